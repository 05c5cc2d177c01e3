"""`report.html`: what a search found, on one page without a second file; it opens without a network.

The pictures are Optuna's own (`optuna.visualization`), drawn by plotly.js, which stands in the page once. They show all
trials that reported anything, each with its best epoch's value, as the leaderboard has it: were only those shown that
ran to their end, nobody would see where the stopped ones lie.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import optuna
import plotly.graph_objects as go
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from optuna import visualization
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from plotly.offline import get_plotlyjs

from pefomed_ray.artifacts.storage import write_bytes
from pefomed_ray.search.choice import Choice, pareto_front
from pefomed_ray.search.leaderboard import TrialRow

REPORT_FILE = "report.html"
LEARNING_RATE, RANK = "optimizer.learning_rate", "lora.rank"
ENOUGH = 10
"""Trials for importances: they compare the best tenth with all."""
INK, ACCENT, GREY = "#1c2733", "#1769aa", "#b9c4cf"
HEIGHT_PX = 400


@dataclass(frozen=True)
class Picture:
    """One picture of the page, or why there is none."""

    title: str
    note: str
    """What the reader must know; of a picture that is missing, why."""
    html: str | None
    whole_width: bool


def write_report(
    output: Path, name: str, metric: str, study: Study, rows: Sequence[TrialRow], choice: Choice | None
) -> Path:
    """Write the page of the search in `output`, finished or not.

    `study` is the search's, as its storage has it; `rows` is the leaderboard, and `choice` None where no trial won.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"share": _share, "interval": _interval, "value": _value}
    page = environment.get_template("report.html.j2").render(
        name=name,
        metric=metric,
        rows=rows,
        params=list(dict.fromkeys(key for row in rows for key in row.params)),
        states={state: sum(row.state == state for row in rows) for state in ("finished", "stopped", "failed")},
        choice=choice,
        front=pareto_front(rows),
        pictures=pictures(study, rows, metric),
        plotly_js=get_plotlyjs(),
    )
    write_bytes(output / REPORT_FILE, page.encode())
    return output / REPORT_FILE


def pictures(study: Study, rows: Sequence[TrialRow], metric: str) -> list[Picture]:
    """All pictures, in the page's order."""
    shown = _with_best_values(study)
    trials = shown.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    varying = [name for name in sorted({name for trial in trials for name in trial.params}) if _varies(trials, name)]
    fixed = [name for name in (LEARNING_RATE, RANK) if name not in varying]
    scored = sum(row.value is not None for row in rows)
    alone = None if len(trials) > 1 else "it takes two trials that reported something"
    one_way = None if len(varying) > 1 else "it takes two parameters that vary, over two trials that reported something"
    return [
        _picture(
            "How the search went",
            "Each trial's best epoch, and the best so far.",
            alone,
            lambda: visualization.plot_optimization_history(shown, target_name=metric),
        ),
        _picture(
            "Epoch by epoch",
            "Grey: trials that did not run to their last epoch.",
            None if trials else "no trial reported anything",
            lambda: _epochs(study, metric),
        ),
        _picture(
            "Metric against parameters that are trained",
            "The line joins the trials that none beats without training more.",
            None if scored > 1 else "it takes two trials that came to a result",
            lambda: _pareto(rows, metric),
        ),
        _picture(
            "Which parameters matter",
            f"PED-ANOVA (arXiv 2304.10255) of {len(trials)} trials; of a few dozen, no more than a hint.",
            one_way or (f"it takes {ENOUGH} trials that reported something" if len(trials) < ENOUGH else None),
            lambda: visualization.plot_param_importances(shown, target_name=metric),
        ),
        _picture(
            "Parameters one by one",
            "Here and below a stopped trial counts with the best it had until then, so rather too low.",
            alone,
            lambda: visualization.plot_slice(shown, target_name=metric),
            whole_width=True,
        ),
        _picture(
            "Learning rate and rank together",
            "Dots are trials. Between them the surface is interpolated: nothing was measured there.",
            f"{' and '.join(fixed)} did not vary" if fixed else None,
            lambda: visualization.plot_contour(shown, params=[LEARNING_RATE, RANK], target_name=metric),
            whole_width=True,
        ),
        _picture(
            "Parameters together",
            "A line a trial. Drag along an axis to pick some out.",
            one_way,
            lambda: visualization.plot_parallel_coordinate(shown, target_name=metric),
            whole_width=True,
        ),
    ]


