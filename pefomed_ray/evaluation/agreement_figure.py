"""The comparison of automatic metrics, judges and people as one figure: what each says, with its 95 % interval.

Two panels: how often a measure puts two answers in the reference's order, which every measure can do, and Cohen's
kappa, for those that give verdicts on the reference's scale. Texts stay texts, so that a reader's own fonts write names
in any script.
"""

import io
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

INK, SOFT, LINE = "#1c2733", "#5b6b7b", "#dde3e9"
COLOURS = {"judge": "#1769aa", "automatic": "#6b4fa0", "rater": "#b3541e", "people": "#b3541e"}
MARKERS = {"judge": "s", "automatic": "o", "rater": "D", "people": "D"}
KIND_WORDS = {"automatic": "automatic metric", "judge": "judge (a language model)", "rater": "one person"}
TITLES = {"vqa": "answers", "report": "reports", "caption": "captions"}
ROW_IN = 0.42
LABEL_CHARACTERS = {False: 34, True: 17}


def draw_figure(result: Mapping[str, Any], *, narrow: bool) -> bytes:
    """The figure of an agreement's result as SVG: two panels beside each other, or for a phone below each other."""
    rows = figure_rows(result)
    height = ROW_IN * max(len(rows), 2) + 1.1
    size = (4.3, 2 * height + 0.7) if narrow else (10.0, height + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasSVG(figure)
    panels = figure.subplots(2, 1) if narrow else figure.subplots(1, 2, sharey=True)
    whom = {"people": "people", "rater": "the rater", "judge": "the judge"}[result["reference"]["kind"]]
    kappa = kappa_name(result)
    words = "Cohen's kappa" if kappa == "kappa" else "Quadratically weighted kappa"
    order, verdict = panels
    _panel(order, rows, result, "ordered", narrow)
    order.set_title(f"Same order as {whom}", loc="left", fontsize=11, color=INK, fontweight="bold")
    order.set_xlabel(f"of 100 pairs of {TITLES[result['task']]} (50: chance)", color=SOFT)
    _panel(verdict, rows, result, kappa, narrow)
    verdict.set_title(f"Same {verdict_word(result)} as {whom}", loc="left", fontsize=11, color=INK, fontweight="bold")
    verdict.set_xlabel(f"{words} (0: chance, 1: always)", color=SOFT)
    kinds = list(dict.fromkeys(result["measures"][row["measure"]]["kind"] for row in rows))
    handles = [
        order.plot([], [], MARKERS[kind], color=COLOURS[kind], label=KIND_WORDS[kind], markersize=6)[0]
        for kind in kinds
    ]
    figure.legend(
        handles=handles,
        loc="outside lower left",
        ncols=1 if narrow else len(handles),
        frameon=False,
        fontsize=10,
        labelcolor=INK,
    )
    file = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "pefomed-ray"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # from the font that it measures texts by
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def figure_rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The comparisons over all answers: metrics and judges from the best order to the worst, those that are not about
    the same items after the others, then raters."""
    compared: Sequence[dict[str, Any]] = result["answer_types"]["all"]["compared"]
    raters = [row for row in compared if result["measures"][row["measure"]]["kind"] == "rater"]
    others = [row for row in compared if row not in raters]

    def order(row: dict[str, Any]) -> tuple[bool, float]:
        value: float | None = row["statistics"]["ordered"]["value"]
        return not row["fewer_items"], -1.0 if value is None else value

    return [*sorted(others, key=order, reverse=True), *raters]


def kappa_name(result: Mapping[str, Any]) -> str:
    """Of verdicts plain kappa; of grades the one for which a grade beside is nearly right."""
    return "kappa" if result["task"] == "vqa" else "kappa_quadratic"


def verdict_word(result: Mapping[str, Any]) -> str:
    """What judges and people give."""
    return "verdict" if result["task"] == "vqa" else "grade"


def _panel(axes: Axes, rows: Sequence[dict[str, Any]], result: Mapping[str, Any], statistic: str, narrow: bool) -> None:
    times = 100.0 if statistic == "ordered" else 1.0
    chance = 50.0 if statistic == "ordered" else 0.0
    lowest = chance
    for place, row in enumerate(rows):
        measure, found = result["measures"][row["measure"]], row["statistics"][statistic]
        kind, reference = measure["kind"], result["measures"][result["reference"]["name"]]
        if found["value"] is None:
            other_scale = statistic != "ordered" and measure["scale"] != reference["scale"]
            axes.text(
                chance + times * 0.02,
                place,
                f"gives no {verdict_word(result)}" if other_scale else "not defined",
                va="center",
                fontsize=9,
                color=SOFT,
                style="italic",
            )
            continue
        if found["ci95"] is not None:
            ends = [times * end for end in found["ci95"]]
            axes.plot(ends, [place, place], color=COLOURS[kind], linewidth=2.2, solid_capstyle="butt")
            lowest = min(lowest, ends[0])
        axes.plot([times * found["value"]], [place], MARKERS[kind], color=COLOURS[kind], markersize=7)
        lowest = min(lowest, times * found["value"])
    raters = sum(result["measures"][row["measure"]]["kind"] == "rater" for row in rows)
    if 0 < raters < len(rows):
        axes.axhline(len(rows) - raters - 0.5, color=SOFT, linewidth=0.8)
    axes.axvline(chance, color=SOFT, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    axes.set_xlim(lowest - times * 0.02, times * 1.0 + times * 0.02)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    labels = [
        result["measures"][row["measure"]]["label"] + (f", {row['n']:,} items" if row["fewer_items"] else "")
        for row in rows
    ]
    axes.set_yticks(range(len(rows)), [textwrap.fill(label, LABEL_CHARACTERS[narrow]) for label in labels])
    for text in axes.get_yticklabels():
        text.set_parse_math(False)  # a name may hold a $
    axes.tick_params(axis="y", length=0, labelsize=10, labelcolor=INK)
    axes.tick_params(axis="x", color=LINE, labelsize=9.5, labelcolor=SOFT)
    axes.grid(axis="x", color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(LINE)
