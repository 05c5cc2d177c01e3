"""A base with four adapters, and what each of them answers offline."""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pefomed_ray.config import ServeConfig
from pefomed_ray.config.schema import Precision
from pefomed_ray.model.base import open_base
from pefomed_ray.model.generate import Generator, Prompt
from pefomed_ray.model.load import open_generator
from pefomed_ray.serving.contract import AdapterRef, Ask, Completion, Piece
from pefomed_ray.serving.engine.engine import Engine
from tests.tiny_served import make_base, make_bundle

ADAPTERS: tuple[dict[str, Any], ...] = (
    {"rank": 4, "alpha": 8},
    {"rank": 8, "alpha": 8, "use_rslora": True, "template": "paper"},
    {"rank": 2, "alpha": 16, "train_projector": False},
    {"rank": 16, "alpha": 4, "target_modules": ["all-linear"]},
)


@dataclass(frozen=True)
class Shown:
    """A base folder, adapters over it, and each of them offline."""

    base: Path
    template: str
    refs: tuple[AdapterRef, ...]
    offline: tuple[Generator, ...]

    @contextmanager
    def engine(self, **config: Any) -> Iterator[Engine]:
        """An engine over the base."""
        settings = ServeConfig.model_validate({"max_batch_size": 6, "max_adapters": 4} | config)
        engine = Engine(open_base(str(self.base), self.template), Precision(), settings)
        try:
            yield engine
        finally:
            engine.close()

    def wrong(self, asks: list[Ask], answers: list[Completion]) -> list[int]:
        """Numbers of those that the adapter which they name would have answered otherwise."""
        generators = {ref.digest: generator for ref, generator in zip(self.refs, self.offline, strict=True)}
        found = []
        for number, (ask, said) in enumerate(zip(asks, answers, strict=True)):
            assert said.digest is not None
            prompt = Prompt(ask.task, ask.question, ask.images)
            (expected,) = generators[said.digest].answer([prompt], ask.sampling.max_tokens or 256)
            same = (said.text, said.tokens, said.prompt_tokens) == (
                expected.text,
                expected.tokens,
                expected.prompt_tokens,
            )
            if not same or (said.ended == "stop") != expected.finished:
                found.append(number)
        return found


def show(base: Path, folder: Path, template: str, adapters: tuple[dict[str, Any], ...]) -> Shown:
    """Bundles over a base."""
    refs = tuple(
        make_bundle(folder / f"adapter{number}", base, seed=number + 1, **({"template": template} | adapter))
        for number, adapter in enumerate(adapters)
    )
    return Shown(base, template, refs, tuple(open_generator(ref.bundle) for ref in refs))


@pytest.fixture(scope="session")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Shown:
    """Over the paper's architecture."""
    folder = tmp_path_factory.mktemp("shown")
    make_base(folder / "base")
    return show(folder / "base", folder, "short", ADAPTERS)


@pytest.fixture(scope="session")
def shown_family(tmp_path_factory: pytest.TempPathFactory, tiny_base: Callable[[str], Path]) -> Callable[[str], Shown]:
    """A function: name of a Hugging Face family -> two adapters over a tiny base of it."""

    def make(family: str) -> Shown:
        adapters = ({"rank": 4, "alpha": 8}, {"rank": 2, "alpha": 2, "train_projector": False})
        return show(tiny_base(family), tmp_path_factory.mktemp("family"), "chat", adapters)

    return make


async def pieces_of(stream: AsyncIterator[Piece]) -> list[Piece]:
    """All of them."""
    return [piece async for piece in stream]
