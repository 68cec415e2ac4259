"""Build of the native modules; everything else is in pyproject.toml.

Three modules, because they load under different conditions:

* ``ksm_ext._C``: operator schemas, CPU kernels and the facts of this build, always built.
* ``ksm_ext._C_cuda``: CUDA kernels, loaded by the package only beside a CUDA torch.
* ``ksm_ext._arithmetic``: the kernels' arithmetic of one value, which pybind11 makes functions of
  NumPy arrays, for the tests; only of a build in place (``pip install -e .``).

The first two use nothing of torch but its stable ABI (2.10) and nothing of Python but its limited
API (3.10): a wheel, which has these alone, runs beside any later torch and Python.
``KSM_EXT_CUDA=0`` or ``=1`` decides about CUDA; without it, a CUDA torch and a CUDA toolkit must
both be there. The decision is printed.
"""

import os
import re
import subprocess
from pathlib import Path

import torch
from setuptools import Extension, setup
from torch.utils import cpp_extension
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHITECTURES = "8.0;9.0;10.0;12.0+PTX"

CXX_FLAGS = [
    "-O3",
    "-g0",
    "-std=c++17",
    # Without contraction every instruction set rounds alike; with it, results would differ by CPU.
    "-ffp-contract=off",
    # Nobody reads errno or floating-point exceptions; with them, roots and comparisons would not
    # vectorise. Values are the same.
    "-fno-math-errno",
    "-fno-trapping-math",
    # gcc 12 warns falsely inside its own AVX-512 headers.
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
]
# KSM_EXT_SANITIZE=1 (`make sanitize`): any read or write outside of an array and any undefined
# arithmetic ends the process. Such modules load only beside the preloaded runtime of ASan.
SANITIZERS = ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"]
SANITIZE = SANITIZERS if os.environ.get("KSM_EXT_SANITIZE") == "1" else []
if SANITIZE:
    CXX_FLAGS += [*SANITIZERS, "-O1", "-g1", "-fno-omit-frame-pointer"]
# The stable ABI of torch 2.10, and a compile error for anything outside of it.
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020a000000000000ULL", "-DTORCH_STABLE_ONLY"]
# The limited API of Python 3.10: for the compiler, and as the tag of wheels.
cpp_extension.min_supported_cpython, OLDEST_PYTHON = "0x030A0000", "cp310"


def sources(*patterns: str) -> list[str]:
    """Files below csrc/, relative to the root as setuptools wants them."""
    found = [path for pattern in patterns for path in (ROOT / "csrc").glob(pattern)]
    return sorted(str(path.relative_to(ROOT)) for path in found)


def find_toolkit() -> Path | None:
    """Root of a CUDA toolkit that has both the compiler and the headers."""
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), cpp_extension.CUDA_HOME]
    for candidate in [*candidates, "/usr/local/cuda"]:
        needed = ("include/cuda_runtime.h", "bin/nvcc")
        if candidate and all((Path(candidate) / file).exists() for file in needed):
            return Path(candidate)
    return None


def decide_cuda() -> tuple[Path | None, str]:
    """The toolkit to build CUDA kernels with, or None; and the reason."""
    request = os.environ.get("KSM_EXT_CUDA", "")
    toolkit = find_toolkit()
    if request == "0":
        return None, "KSM_EXT_CUDA=0"
    if request == "1":
        if toolkit is None:
            raise SystemExit(
                "KSM_EXT_CUDA must be 0 without a CUDA toolkit, got 1 and no nvcc with "
                "cuda_runtime.h. Set CUDA_HOME to the toolkit's folder."
            )
        return toolkit, f"KSM_EXT_CUDA=1, toolkit {toolkit}"
    if request:
        raise SystemExit(
            f"KSM_EXT_CUDA must be 0 or 1, got {request}. Unset it to decide by torch."
        )
    if torch.version.cuda is None:
        return None, f"torch {torch.__version__} is a CPU build; KSM_EXT_CUDA=1 forces it"
    if toolkit is None:
        return None, "no nvcc with cuda_runtime.h found; set CUDA_HOME and KSM_EXT_CUDA=1"
    return toolkit, f"torch {torch.__version__} and toolkit {toolkit}"


