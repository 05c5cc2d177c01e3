"""What is a patient's, and keys, through data, training, evaluation, judge and endpoint with their failures: none of it
is in a log, on the terminal, in a manifest, in quarantine or in metrics. Where texts belong, in shards, predictions and
examples of a report, they are."""

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from pefomed_ray.config import TrainConfig, build_config
from pefomed_ray.config.schema import JudgeConfig
from pefomed_ray.data.options import DataOptions
from pefomed_ray.data.phantom import write_slake
from pefomed_ray.data.shards import prepare
from pefomed_ray.errors import DivergedError, PefomedError
from pefomed_ray.evaluation.evaluate import evaluate
from pefomed_ray.evaluation.judge.run import judge_rows
from pefomed_ray.evaluation.predict import GenerationSettings
from pefomed_ray.evaluation.predictions import Prediction
from pefomed_ray.training.trainer import train
from tests.judge_server import FAULTS
from tests.judge_server import serving as judge_serving
from tests.served_here import messages, serving
from tests.tiny_served import png

pytestmark = [pytest.mark.ray, pytest.mark.long]

TAG, MRN, CAPTION, ANSWER = "Zanzibar^Quetzal", "MRN-4471933", "flumoxian opacity", "quixotropic"
SEARCHED = (".json", ".jsonl", ".yaml", ".log", ".txt", ".md", ".out", ".err", ".csv")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SLAKE's layout: canaries in texts, in a DICOM file's tags, and in rows that are quarantined."""
    pytest.importorskip("pydicom")
    from tests.dicom_files import dicom

    folder = tmp_path_factory.mktemp("canaries") / "corpus"
    write_slake(folder, images=13, questions_per_image=3, seed=5, splits=(9, 2, 2))
    rows = json.loads((folder / "train.json").read_text())
    for number, row in enumerate(rows):
        row["question"] = f"Is the {CAPTION} of {MRN} number {number}?"
        row["answer"] = ANSWER
    pixels = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    (folder / "imgs" / "scan.dcm").write_bytes(dicom(pixels, PatientName=TAG, PatientID=MRN))
    (folder / "imgs" / "burned.dcm").write_bytes(dicom(pixels, PatientName=TAG, BurnedInAnnotation="YES"))
    (folder / "imgs" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + MRN.encode())
    for row, name in zip(rows, ("scan.dcm", "burned.dcm", "broken.png", "missing.png"), strict=False):
        row["img_name"] = name
    rows[5]["question"] = f"{CAPTION}\x00{MRN}"
    (folder / "train.json").write_text(json.dumps(rows))
    test = json.loads((folder / "test.json").read_text())
    for row in test:
        row["question"], row["answer"] = f"Where is {MRN}'s {CAPTION}?", ANSWER
    (folder / "test.json").write_text(json.dumps(test))
    return folder


def test_nothing_of_a_patient_is_left_behind(
    corpus: Path, tmp_path: Path, local_ray: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shards, secrets = tmp_path / "shards", [TAG, MRN, CAPTION, ANSWER]
    manifest = prepare(corpus, shards, DataOptions(max_bad_fraction=0.5))
    assert sum(manifest.quarantined.values()) == 4
    bundle = train(_config(shards, tmp_path / "train")).bundle
    _train_into_the_wall(shards, tmp_path / "wild")
    evaluate(bundle, shards, "test", tmp_path / "evaluation", settings=GenerationSettings(max_new_tokens=2))
    secrets.append(_judge(tmp_path / "judge.sqlite"))
    secrets += _serve()
    printed = "".join(capfd.readouterr())
    left = {path: path.read_bytes() for path in _searched(tmp_path, local_ray)}
    assert len(left) > 20
    found = {(secret, str(path)) for secret in secrets for path, data in left.items() if secret.encode() in data}
    assert found == set()
    assert not [secret for secret in secrets if secret in printed]
    # The control: a planted line is found, and texts are where they belong.
    (local_ray / "planted.log").write_text(f"a line about {MRN}")
    assert any(MRN.encode() in path.read_bytes() for path in _searched(tmp_path, local_ray))
    assert any(CAPTION.encode() in path.read_bytes() for path in shards.rglob("*.parquet"))
    assert any(ANSWER in path.read_text() for path in (tmp_path / "evaluation").rglob("predictions.jsonl"))


def _searched(*folders: Path) -> list[Path]:
    """Logs, manifests, quarantine, metrics; not what holds texts by its nature: predictions, of controls too."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    texts = {path for path in files if path.name == "predictions.jsonl" or path.parent.name == "controls"}
    return [path for path in files if path.suffix in SEARCHED and path not in texts]


