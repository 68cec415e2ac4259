"""What every operator's module needs: the native libraries, checks of tensors, a loop for vmap."""

import importlib.util
from typing import Any

import torch
from torch import Tensor

from ksm_ext import _C  # noqa: F401  registers the operators and their CPU kernels
from ksm_ext.checks import message

# Built only where CUDA was wanted, and loadable only beside a CUDA torch.
BUILT_WITH_CUDA = importlib.util.find_spec("ksm_ext._C_cuda") is not None
if torch.version.cuda is not None and BUILT_WITH_CUDA:
    from ksm_ext import _C_cuda  # noqa: F401  registers the CUDA kernels


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
