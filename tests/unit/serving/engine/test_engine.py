"""The engine answers as the same bundles do offline, whoever is answered beside, and loses nobody."""

import asyncio
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pefomed_ray.errors import DataError, PefomedError
from pefomed_ray.serving.contract import AdapterRef, Ask, Completion, Piece, Sampling
from pefomed_ray.serving.engine.adapters import AdapterSlots
from pefomed_ray.serving.engine.engine import Engine
from tests.tiny_bases import FAMILIES
from tests.tiny_served import make_base, make_bundle, png
from tests.unit.serving.engine.conftest import Shown, pieces_of

TIMEOUT_S = 120
SHORT = ("qwen2_5_vl", "gemma3", "llava")
"""Positions of three axes, sliding windows, and neither. The others are for the long tier."""


def drawn(shown: Shown, count: int, seed: int = 0) -> list[Ask]:
    """Requests for all adapters: pictures, lengths of question and answer drawn."""
    draw = random.Random(seed)
    return [
        Ask(
            "vqa",
            "Is it normal" + "?" * draw.randrange(1, 20),
            tuple(png(draw.randrange(200)) for _ in range(draw.randrange(1, 3))),
            shown.refs[draw.randrange(len(shown.refs))],
            Sampling(max_tokens=draw.randrange(1, 24)),
        )
        for _ in range(count)
    ]


async def answered(engine: Engine, asks: list[Ask], within_s: float = 0.3, seed: int = 0) -> list[Completion]:
    """All of them, begun at drawn moments."""
    draw = random.Random(seed)

    async def one(ask: Ask, wait_s: float) -> Completion:
        await asyncio.sleep(wait_s)
        return await engine.answer(ask)

    asked = asyncio.gather(*(one(ask, draw.random() * within_s) for ask in asks))
    return await asyncio.wait_for(asked, TIMEOUT_S)


def test_a_hundred_questions_to_four_adapters_at_once(shown: Shown) -> None:
    asks = drawn(shown, 100)
    with shown.engine() as engine:
        answers = asyncio.run(answered(engine, asks))
        stats = engine.stats()
    assert [said.digest for said in answers] == [ask.adapter.digest for ask in asks if ask.adapter]
    assert shown.wrong(asks, answers) == []
    assert len({said.text for said in answers}) > 50
    assert stats.steps < stats.tokens / 2  # they were answered together


def test_exchanged_weights_would_be_noticed(shown: Shown, monkeypatch: pytest.MonkeyPatch) -> None:
    fill = AdapterSlots.fill
    monkeypatch.setattr(AdapterSlots, "fill", lambda self, slot, weights: fill(self, slot % 4 + 1, weights))
    asks = drawn(shown, 12)
    with shown.engine() as engine:
        assert shown.wrong(asks, asyncio.run(answered(engine, asks)))


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[] if name in SHORT else pytest.mark.long) for name in FAMILIES]
)
def test_every_family_answers_as_it_does_offline(family: str, shown_family: Callable[[str], Shown]) -> None:
    shown = shown_family(family)
    asks = drawn(shown, 16)
    with shown.engine() as engine:
        assert shown.wrong(asks, asyncio.run(answered(engine, asks))) == []


def test_an_adapter_beyond_all_bounds_disturbs_nobody(shown: Shown, tmp_path: Path) -> None:
    """Its own answers are worth nothing; those beside it are what they always are."""
    huge = make_bundle(tmp_path / "huge", shown.base, rank=4, alpha=8, weight=8e37)
    wild = Ask("vqa", "Is it normal?", (png(3),), huge, Sampling(max_tokens=20))
    asks = drawn(shown, 12)
    with shown.engine(max_adapters=5) as engine:
        answers = asyncio.run(answered(engine, [wild, *asks, wild]))
    assert shown.wrong(asks, answers[1:-1]) == []


def test_the_base_without_an_adapter(shown: Shown) -> None:
    from pefomed_ray.model.base import open_base
    from pefomed_ray.model.generate import Generator, Prompt

    ask = Ask("vqa", "Is it normal?", (png(7),), None, Sampling(max_tokens=12))
    with shown.engine() as engine:
        said, beside = asyncio.run(answered(engine, [ask, drawn(shown, 1)[0]]))
    (expected,) = Generator(open_base(str(shown.base), "short")).answer([Prompt("vqa", ask.question, ask.images)], 12)
    assert (said.text, said.digest) == (expected.text, None)
    assert beside.digest is not None


def test_text_alone(shown: Shown) -> None:
    ask = Ask("vqa", "Is it normal?", (), shown.refs[0], Sampling(max_tokens=12))
    with shown.engine() as engine:
        assert shown.wrong([ask], asyncio.run(answered(engine, [ask]))) == []


