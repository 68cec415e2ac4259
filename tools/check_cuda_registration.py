"""Check without a GPU that every operator of ksm_ext has a CUDA kernel.

Loads a ``_C_cuda`` built with ``KSM_EXT_CUDA=1`` beside a CPU torch. Its symbols of libtorch_cuda
are missing there, hence the lazy binding: registration calls none of them.

Usage: python tools/check_cuda_registration.py BUILD_LIB
"""

import ctypes
import os
import sys
from pathlib import Path

import torch

import ksm_ext.ops  # noqa: F401  registers the schemas


def main() -> None:
    (library,) = Path(sys.argv[1]).glob("ksm_ext/_C_cuda*.so")
    ctypes.CDLL(str(library), mode=os.RTLD_LAZY)
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("ksm_ext::")]
    missing = [
        name for name in names if not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")
    ]
    print(f"{library.name}: {len(names)} operators, without CUDA kernel: {missing or 'none'}")
    sys.exit(bool(missing) or not names)


if __name__ == "__main__":
    main()
