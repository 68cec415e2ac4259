"""Print the results of ``on_device.sh`` as Markdown: a table for each card, and what has not run.

    python benchmarks/results_table.py > benchmarks/results/README.md

``--from FOLDER --brief`` prints what lies in another folder, without the introduction.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rows import Row, rows_of

HEAD = """# Measured on GPUs

`bash benchmarks/on_device.sh` measures a card and every operator on it; `python
benchmarks/results_table.py` prints this page from its results. A ratio is how many times longer the
peer takes. The share of the limit is the time that reading, writing or arithmetic alone would take
at the rate the card reached in the same run, over the time measured.
"""
COLUMNS = ["operator", "size", "time", "times faster than", "share of the limit"]


def table(rows: list[Row], measured: dict[str, Any], commit: str | None = None) -> Iterator[str]:
    yield "| " + " | ".join(COLUMNS) + " |"
    yield "|" + "---|" * len(COLUMNS)
    for row in rows:
        found = measured.get(row.title, {"not run": ""})
        time, *others = cells(found)
        time += of_commit(found, commit)
        yield "| " + " | ".join([row.name, row.size, time, *others]) + " |"


def cells(found: dict[str, Any]) -> list[str]:
    """Time, ratios and share of one row."""
    methods = found.get("methods", {})
    ours = methods.get("ksm_ext", found)
    if "seconds" not in ours:
        return [not_run(ours), "", ""]
    ratios = [
        f"{method['seconds'] / ours['seconds']:.2g}x {name}"
        if "seconds" in method
        else f"{name}: {not_run(method)}"
        for name, method in methods.items()
        if name != "ksm_ext"
    ]
    if "not run" in found:  # to its end
        ratios.append(found["not run"])
    share = found.get("share of limit")
    limit = f"{share:.0%} of {found['limit']}" if share else ""
    return [spelt(ours["seconds"]), "; ".join(ratios), limit]


def of_commit(found: dict[str, Any], commit: str | None) -> str:
    """Which other commit than the card's last run a row is of."""
    own = found.get("commit", commit)
    return "" if own == commit else f" (commit {own:.9})"


def not_run(found: dict[str, Any]) -> str:
    why = found.get("not run", "")
    return f"not run ({why})" if why else "not run"


def spelt(seconds: float) -> str:
    unit, factor = ("ms", 1e3) if seconds >= 1e-3 else ("µs", 1e6)
    return f"{seconds * factor:.3g} {unit}"


def page(content: dict[str, Any], rows: list[Row]) -> Iterator[str]:
    """The section of one card."""
    facts = content["environment"].get("facts", {})
    yield f"\n## {facts.get('gpu', 'Unknown')}\n"
    names = ("date", "commit", "driver", "cuda", "torch", "python")
    yield ", ".join(f"{name} {facts[name]}" for name in names if name in facts) + ".\n"
    steps = content["steps"].items()
    yield "; ".join(f"{name}: {step['status']}" for name, step in steps) + ".\n"
    yield "| limit | rate |\n|---|---|"
    for name, found in content["ceilings"].items():
        rate = f"{found['rate']:.3g} {found['unit']}" if "rate" in found else not_run(found)
        yield f"| {name} | {rate} |"
    yield ""
    yield from table(rows, content["rows"], facts.get("commit"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--from", dest="folder", type=Path, default=Path(__file__).parent / "results"
    )
    parser.add_argument("--brief", action="store_true")
    parser.add_argument("--small", action="store_true", help="rows of on_device.sh --small")
    arguments = parser.parse_args()
    rows = rows_of("small" if arguments.small else "gpu")
    print("" if arguments.brief else HEAD, end="")
    files = sorted(arguments.folder.glob("*.json"))
    for file in files:
        print("\n".join(page(json.loads(file.read_text()), rows)))
    if not files:
        print("\n## No card yet\n\nNothing here has run on a GPU so far.\n")
        print("\n".join(table(rows, {})))


if __name__ == "__main__":
    main()
