"""The phantom corpus: the same bytes for the same seed, answers that are true, and questions that need the picture."""

import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from pefomed_ray.data.phantom import (
    LEXICON,
    Balancer,
    Phrasing,
    Question,
    Scene,
    caption,
    draw,
    make_scene,
    questions,
    report,
    split_sizes,
    write_r2gen,
    write_roco,
    write_slake,
)
from pefomed_ray.data.phantom.wording import GENERAL, SLAKE

CONTENT_TYPES = {"Organ", "Position", "Abnormality", "KG", "Modality", "Size", "Plane", "Quantity", "Color", "Shape"}


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [make_scene(np.random.default_rng([7, number])) for number in range(320)]


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def write_all(root: Path, seed: int) -> dict[str, bytes]:
    write_slake(root / "slake", 12, 5, seed, 64)
    write_r2gen(root / "r2gen", 4, seed, 64, splits=(2, 1, 1))
    write_roco(root / "roco", 6, seed, 64)
    return tree(root)


def test_the_same_seed_writes_the_same_bytes_and_another_seed_does_not(tmp_path: Path) -> None:
    first = write_all(tmp_path / "a", 1)
    assert first == write_all(tmp_path / "b", 1)
    other = write_all(tmp_path / "c", 2)
    assert first.keys() == other.keys()
    assert sum(first[name] == other[name] for name in first) == 0


def test_trees_are_the_publishers_own(tmp_path: Path) -> None:
    files = write_all(tmp_path, 3)
    train = json.loads(files["slake/train.json"])
    assert set(train[0]) == {
        "img_id",
        "img_name",
        "question",
        "answer",
        "q_lang",
        "location",
        "modality",
        "answer_type",
        "base_type",
        "content_type",
        "triple",
        "qid",
    }
    images = {
        split: {row["img_name"] for row in json.loads(files[f"slake/{split}.json"])}
        for split in ("train", "validate", "test")
    }
    assert [len(names) for names in images.values()] == [10, 1, 1]
    assert len(set.union(*images.values())) == 12
    annotation = json.loads(files["r2gen/annotation.json"])
    assert {split: len(rows) for split, rows in annotation.items()} == {"train": 2, "val": 1, "test": 1}
    views = [path for rows in annotation.values() for row in rows for path in row["image_path"]]
    assert all(f"r2gen/images/{path}" in files for path in views)
    for line in files["roco/data/train/radiology/captions.txt"].decode().splitlines():
        name, text = line.split("\t")
        assert text.startswith(" ")
        assert f"roco/data/train/radiology/images/{name}.jpg" in files


def test_pictures_are_gray_bytes_and_repeat(scenes: list[Scene]) -> None:
    for scene in scenes[:30]:
        picture = draw(scene, 64)
        assert picture.shape == (64, 64)
        assert picture.dtype == np.uint8
        assert picture.std() > 8
        assert np.array_equal(picture, draw(scene, 64))


@pytest.mark.parametrize("phrasing", ["slake", "general"])
def test_wording_alone_does_not_give_the_answer(scenes: list[Scene], phrasing: Phrasing) -> None:
    rng, balancer = np.random.default_rng(0), Balancer()
    picked = [balancer.pick(questions(scene, rng, phrasing), 6) for scene in scenes[:300]]
    train = [q for row in picked[:240] for q in row]
    test = [q for row in picked[240:] for q in row]
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for q in train:
        answers[q.question.lower()][q.answer] += 1
    overall = Counter(q.answer for q in train).most_common(1)[0][0]

    def guess(q: Question) -> str:
        known = answers.get(q.question.lower())
        return known.most_common(1)[0][0] if known else overall

    assert len(test) == 360
    assert np.mean([guess(q) == q.answer for q in test]) <= 0.45


def test_answers_are_true(scenes: list[Scene]) -> None:
    seen: Counter[str] = Counter()
    for number, scene in enumerate(scenes):
        organs = {organ.name.lower() for organ in scene.organs}
        for q in questions(scene, np.random.default_rng(number), "slake"):
            assert q.content_type in CONTENT_TYPES
            assert q.answer_type in ("OPEN", "CLOSED")
            assert q.answer
            if q.question.startswith("Does the picture contain ") and "organ" not in q.question:
                asked = q.question.removeprefix("Does the picture contain ").removesuffix("?")
                assert q.answer == ("Yes" if asked in organs else "No")
                seen[q.answer] += 1
            if q.question == "Is the lung healthy?":
                assert (q.answer == "No") == any(f.organ == "Lung" for f in scene.findings)
                seen["lung"] += 1
            if q.question == "What modality is used to take this image?":
                assert q.answer == scene.modality
            if q.question == "How many kidneys in this image?":
                assert q.answer == str(sum(o.name == "Kidney" for o in scene.organs))
    assert min(seen["Yes"], seen["No"], seen["lung"]) > 20


def test_sides_are_the_patients(scenes: list[Scene]) -> None:
    sided = [f for scene in scenes for f in scene.findings if f.side]
    assert len(sided) > 50
    assert all((f.x > 0) == (f.side == "Left") for f in sided)
    assert all(o.x < 0 for scene in scenes for o in scene.organs if o.name == "Liver")


def test_findings_are_inside_the_picture(scenes: list[Scene]) -> None:
    for scene in scenes:
        for f in scene.findings:
            view = scene.view
            x = 0.5 + view.shift_x + 0.5 * view.zoom * (f.x * np.cos(view.angle) - f.y * np.sin(view.angle))
            y = 0.5 + view.shift_y + 0.5 * view.zoom * (f.x * np.sin(view.angle) + f.y * np.cos(view.angle))
            assert 0.04 < x < 0.96, f
            assert 0.04 < y < 0.96, f


def test_general_wording_never_repeats_slakes() -> None:
    assert SLAKE.keys() == GENERAL.keys()
    assert all(len(wordings) >= 2 for wordings in GENERAL.values())
    assert not {w for row in GENERAL.values() for w in row} & {w for row in SLAKE.values() for w in row}


def test_captions_and_reports_name_every_finding(scenes: list[Scene]) -> None:
    for number, scene in enumerate(scenes):
        rng = np.random.default_rng(number)
        sentence, text = caption(scene, rng).lower(), report(scene, rng)
        assert sentence.count(".") == 1
        assert 2 <= text.count(".") <= 4
        if not scene.findings:
            assert "normal" in sentence or "without abnormality" in sentence
        for f in scene.findings:
            stem = {"Cardiomegaly": ""}.get(f.name, f.name.lower())
            assert stem in sentence
            assert stem in text.lower()


def test_split_sizes() -> None:
    assert split_sizes(100) == (80, 10, 10)
    assert split_sizes(5, (3, 1, 1)) == (3, 1, 1)
    with pytest.raises(ValueError, match="add up"):
        split_sizes(5, (3, 3, 3))


def test_lexicon_has_no_repeats() -> None:
    assert len(LEXICON) == len(set(LEXICON)) > 600