def test_short_answers_do_not_wait_for_long_ones(shown: Shown) -> None:
    """Counted in steps of the model, not in seconds."""
    long = Ask("vqa", "Is it normal?", (png(0),), shown.refs[0], Sampling(max_tokens=150))
    short = Ask("vqa", "Is it?", (png(9),), shown.refs[1], Sampling(max_tokens=3))

    async def both(engine: Engine) -> tuple[int, bool]:
        pieces = engine.stream(long)
        await anext(pieces)
        before = engine.stats().steps
        await engine.answer(short)
        steps = engine.stats().steps - before
        rest = await pieces_of(pieces)
        return steps, bool(rest)

    with shown.engine() as engine:
        steps, went_on = asyncio.run(asyncio.wait_for(both(engine), TIMEOUT_S))
    assert steps < 60  # the long one needs 150
    assert went_on


@pytest.mark.parametrize("pinned", [True, False], ids=["pinned", "control"])
def test_reloads_under_load_never_answer_by_other_weights(
    shown: Shown, monkeypatch: pytest.MonkeyPatch, pinned: bool
) -> None:
    """Two slots for four adapters: dozens of reloads. Without the pin, slots are filled under running requests."""
    from pefomed_ray.serving.engine.shelf import Shelf

    if not pinned:
        monkeypatch.setattr(Shelf, "release", lambda self, held: None)
        lease = Shelf.lease

        async def unpinned(self: Shelf, ref: AdapterRef | None) -> Any:
            held = await lease(self, ref)
            held.users = 0
            self._returned.set()
            return held

        monkeypatch.setattr(Shelf, "lease", unpinned)
    fills = []
    fill = AdapterSlots.fill

    def counted(self: AdapterSlots, slot: int, weights: Any) -> None:
        fills.append(slot)
        fill(self, slot, weights)

    monkeypatch.setattr(AdapterSlots, "fill", counted)
    asks = drawn(shown, 80, seed=3)

    async def four_at_a_time(engine: Engine) -> list[Completion]:
        said: dict[int, Completion] = {}

        async def client(first: int) -> None:
            for number in range(first, len(asks), 4):
                said[number] = await engine.answer(asks[number])

        await asyncio.gather(*map(client, range(4)))
        return [said[number] for number in range(len(asks))]

    with shown.engine(max_adapters=2) as engine:
        answers = asyncio.run(asyncio.wait_for(four_at_a_time(engine), TIMEOUT_S))
    assert len(fills) >= 20
    assert bool(shown.wrong(asks, answers)) is not pinned


def test_an_adapter_that_everybody_wants_keeps_nobody_waiting_for_ever(shown: Shown) -> None:
    """One slot, requests for its adapter that overlap all the time, and one for another."""

    async def crowd(engine: Engine, over: asyncio.Event) -> int:
        asked = 0
        while not over.is_set():
            await engine.answer(Ask("vqa", "Is it normal?", (png(asked % 9),), shown.refs[0], Sampling(30)))
            asked += 1
        return asked

    async def both(engine: Engine) -> list[int]:
        over = asyncio.Event()
        crowds = [asyncio.create_task(crowd(engine, over)) for _ in range(4)]
        await asyncio.sleep(0.3)
        ask = Ask("vqa", "Is it normal?", (png(3),), shown.refs[1], Sampling(6))
        said = await asyncio.wait_for(engine.answer(ask), 20)
        over.set()
        assert shown.wrong([ask], [said]) == []
        return list(await asyncio.gather(*crowds))

    with shown.engine(max_adapters=1) as engine:
        assert min(asyncio.run(asyncio.wait_for(both(engine), TIMEOUT_S))) > 0


def test_a_step_that_fails_fails_its_rows_alone(shown: Shown, monkeypatch: pytest.MonkeyPatch) -> None:
    asks = drawn(shown, 3)

    async def through(engine: Engine) -> tuple[list[Any], Completion]:
        failures = list(await asyncio.gather(*(engine.answer(ask) for ask in asks[:2]), return_exceptions=True))
        monkeypatch.undo()
        return failures, await engine.answer(asks[2])

    with shown.engine() as engine:
        monkeypatch.setattr(engine._prompts, "prefill", _out_of_memory)
        failures, said = asyncio.run(asyncio.wait_for(through(engine), TIMEOUT_S))
        assert engine.healthy()
        assert engine.stats().running == 0
    assert [str(failure) for failure in failures] == ["the model failed (OutOfMemoryError); ask again"] * 2
    assert all(isinstance(failure, PefomedError) for failure in failures)
    assert shown.wrong([asks[2]], [said]) == []


def _out_of_memory(*_: Any) -> None:
    raise torch.OutOfMemoryError("tried to allocate what a patient wrote")


def test_a_closed_iterator_frees_its_row(shown: Shown) -> None:
    ask = Ask("vqa", "Is it normal?", (png(0),), shown.refs[0], Sampling(max_tokens=150))

    async def leave(engine: Engine) -> None:
        pieces = engine.stream(ask)
        await anext(pieces)
        assert engine.stats().running == 1
        await pieces.aclose()  # type: ignore[attr-defined]
        assert engine.stats().running == 0

    with shown.engine() as engine:
        asyncio.run(asyncio.wait_for(leave(engine), TIMEOUT_S))
        assert engine.stats().steps < 150


