"""The arguments of ``ksm``, its help, and its exit codes.

``argparse``, since a parser that comes with Python costs no dependency and its help is plain text.
torch takes seconds to import: what a command needs is imported when it runs, and nothing for help.

0: done, also where the reader of a pipe had enough. 1: failed (disk, memory, numerics, a missing
package). 2: bad arguments or input. 130: interrupted.
"""

import os
import re
import sys
from argparse import (
    ArgumentParser,
    ArgumentTypeError,
    Namespace,
    RawDescriptionHelpFormatter,
    _SubParsersAction,
)
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, NoReturn, TypeAlias, get_args

import ksm_ext
from ksm_ext.cli.completion import SHELLS, script
from ksm_ext.surrogates.options import Criterion, Missing, Readout, Warp
from ksm_ext.tables import Format

_DESCRIPTION = """\
Which training tasks help or hurt a score, alone and together?

Score some subsets of the tasks, put the scores into a table with a column per task
(0 or 1) and a column per score, and then:

  ksm fit scores.csv -o surrogate.safetensors
  ksm attribute surrogate.safetensors
  ksm report surrogate.safetensors -o report.html
"""
_EPILOG = """\
A file named - is standard input or output. Tables are CSV, Parquet, JSON or NPZ.
Exit codes: 0 done, 1 failed, 2 bad arguments or input, 130 interrupted.
How to cite: Zhang, Duan & Zhang, ICLR 2026, arXiv:2602.03783.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``ksm`` with the arguments of the process, or with these; answers the exit code."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the caller: as if it led to /dev/null
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - until the process ends
    parser = _parser()
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments:
        parser.print_help(sys.stderr)
        parser.exit(2)
    args = parser.parse_args(arguments)
    try:
        status = _run(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # The reader is gone, and what is still buffered goes nowhere when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, RuntimeError, MemoryError) as error:
        from ksm_ext.cli.output import say

        text = str(getattr(error, "strerror", None) or error)
        if asked := re.search(r"tried to allocate (\d+) bytes", text):
            text = f"there is no memory for {int(asked[1]) / 1e9:,.0f} GB at once: ask for less."
        say(f"ksm: error: {text}")
        of_input = (ValueError, TypeError, FileNotFoundError, IsADirectoryError)
        return 2 if isinstance(error, of_input) else 1


def _run(args: Namespace) -> int:
    if hasattr(args, "output"):
        from ksm_ext.cli.output import check_apart, check_target, default_target

        sources = _sources(args)
        if args.output is None:
            args.output = default_target(sources, args.ending, replace=args.force)
        else:
            check_apart(args.output, sources)
            check_target(args.output, getattr(args, "format", None), getattr(args, "formats", ()))
    if args.command in ("design", "next"):
        from ksm_ext.cli.design import draw as run
    elif args.command == "doctor":
        from ksm_ext.cli.doctor import doctor as run
    elif args.command == "completion":
        sys.stdout.write(script(_parser(), args.shell))
        return 0
    else:
        from ksm_ext.cli import commands

        run = getattr(commands, {"import": "import_scores"}.get(args.command, args.command))
    return run(args)


def _sources(args: Namespace) -> list[str]:
    """The files that a command reads, the one that its output is named after first."""
    names = ["scores", "surrogate", "masks", "estimates", "other", "held_out", "costs", "known"]
    names += ["tasks"] if args.command == "design" else []  # elsewhere these are columns
    given = [getattr(args, name, None) for name in names]
    return [file for each in given if each for file in ([each] if isinstance(each, str) else each)]


# -- arguments ----------------------------------------------------------------------------------


class _Parser(ArgumentParser):
    """Options are spelled out, and a misspelled one is answered by the nearest that there are."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """As of argparse, but a command itself refuses what it does not know."""
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return known, unknown

    def error(self, message: str) -> NoReturn:
        """Exit with 2 and ``message``, and say which option or choice may have been meant."""
        choices = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
        unknown = re.search(r"unrecognized arguments: .*?(--[^\s=]+)", message)
        near: list[str] = []
        if choices is not None:
            near = get_close_matches(choices[1], re.findall(r"[^\s,']+", choices[2]), 1)
        elif unknown is not None:
            near = get_close_matches(unknown[1], self._option_string_actions, 1)
        super().error(message + "".join(f". Did you mean {name}?" for name in near))


def _parser() -> ArgumentParser:
    parser = _Parser(
        prog="ksm",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"ksm_ext {ksm_ext.__version__}")
    kinds = parser.add_subparsers(
        title="commands", dest="command", metavar="COMMAND", required=True
    )
    first = (_add_design, _add_import, _add_fit, _add_attribute, _add_select, _add_report)
    for add in (*first, _add_next, _add_compare, _add_watch, _add_doctor, _add_completion):
        add(kinds)
    return parser


Kinds: TypeAlias = "_SubParsersAction[_Parser]"


def _command(kinds: Kinds, name: str, summary: str, details: str) -> ArgumentParser:
    return kinds.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=details,
        formatter_class=RawDescriptionHelpFormatter,
    )


def _add_design(kinds: Kinds) -> None:
    parser = _command(
        kinds,
        "design",
        "draw the subsets of tasks to score",
        """\
