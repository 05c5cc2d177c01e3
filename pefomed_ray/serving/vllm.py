"""`engine: vllm`: answers by vLLM, through Ray Serve's LLM support, behind the same HTTP side.

`check` says before anything starts why it cannot be; `VllmReplica` has the methods of `replica.ModelReplica`. vLLM
applies the base's own chat template to the words that the adapter was trained with, and loads LoRA alone: no trained
projector, no DoRA. It rounds otherwise than the engine of this project; `promote --endpoint` compares.
"""

import asyncio
import base64
import importlib
import json
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from pefomed_ray.artifacts.base import base_folder, family_of
from pefomed_ray.artifacts.family import PEFOMED
from pefomed_ray.artifacts.manifests import load_bundle_manifest, verify_bundle
from pefomed_ray.artifacts.precision import precision_of
from pefomed_ray.artifacts.registry import local_copy
from pefomed_ray.config import ServeConfig
from pefomed_ray.config.schema import Precision
from pefomed_ray.errors import ConfigError, DataError, PefomedError
from pefomed_ray.serving.contract import AdapterRef, Ask, CannotServeError, Completion, Piece, Stats
from pefomed_ray.serving.pictures import media_type

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as `max_lora_rank`."""
NO_CHAT = "paligemma"
"""The family whose processor has no chat template."""
PROJECTOR_FILE, ADAPTER_FILE, PEFT_PREFIX = "projector.safetensors", "adapter_model.safetensors", "base_model.model."


def check(config: ServeConfig, bundle: Path) -> None:
    """Raise ConfigError with what keeps a bundle, or this machine, from being served by vLLM."""
    base = base_folder(load_bundle_manifest(bundle).base)
    if (kind := family_of(base).model_type) in (PEFOMED, NO_CHAT):
        raise _refusal(f"the base is of kind {kind!r}, which it has no class or no chat template for")
    if not config.use_gpu:
        raise _refusal("it needs GPUs; set use_gpu=true")
    if (precision := precision_of(bundle)).quantization != "none":
        raise _refusal(f"the base is held in {precision.quantization}")
    if largest_rank(config) is None:
        raise _refusal(f"max_rank is {config.max_rank}, and it takes {RANKS[-1]} at most")
    check_adapter(bundle, config.max_rank)
    try:
        importlib.import_module("ray.serve.llm")
    except ImportError:
        raise _refusal("it is not installed: pip install 'ray[llm]' on a machine with CUDA") from None


def check_adapter(bundle: Path, max_rank: int) -> None:
    """Raise ConfigError where vLLM would not load an adapter, or would load a part of it."""
    adapter = json.loads((bundle / "adapter_config.json").read_text(encoding="utf-8"))
    if (bundle / PROJECTOR_FILE).is_file():
        raise _refusal("the bundle has a projector of its own (train_projector), and it loads LoRA alone")
    if adapter.get("use_dora") or adapter.get("rank_pattern") or adapter.get("alpha_pattern"):
        raise _refusal("the adapter is not plain LoRA of one rank")
    if adapter["r"] > max_rank:
        raise _refusal(f"the adapter has rank {adapter['r']}, and max_rank is {max_rank}")
    language_model = family_of(base_folder(load_bundle_manifest(bundle).base)).language_model
    with safe_open(bundle / ADAPTER_FILE, framework="numpy") as file:
        names = [name.removeprefix(PEFT_PREFIX) for name in file.keys()]  # noqa: SIM118 (not a dict)
    if outside := [name for name in names if not name.startswith(f"{language_model}.")]:
        raise _refusal(f"the adapter reaches {outside[0]!r}, beyond the language model")


def largest_rank(config: ServeConfig) -> int | None:
    """The least that vLLM can be told which holds `max_rank`; None where there is none."""
    return next((rank for rank in RANKS if rank >= config.max_rank), None)


def _refusal(why: str) -> ConfigError:
    return ConfigError(f"engine=vllm cannot serve this: {why}. Leave out engine=vllm to serve it by the built-in one")


@dataclass(frozen=True)
class _Lora:
    """What Ray's engine asks of an adapter that it is to load."""

    model_id: str
    local_path: str