def _picture(
    title: str, note: str, missing: str | None, draw: Callable[[], go.Figure], *, whole_width: bool = False
) -> Picture:
    if missing:
        return Picture(title, f"Not drawn: {missing}.", None, whole_width)
    figure = draw().update_layout(
        title=None,
        template="plotly_white",
        height=HEIGHT_PX,
        width=None,
        margin={"l": 70, "r": 30, "t": 40, "b": 60},
        font={"family": "system-ui, sans-serif", "color": INK},
    )
    # Else a learning rate of 1e-4 is read as 100 micro.
    figure.update_xaxes(exponentformat="power").update_yaxes(exponentformat="power")
    identity = title.lower().replace(" ", "-")
    options = {"displaylogo": False, "responsive": True}
    html = figure.to_html(full_html=False, include_plotlyjs=False, div_id=identity, config=options)
    return Picture(title, note, html, whole_width)


def _with_best_values(study: Study) -> Study:
    """A copy in memory in which every trial that reported anything is complete with its best epoch's value."""
    copy = optuna.create_study(direction="maximize")
    for trial in study.get_trials(deepcopy=False):
        values = trial.intermediate_values.values()
        counts = trial.state in (TrialState.COMPLETE, TrialState.PRUNED) and values
        copy.add_trial(
            optuna.trial.create_trial(
                state=TrialState.COMPLETE if counts else TrialState.FAIL,
                value=max(values) if counts else None,
                params=trial.params,
                distributions=trial.distributions,
            )
        )
    return copy


def _varies(trials: Sequence[FrozenTrial], name: str) -> bool:
    return len({trial.params[name] for trial in trials if name in trial.params}) > 1


def _epochs(study: Study, metric: str) -> go.Figure:
    """Optuna's curves of what trials reported, those of trials that did not run to their end in grey, behind."""
    figure = visualization.plot_intermediate_values(study)
    complete = {trial.number for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))}
    for curve in figure.data:
        if int(curve.name.removeprefix("Trial")) not in complete:
            curve.update(line_color=GREY, marker_color=GREY, zorder=-1)
    return figure.update_layout(xaxis={"title": "epoch", "dtick": 1}, yaxis_title=metric)


def _pareto(rows: Sequence[TrialRow], metric: str) -> go.Figure:
    scored = [row for row in rows if row.value is not None]
    by_trial = {row.trial: row for row in scored}
    front = [by_trial[trial] for trial in pareto_front(rows)]
    dots = go.Scatter(
        x=[row.trainable_parameters for row in scored],
        y=[row.value for row in scored],
        text=[f"trial {row.trial}" for row in scored],
        mode="markers",
        marker={"color": GREY, "size": 9},
        name="trial",
    )
    line = go.Scatter(
        x=[row.trainable_parameters for row in front],
        y=[row.value for row in front],
        text=[f"trial {row.trial}" for row in front],
        mode="lines+markers",
        line={"color": ACCENT, "shape": "hv"},
        marker={"size": 9},
        name="Pareto front",
    )
    return go.Figure([dots, line]).update_layout(xaxis_title="parameters trained", yaxis_title=metric)


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _interval(interval: Sequence[float] | None) -> str:
    return "–" if interval is None else f"{100 * interval[0]:.1f} – {100 * interval[1]:.1f}"


def _value(value: object) -> str:
    """Of a parameter; numbers short."""
    return "–" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