examples:
  ksm design --num-tasks 20 --num-subsets 200 --for shapley -o masks.csv
  ksm design --tasks names.txt --num-subsets 40 --for loo --known scores.csv -o more.csv
  ksm design --tasks names.txt --num-subsets 200 --design paired --seed 1 -o masks.csv
  ksm design --num-tasks 20 --design leave-one-out --include-full
  ksm design --num-tasks 17 --num-subsets 64 --design dirichlet -o mixtures.csv

Score a model trained on each row's tasks, then: ksm fit scores.csv --masks masks.csv …
""",
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--num-tasks", type=_count, metavar="N", help="tasks named 0, 1, …")
    which.add_argument("--tasks", metavar="FILE", help="names of the tasks, one a line")
    add = parser.add_argument
    add("--num-subsets", type=_count, metavar="M")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--for",
        dest="question",
        choices=(*get_args(Readout), "prediction"),
        help="what will be asked: draws the design that was best for it",
    )
    kind.add_argument(
        "--design",
        choices=("mixed-sizes", "bernoulli", "fixed-size", "paired", "leave-one-out", "dirichlet"),
        default="mixed-sizes",
        help="or one by name; default: mixed-sizes (Shapley intervals hold); dirichlet: mixtures",
    )
    add("--known", metavar="FILE", help="scored subsets, which are not drawn again (with --for)")
    add("--include-empty", action="store_true", help="the subset of no task too (with --for)")
    add(
        "--probability",
        type=float,
        default=0.5,
        metavar="P",
        help="that a task is in a subset (bernoulli, paired; default 0.5)",
    )
    add("--size", type=_count, metavar="K", help="tasks per subset (fixed-size, paired)")
    add("--sizes", type=_counts, metavar="K,K,…", help="sizes to draw (mixed-sizes; default all)")
    add("--include-full", action="store_true", help="add the subset of all tasks (leave-one-out)")
    add(
        "--prior",
        type=_numbers,
        metavar="X,X,…",
        help="the mean mixture up to a factor (dirichlet; default all tasks alike)",
    )
    add(
        "--strength",
        type=_numbers,
        default=[0.1, 5.0],
        metavar="LOW,HIGH",
        help="small: mixtures of few tasks; large: near the prior (dirichlet; default 0.1,5)",
    )
    add("--minimum", type=float, default=0.0, metavar="X", help="smaller shares are 0 (dirichlet)")
    add("--maximum", type=float, default=1.0, metavar="X", help="of a share (dirichlet)")
    add("--seed", type=int, default=0, help="default 0")
    _add_output(parser, ("npz", "table"))


def _add_next(kinds: Kinds) -> None:
    parser = _command(
        kinds,
        "next",
        "choose the subsets to score next, those that tell most besides what was scored",
        """\
examples:
  ksm next surrogate.safetensors --for shapley -o more.csv
  ksm next surrogate.safetensors --for loo --num-subsets 20 -o more.csv

Score them, add them to the table, and fit it again.
""",
    )
    add = parser.add_argument
    _add_surrogate(parser)
    add(
        "--for",
        dest="question",
        choices=(*get_args(Readout), "prediction"),
        default="loo",
        help="what will be asked (default loo)",
    )
    add("--num-subsets", type=_count, default=10, metavar="M", help="default 10")
    add("--seed", type=int, default=0, help="default 0")
    _add_output(parser, ("npz", "table"))


def _add_import(kinds: Kinds) -> None:
    parser = _command(
        kinds,
        "import",
        "make one table of tasks and scores of what other tools wrote",
        """\
