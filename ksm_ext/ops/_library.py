"""What every operator's module needs: the native libraries, checks of tensors, a loop for vmap."""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C._functorch import (
    TransformType,
    get_unwrapped,
    is_functorch_wrapped_tensor,
    maybe_get_level,
)
from torch._functorch import pyfunctorch

from ksm_ext import _C  # noqa: F401  registers the operators and their CPU kernels
from ksm_ext.checks import message

# Built only where CUDA was wanted, and loadable only beside a CUDA torch.
BUILT_WITH_CUDA = importlib.util.find_spec("ksm_ext._C_cuda") is not None
if torch.version.cuda is not None and BUILT_WITH_CUDA:
    from ksm_ext import _C_cuda  # noqa: F401  registers the CUDA kernels

Function = TypeVar("Function", bound=Callable[..., Any])


class _CompilerFinder:
    """Finds torch's compiler when something imports it, and tells it of our functions.

    ``torch.compiler.allow_in_graph`` would import it at once, which takes as long as the rest of
    torch; this waits for another's import, which comes before anything is compiled.
    """

    MODULE = "torch._dynamo"

    def __init__(self) -> None:
        self.functions: list[Callable[..., Any]] = []

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == self.MODULE else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            sys.meta_path.remove(self)
            for function in self.functions:
                torch.compiler.allow_in_graph(function)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


_compiler_finder = _CompilerFinder()
if _CompilerFinder.MODULE not in sys.modules:
    sys.meta_path.insert(0, _compiler_finder)


def in_graph(function: Function) -> Function:
    """Let ``torch.compile`` put calls of a function into its graphs whole, untraced.

    A graph then meets the ``autograd.Function`` inside as eager code does, with all of its rules.
    """
    if _compiler_finder in sys.meta_path:
        _compiler_finder.functions.append(function)
    else:
        torch.compiler.allow_in_graph(function)
    return function


def check_ndim(name: str, tensor: Tensor, ndim: int) -> None:
    """Raise ``ValueError`` unless ``tensor`` has ``ndim`` dimensions."""
    if tensor.ndim != ndim:
        raise ValueError(
            message(name, f"{ndim}-dimensional", f"shape {tuple(tensor.shape)}", "Reshape it.")
        )


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """Raise unless ``tensor`` is on ``device`` and the kernels for it were built."""
    if tensor.device != device:
        raise ValueError(
            message(
                name,
                f"on {device} like the first argument",
                str(tensor.device),
                f"Move it to {device}.",
            )
        )
    if device.type == "cuda" and not (BUILT_WITH_CUDA and torch.version.cuda):
        if not torch.cuda.is_available():
            raise RuntimeError(
                message(name, "on a device that exists", f"{device} but no CUDA device", "Use cpu.")
            )
        raise RuntimeError(
            message(
                name,
                "on the CPU",
                f"{device}, and ksm_ext was built without CUDA",
                "Reinstall with KSM_EXT_CUDA=1 pip install .",
            )
        )


def check_floating(name: str, tensor: Tensor) -> None:
    """Raise ``TypeError`` unless ``tensor`` is float32 or float64."""
    if tensor.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            message(name, "float32 or float64", str(tensor.dtype), "Convert it to one of them.")
        )


def check_beside(name: str, tensor: Tensor, shape: tuple[int, ...], features: Tensor) -> None:
    """Raise unless ``tensor`` has ``shape``, and the dtype and device of the features."""
    if tuple(tensor.shape) != shape:
        raise ValueError(
            message(
                name,
                f"of shape {shape}",
                f"shape {tuple(tensor.shape)}",
                "Its shape follows from the other arguments.",
            )
        )
    if tensor.dtype != features.dtype:
        raise TypeError(
            message(
                name,
                f"of dtype {features.dtype} like the features",
                str(tensor.dtype),
                "Convert one of them.",
            )
        )
    check_device(name, tensor, features.device)


def check_task_offsets(task_offsets: Tensor) -> None:
    """Raise unless ``task_offsets`` is an int64 vector; the operators check its values."""
    check_ndim("task_offsets", task_offsets, 1)
    if task_offsets.dtype != torch.int64:
        raise TypeError(
            message("task_offsets", "of dtype torch.int64", str(task_offsets.dtype), "Convert it.")
        )
    if task_offsets.shape[0] == 0:
        raise ValueError(
            message("task_offsets", "of num_tasks + 1 values", "none", "Start with a 0.")
        )


def _not_differentiable(name: str) -> str:
    return message(
        name,
        "a constant",
        "a tensor with a gradient or tangent, which this operator does not propagate",
        "Detach it, or write the formula in plain PyTorch.",
    )


def refuse_gradients(**constants: Tensor | None) -> None:
    """Raise ``ValueError`` if one of the named tensors requires a gradient, which would be lost."""
    for name, tensor in constants.items():
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(_not_differentiable(name))


def refuse_tangents(**tangents: Tensor | None) -> None:
    """Raise ``ValueError`` if one of the named arguments has a tangent, which would be lost."""
    for name, tangent in tangents.items():
        if tangent is not None:
            raise ValueError(_not_differentiable(name))


class _Constant(torch.autograd.Function):
    """An operator without derivatives, which says so instead of having silently zero ones."""

    @staticmethod
    def forward(operator: Any, names: Sequence[str], *args: Any) -> Any:
        result = operator(*args)
        return args[0].new_empty(0) if result is None else result

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.names = inputs[1]
        ctx.set_materialize_grads(False)  # an absent tangent is None, not zeros

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise ValueError(_not_differentiable(ctx.names[0]))

    @staticmethod
    def jvp(ctx: Any, operator: None, names: Any, *tangents: Any) -> Any:
        refuse_tangents(**dict(zip(ctx.names, tangents, strict=True)))


def without_derivatives(operator: Any, **args: Any) -> Any:
    """Call an operator on its named arguments; gradients and tangents of them raise."""
    refuse_gradients(**{name: a for name, a in args.items() if isinstance(a, Tensor)})
    return _Constant.apply(operator, tuple(args), *args.values())


def check_one_tangent(name: str, tensor: Tensor | None) -> None:
    """Raise ``ValueError`` if ``tensor`` has a tangent of a tangent.

    PyTorch switches forward mode off inside the ``jvp`` of an ``autograd.Function``: its formulas
    would silently lose the second tangent, unless they are linear and call the operator itself.
    """
    interpreters = pyfunctorch.retrieve_all_functorch_interpreters()
    forward = {i.level() for i in interpreters if i.key() == TransformType.Jvp}
    levels = 0
    while tensor is not None and is_functorch_wrapped_tensor(tensor):
        levels += maybe_get_level(tensor) in forward
        tensor = get_unwrapped(tensor)
    if levels > 1:
        raise ValueError(
            message(
                name,
                "differentiated in forward mode at most once",
                f"{levels} nested forward transforms",
                "Use reverse mode inside: torch.func.hessian, or jvp of grad.",
            )
        )


def one_by_one(function: Any, info: Any, in_dims: tuple[int | None, ...], args: Any) -> Tensor:
    """Batch a function by a loop over its batched arguments; the results, stacked."""
    rows = []
    for index in range(info.batch_size):
        rows.append(
            function(
                *(
                    arg if dim is None else arg.select(dim, index)
                    for arg, dim in zip(args, in_dims, strict=True)
                )
            )
        )
    return torch.stack(rows)
