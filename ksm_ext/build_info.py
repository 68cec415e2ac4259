"""What this installation was built from and runs on: the first thing to put in a bug report."""

import torch

from ksm_ext import _C


def build_info() -> dict[str, str | bool | None]:
    """Facts of the build and of the present run.

    Returns:
        ``torch_built_against`` and ``torch_running``: versions of PyTorch; any two of at least
        2.10 work together. ``cuda``: whether the CUDA kernels were built; ``nvcc`` and
        ``cuda_architectures``: with what and for what, or None. ``compiler``: of the C++ code.
        ``cpu_instruction_set``: which CPU kernels run here: avx512, avx2 or portable.

    Raises:
        RuntimeError: If ``KSM_EXT_CPU_ISA`` names an instruction set that this CPU lacks.
    """
    return {
        "torch_built_against": _C.torch_version,
        "torch_running": torch.__version__,
        "cuda": bool(_C.nvcc_version),
        "nvcc": _C.nvcc_version or None,
        "cuda_architectures": _C.cuda_architectures or None,
        "compiler": _C.compiler,
        "cpu_instruction_set": _C.cpu_instruction_set(),
    }
