import math

import numpy as np
import pytest
from pycocoevalcap.bleu.bleu_scorer import BleuScorer

from pefomed_ray.metrics import caption
from pefomed_ray.metrics.caption import CAPTION_METRICS, NotComputed, caption_metrics, lower_split, measured
from pefomed_ray.metrics.intervals import Summed, difference, with_interval
from pefomed_ray.metrics.java import JavaError

NO_JAVA = JavaError("there is no `java` on the PATH")
REFERENCES = [["no pleural effusion is seen"], ["the heart is enlarged", "mild cardiomegaly"], ["clear lungs"]]
PREDICTIONS = ["no pleural effusion is seen", "the heart is enlarged", "clear lungs"]


def summed(found: Summed | NotComputed) -> Summed:
    assert isinstance(found, Summed)
    return found


def test_lower_split() -> None:
    assert lower_split(["The  Lungs\nare\u2028clear.", " ", "Größe"]) == ["the lungs are clear.", "", "größe"]


def test_bleu_of_the_corpus_is_not_the_mean_of_items() -> None:
    # 3 of 4 words, then 1 of 1: together 4 of 5, no brevity penalty.
    found = measured([["a b c d"], ["e"]], ["a b c x", "e"], NO_JAVA)
    bleu = summed(found["bleu1"])
    assert bleu.value == pytest.approx(4 / 5)
    assert bleu.items == pytest.approx((3 / 4, 1.0))
    assert summed(found["bleu2"]).value == pytest.approx(math.sqrt(4 / 5 * 2 / 3))


def test_brevity_looks_at_the_reference_nearest_in_length() -> None:
    near, far = (
        summed(measured([texts], ["a b"], NO_JAVA)["bleu1"]).value for texts in (["a b c", "a b d e f"], ["a b d e f"])
    )
    assert near == pytest.approx(math.exp(1 - 3 / 2))
    assert far == pytest.approx(math.exp(1 - 5 / 2))


def test_rouge_is_the_mean_and_takes_the_best_of_each_side() -> None:
    found = summed(measured([["a b c d", "x"], ["e"]], ["a b", "y"], NO_JAVA)["rougeL_coco"])
    beta2 = 1.2**2
    first = (1 + beta2) * 1.0 * 0.5 / (0.5 + beta2 * 1.0)
    assert found.items == pytest.approx((first, 0.0))
    assert found.value == pytest.approx(first / 2)


def test_cider_is_ten_for_one_s_own_words_and_not_computed_where_no_word_tells_items_apart() -> None:
    texts = ["no pleural effusion is seen", "the heart is mildly enlarged"]
    assert summed(measured([[text] for text in texts], texts, NO_JAVA)["cider"]).value == pytest.approx(10.0)
    for references in ([["clear lungs"]], [["clear lungs"], ["clear lungs"]], [[""], [" "]]):
        found = measured(references, ["clear lungs"] * len(references), NO_JAVA)["cider"]
        assert isinstance(found, NotComputed)
        assert "all have the same words" in found.reason


def test_an_empty_prediction_is_wrong_not_missing() -> None:
    found = measured([["clear lungs"], ["no effusion"]], ["", "no effusion"], NO_JAVA)
    for name in ("bleu1", "rougeL_coco", "cider"):
        assert summed(found[name]).items[0] == pytest.approx(0.0, abs=1e-6), name
        assert summed(found[name]).items[1] > 0, name


def test_without_java_meteor_is_not_computed_and_the_tokeniser_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    found = caption_metrics([["Clear lungs."], ["No effusion."]], [["clear lungs.", "effusion"], ["x", "y"]])
    assert found.tokenizer == "lower_split"
    assert len(found.systems) == 2
    for system in found.systems:
        assert list(system) == list(CAPTION_METRICS)
        assert system["meteor"] == NotComputed("METEOR needs Java: there is no `java` on the PATH")
    assert summed(found.systems[0]["bleu1"]).items[0] == pytest.approx(1.0)