def _config(shards: Path, output: Path, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "name": "canaries",
        "task": "vqa",
        "template": "short",
        "output_dir": str(output),
        "data": {"shards": str(shards)},
        "lora": {"rank": 4, "alpha": 8},
        "training": {"epochs": 1, "batch_size": 8, "micro_batch_size": 4},
        "validation": {"rows": 3, "max_new_tokens": 2},
        "resources": {"workers": 1},
    }
    return build_config(TrainConfig, values | changes, "test")


def _train_into_the_wall(shards: Path, output: Path) -> None:
    wild = {"rank": 4, "alpha": 1e38, "dropout": 0.0, "target_modules": ["all-linear"]}
    with pytest.raises(DivergedError):
        train(_config(shards, output, lora=wild, optimizer={"learning_rate": 1e6, "warmup_fraction": 0.0}))


def _judge(cache: Path) -> str:
    """Every fault a judge can have; the key."""
    key = "judge-key-quokka-81"
    rows = [
        Prediction(f"r{number}", f"Is the {CAPTION} of {MRN} {fault}?", ANSWER, ANSWER, "open")
        for number, fault in enumerate(FAULTS)
    ]
    file = cache.with_name("key.secret")
    file.write_text(key)
    said = ""
    with judge_serving() as judge:
        judge.faults.update({row.question: [fault] * 9 for row, fault in zip(rows, FAULTS, strict=True)})
        config = {
            "model": "judge",
            "base_url": judge.url,
            "key_file": str(file),
            "local": True,
            "max_retries": 0,
            "timeout_s": 1.0,
            "canaries": 0,
        }
        try:
            judge_rows(rows, "vqa", JudgeConfig.model_validate(config), licence="open", cache=cache)
        except PefomedError as error:
            said = str(error)
    assert not [secret for secret in (MRN, CAPTION, ANSWER, key) if secret in said]
    return key


def _serve() -> list[str]:
    """Answers and refusals of all kinds; the key, and a picture as it was sent."""
    picture = png(123)
    with serving(adapters=1, max_body_bytes=100_000, request_timeout_s=20) as served, served.client() as client:
        asked = messages(picture, f"Is the {CAPTION} of {MRN} {ANSWER}?")
        client.chat.completions.create(model="champion", messages=asked, max_tokens=4)
        list(client.chat.completions.create(model="champion", messages=asked, max_tokens=4, stream=True))
        for broken in (
            {"model": MRN, "messages": asked},
            {"model": "champion", "messages": messages(picture[:50], CAPTION)},
            {"model": "champion", "messages": messages(picture, (CAPTION + MRN) * 20)},
            {"model": "champion", "messages": messages(picture, CAPTION * 9000)},
            {"model": "champion", "messages": asked, "extra_body": {MRN: CAPTION}},
            {"model": "champion", "messages": [{"role": MRN, "content": CAPTION}]},
        ):
            with pytest.raises(openai.APIStatusError) as refused:
                client.chat.completions.create(**broken)
            assert not [secret for secret in (MRN, CAPTION, ANSWER, served.key) if secret in str(refused.value)]
        return [served.key, base64.b64encode(picture).decode()[:60]]
