"""What an evaluation found, in three sentences for somebody who knows medicine and no metrics."""

from typing import Any

from pefomed_ray.evaluation.flags import CONTROL_WORDS
from pefomed_ray.evaluation.score import PRIMARY_METRIC

SEES_NO_IMAGE = ("blank_image", "majority", "question_prior", "constant_text")
"""Controls that cannot know what is on the picture."""


def headline(metrics: dict[str, Any]) -> list[str]:
    """The model's result; what is reached without looking; what follows of the two."""
    task, primary = metrics["task"], PRIMARY_METRIC[metrics["task"]]
    if metrics[primary]["value"] is None:
        return [f"None of the {metrics['rows']:,} rows has a score."]
    sentences = [_result(metrics, primary)]
    reached = {
        name: scores[primary]["value"]
        for name, scores in metrics["controls"].items()
        if name in SEES_NO_IMAGE and metrics["against_controls"].get(name)
    }
    if not reached:
        return [*sentences, "What is reached without seeing the pictures was not measured."]
    parts = []
    if "blank_image" in reached:
        parts.append(f"shown grey pictures, it still gets {_points(reached.pop('blank_image'), task)}")
    if reached:
        best = max(reached, key=lambda name: reached[name])
        parts.append(f"{CONTROL_WORDS[best]}, without any model, gets {_points(reached[best], task)}")
    sentences.append(_capitalised("; ".join(parts) + "."))
    return [*sentences, _conclusion(metrics, primary)]


def _result(metrics: dict[str, Any], primary: str) -> str:
    found, task = metrics[primary], metrics["task"]
    interval = ""
    if found["ci95"] is not None:
        interval = f" (95 % interval {_whole(found['ci95'][0])} to {_whole(found['ci95'][1])})"
    if task == "vqa":
        return (
            f"The model answered {_whole(found['value'])} of 100 questions as the reference does{interval}: "
            f"{found['n']:,} questions about {metrics['image_overlap_with_training']['n']:,} images."
        )
    return (
        f"The model's {task}s share {_whole(found['value'])} % of their words, in order, with the references"
        f"{interval}: {found['n']:,} {task}s."
    )


def _conclusion(metrics: dict[str, Any], primary: str) -> str:
    measured = {
        name: difference
        for name, difference in metrics["against_controls"].items()
        if name in SEES_NO_IMAGE and difference is not None
    }
    nearest = min(measured, key=lambda name: measured[name]["value"])
    difference = measured[nearest]
    ahead, interval = difference["value"], difference["ci95"]
    if interval is None or interval[0] <= 0:
        return "So these numbers do not show that it looks at the pictures."
    unit = "questions of 100" if metrics["task"] == "vqa" else "points of 100"
    return (
        f"So it is ahead of the best that needs no picture by {_whole(ahead)} {unit} "
        f"(95 % interval {_whole(interval[0])} to {_whole(interval[1])})."
    )


def _points(share: float, task: str) -> str:
    return f"{_whole(share)} of 100" if task == "vqa" else f"{_whole(share)} %"


def _whole(share: float) -> str:
    return f"{100 * share:.0f}"


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]
