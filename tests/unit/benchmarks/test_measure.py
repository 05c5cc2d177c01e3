"""The benchmarks' arithmetic and their pictures; no timings."""

import io
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import _measure, _pictures
from benchmarks._measure import (
    AGAIN,
    Sample,
    Spread,
    a_a,
    cpu_seconds,
    finish,
    per_arm,
    ratio,
    run_rounds,
    spread,
    timed,
)
from pefomed_ray.artifacts.folders import open_folder
from pefomed_ray.data.images import check_image
from pefomed_ray.data.intake import take_in
from pefomed_ray.data.options import DataOptions

ROUNDS = [
    {"ours": Sample(1.0, 2.0), "ours again": Sample(1.1, 2.0), "other": Sample(3.0, 3.0)},
    {"ours": Sample(2.0, 2.0), "ours again": Sample(1.8, 2.2), "other": Sample(4.0, 8.0)},
    {"ours": Sample(1.0, 1.0), "ours again": Sample(1.0, 1.0), "other": Sample(10.0, 4.0)},
]


def test_ratios_are_taken_inside_rounds_and_larger_is_better_for_us() -> None:
    assert ratio(ROUNDS, "other", "wall_s") == Spread(median=3.0, low=2.5, high=6.5, rounds=3)
    assert ratio(ROUNDS, "other", "cpu_s").median == 4.0
    assert ratio(ROUNDS, "ours", "wall_s", ours="other").median == pytest.approx(1 / 3)
    # The control: a ratio of medians over all rounds would be another number.
    assert per_arm(ROUNDS)["other"]["wall_s"] / per_arm(ROUNDS)["ours"]["wall_s"] == 4.0


def test_an_arm_against_itself_is_the_second_run_over_the_first() -> None:
    assert a_a(ROUNDS, "wall_s").median == pytest.approx(1.0)
    assert a_a(ROUNDS, "wall_s").high == pytest.approx(1.05)


def test_quartiles_of_few_values() -> None:
    assert spread([2.0]) == Spread(2.0, 2.0, 2.0, 1)
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == Spread(3.0, 2.0, 4.0, 5)


def test_rounds_run_every_arm_in_random_order_and_check_each_result() -> None:
    order: list[str] = []
    checked: list[tuple[str, int]] = []

    def arm(name: str, value: int) -> tuple[int, Sample]:
        order.append(name)
        return value, Sample(value, value)

    arms = {"ours": lambda: arm("ours", 1), "other": lambda: arm("other", 2)}
    rounds = run_rounds(arms, lambda name, value: checked.append((name, value)), rounds=20)
    assert [set(samples) for samples in rounds] == [{"ours", "ours" + AGAIN, "other"}] * 20
    assert sorted(set(checked)) == [("other", 2), ("ours", 1)]
    assert len(checked) == 60
    assert len({tuple(order[at : at + 3]) for at in range(0, 60, 3)}) == 3
    with pytest.raises(ValueError, match="wrong"):
        run_rounds(arms, lambda *_: (_ for _ in ()).throw(ValueError("wrong")), rounds=1)


def spin(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_cpu_time_counts_work_here_and_in_children_and_no_sleep() -> None:
    _, here = timed(lambda: spin(0.05))
    assert 0.05 <= here.cpu_s < 1
    _, asleep = timed(lambda: time.sleep(0.2))
    assert asleep.wall_s >= 0.2
    assert asleep.cpu_s < 0.15
    code = "import time\nend = time.process_time() + 0.3\nwhile time.process_time() < end: pass"
    _, dead_child = timed(lambda: subprocess.run([sys.executable, "-c", code], check=True))
    assert dead_child.cpu_s >= 0.3
    before = cpu_seconds()
    with subprocess.Popen([sys.executable, "-c", code + "\ntime.sleep(60)"]) as child:
        deadline = time.monotonic() + 30
        while cpu_seconds() - before < 0.3 and time.monotonic() < deadline:
            time.sleep(0.05)
        living_child = cpu_seconds() - before
        child.kill()
    assert living_child >= 0.3


def test_the_last_line_is_the_result_and_a_quick_one_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_measure, "RESULTS", tmp_path / "results")
    ratios, aa = {"vs_other": ratio(ROUNDS, "other", "wall_s")}, {"wall": a_a(ROUNDS, "wall_s")}
    finish("name", ratios, aa, {"rows": 3}, as_json=True, quick=True)
    assert not (tmp_path / "results").exists()
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["name"] == "name"
    assert document["ratios"] == {"vs_other": 3.0}
    assert document["aa"] == {"wall": 1.0}
    assert document["machine"].endswith("cores")
    assert document["detail"]["rows"] == 3
    assert document["detail"]["spread"]["vs_other"] == {"median": 3.0, "low": 2.5, "high": 6.5, "rounds": 3}
    finish("name", ratios, aa, {}, as_json=False, quick=False)
    assert json.loads((tmp_path / "results/name.json").read_text())["ratios"] == {"vs_other": 3.0}
    assert "vs_other 3.00 [2.50, 6.50], 3 rounds" in capsys.readouterr().out


def test_pictures_follow_from_their_seed_and_cost_what_radiographs_cost() -> None:
    first, second = _pictures.radiograph(0, 256), _pictures.radiograph(1, 256)
    assert first == _pictures.radiograph(0, 256)
    assert [Image.open(io.BytesIO(data)).mode for data in (first, second)] == ["L", "RGB"]
    for data in (first, second):
        check_image(data)
        assert 0.1 < len(data) / 256**2 < 0.25
    assert np.asarray(Image.open(io.BytesIO(first))).std() > 10  # the control: not an empty picture


def test_a_corpus_has_a_file_of_its_own_for_each_row(tmp_path: Path) -> None:
    examples = _pictures.write_corpus(tmp_path / "corpus", rows=5, side_px=32, distinct=2)
    rows = take_in(open_folder(tmp_path / "corpus"), DataOptions(validation_fraction=0)).references
    assert [row.image_paths[0] for _, row in rows] == [picture for picture, _, _ in examples]
    assert len({row.image_paths for _, row in rows}) == 5
    assert len({path.read_bytes() for path in (tmp_path / "corpus").glob("*.jpg")}) == 2
