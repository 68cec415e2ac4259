"""Run every operator on small and odd sizes, compared with the CPU: for compute-sanitizer.

    compute-sanitizer --tool memcheck --error-exitcode 9 python tools/cuda_smoke.py
    compute-sanitizer --tool racecheck --error-exitcode 9 python tools/cuda_smoke.py --sizes one odd

``--device cpu`` runs the script itself without a GPU.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in ("tests", "")]

from operators import SIZES, calls  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    arguments = parser.parse_args()
    count, different = 0, []
    for size in arguments.sizes:
        for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-12)):
            for name, call in calls(SIZES[size], dtype).items():
                results = call.on(arguments.device).results()
                for found, expected in zip(results, call.results(), strict=True):
                    difference = (found.cpu().double() - expected.double()).abs().max()
                    scale = expected.abs().double().max().clamp_min(1)
                    if not difference <= tolerance * scale:
                        different.append(f"{name}, {size}, {dtype}: {float(difference):.1e}")
                count += 1
    print(f"{count} calls on {arguments.device}, {len(different)} unlike the CPU")
    print("\n".join(different))
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
