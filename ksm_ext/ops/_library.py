"""What every operator's module needs: the native libraries, checks of tensors, a loop for vmap."""

import importlib.util
import sys
from collections.abc import Callable
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
        expected, remedy = f"on {device} like the first argument", f"Move it to {device}."
        raise ValueError(message(name, expected, str(tensor.device), remedy))
    if device.type == "cuda" and not (BUILT_WITH_CUDA and torch.version.cuda):
        if not torch.cuda.is_available():
            found = f"{device} but no CUDA device"
            raise RuntimeError(message(name, "on a device that exists", found, "Use cpu."))
        found = f"{device}, and ksm_ext was built without CUDA"
        remedy = "Reinstall with KSM_EXT_CUDA=1 pip install ."
        raise RuntimeError(message(name, "on the CPU", found, remedy))


def check_floating(name: str, tensor: Tensor) -> None:
    """Raise ``TypeError`` unless ``tensor`` is float32 or float64."""
    if tensor.dtype not in (torch.float32, torch.float64):
        remedy = "Convert it to one of them."
        raise TypeError(message(name, "float32 or float64", str(tensor.dtype), remedy))


def check_matrix(name: str, tensor: Tensor) -> None:
    """Raise unless ``tensor`` is a matrix of float32 or float64 that kernels were built for."""
    check_ndim(name, tensor, 2)
    check_floating(name, tensor)
    check_device(name, tensor, tensor.device)


def check_beside(name: str, tensor: Tensor, shape: tuple[int, ...], features: Tensor) -> None:
    """Raise unless ``tensor`` has ``shape``, and the dtype and device of the features."""
    if tuple(tensor.shape) != shape:
        remedy = "Its shape follows from the other arguments."
        raise ValueError(message(name, f"of shape {shape}", f"shape {tuple(tensor.shape)}", remedy))
    if tensor.dtype != features.dtype:
        expected = f"of dtype {features.dtype} like the features"
        raise TypeError(message(name, expected, str(tensor.dtype), "Convert one of them."))
    check_device(name, tensor, features.device)


def check_task_offsets(task_offsets: Tensor) -> None:
    """Raise unless ``task_offsets`` is an int64 vector; the operators check its values."""
    check_ndim("task_offsets", task_offsets, 1)
    if task_offsets.dtype != torch.int64:
        found = str(task_offsets.dtype)
        raise TypeError(message("task_offsets", "of dtype torch.int64", found, "Convert it."))
    if task_offsets.shape[0] == 0:
        expected = "of num_tasks + 1 values"
        raise ValueError(message("task_offsets", expected, "none", "Start with a 0."))


def check_boolean_masks(masks: Tensor) -> None:
    """Raise unless ``masks`` is a matrix of booleans."""
    check_ndim("masks", masks, 2)
    if masks.dtype != torch.bool:
        found = str(masks.dtype)
        raise TypeError(message("masks", "of dtype torch.bool", found, "Convert it with .bool()."))


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """``tensor`` or a copy of it, row by row; None stays None."""
    return None if tensor is None else tensor.contiguous()


def not_differentiable(name: str) -> ValueError:
    """The error of an argument that has no derivative."""
    found = "a tensor with a gradient or tangent, which this operator does not propagate"
    remedy = "Detach it, or write the formula in plain PyTorch."
    return ValueError(message(name, "a constant", found, remedy))


def refuse_gradients(**constants: Tensor | None) -> None:
    """Raise ``ValueError`` if one of the named tensors requires a gradient, which would be lost."""
    for name, tensor in constants.items():
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise not_differentiable(name)


def refuse_tangents(**tangents: Tensor | None) -> None:
    """Raise ``ValueError`` if one of the named arguments has a tangent, which would be lost."""
    for name, tangent in tangents.items():
        if tangent is not None:
            raise not_differentiable(name)


class _Constant(torch.autograd.Function):
    """An operator without derivatives, which says so instead of having silently zero ones."""

    @staticmethod
    def forward(operator: Any, *args: Any) -> Any:
        result = operator(*args)
        return args[0].new_empty(0) if result is None else result

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.names = _argument_names(inputs[0])
        ctx.set_materialize_grads(False)  # an absent tangent is None, not zeros

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise not_differentiable(ctx.names[0])

    @staticmethod
    def jvp(ctx: Any, operator: None, *tangents: Any) -> Any:
        refuse_tangents(**dict(zip(ctx.names, tangents, strict=True)))


def without_derivatives(operator: Any, *args: Any) -> Any:
    """Call an operator on its arguments; gradients and tangents of them raise."""
    named = zip(_argument_names(operator), args, strict=True)
    refuse_gradients(**{name: arg for name, arg in named if isinstance(arg, Tensor)})
    return _Constant.apply(operator, *args)


def _argument_names(operator: Any) -> list[str]:
    return [argument.name for argument in operator._schema.arguments]


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
        expected = "differentiated in forward mode at most once"
        remedy = "Use reverse mode inside: torch.func.hessian, or jvp of grad."
        raise ValueError(message(name, expected, f"{levels} nested forward transforms", remedy))


def one_by_one(function: Any, info: Any, in_dims: tuple[int | None, ...], args: Any) -> Tensor:
    """Batch a function by a loop over its batched arguments; the results, stacked."""
    pairs = list(zip(args, in_dims, strict=True))
    rows = (
        [arg if dim is None else arg.select(dim, index) for arg, dim in pairs]
        for index in range(info.batch_size)
    )
    return torch.stack([function(*row) for row in rows])
