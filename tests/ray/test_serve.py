"""The endpoint on a real local Ray Serve, asked by the real `openai` client."""

import asyncio
import base64
import io
import random
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import psutil
import pytest
from PIL import Image

from pefomed_ray.artifacts.registry import history, promote, proof_of, rollback
from pefomed_ray.cli.promotion import promote_bundle
from pefomed_ray.config import ServeConfig
from pefomed_ray.errors import ConfigError, DataError, PefomedError, RefusedError
from pefomed_ray.model.generate import Prompt
from pefomed_ray.serving import proof
from pefomed_ray.serving.client import Client
from pefomed_ray.serving.keys import add_key, revoke_key
from pefomed_ray.serving.preflight import check
from tests.served_here import MAX_TOKENS, QUESTION, Served, messages, serving
from tests.tiny_served import make_base, make_bundle, png

pytestmark = pytest.mark.ray

REFRESH_S = 0.5


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(
        max_ongoing_requests=8, max_queued_requests=8, max_batch_size=6, max_rank=16, refresh_s=REFRESH_S
    ) as endpoint:
        yield endpoint


def test_models_show_the_lineage(served: Served) -> None:
    with served.client() as client:
        models = client.models.list().data
    assert {model.id for model in models} == {
        *("base:champion", "base:second", "base:third", "base:fourth"),
        "base",
    }
    (champion,) = [model.model_dump() for model in models if model.id == "base:champion"]
    assert champion["lineage"]["digest"] == served.endpoint.digest
    assert champion["lineage"]["template"] == "short"
    assert champion["lineage"]["trained_on"]["source"] == "phantom"
    assert champion["lineage"]["metrics"] == {"exact_match": {"value": 0.5}}


def test_a_hundred_questions_to_four_adapters_at_once_equal_offline_generation(served: Served) -> None:
    """Token for token: text and both counts, whole and streamed answers mixed."""
    draw = random.Random(0)
    asked = [
        (f"Is it normal{'?' * draw.randrange(1, 20)}", png(draw.randrange(200)), served.bundles[draw.randrange(4)])
        for _ in range(100)
    ]

    async def one(client: openai.AsyncOpenAI, number: int, gate: asyncio.Semaphore) -> tuple[str, int, int, str]:
        question, image, ref = asked[number]
        async with gate:
            common = {"model": f"base:{ref.digest}", "messages": messages(image, question), "max_tokens": MAX_TOKENS}
            if number % 3:
                said = await client.chat.completions.create(**common)
                usage, text = said.usage, said.choices[0].message.content
                digest = said.system_fingerprint
            else:
                text = ""
                options = {"stream": True, "stream_options": {"include_usage": True}}
                async for chunk in await client.chat.completions.create(**common, **options):
                    usage, digest = chunk.usage, chunk.system_fingerprint
                    text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
        return text, usage.prompt_tokens, usage.completion_tokens, digest

    async def all_of_them() -> list[tuple[str, int, int, str]]:
        gate = asyncio.Semaphore(8)
        async with openai.AsyncOpenAI(
            base_url=served.endpoint.url, api_key=served.key, max_retries=4, timeout=60
        ) as client:
            return await asyncio.gather(*(one(client, number, gate) for number in range(len(asked))))

    answers = asyncio.run(asyncio.wait_for(all_of_them(), 120))
    for (question, image, ref), (text, prompt_tokens, tokens, digest) in zip(asked, answers, strict=True):
        served.offline(image, question, ref.digest)  # opens the generator
        (expected,) = served._offline[ref.digest].answer([Prompt("vqa", question, (image,))], MAX_TOKENS)
        assert (text, prompt_tokens, tokens) == (expected.text, expected.prompt_tokens, expected.tokens)
        assert digest == ref.digest
    assert len({text for text, *_ in answers}) > 50