def test_all_systems_are_tokenised_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def tokens(texts: list[str]) -> list[str]:
        asked.append(texts)
        return [text.upper() for text in texts]

    class NoMeteor:
        def __enter__(self) -> None:
            raise NO_JAVA

        def __exit__(self, *_: object) -> None:
            raise AssertionError

    monkeypatch.setattr(caption, "ptb_tokens", tokens)
    monkeypatch.setattr(caption, "Meteor", NoMeteor)
    found = caption_metrics([["A", "b"], ["c"]], [["a", "C"], ["B", "d"]])
    assert asked == [["A", "b", "c", "a", "C", "B", "d"]]
    assert found.tokenizer == "ptb"
    assert [summed(system["bleu1"]).items for system in found.systems] == [
        pytest.approx((1.0, 1.0)),
        pytest.approx((1.0, 0.0)),
    ]


def test_no_prediction_at_all() -> None:
    nothing = {NotComputed("no row has a prediction")}
    assert set(measured([], [], NO_JAVA).values()) == nothing
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(caption, "ptb_tokens", None)  # not called, so no Java starts
        assert [set(system.values()) for system in caption_metrics([], [[], []]).systems] == [nothing, nothing]


def test_the_interval_of_bleu_is_that_of_resampled_corpora() -> None:
    """Against the library asked again for every resample of the clusters."""
    rng = np.random.default_rng(5)
    words = np.array(["no", "acute", "effusion", "seen", "lungs", "clear", "heart", "normal", "size", "the"])
    references = [[" ".join(rng.choice(words, 9))] for _ in range(40)]
    predictions = [" ".join(np.where(rng.random(9) < 0.7, own[0].split(), rng.choice(words, 9))) for own in references]
    clusters = [str(number // 2) for number in range(40)]
    bleu = summed(measured(references, predictions, NO_JAVA)["bleu4"])
    low, high = with_interval(bleu, clusters).ci95 or (0, 0)
    values = []
    for _ in range(200):
        drawn = [2 * cluster + half for cluster in rng.integers(0, 20, 20) for half in (0, 1)]
        scorer = BleuScorer()
        for n in drawn:
            scorer += (predictions[n], references[n])
        values.append(scorer.compute_score(option="closest")[0][3])
    assert (low, high) == pytest.approx(np.percentile(values, (2.5, 97.5)), abs=0.03)
    assert low < bleu.value < high


@pytest.mark.parametrize(("predictions", "edge"), [(PREDICTIONS, 1), (["x", "y", "z"], 0)])
def test_all_right_or_all_wrong_is_not_certain(predictions: list[str], edge: int) -> None:
    found = measured(REFERENCES, predictions, NO_JAVA)
    for name, highest in (("bleu1", 1.0), ("rougeL_coco", 1.0)):
        interval = with_interval(summed(found[name]), ["a", "b", "c"]).ci95
        assert interval is not None
        assert interval[edge] == pytest.approx(edge * highest)
        assert abs(interval[1] - interval[0]) > 0.5 * highest


def test_a_difference_of_corpora() -> None:
    references = [[f"no pleural effusion {n} is seen"] for n in range(12)]
    good = [own[0] for own in references]
    worse = [text if n % 3 else "effusion" for n, text in enumerate(good)]
    rows = [str(n) for n in range(12)]
    ours, theirs = (summed(measured(references, said, NO_JAVA)["bleu4"]) for said in (good, worse))
    found = difference(ours, theirs, rows)
    assert found.value == pytest.approx(ours.value - theirs.value)
    assert found.ci95 is not None
    assert 0 < found.ci95[0] < found.value < found.ci95[1]
    back = difference(theirs, ours, rows)
    assert (back.value, back.p) == (-found.value, found.p)
    same = difference(ours, ours, rows)
    assert (same.value, same.p) == (0.0, 1.0)
    assert same.ci95 is not None
    cider = summed(measured(references, good, NO_JAVA)["cider"])
    wide = difference(cider, cider, rows).ci95
    assert wide is not None
    assert wide[1] == pytest.approx(10 * same.ci95[1])
