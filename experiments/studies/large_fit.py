"""A whole fit by conjugate gradients: its products, time and peak memory.

    python -m experiments.studies.large_fit 10000 [--tasks 1000] [--targets 16] [--solver cg|eigh]

Scores are main effects, pairs and as much noise again. Prints the ridge chosen, the leave-one-out
error beside that on 1,000 subsets held out, how many products with the Gram matrix it took, and the
peak of the resident memory (Linux), which the masks and scores are part of. CPU seconds are those
of all threads together: what a busy machine leaves comparable.
"""

import argparse
import time

import torch
from torch import Tensor

import ksm_ext
from experiments.common import resident, restart_peak
from ksm_ext.evaluation import residual_error
from ksm_ext.surrogates.masks import Masks

HELD = 1_000
MIB = 2**20 / 1e9  # GB


class CountedRBF(ksm_ext.RBF):
    """An RBF kernel that counts its products with square Gram matrices, and their CPU seconds."""

    columns: list[int] = []  # noqa: RUF012 - one list for the process
    seconds = 0.0

    def matmul(self, x: Masks, y: Masks | None, v: Tensor) -> Tensor:
        start = time.process_time()
        product = super().matmul(x, y, v)
        if y is None:
            CountedRBF.columns.append(v.shape[1])
            CountedRBF.seconds += time.process_time() - start
        return product


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("subsets", type=int)
    parser.add_argument("--tasks", type=int, default=1_000)
    parser.add_argument("--targets", type=int, default=16)
    parser.add_argument("--solver", choices=["cg", "eigh"], default="cg")
    parser.add_argument("--readout", action="store_true", help="also time shapley and its std")
    arguments = parser.parse_args()
    n, t = arguments.tasks, arguments.targets
    torch.manual_seed(0)
    masks = ksm_ext.subsets.bernoulli(n, arguments.subsets + HELD, 0.5, seed=0)
    pairs = torch.randint(0, n, (2, 2 * n))
    scores = Masks(masks[:, pairs[0]] & masks[:, pairs[1]]).floats @ torch.randn(2 * n, t).double()
    scores += Masks(masks).floats @ torch.randn(n, t).double()
    scores += scores.std(0) * torch.randn(scores.shape).double()
    held, truth = masks[:HELD], scores[:HELD]
    masks, scores = masks[HELD:].clone(), scores[HELD:].clone()
    restart_peak()
    print(f"m={len(masks)} n={n} t={t} {arguments.solver}, {torch.get_num_threads()} threads")
    print(f"resident before the fit {resident('VmRSS') * MIB:.2f} GB", flush=True)

    start, cpu = time.perf_counter(), time.process_time()
    kernel = CountedRBF(gamma=1 / n)
    surrogate = ksm_ext.fit_surrogate(
        masks, scores, kernel=kernel, share_ridge=True, solver=arguments.solver
    )
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    print(f"fit {wall:.1f} s, {cpu:.1f} CPU s, peak {resident('VmHWM') * MIB:.2f} GB")
    print(f"products of {CountedRBF.columns} columns, {CountedRBF.seconds:.1f} CPU s")
    print(surrogate.candidates)
    start = time.perf_counter()
    error = residual_error(truth, surrogate.predict(held), pooled=True)
    print(f"prediction of {HELD} subsets {time.perf_counter() - start:.2f} s")
    print(f"leave-one-out error {surrogate.loo_error.mean():.4f}, held-out error {error:.4f}")
    start = time.perf_counter()
    surrogate.attribute("shapley")
    print(f"shapley {time.perf_counter() - start:.2f} s", flush=True)
    if arguments.readout:
        start = time.perf_counter()
        surrogate.attribute("shapley", return_std=True)
        print(f"with standard deviations {time.perf_counter() - start:.1f} s")
    print(f"peak {resident('VmHWM') * MIB:.2f} GB")


if __name__ == "__main__":
    main()
