"""The benchmarks of packed trials: their course at a tiny size, what they refuse, and their arithmetic; no timings."""

from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks._adapters import Apart, Trained, check_equal
from benchmarks._measure import Sample
from benchmarks.memory import Held, kernel_bytes, watched
from benchmarks.pack import Case, Outcome, all_cases, measure, scaled
from pefomed_ray.training.packed_step import PackedOptimizer

TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 112,
    "patch_size": 14,
    "initializer_range": 0.02,
}
START = [torch.zeros(4)]
MOST = Apart(losses=1e-4, way=1e-3)


def course(*cases: Case) -> dict[Case, Outcome]:
    return measure(cases, {"": TEXT}, VISION)


def test_both_arms_train_the_same_at_a_tiny_size() -> None:
    five, bf16 = Case(5, 2, rounds=1), Case(2, 1, "bf16", rounds=1)
    done = course(five, bf16)
    assert set(done[five].rounds[0]) == {"ours", "ours again", "separate", "separate_cached"}
    assert done[five].apart["ours"].way < 1e-3
    assert len(done[five].losses) == 4  # of five trials the last is the first over again
    assert {case: set(outcome.apart) for case, outcome in done.items()}[bf16] == set(done[five].apart)


def test_a_fast_pack_that_trains_nothing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PackedOptimizer, "step", lambda self, *_: self.pack.gradients_KP.zero_())
    with pytest.raises(AssertionError, match="k2_b1_fp32 ours: trial 0 does not learn"):
        course(Case(2, 1, rounds=1))


def test_a_hundredth_more_learning_rate_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    step = PackedOptimizer.step
    monkeypatch.setattr(
        PackedOptimizer, "step", lambda self, rates, taken: step(self, [1.01 * r for r in rates], taken)
    )
    with pytest.raises(AssertionError, match="are not the same"):
        course(Case(2, 1, rounds=1))


def test_every_trial_is_compared_with_its_own() -> None:
    expected = Trained([[3.0, 2.0]], [torch.ones(4)])
    same = Trained([[3.0, 2.0]] * 5, [torch.ones(4)] * 5)
    start = START * 4
    of_four = Trained(expected.losses * 4, expected.weights * 4)
    assert check_equal("arm", same, of_four, start, MOST) == Apart(0.0, 0.0)
    off = Trained([[3.0, 2.0]] * 5, [torch.ones(4)] * 4 + [torch.full((4,), 1.01)])
    with pytest.raises(AssertionError, match="not the same"):
        check_equal("arm", off, of_four, start, MOST)
    still = Trained([[3.0, 3.0]], [torch.zeros(4)])
    with pytest.raises(AssertionError, match="does not learn"):
        check_equal("arm", still, expected, START, MOST)


def test_trials_that_stand_for_others_are_counted_as_often() -> None:
    trained, sample = scaled(lambda: (Trained([], []), Sample(2.0, 1.0)), 16 / 4)()
    assert (sample.wall_s, sample.cpu_s, trained.losses) == (8.0, 4.0, [])


def test_cases_name_each_number_of_adapters_rows_and_precision() -> None:
    names = [case.name for case in all_cases(fast_bfloat16=True)]
    assert {f"k{k}_b{b}_{p}" for k in (1, 2, 4, 8, 16) for b in (1, 4) for p in ("fp32", "bf16")} < set(names)
    slow = [case.name for case in all_cases(fast_bfloat16=False)]
    assert [name for name in slow if "bf16" in name] == ["k1_b1_bf16", "k8_b1_bf16"]
    assert len(names) == len(set(names))


def test_pages_of_files_are_counted_once() -> None:
    assert Held(peak_bytes=100, file_bytes=40, losses=[]).times(8) == 8 * 60 + 40
    assert Held(peak_bytes=100, file_bytes=0, losses=[]).times(8) == 800  # the control


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the kernel's count of memory is Linux's")
def test_the_kernel_says_what_a_process_holds() -> None:
    def hold(size: int) -> tuple[Trained, None]:
        assert len(bytearray(b"1") * size) == size
        return Trained([], []), None

    large, small = (watched(partial(hold, size)).peak_bytes for size in (128 * 2**20, 1))
    assert large - small > 100 * 2**20  # so the peak is what was held meanwhile, not what was ever
    with pytest.raises(ValueError, match="no VmNothing"):
        kernel_bytes("VmHWM:\t 12 kB\n", "VmNothing")
    assert kernel_bytes("VmHWM:\t 12 kB\n", "VmHWM") == 12 * 1024