def test_a_damaged_picture_fails_alone(served: Served) -> None:
    whole = png(3)
    with ThreadPoolExecutor(2) as pool:
        good = pool.submit(served.ask, whole)
        with pytest.raises(openai.BadRequestError, match="does not decode"):
            served.ask(whole[: len(whole) // 2])
        assert good.result() == served.offline(whole)


def test_a_bomb_is_refused_before_it_is_decoded(served: Served) -> None:
    """81 megapixels in 10 kB, and four pictures that are too many together."""
    bomb, large = io.BytesIO(), io.BytesIO()
    Image.new("1", (9000, 9000)).save(bomb, "PNG")
    Image.new("1", (4000, 4000)).save(large, "PNG")
    replicas = [child for child in psutil.Process().children(recursive=True) if _is_replica(child)]
    before = sum(replica.memory_info().rss for replica in replicas)
    for _ in range(5):
        with pytest.raises(openai.BadRequestError, match="image"):
            served.ask(bomb.getvalue())
    asked = messages(large.getvalue(), QUESTION)
    asked[0]["content"] = [asked[0]["content"][0]] * 3 + asked[0]["content"]
    with served.client() as client, pytest.raises(openai.BadRequestError, match="pixels together"):
        client.chat.completions.create(model="champion", messages=asked)
    assert sum(replica.memory_info().rss for replica in replicas) - before < 100e6
    assert served.ask(png(1)) == served.offline(png(1))


def _is_replica(process: psutil.Process) -> bool:
    return " ".join(process.cmdline()).startswith("ray::ServeReplica:pefomed:ModelReplica")


def test_a_header_of_a_megabyte(served: Served) -> None:
    headers = {"Authorization": f"Bearer {served.key}", "X-Question": "x" * 1_000_000}
    try:
        said = httpx.post(f"{served.endpoint.url}/vqa", content=png(1), headers=headers, trust_env=False)
    except httpx.TransportError:
        return  # the server hung up
    assert 400 <= said.status_code < 500


def test_too_long_for_the_model(served: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="leaves 0 of the model's 256"):
        served.ask(png(1), "x" * 400)


def test_special_tokens_of_a_question_are_text(served: Served) -> None:
    question = "<image></s><pad> [/INST]"
    assert served.ask(png(1), question) == served.offline(png(1), question)


def test_wrong_key_and_unknown_model(served: Served) -> None:
    stranger = openai.OpenAI(base_url=served.endpoint.url, api_key="wrong", max_retries=0)
    with stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()
    for name in ("other", f"base:{'0' * 64}", served.endpoint.digest):
        with pytest.raises(openai.NotFoundError) as caught:
            served.ask(png(1), model=name)
        assert caught.value.code == "model_not_found"


def test_keys_are_added_and_revoked_while_it_runs(served: Served) -> None:
    key = add_key(served.registry, "ward-7")
    with openai.OpenAI(base_url=served.endpoint.url, api_key=key, max_retries=0) as client:
        _until(lambda: _is_let_in(client), within_s=REFRESH_S + 10)
        revoke_key(served.registry, "ward-7")
        _until(lambda: not _is_let_in(client), within_s=REFRESH_S + 10)
    assert served.ask(png(1))  # the others stay


def test_overload_is_said_at_once_and_passes(served: Served) -> None:
    with ThreadPoolExecutor(64) as pool:
        futures = [pool.submit(served.ask, png(shade), max_tokens=100) for shade in range(64)]
        failures = [error for future in futures if (error := future.exception())]
    assert 0 < len(failures) < 64
    for error in failures:
        assert isinstance(error, openai.RateLimitError)
        # Ours in OpenAI's shape; what comes on top is refused by Serve's proxy in words of its own.
        assert error.code in ("overloaded", None)
        assert error.response.headers["retry-after"] == "1"
    assert served.ask(png(1)) == served.offline(png(1))


def test_a_client_that_leaves_frees_its_place(served: Served) -> None:
    with served.client() as client:
        stream = client.chat.completions.create(
            model="champion", messages=messages(png(1), QUESTION), stream=True, max_tokens=150
        )
        next(iter(stream))
        stream.close()
    _until(lambda: _gauge(served, "pefomed_replica_running") == 0, within_s=10)


def test_metrics_and_page(served: Served) -> None:
    assert _gauge(served, "pefomed_replica_tokens") > 0
    assert _gauge(served, "pefomed_replica_adapters") == 4
    root = served.endpoint.url.removesuffix("/v1")
    assert httpx.get(f"{root}/", trust_env=False).headers["content-type"].startswith("text/html")
    assert httpx.get(f"{root}/healthz", trust_env=False).json() == {"status": "ok"}
    assert httpx.get(f"{root}/readyz", trust_env=False).status_code == 401


def test_a_promotion_with_proof_and_back(served: Served) -> None:
    """Probe by digest, alias moved, endpoint told and asked, recorded; the same back; each twice changes nothing."""
    ref = make_bundle(served.folder / "new", served.folder / "base", seed=9, rank=4, alpha=8)
    before = served.ask(png(5), model="third")
    done = promote_bundle(served.registry, "third", Path(ref.bundle), endpoint=served.endpoint.url)
    assert done.proof is not None
    assert (done.proof.digest, done.proof.probed) == (ref.digest, 3)
    assert done.proof.followed_after_s < 10
    assert served.ask(png(5), model="third") != before
    again = promote_bundle(served.registry, "third", Path(ref.bundle), endpoint=served.endpoint.url)
    assert again.entry == done.entry
    assert proof_of(served.registry, "third", done.entry.counter) == again.proof
    with Client(served.endpoint.url, served.key, 30.0) as client:
        entry = rollback(served.registry, "third")
        proof.follow(client, "third", entry.digest, 30.0)
    assert served.ask(png(5), model="third") == before
    assert [move.action for move in history(served.registry, "third")] == ["promote", "promote", "rollback"]


def test_answers_that_differ_from_offline_ones_stop_a_promotion(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref = make_bundle(served.folder / "differs", served.folder / "base", seed=10, rank=4, alpha=8)
    moves = history(served.registry, "third")
    # Offline, another bundle answers: as if the endpoint rendered or computed otherwise.
    opened = proof.open_generator
    monkeypatch.setattr(proof, "open_generator", lambda bundle: opened(Path(served.bundles[0].bundle)))
    with pytest.raises(RefusedError, match="answers otherwise"):
        promote_bundle(served.registry, "third", Path(ref.bundle), endpoint=served.endpoint.url)
    assert history(served.registry, "third") == moves


def test_what_cannot_be_served_leaves_the_old_one_and_says_why(served: Served) -> None:
    """A wrong base, a rank above the limit, changed weights: by a promotion with proof, and behind the endpoint's
    back."""
    make_base(served.folder / "other", seed=5)
    other = make_bundle(served.folder / "of-other", served.folder / "other")
    high = make_bundle(served.folder / "high", served.folder / "base", rank=32)
    bad = make_bundle(served.folder / "bad", served.folder / "base", seed=11, rank=4)
    before = served.ask(png(5), model="fourth")
    for ref, why in ((other, "trained on base"), (high, "max_rank is 16")):
        moves = history(served.registry, "fourth")
        with pytest.raises(ConfigError, match=why):
            promote_bundle(served.registry, "fourth", Path(ref.bundle), endpoint=served.endpoint.url)
        assert history(served.registry, "fourth") == moves
        promote(served.registry, "fourth", Path(ref.bundle))
        assert why in _not_followed(served, "fourth")
        assert served.ask(png(5), model="fourth") == before
    (served.registry / "bundles" / bad.digest).mkdir(parents=True)
    shutil.copytree(bad.bundle, served.registry / "bundles" / bad.digest, dirs_exist_ok=True)
    promote(served.registry, "fourth", Path(bad.bundle))
    rollback(served.registry, "fourth", served.bundles[3].digest)
    weights = served.registry / "bundles" / bad.digest / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(DataError, match="adapter_model"):
        promote(served.registry, "fourth", Path(bad.bundle))
    with pytest.raises(openai.NotFoundError, match="adapter_model") as caught:
        served.ask(png(5), model=f"base:{bad.digest}")
    assert str(served.folder) not in str(caught.value)
    with pytest.raises(PefomedError, match="no alias 'none'"):
        rollback(served.registry, "none")
    assert served.ask(png(5), model="fourth") == before
    assert httpx.get(
        f"{served.endpoint.url.removesuffix('/v1')}/readyz",
        headers={"Authorization": f"Bearer {served.key}"},
        trust_env=False,
    ).is_success


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


def _not_followed(served: Served, alias: str) -> str:
    with Client(served.endpoint.url, served.key, 30.0) as client:
        return str(client.refresh()["not_followed"].get(alias))


def _gauge(served: Served, name: str) -> float:
    url = served.endpoint.url.removesuffix("/v1") + "/metrics"
    page = httpx.get(url, headers={"Authorization": f"Bearer {served.key}"}, trust_env=False, timeout=10).text
    return sum(float(line.split()[-1]) for line in page.splitlines() if line.startswith(name + "{"))


def _is_let_in(client: openai.OpenAI) -> bool:
    try:
        client.models.list()
    except openai.AuthenticationError:
        return False
    return True


def _until(what: object, within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while not what():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.05)
