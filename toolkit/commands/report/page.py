"""A report as one HTML file: text that stands without a script, curves that a script draws.

The curves are on canvases, by some hundred lines of script in the file itself: a plotting library
for browsers is larger than the whole page may be, and one that is fetched needs a network.
"""

import math
import shlex
from pathlib import Path
from typing import Any

import jinja2
import msgspec
import numpy as np
from markupsafe import Markup

from toolkit.commands.report import tables
from toolkit.commands.report.charts import Axes, Chart, Curve
from toolkit.commands.report.reading import Report, RunReport
from toolkit.commands.runs import compare
from toolkit.commands.runs.curves import LETTERS
from toolkit.config.secrets import mask_secrets
from toolkit.errors import ConfigError
from toolkit.metrics.history import Series
from toolkit.runs.files import RUN_FILES
from toolkit.storage.atomic import write_atomic
from toolkit.storage.foreign import check_regular
from toolkit.wording import compact, span, visible

_FOLDER = Path(__file__).parent
_BEGINNING = b"<!doctype html>"
COLORS = (
    "#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd",
    "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf",
)  # fmt: skip
SECTIONS = {
    "overview": "Overview",
    "differences": "Differences",
    "loss": "Losses",
    "lr": "Learning rate",
    "norms": "Norms of gradients and weights",
    "throughput": "Throughput",
    "evals": "Evaluations",
    "samples": "Samples",
    "data": "Data",
    "checkpoints": "Checkpoints",
    "attempts": "Attempts and interruptions",
    "system": "System",
    "other": "Other metrics",
    "config": "Config",
    "repeat": "How to repeat it",
}


def write_html(report: Report, path: Path) -> int:
    """Write the page to `path`, in the place of a page that is there; its size in bytes.

    Raises:
        ConfigError: it cannot be written, or the file there is no page.
    """
    data = html(report).encode()
    try:
        if path.exists():
            check_regular(path, ConfigError)
            with path.open("rb") as file:
                if file.read(len(_BEGINNING)) not in (_BEGINNING, b""):
                    raise ConfigError(f"{path}: exists and is no report; give another", key="--out")
        write_atomic(path, data)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}", key="--out") from None
    return len(data)


def html(report: Report) -> str:
    """The page."""
    sections = {key: text for key, text in SECTIONS.items() if key != "differences"}
    return filled(
        "page.html.j2",
        report=report,
        sections=SECTIONS if len(report.runs) > 1 else sections,
        colors=COLORS,
        letters=[*LETTERS, *["-"] * len(report.runs)],
        script=Markup((_FOLDER / "page.js").read_text()),
        data=Markup(_embedded(report)),
        overview=tables.overview(report.runs),
        evaluations=tables.evaluations(report.runs),
        data_of_runs=tables.data(report.runs),
        commands=_commands,
        shown_difference=compare.shown,
    )


def filled(template: str, **values: Any) -> str:
    """A template of this folder with `values`, in which no text is markup."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_printable,
    )
    environment.filters |= {
        "compact": compact,
        "span": span,
        "number": _number,
        "masked": mask_secrets,
    }
    style = Markup((_FOLDER / "page.css").read_text())
    return environment.get_template(template).render(style=style, **values)


def _printable(value: Any) -> Any:
    if isinstance(value, Markup) or not isinstance(value, str):
        return "" if value is None else value
    return visible(value, kept="\n\t")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"


def _embedded(report: Report) -> str:
    """What the script draws, as JSON that cannot end the element it stands in."""
    start = [_first_time(report, run) for run in range(len(report.runs))]
    data = {
        "runs": [visible(run.title) for run in report.runs],
        "colors": COLORS,
        "charts": {
            section: [_chart(chart, start) for chart in charts]
            for section, charts in report.charts.items()
        },
        "attempts": [
            [
                [event.attempt.number, _place(event.begin, since), _place(event.end, since)]
                for event in run.events
                if event.begin is not None
            ]
            for run, since in zip(report.runs, start, strict=True)
        ],
    }
    return msgspec.json.encode(data).decode().replace("<", "\\u003c")


def _first_time(report: Report, run: int) -> float:
    """Of the run's curves: the axis of time begins there."""
    times = [
        float(np.nanmin(curve.points.time))
        for charts in report.charts.values()
        for chart in charts
        for curve in chart.curves
        if curve.run == run and np.isfinite(curve.points.time).any()
    ]
    return min(times, default=0.0)


def _chart(chart: Chart, start: list[float]) -> dict[str, Any]:
    curves = [_curve(curve, start[curve.run]) for curve in chart.curves]
    found = {"title": visible(chart.title), "log": chart.is_log, "curves": curves}
    return found | ({"byRun": True} if chart.is_by_run else {})


def _curve(curve: Curve, start: float) -> dict[str, Any]:
    found = {"run": curve.run, "label": visible(curve.label), **_columns(curve.points, start)}
    if curve.is_exact:
        found["exact"] = True
    if curve.is_few:
        found["few"] = True
    if curve.dash:
        found["dash"] = curve.dash
    if curve.means is not None:
        found["means"] = _columns(curve.means, start)
    return found


def _columns(series: Series, start: float) -> dict[str, list[Any]]:
    """Six digits of a value are more than a screen has."""
    return {
        "step": series.step.tolist(),
        "tokens": [tokens if tokens >= 0 else None for tokens in series.tokens.tolist()],
        "time": [_short(time - start, 1) for time in series.time.tolist()],
        "value": [
            float(f"{value:.6g}") if math.isfinite(value) else None
            for value in series.value.tolist()
        ],
    }


def _short(value: float, digits: int) -> float | None:
    return round(value, digits) if math.isfinite(value) else None


def _place(axes: Axes | None, start: float) -> dict[str, Any] | None:
    if axes is None:
        return None
    time = None if axes.time is None else _short(axes.time - start, 1)
    return {"step": axes.step, "tokens": axes.tokens, "time": time}


def _commands(run: RunReport) -> list[str]:
    """What makes the run again, as far as the folder tells."""
    facts, lines = run.facts, []
    if facts.git.get("commit"):
        lines.append(f"git checkout {shlex.quote(str(facts.git['commit']))}")
        if facts.git.get("dirty"):
            patch = Path(facts.folder) / RUN_FILES.changes
            known = f"git apply {shlex.quote(str(patch))}"
            lines.append(known if patch.is_file() else "# uncommitted changes were not recorded")
    argv = facts.command.get("argv")
    if isinstance(argv, list) and len(argv) > 1:
        words = [str(word) for word in argv[1:]]
        lines.append(f"# as it was typed, in {visible(str(facts.command.get('cwd', '?')))}")
        lines.append(shlex.join(["toolkit", *words]))
    for resume in facts.resumes:
        typed = shlex.join(["toolkit", *map(str, resume["argv"][1:])])
        lines.append(f"# attempt {resume.get('attempt', '?')} went on: {visible(typed)}")
    stored = shlex.quote(str(Path(facts.folder) / RUN_FILES.config))
    again = shlex.quote(f"{facts.record.name}-again")
    lines += ["# the same config, every value as it was", f"toolkit train {stored} --name {again}"]
    lines += [
        "# to the last bit?",
        f"toolkit runs compare {shlex.quote(facts.folder)} {again}",
    ]
    return lines
