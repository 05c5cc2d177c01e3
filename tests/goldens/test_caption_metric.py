"""BLEU, METEOR, ROUGE-L and CIDEr equal the published numbers, of the corpus and of every item.

Every `caption_metric/*_ref.json` is taken, so one that is added is tested without a change here.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pefomed_ray.metrics.caption import Measured, NotComputed, lower_split, measured
from pefomed_ray.metrics.intervals import Summed
from pefomed_ray.metrics.java import JavaError, Meteor, ptb_tokens
from pefomed_ray.metrics.text import rouge_l

FILES = sorted((Path(os.environ.get("PEFOMED_PARITY") or "none") / "caption_metric").glob("*_ref.json"))
PUBLISHED = {
    "bleu1": "Bleu_1",
    "bleu2": "Bleu_2",
    "bleu3": "Bleu_3",
    "bleu4": "Bleu_4",
    "meteor": "METEOR",
    "rougeL_coco": "ROUGE_L",
    "cider": "CIDEr",
}
SAME_TO = 1e-6
NO_JAVA = "java is not there"
COMMAND_TIMEOUT_S = 900

each_file = pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
needs_java = pytest.mark.skipif(shutil.which("java") is None, reason=NO_JAVA)


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def tokens(samples: list[dict[str, Any]], tokenizer: str) -> tuple[list[list[str]], list[str]]:
    """References and predictions, tokenised by us."""
    texts = [text for sample in samples for text in (*sample["refs"], sample["hyp"])]
    found = iter(ptb_tokens(texts) if tokenizer == "ptb" else lower_split(texts))
    both = [([next(found) for _ in sample["refs"]], next(found)) for sample in samples]
    return [references for references, _ in both], [prediction for _, prediction in both]


@pytest.fixture(scope="module")
def meteor() -> Iterator[Meteor | JavaError]:
    if shutil.which("java") is None:
        yield JavaError(NO_JAVA)
        return
    with Meteor() as running:
        yield running


def test_there_are_files(parity_dir: Path) -> None:
    assert FILES, f"{parity_dir / 'caption_metric'} holds no *_ref.json"


@each_file
@pytest.mark.parametrize("tokenizer", [pytest.param("ptb", marks=needs_java), "lower_split"])
def test_equal_in_corpus_and_items(path: Path, tokenizer: str, meteor: Meteor | JavaError) -> None:
    document = read(path)
    samples = document["samples"]
    found = measured(*tokens(samples, tokenizer), meteor)
    assert far_off(found, document, tokenizer) == {}
    assert isinstance(found["meteor"], Summed) or shutil.which("java") is None
    if tokenizer == "ptb" and "agg_metrics_CIDEr_plus_Bleu4" in document:
        sum_of_two = found["cider"].value + found["bleu4"].value  # type: ignore[union-attr]
        assert sum_of_two == pytest.approx(document["agg_metrics_CIDEr_plus_Bleu4"], abs=SAME_TO)


def far_off(found: Measured, document: dict[str, Any], tokenizer: str) -> dict[str, float]:
    """Metric -> largest distance from what is published, of those that are not equal."""
    distances = {}
    for name, published in PUBLISHED.items():
        metric = found[name]
        if isinstance(metric, NotComputed):
            assert name == "meteor", metric.reason
            continue
        corpus = metric.value - document[f"corpus_{tokenizer}"][published]
        items = np.array(metric.items) - [sample[tokenizer][published] for sample in document["samples"]]
        distances[name] = float(np.abs([corpus, *items]).max())
    return {name: distance for name, distance in distances.items() if not distance <= SAME_TO}


@each_file
def test_other_predictions_are_told_apart(path: Path) -> None:
    document = read(path)
    references, predictions = tokens(document["samples"], "lower_split")
    found = measured(references, [*predictions[1:], predictions[0]], JavaError("not asked"))
    assert len(far_off(found, document, "lower_split")) == len(PUBLISHED) - 1


@each_file
@needs_java
def test_same_tokens(path: Path) -> None:
    samples = read(path)["samples"]
    references, predictions = tokens(samples, "ptb")
    assert references == [sample["ref_ptb_tokens"] for sample in samples]
    assert predictions == [sample["hyp_ptb_tokens"] for sample in samples]


@each_file
@pytest.mark.parametrize("tokenizer", [pytest.param("ptb", marks=needs_java), "lower_split"])
def test_sums_come_to_the_library_s_own_numbers(path: Path, tokenizer: str, meteor: Meteor | JavaError) -> None:
    """Intervals are resampled from sums; of all items they must give the published corpus score, of one its own."""
    for name, metric in measured(*tokens(read(path)["samples"], tokenizer), meteor).items():
        if isinstance(metric, Summed):
            assert float(metric.of_sums(metric.sums_NK.sum(axis=0))) == pytest.approx(metric.value, abs=1e-9), name
            assert metric.of_sums(metric.sums_NK) == pytest.approx(np.array(metric.items), abs=1e-9), name


@needs_java
@pytest.mark.parametrize("path", FILES[:1], ids=[path.stem for path in FILES[:1]])
def test_the_command_gives_the_same(path: Path, tmp_path: Path) -> None:
    document = read(path)
    rows = [
        {"id": s["id"], "answer": s["refs"][0], "references": s["refs"], "prediction": s["hyp"]}
        for s in document["samples"]
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    command = [sys.executable, "-m", "pefomed_ray", "score", "p.jsonl", "--task", "report", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr
    scores = json.loads(done.stdout.splitlines()[-1])
    for name, published in PUBLISHED.items():
        assert scores[name]["value"] == pytest.approx(document["corpus_ptb"][published], abs=SAME_TO), name
        assert (scores[name]["tokenizer"], scores[name]["n"], scores[name]["unscored"]) == ("ptb", len(rows), 0)
        low, high = scores[name]["ci95"]
        assert low < scores[name]["value"] < high


def rouge_numbers(value: Any, key: str) -> list[Any]:
    """What stands under a key, however deep."""
    if isinstance(value, list):
        return [found for entry in value for found in rouge_numbers(entry, key)]
    if not isinstance(value, dict):
        return []
    own = [value[key]] if key in value else []
    return own + [found for name, entry in value.items() if name != key for found in rouge_numbers(entry, key)]


def f_measure(value: Any) -> float:
    """Of P, R and F, as a list or by name, or of F alone."""
    if isinstance(value, dict):
        return float(next(number for name, number in value.items() if name.lower().startswith("f")))
    return float(value[-1] if isinstance(value, list) else value)


def test_rouge_score_where_a_file_has_it() -> None:
    """Only what the package reads as we do: it drops every letter beyond a-z."""
    pairs = [
        (max(rouge_l(sample["hyp"], reference) for reference in sample["refs"]), f_measure(numbers[0]))
        for path in FILES
        for sample in read(path)["samples"]
        if len(numbers := rouge_numbers(sample, "rougeL")) == 1 and "".join([sample["hyp"], *sample["refs"]]).isascii()
    ]
    if not pairs:
        pytest.skip("no file holds numbers of the rouge-score package")
    ours, published = zip(*pairs, strict=True)
    assert ours == pytest.approx(published, abs=SAME_TO)
