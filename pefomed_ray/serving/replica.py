"""A replica: one copy of the model, answering in batches."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ray import serve

from pefomed_ray.artifacts.records import Task
from pefomed_ray.config import ServeConfig
from pefomed_ray.errors import DataError
from pefomed_ray.model.bundle import open_bundle
from pefomed_ray.model.generate import Generator, Prompt
from pefomed_ray.rendering.images import MAX_PIXELS, decode_image
from pefomed_ray.serving.schemas import Ask, Completion


class ModelReplica:
    """Serve deployment around `Generator`. Constructed with the registry's copy of a bundle, so it survives the run."""

    def __init__(self, bundle: str, task: Task, config: ServeConfig) -> None:
        device = "cuda" if config.use_gpu else "cpu"
        base, manifest = open_bundle(Path(bundle), device=device)
        self._digest = manifest.digest
        self._task = task
        self._max_new_tokens = config.max_new_tokens
        self._context_tokens = base.context_tokens
        self._generator = Generator(base, device)
        # One thread: the model is asked one batch at a time, off the event loop that collects the next.
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._answer_batch.set_max_batch_size(config.max_batch_size)

    async def ready(self) -> None:
        """Returns: the constructor is through."""

    async def answer(self, ask: Ask) -> Completion | DataError:
        """Answer one request, together with others that arrive meanwhile.

        What is wrong with the images or the length comes back as a value: raised, Serve would log it with a traceback.
        """
        try:
            max_tokens = await asyncio.to_thread(self._check, ask)
        except DataError as error:
            return error
        completion: Completion = await self._answer_batch((ask, max_tokens))
        return completion

    def _check(self, ask: Ask) -> int:
        """How many tokens may be generated. Before the batch, so that a bad request fails alone."""
        pixels = sum(image.width * image.height for image in map(decode_image, ask.images))
        if pixels > MAX_PIXELS:
            raise DataError(f"the images of a request have {pixels} pixels together; at most {MAX_PIXELS}")
        prompt_tokens = self._generator.renderer.prompt_length(self._task, ask.question, ask.images)
        room = self._context_tokens - prompt_tokens
        if room < (ask.max_tokens or 1):
            raise DataError(
                f"the prompt has {prompt_tokens} tokens and leaves {max(room, 0)} of the model's "
                f"{self._context_tokens} for the answer; ask shorter or set a smaller max_tokens"
            )
        return ask.max_tokens or min(room, self._max_new_tokens)

    @serve.batch
    async def _answer_batch(self, asks: list[tuple[Ask, int]]) -> list[Completion]:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._generate, asks)

    def _generate(self, asks: list[tuple[Ask, int]]) -> list[Completion]:
        prompts = [Prompt(self._task, ask.question, ask.images) for ask, _ in asks]
        answers = self._generator.answer(prompts, [max_tokens for _, max_tokens in asks])
        return [
            Completion(answer.text, self._digest, answer.prompt_tokens, answer.tokens, answer.finished)
            for answer in answers
        ]
