"""``ksm doctor``: what is installed, what runs, and what is missing for what."""

import json
import platform
from argparse import Namespace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch

from ksm_ext import ops
from ksm_ext.build_info import build_info

PACKAGES = (
    *("ksm_ext", "torch", "numpy", "scipy", "safetensors", "tqdm", "joblib", "jinja2"),
    *("filelock", "lazy_loader"),
)
EXTRAS = (
    ("matplotlib", "ksm_ext[plot]", "figures: ksm_ext.plotting"),
    ("pyarrow", "ksm_ext[tables]", "Parquet, Feather and Excel tables on the command line"),
    ("pandas", "pandas", "tables in and out of Python: data frames go in and come back"),
    ("dask", "dask[distributed]", "retraining on a cluster: retrain_scores"),
    ("transformers", "transformers", "gradients of language models"),
    ("curvlinops", "curvlinops-for-pytorch", "influence functions by EK-FAC"),
)
"""Optional dependencies: the module imported, what installs it, and what needs it."""


def doctor(args: Namespace) -> int:
    """Print the state of the installation; 0 if the operators work, else 1."""
    facts = diagnose()
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        print(_text(facts))
    return 0 if facts["works"] else 1


def diagnose() -> dict[str, Any]:
    """Everything :func:`doctor` prints, as values that JSON knows.

    Raises:
        RuntimeError: If ``KSM_EXT_CPU_ISA`` names an instruction set that this CPU lacks.
    """
    devices = {
        "cpu": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    }
    for index in range(torch.cuda.device_count()):
        devices[f"cuda:{index}"] = torch.cuda.get_device_name(index)
    build = build_info()
    tried = ["cpu", *(name for name in devices if name != "cpu" and build["cuda"])]
    operators = {name: _check_operator(torch.device(name)) for name in tried}
    return {
        "works": all(found == "works" for found in operators.values()),
        "versions": {
            "python": platform.python_version(),
            **{package: _version(package) for package in PACKAGES},
            "torch": torch.__version__,  # which CUDA it is for, too
        },
        "platform": platform.platform(),
        "build": build,
        "devices": devices,
        "operators": operators,
        "missing": {
            module: {"install": f'pip install "{install}"', "for": purpose}
            for module, install, purpose in EXTRAS
            if find_spec(module) is None
        },
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed as a package"


def _check_operator(device: torch.device) -> str:
    """Run ``mask_gram`` on small masks and compare it with the distances spelled out."""
    masks = torch.arange(4 * 70).reshape(4, 70).remainder(3).eq(0)  # two words of bits
    table = torch.exp(-0.1 * torch.arange(71, dtype=torch.float64))
    expected = table[(masks[:, None] != masks[None]).sum(2)]
    try:
        bits = ops.pack_masks(masks.to(device))
        found = ops.mask_gram(bits, bits, 70, hamming_table=table.to(device)).cpu()
    except RuntimeError as error:
        return f"fails: {error}"
    difference = float((found.double() - expected).abs().max())
    return "works" if difference < 1e-12 else f"is wrong by {difference:.3g}"


def _text(facts: dict[str, Any]) -> str:
    build = facts["build"]
    cuda = f"built by nvcc {build['nvcc']} for {build['cuda_architectures']}"
    lines = [
        "versions    " + ", ".join(f"{name} {found}" for name, found in facts["versions"].items()),
        f"platform    {facts['platform']}",
        f"built       with {build['compiler']} against torch {build['torch_built_against']}",
        f"CUDA        {cuda if build['cuda'] else 'not built (KSM_EXT_CUDA=1 pip install …)'}",
        f"CPU code    {build['cpu_instruction_set']}",
        *(f"device      {name}: {found}" for name, found in facts["devices"].items()),
        *(f"operators   on {name}: {found}" for name, found in facts["operators"].items()),
    ]
    for module, fact in facts["missing"].items():
        lines.append(f"missing     {module}, for {fact['for']}: {fact['install']}")
    verdict = "All well." if facts["works"] else "The operators do not work: reinstall ksm_ext."
    return "\n".join([*lines, verdict])
