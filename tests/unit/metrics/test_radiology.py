from pathlib import Path

import pytest

from pefomed_ray.errors import ConfigError, PefomedError
from pefomed_ray.metrics.radiology import check_radiology, highest, radiology_metrics

STAND_IN = '''
"""RadEval's interface (2.2.1), without its models."""

class RadEval:
    def __init__(self, metrics=None, per_sample=False, show_progress=True):
        (self.name,) = metrics
        assert not show_progress
        self.per_sample = per_sample
        self.metric_keys = ["f1chexbert_all_micro_f1"] if self.name == "f1chexbert" else [self.name]
        if self.name == "srrbert":
            raise OSError("could not fetch weights for: secret report")

    def __call__(self, refs, hyps):
        same = [float(ref == hyp) for ref, hyp in zip(refs, hyps)]
        if self.name == "f1chexbert":
            return {"f1chexbert_sample_acc_all": same} if self.per_sample else {"f1chexbert_all_micro_f1": 0.25}
        if self.name == "ratescore":
            return {"ratescore": same[:1]}
        if self.name == "radcliq":
            return {"radcliq": [float("nan"), *same[1:]]}
        return {self.name: same}
'''


@pytest.fixture
def radeval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "radeval.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "radeval", raising=False)


@pytest.fixture
def no_radeval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pefomed_ray.metrics.radiology.find_spec", lambda name: None)


@pytest.mark.usefixtures("radeval")
def test_by_item_and_together() -> None:
    found = radiology_metrics(["bertscore", "f1chexbert", "radcliq"], ["a", "b"], ["a", "c"])
    assert found.items == {
        "bertscore": [1.0, 0.0],
        "f1chexbert_sample_acc_all": [1.0, 0.0],
        "radcliq": [None, 0.0],
    }
    assert found.corpus == {"f1chexbert_all_micro_f1": 0.25}


@pytest.mark.usefixtures("radeval")
@pytest.mark.parametrize(("name", "said"), [("srrbert", "OSError"), ("ratescore", "one number for each of 2")])
def test_a_failure_is_named_without_its_text(name: str, said: str) -> None:
    with pytest.raises(PefomedError, match=said) as caught:
        radiology_metrics([name], ["a", "b"], ["a", "c"])
    assert name in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.usefixtures("no_radeval")
def test_the_missing_package_names_the_extra() -> None:
    with pytest.raises(ConfigError, match=r"pefomed-ray\[radeval\]"):
        radiology_metrics(["radgraph"], ["a"], ["b"])
    check_radiology([])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("radgraf", "did you mean 'radgraph'"),
        ("spice", "allowed: bertscore"),
        ("crimson", "sends the texts"),
        ("green", "code that is downloaded"),
    ],
)
def test_names_that_are_none_or_not_offered(name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_radiology([name])


def test_bounds() -> None:
    assert (highest("bertscore"), highest("radgraph_simple"), highest("radcliq_v1")) == (1.0, 1.0, None)
