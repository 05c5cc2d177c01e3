"""What keeps vLLM from serving a bundle, and what passes between it and us; vLLM itself was never here."""

import asyncio
import json
import sys
import types
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from pefomed_ray.artifacts.manifests import BundleManifest, save_document
from pefomed_ray.config import ServeConfig
from pefomed_ray.errors import ConfigError, DataError, PefomedError
from pefomed_ray.serving.contract import AdapterRef, Ask, Completion, Piece, Sampling
from pefomed_ray.serving.vllm import check, largest_rank, pieces_of, request_of
from tests.served_stub import png

Make = Callable[..., Path]
GPU = ServeConfig(engine="vllm", use_gpu=True)
INSIDE = "model.language_model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture
def bundle(tmp_path: Path) -> Make:
    """A function: a bundle over a LLaVA, as far as `check` looks."""

    def make(kind: str = "llava", key: str = INSIDE, projector: bool = False, run: str = "", **adapter: Any) -> Path:
        base, folder = tmp_path / "base", tmp_path / "bundle"
        base.mkdir()
        folder.mkdir()
        (base / "config.json").write_text(json.dumps({"model_type": kind}))
        for name in ("tokenizer.json", "preprocessor_config.json", "model.safetensors"):
            (base / name).write_text("{}")
        (folder / "run.yaml").write_text(run or "task: vqa\n")
        (folder / "adapter_config.json").write_text(json.dumps({"r": 16} | adapter))
        save_file({f"base_model.model.{key}": np.zeros(1, np.float32)}, folder / "adapter_model.safetensors")
        if projector:
            (folder / "projector.safetensors").write_bytes(b"")
        manifest = BundleManifest(
            base=str(base), base_digest="0", template="chat", template_digest="1", image_size=None, files={}
        )
        save_document(manifest, folder / "bundle.json")
        return folder

    return make