def test_closing_fails_what_is_under_way(shown: Shown) -> None:
    async def ask(engine: Engine) -> None:
        pieces = engine.stream(Ask("vqa", "Is it normal?", (png(0),), shown.refs[0], Sampling(max_tokens=150)))
        await anext(pieces)
        await asyncio.to_thread(engine.close)
        with pytest.raises(PefomedError, match="closing"):
            await pieces_of(pieces)
        with pytest.raises(PefomedError, match="closed"):
            await engine.answer(drawn(shown, 1)[0])

    with shown.engine() as engine:
        asyncio.run(asyncio.wait_for(ask(engine), TIMEOUT_S))


def test_pieces_add_up_and_a_stop_text_ends_an_answer(shown: Shown) -> None:
    ask = Ask("vqa", "Is it normal?", (png(3),), shown.refs[0], Sampling(max_tokens=40))

    async def streamed(engine: Engine, ask: Ask) -> list[Piece]:
        return await pieces_of(engine.stream(ask))

    with shown.engine() as engine:
        pieces = asyncio.run(streamed(engine, ask))
        whole = pieces[-1].completion
        assert whole is not None
        assert "".join(piece.text for piece in pieces) == whole.text
        assert len(pieces) > 5
        stop = whole.text[4:6]
        first = whole.text.index(stop)
        shorter = asyncio.run(
            streamed(engine, Ask(ask.task, ask.question, ask.images, ask.adapter, Sampling(40, stop=("zq", stop))))
        )
    said = shorter[-1].completion
    assert said is not None
    assert said.text == whole.text[:first] == "".join(piece.text for piece in shorter)
    assert said.ended == "stop"
    assert said.tokens < whole.tokens


def test_a_seed_is_kept_to(shown: Shown) -> None:
    def hot(seed: int) -> Ask:
        return Ask(
            "vqa", "Is it normal?", (png(3),), shown.refs[0], Sampling(24, temperature=1.5, top_p=0.9, seed=seed)
        )

    with shown.engine() as engine:
        one, again, other = asyncio.run(answered(engine, [hot(1), hot(1), hot(2)]))
    assert one.text == again.text != other.text


def test_the_tower_looks_once_at_an_image(shown: Shown, monkeypatch: pytest.MonkeyPatch) -> None:
    asks = [Ask("vqa", f"Is it {n}?", (png(3),), shown.refs[n % 4], Sampling(6)) for n in range(8)]
    seen: list[int] = []
    with shown.engine() as engine:
        model: Any = engine._base.model
        model.vision_tower.register_forward_pre_hook(lambda module, inputs: seen.append(1))
        answers = asyncio.run(answered(engine, asks))
        assert len(seen) == 1
        assert shown.wrong(asks, answers) == []
    with shown.engine(image_cache_bytes=0) as engine:
        model = engine._base.model
        seen.clear()
        model.vision_tower.register_forward_pre_hook(lambda module, inputs: seen.append(1))
        for ask in asks[:3]:
            asyncio.run(engine.answer(ask))
        assert len(seen) == 3


@pytest.fixture(scope="module")
def refused(shown: Shown, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[AdapterRef, str]]:
    """Bundles that cannot be served, and why."""
    folder = tmp_path_factory.mktemp("refused")
    make_base(folder / "other", seed=5)
    other = make_bundle(folder / "of-another", folder / "other")
    high = make_bundle(folder / "high", shown.base, rank=32)
    infinite = make_bundle(folder / "infinite", shown.base, rank=4, weight=float("inf"))
    dora = make_bundle(folder / "dora", shown.base, use_dora=True)
    shutil.copytree(shown.refs[0].bundle, folder / "flipped")
    weights = folder / "flipped" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    return {
        "another base": (other, "was trained on base"),
        "rank": (high, "rank 32, and max_rank is 16"),
        "DoRA": (dora, "DoRA"),
        "not finite": (infinite, "holds NaN or infinity"),
        "tampered": (AdapterRef(shown.refs[0].digest, str(folder / "flipped")), "adapter_model.safetensors"),
        "another bundle": (AdapterRef("0" * 64, shown.refs[1].bundle), "holds"),
        "missing": (AdapterRef("1" * 64, str(Path(folder) / "none")), "none"),
    }


@pytest.mark.parametrize(
    "which", ["another base", "rank", "DoRA", "not finite", "tampered", "another bundle", "missing"]
)
def test_what_cannot_be_served_is_refused_and_nobody_else_notices(
    which: str, refused: dict[str, tuple[AdapterRef, str]], shown: Shown
) -> None:
    ref, why = refused[which]
    bad = Ask("vqa", "Is it normal?", (png(3),), ref, Sampling(6))
    good = [ask for ask in drawn(shown, 8) if ask.adapter != shown.refs[0]]

    async def all_of_them(engine: Engine) -> list[Any]:
        return list(await asyncio.gather(*(engine.answer(ask) for ask in [bad, *good]), return_exceptions=True))

    with shown.engine(max_rank=16) as engine:
        error, *answers = asyncio.run(asyncio.wait_for(all_of_them(engine), TIMEOUT_S))
        assert engine.stats().adapters <= 4
    assert isinstance(error, DataError), error
    assert why in str(error)
    assert shown.wrong(good, answers) == []