def nvcc_version(toolkit: Path) -> str:
    """Release of nvcc, such as 13.0."""
    nvcc = str(toolkit / "bin" / "nvcc")
    text = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    match = re.search(r"release ([\d.]+)", text)
    return match.group(1) if match else "unknown"


def cpu_extension(toolkit: Path | None) -> CppExtension:
    """Schemas, CPU kernels, and the facts of this build."""
    facts = {
        "KSM_TORCH_VERSION": torch.__version__,
        "KSM_NVCC_VERSION": nvcc_version(toolkit) if toolkit else "",
        "KSM_CUDA_ARCHITECTURES": os.environ["TORCH_CUDA_ARCH_LIST"] if toolkit else "",
    }
    return CppExtension(
        "ksm_ext._C",
        sources("module.cpp", "ops.cpp", "cpu/*.cpp"),
        include_dirs=[str(ROOT / "csrc")],
        define_macros=[(name, f'"{value}"') for name, value in facts.items()],
        extra_compile_args={"cxx": [*CXX_FLAGS, *STABLE_ABI]},
        extra_link_args=SANITIZE,
        py_limited_api=True,
    )


def cuda_extension(toolkit: Path) -> CppExtension:
    """CUDA kernels; beside a CPU torch they compile and link, for checks, but cannot be loaded."""
    # torch looks beside the nvcc on the PATH, which may be a wrapper; a CPU torch does not look.
    cpp_extension.CUDA_HOME = str(toolkit)
    if torch.version.cuda:
        libraries = ["cudart", "c10_cuda", "torch_cuda"]
    else:
        libraries = ["cudart_static", "dl", "rt", "pthread"]
    return CppExtension(
        "ksm_ext._C_cuda",
        sources("cuda/*.cpp", "cuda/*.cu"),
        include_dirs=[str(ROOT / "csrc"), str(toolkit / "include")],
        library_dirs=[str(toolkit / "lib64")],
        libraries=libraries,
        extra_compile_args={
            "cxx": [*CXX_FLAGS, *STABLE_ABI, "-DUSE_CUDA"],
            # -fmad=false as -ffp-contract=off above; -Xptxas -v reports registers and spills.
            "nvcc": ["-O3", "-std=c++17", "-lineinfo", "-fmad=false", "-Xptxas", "-v"],
        },
        py_limited_api=True,
    )


def arithmetic_extension() -> Extension:
    """The pybind11 module: of torch's copy of pybind11, not linked to torch."""
    return Extension(
        "ksm_ext._arithmetic",
        sources("bindings.cpp"),
        include_dirs=[str(ROOT / "csrc"), *cpp_extension.include_paths()],
        extra_compile_args={"cxx": CXX_FLAGS},
        extra_link_args=SANITIZE,
        language="c++",
    )


class BuildModules(BuildExtension):
    """Leaves out of wheels what one Python alone could load."""

    def run(self) -> None:
        """Build the modules."""
        if not self.inplace:
            self.extensions = [module for module in self.extensions if module.py_limited_api]
        super().run()


toolkit, reason = decide_cuda()
print(f"ksm_ext: building {'CPU and CUDA' if toolkit else 'CPU only'} ({reason})", flush=True)
extensions = [arithmetic_extension()]
if toolkit:
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHITECTURES)
    extensions.append(cuda_extension(toolkit))
extensions.append(cpu_extension(toolkit))
setup(
    ext_modules=extensions,
    cmdclass={"build_ext": BuildModules},
    options={"bdist_wheel": {"py_limited_api": OLDEST_PYTHON}},
    exclude_package_data={} if toolkit else {"ksm_ext": ["_C_cuda.pyi"]},
)