@pytest.mark.parametrize(
    ("changes", "config", "why"),
    [
        ({"kind": "pefomed"}, {}, "of kind 'pefomed'"),
        ({"kind": "paligemma"}, {}, "of kind 'paligemma'"),
        ({}, {"use_gpu": False}, "use_gpu=true"),
        ({"run": "task: vqa\nbase: {quantization: nf4}\n"}, {}, "held in nf4"),
        ({}, {"max_rank": 513}, "it takes 512 at most"),
        ({"projector": True}, {}, "projector of its own"),
        ({"use_dora": True}, {}, "not plain LoRA"),
        ({"rank_pattern": {"q": 4}}, {}, "not plain LoRA"),
        ({"r": 128}, {}, "rank 128, and max_rank is 64"),
        ({"key": "model.vision_tower.layers.0.q_proj.lora_A.weight"}, {}, "beyond the language model"),
        ({}, {}, "not installed: pip install"),
    ],
)
def test_what_it_cannot_serve(
    changes: dict[str, Any], config: dict[str, Any], why: str, bundle: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray.serve.llm", None)  # as where it is not installed
    with pytest.raises(ConfigError, match=why) as refused:
        check(GPU.model_copy(update=config), bundle(**changes))
    assert "Leave out engine=vllm" in str(refused.value)


def test_what_it_can_serve(bundle: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray.serve.llm", types.ModuleType("ray.serve.llm"))
    assert check(GPU, bundle()) is None  # type: ignore[func-returns-value]


@pytest.mark.parametrize(("rank", "told"), [(1, 8), (8, 8), (9, 16), (64, 64), (300, 320), (512, 512), (513, None)])
def test_the_rank_it_is_told(rank: int, told: int | None) -> None:
    assert largest_rank(ServeConfig(max_rank=rank)) == told


ASK = Ask("vqa", "Is it?", (png(),), AdapterRef("d" * 64, "/x"), Sampling(7, 0.5, 0.9, 3, ("END",)))


def test_a_request() -> None:
    request = request_of(ASK, "Answer: Is it?", ASK.adapter.digest if ASK.adapter else "", GPU)
    image, words = request.pop("messages")[0]["content"]
    assert image["image_url"]["url"].startswith("data:image/png;base64,iVBOR")
    assert words == {"type": "text", "text": "Answer: Is it?"}
    assert request == {
        "model": "d" * 64,
        "max_tokens": 7,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 3,
        "stop": ["END"],
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def event(text: str = "", finish: str | None = None, usage: dict[str, int] | None = None) -> str:
    choices = [] if usage else [{"index": 0, "delta": {"content": text}, "finish_reason": finish}]
    return f"data: {json.dumps({'choices': choices, 'usage': usage})}\n\n"


async def read(batches: list[Any]) -> list[Piece | PefomedError]:
    async def stream() -> AsyncIterator[Any]:
        for batch in batches:
            yield batch

    return [piece async for piece in pieces_of(stream(), ASK)]


def test_its_events_are_an_answer() -> None:
    usage = {"prompt_tokens": 40, "completion_tokens": 3, "total_tokens": 43}
    batches = [[event(" "), event(" the left")], [event(" lung ", "length")], [event(usage=usage), "data: [DONE]\n\n"]]
    *pieces, last = asyncio.run(read(batches))
    assert pieces == [Piece("the left"), Piece(" lung ")]
    assert last == Piece("", Completion("the left lung", "length", 40, 3, "d" * 64))


@pytest.mark.parametrize(("code", "kind"), [(400, DataError), (500, PefomedError), (None, PefomedError)])
def test_its_errors_are_ours(code: int | None, kind: type[PefomedError]) -> None:
    response = types.SimpleNamespace(error=types.SimpleNamespace(code=code, message="what a patient wrote"))
    (said,) = asyncio.run(read([[response]]))
    assert type(said) is kind
    assert "patient" not in str(said)


class FakeServer:
    """As Ray Serve's `LLMServer`, as far as it is used."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.asked: list[dict[str, Any]] = []
        self.loaded: list[str] = []
        self.engine = self

    @classmethod
    def sync_init(cls, config: dict[str, Any]) -> "FakeServer":
        return cls(config)

    async def start(self) -> None:
        await asyncio.sleep(0.01)

    async def resolve_lora(self, lora: Any) -> None:
        self.loaded.append(lora.model_id)

    async def chat(self, request: dict[str, Any]) -> Any:
        self.asked.append(request)

        async def stream() -> AsyncIterator[list[str]]:
            yield [event("yes", "stop"), event(usage={"prompt_tokens": 4, "completion_tokens": 2})]

        return stream()


def test_the_replica(tiny_base: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pefomed_ray.config.schema import Precision
    from pefomed_ray.serving.vllm import VllmReplica
    from tests.tiny_served import make_bundle

    modules = {
        "ray.serve.llm": {"LLMConfig": dict, "LLMServer": FakeServer},
        "ray.serve.llm.openai_api_models": {"ChatCompletionRequest": dict},
    }
    for name, members in modules.items():
        module = types.ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)
    base = tiny_base("llava")
    good = make_bundle(tmp_path / "good", base, template="chat", rank=4, train_projector=False)
    bad = make_bundle(tmp_path / "bad", base, template="chat", rank=4)
    replica = VllmReplica(str(base), "chat", Precision(), GPU)

    async def ask() -> list[Any]:
        asks = [Ask("vqa", "Is it?", (png(),), ref) for ref in (good, good, None, bad)]
        return list(await asyncio.gather(*(replica.answer(one) for one in asks)))

    first, second, base_s, refused = asyncio.run(ask())
    assert first == second == Completion("yes", "stop", 4, 2, good.digest)
    assert base_s.digest is None
    assert "projector of its own" in str(refused)
    server = replica._server
    assert set(server.loaded) == {good.digest}
    assert [one["model"] for one in server.asked].count(good.digest) == 2
    assert server.config["engine_kwargs"]["max_lora_rank"] == 64
    assert "Is it?" in server.asked[0]["messages"][0]["content"][1]["text"]
