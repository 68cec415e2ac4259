"""How well surrogates do beside what else can be installed, and beside an earlier build.

    python -m benchmarks.peers DATA [--before PATH] [--only learners,small] [-o FILE]

prints a table per question, in Markdown; ``-o`` writes every single measurement as JSON. DATA is a
folder with ``games`` (shapiq's precomputed set functions) and ``regmix`` (sail-sg/regmix).

Sections (``--only``), each described at the head of its file in ``benchmarks/comparisons/``:

* ``shapley``: Shapley values at a budget, against shapiq's estimators;
* ``learners``: other learners on the same subsets;
* ``mixtures``: losses of real-valued mixtures, against trees and a mixing law;
* ``intervals``: how often intervals hold;
* ``small``: the worst case over small tables, and the processor time of a fit.

Designs have a study of their own, ``experiments.studies.designs``.

``--build PATH`` is the checkout whose ``ksm_ext`` is measured (this one by default), ``--before
PATH`` another to put beside it; each is measured in a process of its own. Peers are optional, and
those that are not installed are named. To install them beside an environment rather than into it
(without dependencies: its torch, NumPy and scikit-learn serve them)::

    pip install --target FOLDER --no-deps lightgbm xgboost gpytorch linear_operator jaxtyping \\
        "shapiq>=1.8" botorch pyro-ppl multipledispatch pyre-extensions typing-inspect threadpoolctl

and add ``--peers FOLDER`` (several are joined by ``:``). The second line is for shapiq's newer
estimators (ProxySHAP, RegressionMSR, OddSHAP, ShaplEIG, ...), which need Python 3.12.

Peers measured once can be put beside any later build: ``-o FILE`` and then ``--reuse FILE``, with
the same ``--games``, ``--sizes`` and ``--seeds``.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

from benchmarks.comparisons.common import BEFORE

ROOT = Path(__file__).resolve().parents[1]
SECTIONS = ("shapley", "learners", "mixtures", "intervals", "small")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser("benchmarks.peers", description=__doc__.split("\n")[0])
    made.add_argument("data", type=Path, help="folder with games and regmix")
    made.add_argument("--only", type=listed, default=SECTIONS, help=", ".join(SECTIONS))
    made.add_argument("--build", type=Path, default=ROOT, help="checkout to measure")
    made.add_argument("--before", type=Path, help="checkout of an earlier build")
    made.add_argument(
        "--peers", help="folder that peers were installed into; 'none' leaves them out"
    )
    made.add_argument("--reuse", type=Path, help="take peers from the JSON of an earlier run")
    made.add_argument("--kernels", type=listed, default=("auto", "rbf", "anova2", "linear"))
    made.add_argument("--games", type=int, help="how many complete tables; all by default")
    made.add_argument("--sizes", type=sizes, help="m, such as 50,100; each section has its own")
    made.add_argument("--seeds", type=int, default=1, help="draws of subsets for each table")
    made.add_argument("--quick", action="store_true", help="fewer games and small tables")
    made.add_argument(
        "--slow", action="store_true", help="estimators too that take minutes for a table"
    )
    made.add_argument("-o", "--output", type=Path, help="JSON of all measurements")
    made.add_argument("--measure", choices=("ours", "peers"), help=argparse.SUPPRESS)
    return made


def listed(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def sizes(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def section(name: str) -> ModuleType:
    return import_module(f"benchmarks.comparisons.{name}")


def measure(options: argparse.Namespace) -> list[dict]:
    """Records of the sections, by the packages that this process imports."""
    warnings.filterwarnings("ignore")  # of peers that did not converge, or take no names
    records, peer = [], options.measure == "peers"
    for name in options.only:
        found, facts = section(name), {"section": name, "peer": peer}
        if peer:
            records.append({**facts, "absent": found.absent()})
        records += [{**facts, **record} for record in found.measure(options, ours=not peer)]
    return records


def measured(arguments: Sequence[str], what: str, build: Path, site: str | None) -> list[dict]:
    """Records of a process that imports ``ksm_ext`` of a build, and peers of a folder."""
    with tempfile.TemporaryDirectory() as folder:
        # only the package is of that build: what measures it, and the data, are the same for all
        (Path(folder) / "ksm_ext").symlink_to(build.resolve() / "ksm_ext")
        places = [folder, *([site] if site else []), str(ROOT)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(places), "OMP_NUM_THREADS": "1"}
        output = Path(folder) / "records.json"
        command = [sys.executable, __file__, *arguments, "--measure", what, "-o", str(output)]
        subprocess.run(command, env=environment, check=True)
        return json.loads(output.read_text())


def report(options: argparse.Namespace, records: list[dict]) -> None:
    """Print the tables of all sections, what is not installed, and what failed."""
    for name in options.only:
        found = [record for record in records if record["section"] == name]
        print(f"\n## {section(name).__doc__.splitlines()[0]}")
        rows = [record for record in found if "method" in record]
        for title, table in section(name).tables(rows, options.kernels[0]):
            print(f"\n{title}\n\n{table}", flush=True)
        for line in remarks(found):
            print(f"\n{line}")


def remarks(records: list[dict]) -> list[str]:
    """A line on peers that are not installed, and one for each that failed."""
    absent = [name for record in records for name in record.get("absent", ())]
    lines = [f"Not installed, and so not compared: {', '.join(absent)}."] if absent else []
    for method in dict.fromkeys(row["method"] for row in records if "failed" in row):
        rows = [row for row in records if row.get("method") == method]
        failed = [row["failed"] for row in rows if "failed" in row]
        lines.append(f"{method} failed on {len(failed)} of {len(rows)}: {failed[0]}")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = parser().parse_args(arguments)
    if options.measure:
        records = measure(options)
    else:
        records = measured(arguments, "ours", options.build, None)
        if options.before:
            earlier = measured(arguments, "ours", options.before, None)
            records += [{**row, "method": row["method"] + BEFORE} for row in earlier]
        if options.reuse:
            earlier = json.loads(options.reuse.read_text())
            records += [row for row in earlier if row["peer"] and row["section"] in options.only]
        elif options.peers != "none":
            records += measured(arguments, "peers", options.build, options.peers)
        report(options, records)
    if options.output:
        options.output.write_text(json.dumps(records, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
