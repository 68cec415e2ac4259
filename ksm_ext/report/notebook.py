"""A surrogate as a notebook shows it: its line, what helps and hurts each target, and bars.

Shapes: n tasks, t targets.
"""

from markupsafe import Markup

from ksm_ext.drawing import largest, shortened
from ksm_ext.report.answers import directions
from ksm_ext.report.sections import Attributions, answer_of
from ksm_ext.report.svg import bars
from ksm_ext.surrogates.quality import qualities
from ksm_ext.surrogates.surrogate import Surrogate

_MAX_TARGETS, _MAX_BARS = 4, 8
_MAX_WORK = 2**26  # n m: above it, attributions are not computed to show an object
_STYLE = Markup(
    "<style>.ksm-card{--blue:#0072b2;--orange:#d55e00;max-width:60rem}"
    ".ksm-card .good{fill:var(--blue)}.ksm-card .bad{fill:var(--orange)}"
    ".ksm-card .unsure{fill-opacity:.38}.ksm-card .axis{stroke:currentColor}"
    ".ksm-card svg text{fill:currentColor;font-size:11px}.ksm-card svg{max-width:100%}"
    "@media(prefers-color-scheme:dark){.ksm-card{--blue:#56b4e9;--orange:#f08a3c}}</style>"
)


def card(surrogate: Surrogate) -> str:
    """HTML of a few targets: leave-one-out effects in words and bars; the text where it is large.

    Which way a target gets better is guessed from its name, and said.
    """
    surrogate = surrogate.with_tensor_answers()
    parts = [Markup("<p>{}</p>").format(line) for line in str(surrogate).splitlines()]
    n, names = surrogate.masks.num_tasks, surrogate.target_names
    if n * len(surrogate.masks) <= _MAX_WORK:
        found, ways = Attributions.of(surrogate, "loo"), directions(names, None)
        good = [quality.predicts for quality in qualities(surrogate)]
        for j in [j for j in range(len(names)) if good[j]][:_MAX_TARGETS]:
            said = answer_of(surrogate, found, j, ways[j])
            heading = "<p><b>{}</b>: leave-one-out effects, {}; {} of {} tasks clear of zero</p>"
            clear = said["num_clear"] if said["known"] else "unknown"
            parts.append(Markup(heading).format(names[j], ways[j], clear, n))
            order = largest(found.values[:, j], _MAX_BARS)
            half = None if found.half is None else found.half[order, j]
            tasks = [shortened(surrogate.task_names[i], 24) for i in order.tolist()]
            parts.append(bars(found.values[order, j], half, tasks, ways[j].sign))
        if len(names) > _MAX_TARGETS:
            text = "<p>… of {:,} targets. <code>ksm_ext.write_report(…)</code> has all.</p>"
            parts.append(Markup(text).format(len(names)))
    return str(Markup('<div class="ksm-card">{}{}</div>').format(_STYLE, Markup("").join(parts)))
