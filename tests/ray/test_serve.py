"""The endpoint on a real local Ray Serve, asked by the real `openai` client."""

import base64
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest

from pefomed_ray.artifacts.registry import promote
from pefomed_ray.config import ServeConfig
from pefomed_ray.errors import ConfigError
from pefomed_ray.model.generate import Generator, Prompt
from pefomed_ray.model.load import open_generator
from pefomed_ray.serving import deploy
from pefomed_ray.serving.client import ask
from pefomed_ray.serving.keys import KEY_FILE, client_key
from pefomed_ray.serving.preflight import check
from tests.tiny_served import make_base, make_bundle, png

pytestmark = pytest.mark.ray

MAX_TOKENS = 12
QUESTION = "Is it normal?"


@dataclass(frozen=True)
class Served:
    """A running endpoint, its key, and the same model offline."""

    endpoint: deploy.Endpoint
    registry: Path
    key: str
    offline: Generator

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.endpoint.url, api_key=self.key, max_retries=0, timeout=60.0)

    def ask(self, image: bytes, question: str = QUESTION) -> str:
        url = "data:image/png;base64," + base64.b64encode(image).decode()
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
        with self.client() as client:
            completion = client.chat.completions.create(
                model="champion",
                messages=[{"role": "user", "content": content}],  # type: ignore[list-item,misc]
                max_tokens=MAX_TOKENS,
            )
        assert completion.system_fingerprint == self.endpoint.digest
        return completion.choices[0].message.content or ""

    def ask_offline(self, image: bytes, question: str = QUESTION) -> str:
        return self.offline.answer([Prompt("vqa", question, (image,))], MAX_TOKENS)[0].text


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    folder = Path(tempfile.mkdtemp(prefix="pfs-", dir="/tmp"))  # short: Ray's sockets allow 107 characters
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    registry = folder / "registry"
    config = ServeConfig(port=port, max_batch_size=2, max_ongoing_requests=2, max_queued_requests=2)
    try:
        make_base(folder / "base")
        make_bundle(folder / "bundle", folder / "base")
        promote(registry, "champion", folder / "bundle")
        started = time.monotonic()
        endpoint = deploy.start(config, registry, "champion", registry / KEY_FILE)
        print(f"endpoint up after {time.monotonic() - started:.1f} s")
        yield Served(endpoint, registry, client_key(registry), open_generator(folder / "bundle"))
    finally:
        deploy.stop()
        shutil.rmtree(folder, ignore_errors=True)


def test_models_show_the_lineage(served: Served) -> None:
    with served.client() as client:
        first, second = client.models.list().data
    assert (first.id, second.id) == ("base:champion", "base")
    lineage = first.model_dump()["lineage"]
    assert lineage["digest"] == served.endpoint.digest
    assert lineage["template"] == "short"
    assert lineage["trained_on"]["source"] == "phantom"
    assert lineage["metrics"] == {"exact_match": {"value": 0.5}}


def test_one_answer_equals_the_offline_one(served: Served, tmp_path: Path) -> None:
    path = tmp_path / "scan.png"
    path.write_bytes(png(1))
    reply = ask(served.endpoint.url, served.key, served.endpoint.model, path, QUESTION, 60.0)
    offline = served.offline.answer([Prompt("vqa", QUESTION, (png(1),))], 256 - reply.usage["prompt_tokens"])[0]
    assert reply.text == offline.text
    assert reply.digest == served.endpoint.digest
    assert reply.usage["prompt_tokens"] == offline.prompt_tokens
    assert reply.usage["completion_tokens"] == offline.tokens


def test_two_pictures_in_one_batch_answer_as_alone(served: Served) -> None:
    images = [png(0), png(200)]
    questions = [QUESTION, "A much longer question about the same place?"]
    alone = [served.ask_offline(image, question) for image, question in zip(images, questions, strict=True)]
    assert alone[0] != alone[1]
    assert served.ask_offline(images[1]) != alone[0]  # the picture matters, not only the question
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(served.ask, images, questions))
    assert together == alone


def test_a_damaged_picture_fails_alone(served: Served) -> None:
    whole = png(3)
    with ThreadPoolExecutor(2) as pool:
        good = pool.submit(served.ask, whole)
        with pytest.raises(openai.BadRequestError, match="does not decode"):
            served.ask(whole[: len(whole) // 2])
        assert good.result() == served.ask_offline(whole)


def test_too_long_for_the_model(served: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="leaves 0 of the model's 256"):
        served.ask(png(1), "x" * 400)


def test_special_tokens_of_a_question_are_text(served: Served) -> None:
    question = "<image></s><pad> [/INST]"
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(served.ask, [png(1)] * 2, [question] * 2))
    assert answers == [served.ask_offline(png(1), question)] * 2


def test_wrong_key_and_unknown_model(served: Served) -> None:
    stranger = openai.OpenAI(base_url=served.endpoint.url, api_key="wrong", max_retries=0)
    with stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()
    with served.client() as client, pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="other", messages=[{"role": "user", "content": "x"}])
    assert caught.value.code == "model_not_found"


def test_overload_is_said_at_once_and_passes(served: Served) -> None:
    with ThreadPoolExecutor(24) as pool:
        futures = [pool.submit(served.ask, png(shade)) for shade in range(24)]
        failures = [error for future in futures if (error := future.exception())]
    assert 0 < len(failures) < 24
    for error in failures:
        assert isinstance(error, openai.RateLimitError)
        assert (error.code, error.response.headers["retry-after"]) == ("overloaded", "1")
    assert served.ask(png(1)) == served.ask_offline(png(1))


def test_logs_hold_nothing_of_a_request(served: Served, local_ray: Path) -> None:
    question = "Canary-7f3a question?"
    answer = served.ask(png(77), question)
    damaged = png(77)[:60]
    with pytest.raises(openai.BadRequestError):
        served.ask(damaged, question)
    files = [path for path in local_ray.rglob("logs/**/*") if path.is_file()]
    logs = b"".join(path.read_bytes() for path in files)
    assert b"ModelReplica" in logs  # the search finds what is there
    for secret in (question.encode(), served.key.encode(), base64.b64encode(damaged)[:40], answer.encode()):
        assert secret not in logs


def test_the_port_is_taken_now(served: Served) -> None:
    port = int(served.endpoint.url.split(":")[2].split("/")[0])
    with pytest.raises(ConfigError, match="port"):
        check(ServeConfig(port=port), served.registry, "champion")