class VllmReplica:
    """Serve deployment around Ray Serve's `LLMServer`. What is refused comes back as a value."""

    def __init__(self, base: str, template: str, precision: Precision, config: ServeConfig) -> None:
        from ray.serve.llm import LLMConfig, LLMServer

        from pefomed_ray.rendering.opening import open_renderer

        folder = base_folder(base)
        self._config = config
        self._renderer: Any = open_renderer(folder, family_of(folder), template)
        self._base = folder.name
        self._running = self._tokens = 0
        self._loaded: set[str] = set()
        self._server: Any = LLMServer.sync_init(
            LLMConfig(
                model_loading_config={"model_id": self._base, "model_source": str(folder)},
                engine_kwargs={
                    "dtype": precision.dtype,
                    "enable_lora": True,
                    "max_loras": config.max_adapters,
                    "max_lora_rank": largest_rank(config),
                    "max_num_seqs": config.max_batch_size,
                    "limit_mm_per_prompt": {"image": config.max_images},
                },
            )
        )
        self._starting: asyncio.Task[None] | None = None

    async def answer(self, ask: Ask) -> Completion | PefomedError:
        """Answer one request."""
        async for said in self.stream(ask):
            if isinstance(said, PefomedError):
                return said
            if said.completion is not None:
                return said.completion
        return PefomedError("vLLM ended without an answer")

    async def stream(self, ask: Ask) -> AsyncGenerator[Piece | PefomedError, None]:
        """The same piece by piece; the last thing is the piece with the completion, or why there is none."""
        self._running += 1
        try:
            if ask.adapter is not None and (error := await self.load(ask.adapter)):
                yield error
                return
            async for piece in pieces_of(await self._chat(ask), ask):
                if isinstance(piece, Piece) and piece.completion:
                    self._tokens += piece.completion.tokens
                yield piece
        finally:
            self._running -= 1

    async def load(self, ref: AdapterRef) -> PefomedError | None:
        """Read an adapter; why it cannot be served, where it cannot."""
        if ref.digest in self._loaded:
            return None
        try:
            folder = local_copy(ref.bundle, ref.digest)
            verify_bundle(folder)
            check_adapter(folder, self._config.max_rank)
            await self.ready()
            await self._server.engine.resolve_lora(_Lora(ref.digest, str(folder)))
        except (PefomedError, ValueError) as error:
            return CannotServeError(str(error))
        self._loaded.add(ref.digest)
        return None

    async def ready(self) -> None:
        """Returns once vLLM has the base."""
        if self._starting is None:
            self._starting = asyncio.create_task(self._server.start())
        await asyncio.shield(self._starting)

    async def stats(self) -> Stats:
        """What is known here of how it is doing."""
        return Stats(self._running, 0, len(self._loaded), 0, self._tokens, 0, 0)

    async def check_health(self) -> None:
        """Called by Serve, which replaces a replica that raises."""
        if self._starting is not None and self._starting.done():
            self._starting.result()
            await self._server.check_health()

    async def _chat(self, ask: Ask) -> Any:
        from ray.serve.llm.openai_api_models import ChatCompletionRequest

        await self.ready()
        words = self._renderer.words(ask.task, ask.question)
        name = ask.adapter.digest if ask.adapter else self._base
        return await self._server.chat(ChatCompletionRequest(**request_of(ask, words, name, self._config)))


def request_of(ask: Ask, words: str, model: str, config: ServeConfig) -> dict[str, Any]:
    """An ask as a chat request to vLLM: pictures as `data:` URLs, then the words of the adapter's template."""
    images = [f"data:{media_type(image)};base64,{base64.b64encode(image).decode()}" for image in ask.images]
    content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in images]
    return {
        "model": model,
        "messages": [{"role": "user", "content": [*content, {"type": "text", "text": words}]}],
        "max_tokens": ask.sampling.max_tokens or config.max_new_tokens,
        "temperature": ask.sampling.temperature,
        "top_p": ask.sampling.top_p,
        "seed": ask.sampling.seed,
        "stop": list(ask.sampling.stop),
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def pieces_of(batches: Any, ask: Ask) -> AsyncGenerator[Piece | PefomedError, None]:
    """vLLM's events, which come in lists of `data: {...}`, as pieces of an answer without blanks at its beginning."""
    text, ended, usage = "", "stop", {"prompt_tokens": 0, "completion_tokens": 0}
    async for batch in batches:
        for event in batch if isinstance(batch, list) else [batch]:
            if not isinstance(event, str):
                yield _error_of(event)
                return
            data = event.removeprefix("data:").strip()
            if data == "[DONE]":
                continue
            chunk = json.loads(data)
            usage = chunk.get("usage") or usage
            for choice in chunk["choices"]:
                ended = "length" if choice.get("finish_reason") == "length" else ended
                new = choice["delta"].get("content") or ""
                new = new if text else new.lstrip()
                text += new
                if new:
                    yield Piece(new)
    digest = ask.adapter.digest if ask.adapter else None
    completion = Completion(
        text.strip(),
        "length" if ended == "length" else "stop",
        usage["prompt_tokens"],
        usage["completion_tokens"],
        digest,
    )
    yield Piece("", completion)


def _error_of(response: Any) -> PefomedError:
    code = getattr(getattr(response, "error", None), "code", None)
    if isinstance(code, int) and 400 <= code < 500:
        return DataError("vLLM refuses the question; its log has more")
    return PefomedError("vLLM failed; its log has more")
