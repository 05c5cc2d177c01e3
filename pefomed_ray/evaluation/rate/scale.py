"""What the numbers mean that people give."""

from pefomed_ray.artifacts.records import Task

RIGHT_OR_WRONG = {
    1: "Right: means the same as the reference",
    0: "Wrong, partly right or beside the question",
}
LIKERT = {
    4: "Says the same; nothing important differs",
    3: "Small differences that would change nothing",
    2: "Half: some of what is important is right",
    1: "Mostly missing or wrong",
    0: "All wrong, or nothing usable",
}
"""Five points, as the paper's judge gives to reports (arXiv 2401.02797); the words are ours."""


def scale_of(task: Task) -> dict[int, str]:
    """Score -> meaning, best first: 1 and 0 for `vqa`, 4 to 0 for `report` and `caption`."""
    return RIGHT_OR_WRONG if task == "vqa" else LIKERT
