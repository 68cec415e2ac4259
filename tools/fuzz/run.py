"""Fuzz one target for a while: ``python tools/fuzz/run.py TARGET SECONDS [options of libFuzzer]``.

Coverage of the package's Python code leads the fuzzer. The corpus starts from the target's own
files, lies in memory and is not kept; an input that fails is written to the current folder as
``crash-*``, and ``python tools/fuzz/run.py TARGET 0 crash-...`` repeats it.
"""

import atexit
import sys

import atheris

with atheris.instrument_imports(include=["ksm_ext"]):
    from targets import TARGETS, Workplace


def main() -> None:
    if len(sys.argv) < 3 or sys.argv[1] not in TARGETS:
        sys.exit(f"{__doc__}\nTargets: {', '.join(TARGETS)}")
    name, seconds, *options = sys.argv[1:]
    place = Workplace(name)
    atexit.register(place.remove)
    run = [f"-max_total_time={seconds}", "-max_len=20000", "-rss_limit_mb=4096", "-timeout=60"]
    corpus = [] if any(not option.startswith("-") for option in options) else [str(place.corpus)]
    atheris.Setup([sys.argv[0], *run, "-print_final_stats=1", *options, *corpus], place.target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
