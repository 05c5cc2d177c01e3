"""What the numbers mean that people give."""

from pefomed_ray.artifacts.records import Task

RIGHT_OR_WRONG = {
    1: "Right: means the same as the reference",
    0: "Wrong, partly right or beside the question",
}
LIKERT = {
    4: "Same findings; only the wording differs",
    3: "All that matters is right; details differ",
    2: "Main finding right, others wrong or missing",
    1: "Main finding wrong or missing",
    0: "Nothing that matters agrees",
}
"""Five points, as the paper's judge gives to reports (arXiv 2401.02797); in short what our judge is told
(`judge/prompts/report-1.txt`), so that people and models score by the same words."""


def scale_of(task: Task) -> dict[int, str]:
    """Score -> meaning, best first: 1 and 0 for `vqa`, 4 to 0 for `report` and `caption`."""
    return RIGHT_OR_WRONG if task == "vqa" else LIKERT
