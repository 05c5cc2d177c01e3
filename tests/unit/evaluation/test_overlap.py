from pefomed_ray.evaluation.overlap import image_overlap_share, text_overlap
from pefomed_ray.evaluation.predictions import Prediction

TRAINING = [("Which organ?", "Lung"), ("Which side?", "left")]
ROWS = [
    Prediction("1", " which  ORGAN? ", "lung", "left"),
    Prediction("2", "Which side?", "lung", "left"),
    Prediction("3", "Which side?", "right", None),
]


def test_of_questions_the_pair_counts() -> None:
    assert text_overlap(ROWS, TRAINING, "vqa") == {
        "references": {"value": 1 / 3, "n": 3},
        "predictions": {"value": 1 / 2, "n": 2},
    }


def test_of_reports_the_text_counts() -> None:
    assert text_overlap(ROWS, TRAINING, "report") == {
        "references": {"value": 2 / 3, "n": 3},
        "predictions": {"value": 1.0, "n": 2},
    }


def test_without_training_rows_nothing_is_known() -> None:
    assert text_overlap(ROWS, [], "vqa")["references"] == {"value": None, "n": 3}
    assert image_overlap_share([["a"]], []) == {"value": None, "n": 1}


def test_images_are_counted_once() -> None:
    assert image_overlap_share([["a", "b"], ["a"], ["c"]], [["c"], ["d"]]) == {"value": 1 / 3, "n": 3}
