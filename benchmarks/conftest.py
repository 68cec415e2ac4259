"""Ratios after every benchmark run: how many times faster ksm_ext is than its fastest peer."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--small", action="store_true", help="operators at sizes for a check of the code"
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    session = getattr(terminalreporter.config, "_benchmarksession", None)
    groups: dict[str, dict[str, float]] = {}
    for bench in session.benchmarks if session else []:
        said = (
            f"{name} {f'{value:.4g}' if isinstance(value, float) else f'{value:,}'}"
            for name, value in bench.extra_info.items()
            if isinstance(value, (int, float))
        )
        if bench.extra_info:
            terminalreporter.write_line(f"{bench.name}: {', '.join(said)}")
        if not bench.has_error and "peer" in (bench.params or {}):
            groups.setdefault(bench.group, {})[bench.params["peer"]] = bench.stats.median
    for group, medians in groups.items():
        ours = medians.pop("ksm_ext", None)
        if ours is None or not medians:
            continue
        ratios = ", ".join(
            f"{seconds / ours:.1f}x {peer}"
            for peer, seconds in sorted(medians.items(), key=lambda item: item[1])
        )
        terminalreporter.write_line(f"{group}: ksm_ext {ours * 1e3:.1f} ms; faster than {ratios}")
