"""The benchmark of packed trials on a GPU, tiny and on the CPU: its course, and that it sees what does not train."""

import json

import pytest
import torch

from benchmarks.gpu_pack import Case, check, main, report
from pefomed_ray.training.packed_step import PackedOptimizer

CPU = torch.device("cpu")
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 1536,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 112,
    "patch_size": 14,
    "initializer_range": 0.02,
}


def test_the_whole_course_at_a_tiny_size(capsys: pytest.CaptureFixture[str]) -> None:
    report(TEXT, VISION, CPU, [Case(1, 1), Case(3, 2)], 1, as_json=True, quick=True)
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(document["ratios"]) == set(document["aa"]) == {"k1_b1", "k3_b2"}
    seen = document["detail"]["cases"]
    assert all(case["losses"][-1] < case["losses"][0] for case in seen.values())
    expected = 3 * seen["k3_b2"]["alone_step_s"] / seen["k3_b2"]["packed_step_s"]
    assert document["ratios"]["k3_b2"] == pytest.approx(expected, rel=1e-3)


def test_a_pack_that_does_not_learn_is_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PackedOptimizer, "step", lambda self, *_: self.pack.gradients_KP.zero_())
    with pytest.raises(AssertionError, match="k2_b1: losses"):
        report(TEXT, VISION, CPU, [Case(2, 1)], 1, as_json=False, quick=True)


def test_one_adapter_that_is_off_is_seen() -> None:
    falling = [3.0, 2.9, 2.7]
    check(Case(2, 1), [[loss, loss + 0.01] for loss in falling], falling)
    with pytest.raises(AssertionError, match="at step 2"):
        check(Case(2, 1), [[3.0, 3.0], [2.9, 2.95], [2.7, 3.0]], falling)
    with pytest.raises(AssertionError, match="do not learn"):
        check(Case(1, 1), [[3.0], [3.0]], [3.0, 3.0])


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    main(json_=True)
    said, document = capsys.readouterr().out.splitlines()
    assert said == "gpu_pack: skipped, no CUDA device"
    assert (json.loads(document)["ratios"], json.loads(document)["skipped"]) == ({}, "no CUDA device")
