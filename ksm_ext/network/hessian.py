r"""Hessian and generalised Gauss-Newton matrices of a model's mean loss, as products with vectors.

For the mean loss :math:`L(W) = \frac1b \sum_i \ell_i(f_i(W))` of b samples, without ever forming a
matrix of p x p,

.. math:: H v = \nabla^2 L \, v, \qquad G v = \frac1b \sum_i J_i^\top (\nabla^2 \ell_i) J_i v,

G being what remains of H when the outputs :math:`f_i` are linearised: it is positive semi-definite
for a convex loss, and its product costs about two thirds. Both are exact. Many vectors are
multiplied at once: they share one forward and one backward pass. Samples are regrouped into passes
of ``batch_size``, so that a product does not depend on the loader's batches.

Shapes: p parameters flattened one after the other in the model's order, vectors (s, p).

References: *Pearlmutter 1994*; *Schraudolph 2002*.
"""

import importlib
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cache, partial
from itertools import pairwise
from operator import itemgetter
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from ksm_ext.checks import (
    check_choice,
    check_finite,
    check_function,
    check_positive_int,
    check_samples,
    check_seed,
    check_tensor,
    listed,
    message,
    shape_text,
)
from ksm_ext.identity import Checksum, changed, checksums
from ksm_ext.network.batches import (
    Batch,
    as_batch,
    checked_datasets,
    chunks,
    each,
    num_rows,
    ordered_loader,
)
from ksm_ext.network.engines import Ladder, differentiable, evaluating, first_that_can, used_beside
from ksm_ext.network.factors import Part, flat, formed
from ksm_ext.network.gradients import (
    parameter_names,
    samples_of_pass,
    samples_together,
)
from ksm_ext.network.linear_layers import Layer, Pair, Weights, hessian_products, lone_layers
from ksm_ext.network.outputs import DRAWS, LOSSES, Loss, outputs_and_labels, with_labels
from ksm_ext.network.solvers import without_autocast

Stacks = Mapping[str, Tensor | Pair]
"""By parameter, products with s vectors: ``(s, *shape)``, or rows that make them."""
Product = Callable[[list[Tensor]], Sequence[Tensor]]
"""From a vector, as one tensor for each parameter, to its product."""

# Tangents of parameters and activations of a pass, unless vectors_per_pass says otherwise. A vector
# that alone takes more than the caches is multiplied alone: with others, page faults of fresh
# memory would cost more than the overhead that they share.
BYTES_OF_PASS = 2**28
BYTES_ALONE = {"cpu": 2**23, "cuda": 2**26}
MAX_SAMPLES = 1024  # of a pass, unless batch_size says otherwise


