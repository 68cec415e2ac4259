"""Check that a torch exports what the native modules need of it, without loading anything.

    python tools/check_symbols.py BUILD_LIB [TORCH]

TORCH is the unpacked wheel of a torch, such as of the oldest supported one (``pip download
--no-deps torch==2.10.0`` and ``unzip``); without it, the installed torch is looked at. A torch
without CUDA can answer for the CPU kernels only. Symbols that carry their library's version were
found when the module was linked.
"""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path


def symbols(library: Path, *options: str) -> set[str]:
    """Dynamic symbols, without those that may be missing."""
    command = ["nm", "-D", *options, str(library)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return {line.split()[-1].replace("@@", "@") for line in lines if line.split()[-2] not in "wv"}


def missing(needed: set[str], exported: set[str]) -> set[str]:
    """What neither torch nor, by a version or Python's prefix, another library is known to have."""
    names = {symbol.partition("@")[0] for symbol in exported}
    return {symbol for symbol in needed if not re.search(r"@|^_?Py", symbol)} - names


def torch_of(folder: Path) -> tuple[str, list[Path]]:
    version = (folder / "torch/version.py").read_text()
    found = re.search(r"__version__ = '(.*?)'", version)
    return found[1] if found else "unknown", sorted((folder / "torch/lib").glob("lib*.so"))


def main() -> None:
    modules = sorted(Path(sys.argv[1]).glob("ksm_ext/_C*.so"))
    spec = importlib.util.find_spec("torch")
    installed = Path(spec.origin).parents[1] if spec and spec.origin else Path()
    version, libraries = torch_of(Path(sys.argv[2]) if sys.argv[2:] else installed)
    if not any(library.name == "libtorch_cuda.so" for library in libraries):
        modules = [module for module in modules if "_cuda" not in module.name]
    command = ["c++", "-print-file-name=libstdc++.so.6"]
    standard = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    exported = {
        name for path in (*libraries, Path(standard)) for name in symbols(path, "--defined-only")
    }
    failed = not modules
    for module in modules:
        needed = symbols(module, "--undefined-only")
        lacking = sorted(missing(needed, exported))
        failed |= bool(lacking)
        print(
            f"{module.name} needs {len(needed)} symbols; torch {version} lacks", lacking or "none"
        )
    sys.exit(failed)


if __name__ == "__main__":
    main()