examples:
  ksm import trials.csv -o scores.csv
  ksm import runs.csv --subset datasets --targets loss -o scores.csv
  ksm import runs.csv --long run,dataset --targets loss -o scores.csv
  ksm import runs/*/trainer_state.json --masks masks.csv --key run -o scores.csv

Known are the tables of Optuna, MLflow, scikit-learn, Ray Tune and Weights & Biases, whose runs
count where they ended well; files of one run's results (trainer_state.json of HuggingFace, results
of lm-evaluation-harness), a row each; games that shapiq saved. ksm fit reads the same tables. What
became what is printed.
""",
    )
    parser.add_argument(
        "scores", metavar="FILE", nargs="+", help="a table, or a file of results per run"
    )
    _add_tables(parser, "FILE")
    _add_columns(parser)
    _add_missing(parser)
    _add_output(parser, ("table",))


def _add_fit(kinds: Kinds) -> None:
    parser = _command(
        kinds,
        "fit",
        "fit a surrogate to the scores of subsets",
        """\
examples:
  ksm fit scores.csv -o surrogate.safetensors
  ksm fit scores.csv --masks masks.csv --kernel linear,rbf -o surrogate.safetensors
  ksm fit scores.parquet --targets 'valid_*' --ignore run,seed -o surrogate.safetensors
  ksm fit losses.csv --masks mixtures.csv --weights --key index -o surrogate.safetensors
  ksm fit modular_addition.json --merge-duplicates -o surrogate.safetensors
  ksm fit scores.csv --estimates cheap.csv -o surrogate.safetensors
  ksm fit - -o - < scores.csv | ksm attribute - | head

SCORES has a column per task (0 or 1) and a column per score, or is beside a file of masks that a
shared column joins, or with the same rows. What each column is taken for, and why, is printed; a
column in doubt is an error that lists the options to add. Options take names and globs.
NPZ and JSON objects have masks, scores and perhaps task_names and target_names. Published JSON
layouts are read too: train_w with train_subset_scores; lists of scores beside lists of task
numbers.
""",
    )
    add = parser.add_argument
    add("scores", metavar="SCORES", help="CSV, Parquet, JSON, NPZ, or -")
    _add_tables(parser, "SCORES")
    _add_columns(parser)
    add(
        "--estimates",
        action="append",
        default=[],
        metavar="FILE",
        help="cheaper scores of more subsets, in a table of the same columns, or a surrogate of "
        "them; once more for each further kind",
    )
    _add_model(parser)
    _add_sample_weight(parser)
    add("--quiet", action="store_true", help="say nothing unless it fails")
    _add_file(parser, "SCORES", ".safetensors")


def _add_model(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--kernel",
        default="auto",
        metavar="NAME[,NAME…]",
        help="auto (default), linear, anova2, rbf, exponential, laplace, polynomial, "
        "size, warped (of weights), sums such as linear+rbf, ard (a learnt decay for each task), "
        "lasso, least_squares; of several, the best by leave-one-out",
    )
    add("--ridge", type=_ridge, default="loo", metavar="NUMBER", help="default: by leave-one-out")
    add(
        "--criterion",
        choices=get_args(Criterion),
        default="error",
        help="what leave-one-out minimises: squared error (default), errors of rank, or squared "
        "error near the full set, for leave-one-out effects",
    )
    add(
        "--warp",
        choices=get_args(Warp),
        default="identity",
        help="a map of scores that predictions go through, for scores that saturate; auto: the "
        "best by leave-one-out (attributions are of the scores as they are)",
    )
    add(
        "--share-ridge",
        choices=("auto", "yes", "no"),
        default="auto",
        help="one kernel and ridge for all targets (default: what predicts best)",
    )
    add("--no-intercept", action="store_true")
    add(
        "--noise-std",
        type=float,
        metavar="NUMBER",
        help="standard deviation of a single run by its seed, 0 for none (default: measured on "
        "repeated subsets, else unknown)",
    )
    _add_missing(parser)


def _add_sample_weight(parser: ArgumentParser) -> None:
    help_text = "the column that says how sure each row is: 2 is as sure as two runs, 0 left out"
    parser.add_argument("--sample-weight", metavar="COLUMN", help=help_text)


def _add_missing(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--missing",
        choices=get_args(Missing),
        default="error",
        help="empty cells of scores: an error (default), or each score on the rows that have it",
    )


def _add_attribute(kinds: Kinds) -> None:
    parser = _command(
        kinds,
        "attribute",
        "say how much each task raises each score, with intervals",
        """\
examples:
  ksm attribute surrogate.safetensors
  ksm attribute surrogate.safetensors --readout shapley --top 10 -o attributions.csv
  ksm attribute surrogate.safetensors --interactions --top 20 --format json

A positive value raises the score, in the score's own units: for a loss, that is harm.
Columns: task, target, value, std, low, high (the ends of the 95 % interval).
""",
    )
    _add_surrogate(parser)
    _add_readout(parser)
    add = parser.add_argument
    add("--interactions", action="store_true", help="pairs of tasks instead of single ones")
    add(
        "--target", action="append", default=[], metavar="NAME", help="may be repeated; default all"
    )
    add(
        "--sort",
        choices=("size", "value", "none"),
        default="size",
        help="largest absolute value first (default), largest value, or the order of the tasks",
    )
    add("--top", type=_count, metavar="K", help="the first K of each target")
    add("--no-intervals", action="store_true", help="values only, faster")
    _add_output(parser, ("table",))


def _add_select(kinds: Kinds) -> None:
    parser = _command(
        kinds,
        "select",
        "choose tasks within a budget",
        """\
examples:
  ksm select surrogate.safetensors --budget 5 --maximize
  ksm select surrogate.safetensors --budget 3600 --costs seconds.csv --minimize --target loss
  ksm select mixtures.safetensors --mixture --minimize --target loss --confidence 0.9

costs.csv has the columns task and cost. Tasks are added by improvement per cost while they
improve the predicted score; --exact compares all subsets (22 tasks at most). --mixture finds the
best shares of tasks instead, for a surrogate of mixtures.
""",
    )
    _add_surrogate(parser)
    add = parser.add_argument
    limit = parser.add_mutually_exclusive_group(required=True)
    limit.add_argument("--budget", type=float, metavar="B", help="in units of the costs")
    limit.add_argument("--mixture", action="store_true", help="shares of all tasks")
    add("--costs", metavar="FILE", help="default: 1 per task, so B tasks")
    direction = parser.add_mutually_exclusive_group(required=True)
    direction.add_argument("--maximize", action="store_true", dest="maximize")
    direction.add_argument("--minimize", action="store_false", dest="maximize")
    add(
        "--target",
        action="append",
        default=[],
        metavar="NAME",
        help="the score that counts; may be repeated for scores of one direction, which are "
        "averaged in units of their standard deviations",
    )
    add("--exact", action="store_true", help="compare all subsets")
    add("--minimum", type=float, default=0.0, metavar="X", help="of a share (--mixture; default 0)")
    add("--maximum", type=float, default=1.0, metavar="X", help="of a share (--mixture; default 1)")
    add(
        "--confidence",
        type=float,
        default=0.5,
        metavar="P",
        help="best of what holds with this probability (--mixture; default 0.5)",
    )
    _add_output(parser, ("table",))


def _add_report(kinds: Kinds) -> None:
    parser = _command(
        kinds,
        "report",
        "write one HTML page that needs no network",
        """\
examples:
  ksm report surrogate.safetensors -o report.html
  ksm report surrogate.safetensors --readout shapley --title "Which data help?" -o report.html
  ksm report surrogate.safetensors --held-out new_scores.csv -o report.html
  ksm report surrogate.safetensors --minimize perplexity --maximize bleu -o report.html

Which way a score gets better is guessed from words of its name, and said, unless given.
""",
    )
    _add_surrogate(parser)
    _add_readout(parser)
    add = parser.add_argument
    add("--target", metavar="NAME", help="show this one only")
    add("--held-out", metavar="SCORES", help="scored subsets that were not fitted, to predict")
    _add_tables(parser, "the held-out scores")
    _add_page(parser)


def _add_page(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--title", default="Task attribution")
    for way, what in (("maximize", "more"), ("minimize", "less")):
        help_text = f"targets of which {what} is better"
        add(f"--{way}", type=_names, action="extend", default=[], metavar="NAME,…", help=help_text)
    _add_file(parser, "what is read", ".html")


def _add_compare(kinds: Kinds) -> None:
    parser = _command(
        kinds,
        "compare",
        "compare the attributions of two surrogates",
        """\
examples:
  ksm compare before.safetensors after.safetensors
  ksm compare small_model.safetensors large_model.safetensors --readout shapley --top 10

A row per task and target that both have: the value of each, their difference and its 95 % interval,
as of two independent fits, the largest difference first. Rank correlations of the values, and how
many differences are clear of zero, are said.
""",
    )
    add = parser.add_argument
    _add_surrogate(parser)
    add("other", metavar="OTHER", help="another of these")
    _add_readout(parser)
    add("--top", type=_count, metavar="K", help="the first K of each target")
    _add_output(parser, ("table",))


def _add_watch(kinds: Kinds) -> None:
    parser = _command(
        kinds,
        "watch",
        "fit again and write the report anew while runs arrive",
        """\
examples:
  ksm watch scores.csv -o report.html
  ksm watch runs.sqlite --every 60 --until 200 -o report.html

SCORES is a table that grows, or what retrain_scores keeps. Whenever it has changed, a line says how
many runs there are and how well they are predicted. Ctrl-C ends it.
""",
    )
    add = parser.add_argument
    add("scores", metavar="SCORES", help="a table, or the store of retrain_scores")
    _add_tables(parser, "SCORES")
    _add_columns(parser)
    _add_model(parser)
    _add_readout(parser)
    _add_sample_weight(parser)
    add("--every", type=float, default=10.0, metavar="SECONDS", help="between looks (default 10)")
    add("--until", type=_count, metavar="M", help="end with so many runs")
    _add_page(parser)


def _add_doctor(kinds: Kinds) -> None:
    parser = _command(
        kinds,
        "doctor",
        "say what is installed, what runs, and what is missing for what",
        """\
examples:
  ksm doctor
  ksm doctor --json

Exit code 0 if the operators work, 1 if not. Put what it prints into bug reports.
""",
    )
    parser.add_argument("--json", action="store_true")


def _add_completion(kinds: Kinds) -> None:
    parser = _command(
        kinds,
        "completion",
        "print what a shell needs to complete ksm when Tab is pressed",
        """\
examples:
  ksm completion bash >> ~/.bashrc
  ksm completion zsh >> ~/.zshrc
  ksm completion fish > ~/.config/fish/completions/ksm.fish

It holds in the shells that are opened afterwards.
""",
    )
    parser.add_argument("shell", choices=SHELLS, help="bash, zsh or fish")


def _add_surrogate(parser: ArgumentParser) -> None:
    parser.add_argument("surrogate", metavar="SURROGATE", help="what ksm fit saved, or -")


def _add_readout(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--readout",
        choices=get_args(Readout),
        default="loo",
        help="leave-one-out at all tasks (default), or an average over subsets",
    )


def _names(text: str) -> list[str]:
    """Names and globs between commas; one with a comma, or a blank at its end, in double quotes."""
    found = re.findall(r'\s*(?:"((?:[^"]|"")*)"|([^,]*?))\s*(?:,|$)', text)
    return [quoted.replace('""', '"') or plain for quoted, plain in found if quoted or plain]


_SEVERAL: dict[str, Any] = {"type": _names, "action": "extend", "default": [], "metavar": "NAME,…"}


def _add_tables(parser: ArgumentParser, what: str) -> None:
    add = parser.add_argument
    add("--masks", metavar="FILE", help=f"where they are not in {what}")
    add("--key", metavar="NAME", help="the column that joins two files; default: the shared one")
    add("--ignore", help="columns that are neither task nor score", **_SEVERAL)


def _add_columns(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--tasks", help="the task columns; default: those of 0 and 1, beyond doubt", **_SEVERAL)
    add("--targets", help="the score columns; default: those named like scores", **_SEVERAL)
    add("--weights", action="store_true", help="masks may be shares of a mixture, or counts")
    add("--num-tasks", type=_count, metavar="N", help="where masks are lists of task numbers")
    add("--subset", metavar="NAME", help="a column of lists of task names, or of bit strings")
    help_text = "what stands between names in the cells of --subset; once more for another"
    add("--separator", action="append", default=[], metavar="SYMBOL", help=help_text)
    add("--long", type=_names, metavar="RUN,TASK", help="where each task of a run has a row")
    add(
        "--merge-duplicates",
        action="store_true",
        help="make one task of those that are in or out together in every subset",
    )


def _add_output(parser: ArgumentParser, others: Sequence[str]) -> None:
    formats = (*get_args(Format), *others)
    parser.add_argument("-o", "--output", default="-", metavar="FILE", help="default: -")
    parser.add_argument(
        "--format", choices=formats, help="default: the ending of FILE; CSV in a pipe"
    )
    parser.set_defaults(formats=[form for form in formats if form != "table"])


def _add_file(parser: ArgumentParser, what: str, ending: str) -> None:
    add = parser.add_argument
    help_text = f"or - for standard output; default: {what}, ending in {ending}"
    add("-o", "--output", metavar="FILE", help=help_text)
    add("--force", action="store_true", help="replace a file of the default name")
    parser.set_defaults(ending=ending)


def _count(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return number


def _counts(text: str) -> list[int]:
    return [_count(part) for part in text.split(",")]


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ArgumentTypeError(f"must be numbers between commas, got {text!r}") from error


def _ridge(text: str) -> float | str:
    if text == "loo":
        return text
    try:
        return float(text)
    except ValueError as error:
        raise ArgumentTypeError(f"must be loo or a number, got {text!r}") from error
