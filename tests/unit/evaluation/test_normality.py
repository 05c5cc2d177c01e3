import pytest

from pefomed_ray.evaluation.normality import looks_normal, normal_share

NORMAL = [
    "Heart size is normal. Lungs are clear. No pneumothorax or pleural effusion.",
    "No acute cardiopulmonary abnormality.\nNo focal consolidation.",
    "The lungs are free of infiltrates",
    "UNREMARKABLE CHEST.",
    "Normal heart size; no focal airspace opacities.",
]
NOT_NORMAL = [
    "Heart size is enlarged. Lungs are clear.",
    "Small left pleural effusion. No pneumothorax.",
    "Lungs are clear. Degenerative changes of the spine.",
    "Nodule in the right upper lobe.",
    "",
    "PA and lateral views.",
    "Massive cardiomegaly",
]


@pytest.mark.parametrize(("reports", "normal"), [(NORMAL, True), (NOT_NORMAL, False)])
def test_the_rule(reports: list[str], normal: bool) -> None:
    assert [looks_normal(report) for report in reports] == [normal] * len(reports)


def test_a_word_that_only_holds_a_negation_denies_nothing() -> None:
    assert not looks_normal("Nodular opacity, noted before.")
    assert not looks_normal("Another effusion.")


def test_share() -> None:
    assert normal_share(["Normal.", "Effusion.", None, "Clear."]) == {"value": pytest.approx(2 / 3), "n": 3}
    assert normal_share([None]) == {"value": None, "n": 0}