class CurvatureOperator(ABC):
    """A symmetric linear operator on the parameters: :class:`Hessian` or :class:`GaussNewton`.

    ``operator(v)`` multiplies rows, (s, p) -> (s, p) or (p,) -> (p,); ``operator @ x`` is the
    convention of linear algebra, (p,) or (p, s); :meth:`linear_operator` is SciPy's. Products are
    in the parameters' dtype: float64 parameters give them to 1e-12.

    Args:
        model: The network; used in evaluation mode and left as it was. The operator is that of
            the parameters which the model has when it is made: a product after they, or buffers
            such as running means, have changed is an error.
        data: A DataLoader that does not shuffle, a Dataset, or a tuple of tensors (b, ...), ending
            in the labels; or dicts with ``labels``, see :mod:`.outputs`. Kept on the device.
        loss: ``"cross_entropy"``, ``"squared_error"``, or a function (outputs, labels) -> (b,),
            of these two alone: the curvature of a weight decay is its strength as damping.
        parameters: Names or patterns, see :func:`.gradients.parameter_names`; None: all.
            The others are constants.
        batch_size: Samples of a pass; None: 1,024. Changes memory and rounding, nothing else.
        vectors_per_pass: Vectors multiplied together, each of which takes about the memory of a
            gradient. 1: one by one, by differentiating the gradient's own graph, which all of them
            share. None: as many as have 256 MiB of parameters and layers' outputs together, and one
            by one if each has more than 8 MiB (64 on a GPU).
        engine: How gradients of single samples are taken, see :mod:`.engines`. ``"auto"`` has
            slopes along vectors by forward differentiation, where the network knows that.
        progress: Whether to show a bar over passes.

    Attributes:
        shape: (p, p).
        dtype: The parameters', and so that of the vectors.
        device: Where they live.
        num_samples: b.
        batches: The samples, on the device, as passes take them.
        parameter_shapes: Shape of each parameter by name, in the order in which they are flattened.
        batch_size: Samples of a pass.
        vectors_per_pass: Vectors multiplied together.

    Raises:
        ValueError: If data or labels do not fit the model, or a function ``loss`` uses parameters
            itself; in products, if it does not give one number for each sample.
        TypeError: If ``data`` is no data set, or parameters differ in dtype.
        RuntimeError: In products, if the model has changed.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        loss: str | Loss = "cross_entropy",
        *,
        parameters: str | Sequence[str] | None = None,
        batch_size: int | None = None,
        vectors_per_pass: int | None = None,
        engine: str = "auto",
        progress: bool = False,
    ) -> None:
        names = parameter_names(model, parameters)
        own = dict(model.named_parameters())
        self._weights: Weights = {name: own[name].detach() for name in names}
        self._model, self._loss, self._progress = model, _loss(loss), progress
        self._draw = DRAWS[loss] if isinstance(loss, str) else None
        self._engine, self._ladder = engine, Ladder(engine)
        kind = self._weights[names[0]].device.type
        self._autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        self._forward = True  # whether the network knows forward differentiation
        self._proved: set[str] = set()  # what that was shown to be right for
        self._lone: dict[int, dict[str, Layer]] = {}  # by the batch
        if vectors_per_pass is not None:
            vectors_per_pass = check_positive_int("vectors_per_pass", vectors_per_pass)
        first = self._weights[names[0]]
        dtypes = {weight.dtype for weight in self._weights.values()}
        if len(dtypes) > 1:
            found = " and ".join(sorted(map(str, dtypes)))
            remedy = "Convert the model with .float() or .double()."
            raise TypeError(message("model", "of parameters of one dtype", found, remedy))
        self.parameter_shapes = {name: weight.shape for name, weight in self._weights.items()}
        num_parameters = sum(weight.numel() for weight in self._weights.values())
        self.shape = (num_parameters, num_parameters)
        self.dtype, self.device = first.dtype, first.device
        batch_size = MAX_SAMPLES if batch_size is None else batch_size
        self.batch_size = check_positive_int("batch_size", batch_size)
        loader = ordered_loader(data, self.batch_size)
        # An operator is applied many times: its samples are kept as they will be used.
        self.batches = [
            as_batch(batch, self.device) for batch in chunks(loader, self.batch_size, 0)
        ]
        self.num_samples = sum(num_rows(batch) for batch in self.batches)
        self._check_functions(loss if callable(loss) else LOSSES[loss])
        self.vectors_per_pass = vectors_per_pass or self._vectors_within_budget()
        self._checksums = self.checksums()

    @abstractmethod
    def _products(self, batch: Batch, vectors: Weights) -> Stacks:
        """Products with the sum of a batch's losses: stacks (s, *shape) to stacks (s, *shape)."""

    @abstractmethod
    def _graph_product(self, batch: Batch, weights: Weights) -> Product:
        """The same for single vectors, through a graph of the weights that they share."""

    @abstractmethod
    def _quadratics(self, batch: Batch, vector: Weights) -> Tensor:
        """Curvature of each sample's own loss along a vector of tensors (*shape): (samples,)."""

    def __call__(self, v: Tensor) -> Tensor:
        """Products with rows: (s, p) -> (s, p), or (p,) -> (p,)."""
        rows = self._checked(v)
        alone = partial(self._one_by_one, rows)
        if self.vectors_per_pass == 1 or len(rows) == 1:
            return self.require_finite(alone()).reshape(v.shape)

        def together() -> Tensor:
            found = self._together(self._products, rows)
            self._prove("products", found[0], lambda: self._one_by_one(rows[:1])[0])
            return found

        return self.require_finite(self._differentiated(together, reverse=alone)).reshape(v.shape)

    def require_finite(self, found: Tensor) -> Tensor:
        """What was found, unless it is not finite because of samples: they are named.

        Raises:
            ValueError: If some samples have no finite loss or gradient.
        """
        if not bool(found.isfinite().all()):
            list(self._gradients())
        return found

    def __matmul__(self, x: Tensor) -> Tensor:
        """Products with columns: (p, s) -> (p, s), or (p,) -> (p,)."""
        check_tensor("x", x)
        return self(x.T).T if x.ndim == 2 else self(x)

    def linear_operator(self) -> Any:
        """The same as a ``scipy.sparse.linalg.LinearOperator`` on NumPy arrays."""
        from scipy.sparse.linalg import LinearOperator

        dtype = torch.zeros(0, dtype=self.dtype).numpy().dtype

        def multiply(x: np.ndarray) -> np.ndarray:
            columns = torch.from_numpy(np.ascontiguousarray(x.T, dtype=dtype)).to(self.device)
            return self(columns.reshape(-1, self.shape[0])).cpu().numpy().T.reshape(x.shape)

        return LinearOperator(
            self.shape, multiply, rmatvec=multiply, matmat=multiply, rmatmat=multiply, dtype=dtype
        )

    def gradient(self) -> Tensor:
        """(p,): the gradient of the mean loss."""
        self._check_unchanged()
        if self._engine != "auto":
            rows = [part.sum(0) for part in self._gradients()]
            return torch.stack(rows).sum(0) / self.num_samples
        names = [*self._weights]
        with self._exact(), differentiable(self._model, names) as weights, torch.enable_grad():
            for batch in self.batches:
                loss = self._loss(*outputs_and_labels(self._model, batch)).sum()
                if loss.requires_grad:
                    loss.backward()
            parts = {
                name: torch.zeros_like(weight) if weight.grad is None else weight.grad.to_dense()
                for name, weight in weights.items()
            }
        return self.require_finite(flatten(parts).detach() / self.num_samples)

    @without_autocast()
    def per_sample_slopes(self, v: Tensor) -> Tensor:
        """Slope of each sample's loss along each vector, ``v . grad loss_i``: (s, p) -> (s, b).

        By forward differentiation, without forming the gradients of samples, unless the network
        does not know it or an engine was chosen.
        """
        rows = self._checked(v)

        def slopes(batch: Batch, vectors: Weights) -> Tensor:  # (vectors, samples)
            losses = self._losses(batch)
            return vmap(lambda vector: jvp(losses, (self._weights,), (vector,))[1])(vectors)

        def products() -> Tensor:
            return torch.cat([rows @ gradients.T for gradients in self._gradients()], dim=1)

        if self._engine != "auto":
            return products()

        def forward() -> Tensor:
            found = self._by_sample(slopes, rows, self._passes(len(rows)))
            mean, size = found[0].mean(), found[0].abs().mean()
            self._prove("slopes", mean, lambda: self.gradient() @ rows[0], size)
            return found

        return self._differentiated(forward, gradients=products)

    def per_sample_gradients(self) -> Tensor:
        """Gradient of each sample's loss, (b, p)."""
        return torch.cat([*self._gradients()])

    def _gradients(self) -> Iterator[Tensor]:
        """Some samples' gradients (rows, p) after another's."""
        start = 0
        for num_samples, parts in self.per_sample_parts(self._ladder, self.batches):
            found = formed(parts, self._weights, num_samples)
            rows = torch.cat([flat(gradient) for gradient in found.values()], dim=1)
            check_samples("loss", rows.isfinite().all(dim=1), start=start)
            start += num_samples
            yield rows

    def per_sample_parts(
        self, ladder: Ladder, batches: Sequence[Batch], *, by_factors: bool = False
    ) -> Iterator[tuple[int, dict[str, list[Part]]]]:
        """How many some samples are, and the parts of their losses' gradients by name, in turn.

        Args:
            ladder: The engines to take.
            batches: Such as :attr:`batches`, or with other labels.
            by_factors: Whether gradients are not to be formed of the parts: more samples together.
        """
        self._check_unchanged()

        def output(model: Any, batch: Batch) -> Tensor:
            return self._loss(*outputs_and_labels(model, batch))

        size = samples_together(self._weights.values())
        if by_factors:
            few = each(itemgetter(slice(2)), batches[0])
            size = samples_of_pass(self._model, output, few, [*self._weights])
        for batch in batches:
            for start in range(0, num_rows(batch), size):
                part = each(itemgetter(slice(start, start + size)), batch)
                with self._precision():
                    values, parts = ladder(self._model, output, part, [*self._weights])
                yield len(values), parts

    def relabelled(self, seed: int) -> list[Batch]:
        """The batches with labels that are drawn from the model's own distribution.

        It is that of which the loss is a negative log-likelihood: classes by their probabilities,
        tokens each by those of what stands before it in the data, numbers with a variance of 1/2.

        Raises:
            ValueError: If the loss is a function of one's own.
        """
        if self._draw is None:
            expected, remedy = "the name of one", "Pass EKFAC(fisher='empirical')."
            raise ValueError(message("loss", expected, "a function", remedy))
        seed = check_seed("seed", seed)
        self._check_unchanged()
        generator = torch.Generator().manual_seed(seed)
        with self._exact():
            return [
                with_labels(batch, self._draw(*outputs_and_labels(self._model, batch), generator))
                for batch in self.batches
            ]

    def _differentiated(
        self, forward: Callable[[], Tensor], **instead: Callable[[], Tensor]
    ) -> Tensor:
        """By forward differentiation, or by another way where the network does not know that."""
        _load_forward_rules()
        ways = {"forward": forward, **instead} if self._forward else instead
        way, found = first_that_can(f"Curvature of {type(self._model).__name__}", ways)
        self._forward = way == "forward"
        return found

    def _prove(
        self, what: str, found: Tensor, expected: Callable[[], Tensor], size: Tensor | None = None
    ) -> None:
        """Once, that forward differentiation finds what the backward passes do.

        Tangents go through what a network does under ``torch.no_grad`` or to ``.data``, where it
        stops gradients.
        """
        if what in self._proved:
            return
        right = expected()
        scale = right.norm() if size is None else size
        rounding = max(4 * torch.finfo(self.dtype).eps ** 0.5, 1e-3)  # float32 within float64, too
        if self._autocast is not None:
            rounding = max(16 * torch.finfo(self._autocast).eps, rounding)
        if not bool((found - right).norm() <= rounding * scale):
            form, remedy = "one that stops tangents where it stops gradients", "Use detach()."
            raise RuntimeError(message("model", form, "another, as by no_grad", remedy))
        if bool(scale > 0):
            self._proved.add(what)

    def per_sample_quadratic(self, v: Tensor) -> Tensor:
        r"""Curvature of each sample's own loss along each vector, :math:`v^\top H_i v`.

        All samples of a pass are done at once. For a Gauss-Newton operator it is the sample's own
        Gauss-Newton matrix.

        Args:
            v: (s, p), in the dtype of the parameters.

        Returns:
            (s, b), the samples in the order of the data.
        """
        rows = self._checked(v)
        return self._by_sample(self._quadratics, rows, range(len(rows)))

    def unflatten(self, v: Tensor) -> Weights:
        """Vectors ``(..., p)`` as tensors ``(..., *shape)`` by name."""
        check_tensor("v", v)
        if v.shape[-1:] != self.shape[1:]:
            remedy = "Flatten the parameters in the order of their model."
            expected = f"of {self.shape[0]} last entries"
            raise ValueError(message("v", expected, shape_text(v), remedy))
        return unflatten(v, self.parameter_shapes)

    # -- vectors and batches --------------------------------------------------------------------

    def _together(self, product: Callable[..., Stacks], *vectors: Tensor) -> Tensor:
        """Mean over samples of what ``product(batch, *stacks)`` sums: rows (s, p) to (s, p)."""
        out = torch.empty_like(vectors[0])
        with self._exact():
            for rows in self._in_turn(self._passes(len(out))):
                # Rows as a tensor of their own, which starts where its memory does: see _in_a_row.
                stacks = [self.unflatten(torch.from_dlpack(v[rows])) for v in vectors]
                for number, batch in enumerate(self.batches):
                    found = product(batch, *stacks)
                    _add(found, out[rows], weight=1 / self.num_samples, more=number > 0)
        return out

    def _one_by_one(self, v: Tensor) -> Tensor:
        """Products with rows (s, p), by reverse mode over graphs that the vectors share."""
        out = torch.empty_like(v)
        for number, batch in enumerate(self.batches):
            with self._exact(), torch.enable_grad():
                weights = {n: w.detach().requires_grad_() for n, w in self._weights.items()}
                product = self._graph_product(batch, weights)
            for row, into in zip(self._in_turn(v), out, strict=True):
                found = product([*self.unflatten(row).values()])
                stacks = {n: part[None] for n, part in zip(weights, found, strict=True)}
                _add(stacks, into[None], weight=1 / self.num_samples, more=number > 0)
        return out

    def _by_sample(
        self, values: Callable[[Batch, Weights], Tensor], v: Tensor, turns: Sequence[Any]
    ) -> Tensor:
        """What ``values`` has of each batch's samples, for the rows (s, p) of each turn: (s, b)."""
        out = torch.empty(len(v), self.num_samples, dtype=self.dtype, device=self.device)
        with self._exact():
            for rows in self._in_turn(turns):
                vectors, done = self.unflatten(v[rows]), 0
                for batch in self.batches:
                    part = values(batch, vectors)
                    out[rows, done : done + part.shape[-1]] = part
                    done += part.shape[-1]
        return out

    # -- the model and its loss -----------------------------------------------------------------

    def _losses(self, batch: Batch) -> Callable[[Weights], Tensor]:
        """From weights to the losses (b,)."""
        return lambda weights: self._loss(*self._outputs(batch, weights))

    def _total(self, batch: Batch) -> Callable[[Weights], Tensor]:
        """From weights to the sum of the losses, ()."""
        return lambda weights: self._losses(batch)(weights).sum()

    def _in_a_row(self) -> Weights:
        """The weights as parts of one vector, as tangents are.

        Forward differentiation copies tangents that lie otherwise in their memory than weights do.
        """
        return self.unflatten(flatten(self._weights))

    def _outputs(self, batch: Batch, weights: Weights) -> tuple[Tensor, Tensor]:
        """Outputs (b, C) or (b, T, C), and labels."""
        return outputs_and_labels(
            lambda *a, **k: functional_call(self._model, weights, a, k), batch
        )

    # -- arguments ------------------------------------------------------------------------------

    def _checked(self, v: Tensor, name: str = "v") -> Tensor:
        rows = checked_vectors(name, v, self.shape[0], self.dtype, self.device)
        self._check_unchanged()
        return rows

    def checksums(self) -> dict[str, Checksum]:
        """Of all that decides the model's outputs, as it is now; see :mod:`ksm_ext.identity`."""
        buffers = ((n, x) for n, x in self._model.named_buffers() if x.is_floating_point())
        return checksums([*self._model.named_parameters(), *buffers])

    def _check_unchanged(self) -> None:
        """Raise ``RuntimeError`` if the model is no longer the one that the operator is of."""
        if names := changed(self._checksums, self.checksums()):
            expected = "as it was when the operator was made"
            found = f"another `{listed(names, 3)}`"
            raise RuntimeError(message("model", expected, found, "Make a new operator."))

    def _check_functions(self, loss: Callable[..., Any]) -> None:
        """Raise ``ValueError`` if weights have a part in the losses that products would not see."""
        few = each(itemgetter(slice(2)), self.batches[0])
        names = [*self._weights]
        with self._exact(), differentiable(self._model, names) as own, torch.enable_grad():
            outputs, labels = self._outputs(few, self._weights)
            if beside := used_beside(outputs, own):
                expected = "one that uses its parameters where they are registered"
                found = f"one that uses `{beside[0]}` elsewhere"
                raise ValueError(message("model", expected, found, "Read it in `forward`."))
            losses = loss(outputs, labels)
            beside = used_beside(losses, own) if isinstance(losses, Tensor) else []
        if beside:
            expected = "a function of outputs and labels alone"
            remedy = "Leave a weight decay out, and pass its strength as damping."
            raise ValueError(message("loss", expected, f"one that uses `{beside[0]}`", remedy))

    def _precision(self) -> AbstractContextManager[Any]:
        """Autocast as it was when the operator was made, whatever the solver around it needs."""
        on = self._autocast is not None
        return torch.autocast(self.device.type, self._autocast, enabled=on)

    @contextmanager
    def _exact(self) -> Iterator[None]:
        """No dropout, and operations with derivatives of any order."""
        with self._precision(), evaluating(self._model):
            yield

    def _vectors_within_budget(self) -> int:
        """As many as have tangents of all parameters and outputs of layers within the budget."""
        sizes = [self.shape[0]]
        leaves = [part for part in self._model.modules() if not [*part.children()]]

        def count(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                sizes.append(output.numel())

        handles = [leaf.register_forward_hook(count) for leaf in leaves]
        try:
            with self._exact():
                outputs_and_labels(self._model, self.batches[0])
        finally:
            for handle in handles:
                handle.remove()
        alone = BYTES_ALONE["cpu" if self.device.type == "cpu" else "cuda"]
        each_bytes = sum(sizes) * torch.empty(0, dtype=self.dtype).element_size()
        return 1 if each_bytes > alone else int(BYTES_OF_PASS // each_bytes)

    def _passes(self, num_vectors: int) -> list[slice]:
        """Vectors of each pass, as many in one as in another."""
        count = -(-num_vectors // self.vectors_per_pass)
        edges = [num_vectors * number // max(count, 1) for number in range(count + 1)]
        return [slice(*pair) for pair in pairwise(edges)]

    def _in_turn(self, steps: Any) -> Any:
        return tqdm(steps, unit=" passes", disable=not self._progress or len(steps) < 2)


class Hessian(CurvatureOperator):
    """The Hessian of a model's mean loss over a data set; compare ``curvlinops``.

    Arguments and attributes are those of :class:`CurvatureOperator`.
    """

    def _products(self, batch: Batch, vectors: Weights) -> Stacks:
        total, weights = self._total(batch), self._in_a_row()
        if id(batch) not in self._lone:
            self._lone[id(batch)] = lone_layers(total, weights)
        return hessian_products(total, weights, vectors, self._lone[id(batch)])

    def _graph_product(self, batch: Batch, weights: Weights) -> Product:
        """The derivative of a vector's product with the gradient."""
        gradient = _vjp(self._total(batch)(weights), weights, None, create_graph=True)
        dependent = [i for i, part in enumerate(gradient) if part.requires_grad]
        if not dependent:  # the loss is linear in the weights
            return lambda vector: [torch.zeros_like(part) for part in vector]
        parts = [gradient[i] for i in dependent]
        return lambda vector: _vjp(parts, weights, [vector[i] for i in dependent])

    def _quadratics(self, batch: Batch, vector: Weights) -> Tensor:
        """By weights of the losses, of which the samples' own curvatures are the derivatives."""
        counts = torch.ones(num_rows(batch), dtype=self.dtype, device=self.device)
        with torch.enable_grad():
            bent = self._bent(batch, self._weights, counts.requires_grad_(), vector, vector)
        return _vjp(bent, {"counts": counts}, None)[0]

    def _bent(
        self, batch: Batch, weights: Weights, counts: Tensor | float, *along: Weights
    ) -> Tensor:
        """Derivative of the weighted sum of losses along each vector in turn, with its graph.

        Reverse mode only: PyTorch's forward derivative of layer_norm is right, and the derivative
        of that derivative is not.
        """
        kind: Any = {"dtype": self.dtype, "device": self.device, "requires_grad": True}
        steps = [torch.zeros((), **kind) for _ in along]
        for step, vector in zip(steps, along, strict=True):
            weights = {name: w + step * vector[name] for name, w in weights.items()}
        total = (counts * self._losses(batch)(weights)).sum()
        for step in steps:
            (total,) = _vjp(total, {"step": step}, None, create_graph=True)
        return total

    def third(self, u: Tensor, v: Tensor) -> Tensor:
        r"""Third derivatives of the mean loss along pairs: :math:`\nabla^3 L[u, v, \cdot]`.

        Args:
            u: (s, p), in the dtype of the parameters.
            v: (s, p). Row i goes with row i of ``u``.

        Returns:
            (s, p). Wrong, as PyTorch's third derivatives are, for ``instance_norm``.
        """

        def product(batch: Batch, a: Weights, b: Weights) -> Weights:
            def curvature(weights: Weights) -> Tensor:  # a^T H b, by reverse mode: see _quadratics
                def total(x: Tensor, y: Tensor) -> Tensor:
                    return self._total(batch)(
                        {n: w + x * a[n] + y * b[n] for n, w in weights.items()}
                    )

                zero = torch.zeros((), dtype=self.dtype, device=self.device)
                return grad(lambda x: grad(lambda y: total(x, y))(zero))(zero)

            return grad(curvature)(self._weights)

        def products(batch: Batch, *stacks: Weights) -> Weights:
            return vmap(partial(product, batch))(*stacks)

        pairs = self._checked(u, "u"), self._checked(v)
        if len(pairs[0]) != len(pairs[1]):
            expected = f"of shape {tuple(pairs[0].shape)} like `u`"
            raise ValueError(message("v", expected, shape_text(pairs[1]), "Pair the rows."))
        with _LayerNormInParts():
            ways = {
                "vmap": partial(self._together, products, *pairs),
                "reverse": partial(self._together, self._third_one_by_one, *pairs),
            }
            return first_that_can(f"Third derivatives of {type(self._model).__name__}", ways)[1]

    def _third_one_by_one(self, batch: Batch, *stacks: Weights) -> Weights:
        """Third derivatives along pairs of rows, through ordinary graphs."""
        pairs = zip(*(zip(*stack.values(), strict=True) for stack in stacks), strict=True)
        rows = []
        for pair in pairs:
            along = [dict(zip(self._weights, parts, strict=True)) for parts in pair]
            weights = {name: w.detach().requires_grad_() for name, w in self._weights.items()}
            with torch.enable_grad():
                bent = self._bent(batch, weights, 1.0, *along)
            rows.append(_vjp(bent, weights, None))
        return dict(zip(self._weights, map(torch.stack, zip(*rows, strict=True)), strict=True))


class GaussNewton(CurvatureOperator):
    """The generalised Gauss-Newton matrix of a model's mean loss over a data set.

    For cross-entropy it is the Fisher matrix. Positive semi-definite where the loss is convex in
    the outputs, so that conjugate gradients with any positive damping converge. Arguments and
    attributes are those of :class:`CurvatureOperator`.
    """

    def _products(self, batch: Batch, vectors: Weights) -> Weights:
        weights = self._in_a_row()
        result: Any = vjp(lambda weights: self._outputs(batch, weights), weights, has_aux=True)
        outputs, transposed, labels = result

        def product(vector: Weights) -> Weights:
            change = jvp(lambda w: self._outputs(batch, w)[0], (weights,), (vector,))[1]
            return transposed(self._loss_hessian(outputs, labels, change))[0]

        return vmap(product)(vectors)

    def _graph_product(self, batch: Batch, weights: Weights) -> Product:
        outputs, change, curved = self._linearised(batch, weights)
        return lambda vector: _vjp(outputs, weights, curved(change(vector)))

    def _quadratics(self, batch: Batch, vector: Weights) -> Tensor:
        with torch.enable_grad():
            weights = {name: w.detach().requires_grad_() for name, w in self._weights.items()}
            _, change, curved = self._linearised(batch, weights)
        step = change([*vector.values()])
        return (step * curved(step)).flatten(1).sum(1)

    def _linearised(
        self, batch: Batch, weights: Weights
    ) -> tuple[Tensor, Callable[[list[Tensor]], Tensor], Callable[[Tensor], Tensor]]:
        """Outputs, their change along a vector, and the Hessian of the loss times such a change.

        By reverse mode alone: the Jacobian is the derivative of its transpose, which is linear in
        what it is given.
        """
        outputs, labels = self._outputs(batch, weights)
        given = torch.zeros_like(outputs, requires_grad=True)
        transposed = _vjp(outputs, weights, given, create_graph=True)
        dependent = [i for i, part in enumerate(transposed) if part.requires_grad]
        parts = [transposed[i] for i in dependent]
        at = outputs.detach().requires_grad_()
        (slope,) = _vjp(self._loss(at, labels).sum(), {"outputs": at}, None, create_graph=True)

        def change(vector: list[Tensor]) -> Tensor:
            chosen = [vector[i] for i in dependent]
            if not chosen:
                return torch.zeros_like(given)
            return torch.autograd.grad(parts, given, chosen, retain_graph=True)[0]

        def curved(change: Tensor) -> Tensor:
            if not slope.requires_grad:  # the loss is linear in the outputs
                return torch.zeros_like(change)
            return _vjp(slope, {"outputs": at}, change)[0]

        return outputs, change, curved

    def _loss_hessian(self, outputs: Tensor, labels: Tensor, change: Tensor) -> Tensor:
        """The Hessian of the loss by the outputs, times a change of them: like the outputs."""
        gradient = grad(lambda outputs: self._loss(outputs, labels).sum())
        return jvp(gradient, (outputs,), (change,))[1]


def loss_gradients(
    model: nn.Module,
    datasets: Sequence[Any],
    loss: str | Loss = "cross_entropy",
    *,
    parameters: str | Sequence[str] | None = None,
    batch_size: int | None = None,
    engine: str = "auto",
    progress: bool = False,
) -> Tensor:
    """Gradients of the summed loss of each data set: (n, p).

    Args:
        model: The network, as for :class:`CurvatureOperator`.
        datasets: n data sets.
        loss: See :class:`CurvatureOperator`.
        parameters: See :class:`CurvatureOperator`.
        batch_size: Samples of a pass.
        engine: ``"auto"`` for one backward pass of all samples together; another takes those of
            single samples, see :mod:`.engines`.
        progress: Whether to show a bar over data sets.
    """
    gradients = []
    datasets = checked_datasets("datasets", datasets)
    options: dict[str, Any] = {"parameters": parameters, "batch_size": batch_size}
    options |= {"engine": engine, "vectors_per_pass": 1}  # of which there are none
    for data in tqdm(datasets, unit=" gradients", disable=not progress):
        operator = Hessian(model, data, loss, **options)
        gradients.append(operator.gradient() * operator.num_samples)
    return torch.stack(gradients)


class _LayerNormInParts(TorchFunctionMode):
    """Layer normalisation by its formula: the third derivatives of PyTorch's own are wrong."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return (_layer_norm if func is F.layer_norm else func)(*args, **kwargs)


def _layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    dims = tuple(range(-len(normalized_shape), 0))
    centred = x - x.mean(dims, keepdim=True)
    normal = centred * (centred.square().mean(dims, keepdim=True) + eps).rsqrt()
    scaled = normal if weight is None else normal * weight
    return scaled if bias is None else scaled + bias


@cache
def _load_forward_rules() -> None:
    """Those of PyTorch that it compiles when they are first asked for.

    That is deprecated, and PyTorch warns of itself, which is no news to who asks for a product.
    """
    with warnings.catch_warnings(), suppress(ImportError):
        warnings.filterwarnings("ignore", "`torch.jit")
        importlib.import_module("torch._decomp.decompositions_for_jvp")


def checked_vectors(
    name: str, v: Tensor, p: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Rows (s, p), of those or of one (p,), as the parameters' dtype and device are.

    Raises:
        ValueError: If the shape is another one, or a number is not finite.
        TypeError: If it is no tensor, or one of another dtype or device.
    """
    check_tensor(name, v)
    if v.ndim not in (1, 2) or v.shape[-1] != p:
        remedy = "Flatten the parameters in the order of their model."
        raise ValueError(message(name, f"of shape (s, {p})", shape_text(v), remedy))
    if v.dtype != dtype or v.device != device:
        expected = f"{dtype} on {device} like the parameters"
        raise TypeError(message(name, expected, f"{v.dtype} on {v.device}", "Convert it."))
    check_finite(name, v, "Look for a division by zero before this product.")
    return v.detach().reshape(-1, p)


def flatten(tensors: Weights) -> Tensor:
    """Tensors by name as one vector (p,)."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors.values()])


def unflatten(v: Tensor, shapes: Mapping[str, torch.Size]) -> Weights:
    """Vectors ``(..., p)`` as tensors ``(..., *shape)`` by name."""
    parts = v.split([shape.numel() for shape in shapes.values()], dim=-1)
    return {
        name: part.reshape(v.shape[:-1] + shape)
        for (name, shape), part in zip(shapes.items(), parts, strict=True)
    }


def _vjp(outputs: Any, weights: Weights, v: Any, *, create_graph: bool = False) -> Any:
    """The transposed Jacobian of ``outputs`` by the weights times v, through a graph that stays."""
    if isinstance(outputs, Tensor) and not outputs.requires_grad:  # they depend on none
        return [torch.zeros_like(weight) for weight in weights.values()]
    return torch.autograd.grad(
        outputs,
        [*weights.values()],
        v,
        retain_graph=True,
        create_graph=create_graph,
        materialize_grads=True,
    )


def _add(stacks: Stacks, out: Tensor, *, weight: float, more: bool) -> None:
    """Write weighted stacks (s, *shape) by name to rows (s, p), or add ``more`` to them.

    One pass over memory, which fresh pages of a sum and of its multiple would double.
    """
    start = 0
    for stack in stacks.values():
        left, right = stack if isinstance(stack, tuple) else (None, stack)
        shape = right.shape[1:] if left is None else (left.shape[2], right.shape[2])
        place = out[:, start : start + math.prod(shape)]
        start += math.prod(shape)
        if left is not None:
            place.unflatten(1, shape).baddbmm_(left.mT, right, beta=float(more), alpha=weight)
        elif more:
            place.add_(flat(right), alpha=weight)
        else:
            torch.mul(flat(right), weight, out=place)


def _loss(loss: str | Loss) -> Loss:
    if isinstance(loss, str):
        check_choice("loss", loss, tuple(LOSSES), "Or pass a function (outputs, labels) -> (b,).")
        return LOSSES[loss]
    remedy = "The names 'cross_entropy' and 'squared_error' are losses, too."
    check_function("loss", loss, ("outputs", "labels"), remedy)

    def of_samples(outputs: Tensor, labels: Tensor) -> Tensor:
        losses = loss(outputs, labels)
        is_tensor = isinstance(losses, Tensor)
        if not is_tensor or losses.shape != outputs.shape[:1]:
            what = shape_text(losses) if is_tensor else type(losses).__name__
            found = f"{what} for {len(outputs)} samples"
            remedy = "Return one number for each sample, such as by reduction='none'."
            raise ValueError(message("loss", "a function (outputs, labels) -> (b,)", found, remedy))
        return losses

    return of_samples
