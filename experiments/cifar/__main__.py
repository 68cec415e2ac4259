"""``python -m experiments.cifar COMMAND``: every method against the truth, on CIFAR-10."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from experiments import comparison, runner
from experiments.cifar import mislabelled
from experiments.cifar.attribution import trak_by_sample, trak_ranks
from experiments.cifar.experiment import Cifar
from experiments.cifar.settings import CifarSettings
from experiments.common import one_thread, write_json
from experiments.comparison import Run
from experiments.settings import as_dict
from experiments.truth import retrained, subsets
from ksm_ext.atomic_write import write_whole


def trak_of_images(run: Run) -> Tensor:
    """TRAK of single images (b, t) in its own units, kept in ``samples-trak.safetensors``."""
    path, spelled = run.output / "samples-trak.safetensors", json.dumps(as_dict(run.settings))
    if path.exists():
        with safe_open(path, framework="pt") as file:
            if file.metadata()["settings"] == spelled:
                return file.get_tensor("values")
    problem = comparison.problem_of(run)
    with one_thread():
        values = trak_by_sample(problem).float().cpu().contiguous()
    write_whole(path, save({"values": values}, metadata={"settings": spelled}))
    return values


def trak(run: Run) -> None:
    """Of groups, and of each image in TRAK's own units."""
    comparison.COMMANDS["trak"](run)
    trak_of_images(run)


def eval_trak(run: Run) -> None:
    """Rank correlation of a subset's mean TRAK score with its true loss: -1 is best."""
    truth, data, masks = run.settings.truth, run.experiment.data(), subsets(run.experiment)
    runs = retrained(run.experiment, run.output, masks, truth.subset_seeds)
    scores = trak_of_images(run)
    ranks = trak_ranks(scores, data.tasks, masks, runs.mean(0)[:, truth.checkpoint]).tolist()
    for name, rank in zip(data.target_names, ranks, strict=True):
        print(f"{name}: {rank:+.2f}")
    print(f"mean: {sum(ranks) / len(ranks):+.2f}")
    write_json(run.output / "eval_trak.json", dict(zip(data.target_names, ranks, strict=True)))


def find_mislabelled(run: Run) -> None:
    """Groups with flipped labels, by every method that trains on all of them only."""
    print(mislabelled.markdown(mislabelled.find(run.experiment, run.output)))


def figures(run: Run) -> None:
    """The tables, and the figures."""
    comparison.make_figures(run)
    path = run.output / "mislabelled.json"
    if path.exists():
        table = run.output / "table.md"
        areas = mislabelled.markdown(json.loads(path.read_text()))
        write_whole(table, f"{table.read_text()}\n{areas}\n".encode())
        print(areas)


COMMANDS: dict[str, Callable[[Run], None]] = {
    "train": comparison.train_all,
    "train-subsets": comparison.train_subsets,
    "leave-one-out": comparison.leave_one_out,
    "datamodels": comparison.COMMANDS["datamodels"],
    "influence": comparison.COMMANDS["influence"],
    "trak": trak,
    "eval-trak": eval_trak,
    "kernel-surrogate": comparison.COMMANDS["kernel-surrogate"],
    "mislabelled": find_mislabelled,
    "figures": figures,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; answers the exit status."""

    def bound(command: Callable[[Run], None]) -> runner.Command:
        def run(settings: CifarSettings, output: Path) -> None:
            command(Run(Cifar(settings), output))

        return run

    commands = {name: bound(command) for name, command in COMMANDS.items()}
    return runner.main(
        "cifar", __doc__, Cifar.presets, commands, arguments, shortcuts={"data": "data.path"}
    )


if __name__ == "__main__":
    sys.exit(main())
