"""Answers in batches: each the same as alone, whatever was asked beside it and in whatever order."""

import io
import random

import pytest
import torch
from PIL import Image

from pefomed_ray.model import generate
from pefomed_ray.model.base import open_base
from pefomed_ray.model.generate import Answer, Generator, Prompt
from pefomed_ray.rendering.batches import Batch, Rendered, generation_batch

LIMIT = 12
QUESTIONS = (
    "Where?",
    "Is this a CT?",
    "What modality is this image?",
    "Which of the organs that can be seen in this picture is the largest one of all of them?",
    "Is there any finding in the left lung, or in the right lung, or in both of them at the same time, or in neither?",
)


def picture(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.radial_gradient("L").point(lambda v: (v + level) % 256).save(buffer, "PNG")
    return buffer.getvalue()


PICTURES = [picture(level) for level in range(0, 250, 50)]


def many_prompts() -> list[Prompt]:
    """Of mixed lengths; each question about no, one and two pictures."""
    return [
        Prompt("vqa", question, tuple(PICTURES[(number + i) % len(PICTURES)] for i in range(images)))
        for number, question in enumerate(QUESTIONS)
        for images in (0, 1, 2)
    ]


@pytest.fixture(scope="module")
def generator() -> Generator:
    return Generator(open_base("embedded", "short"))


@pytest.fixture(scope="module")
def alone(generator: Generator) -> list[Answer]:
    return [generator.answer([prompt], LIMIT)[0] for prompt in many_prompts()]


def test_prompts_differ_in_length_and_answers_in_text(alone: list[Answer]) -> None:
    """What the tests below compare is not one answer over and over."""
    assert len({answer.prompt_tokens for answer in alone}) > 10
    assert len({answer.text for answer in alone}) > 5
    assert len({answer.tokens for answer in alone}) > 2


@pytest.mark.parametrize("batch_size", [2, 4, 100])
def test_answers_do_not_depend_on_the_batch(batch_size: int, generator: Generator, alone: list[Answer]) -> None:
    generator.batch_size = batch_size
    prompts = many_prompts()
    assert generator.answer(prompts, LIMIT) == alone
    order = random.Random(batch_size).sample(range(len(prompts)), len(prompts))
    assert generator.answer([prompts[i] for i in order], LIMIT) == [alone[i] for i in order]


def test_without_the_mask_they_would(
    generator: Generator, alone: list[Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: padding that is looked at changes answers, and the comparison sees it."""

    def unmasked(rows: list[Rendered], pad_token_id: int) -> Batch:
        batch = generation_batch(rows, pad_token_id)
        batch.mask_BT.fill_(1)
        return batch

    monkeypatch.setattr(generate, "generation_batch", unmasked)
    generator.batch_size = 100
    found = generator.answer(many_prompts(), LIMIT)
    assert [answer.text for answer in found] != [answer.text for answer in alone]


def test_neighbours_in_length_are_answered_together(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[list[int]] = []

    def watched(rows: list[Rendered], pad_token_id: int) -> Batch:
        lengths.append([len(row.prompt) for row in rows])
        return generation_batch(rows, pad_token_id)

    monkeypatch.setattr(generate, "generation_batch", watched)
    generator.batch_size = 4
    generator.answer(many_prompts(), 1)
    flat = [length for batch in lengths for length in batch]
    assert flat == sorted(flat, reverse=True)
    assert [len(batch) for batch in lengths] == [4, 4, 4, 3]


def test_each_prompt_may_have_its_own_limit(generator: Generator, alone: list[Answer]) -> None:
    prompts = many_prompts()
    limits = [1 + i % 5 for i in range(len(prompts))]
    generator.batch_size = 4
    found = generator.answer(prompts, limits)
    for prompt, limit, answer, free in zip(prompts, limits, found, alone, strict=True):
        assert answer == generator.answer([prompt], limit)[0]
        assert answer.tokens == min(limit, free.tokens)
        assert answer.finished == (free.finished and free.tokens <= limit)
    assert len({answer.finished for answer in found}) == 2


def test_answers_are_the_same_each_time_whatever_the_seed(generator: Generator, alone: list[Answer]) -> None:
    torch.manual_seed(1)
    assert generator.answer(many_prompts()[:4], LIMIT) == alone[:4]
    torch.manual_seed(2)
    assert generator.answer(many_prompts()[:4], LIMIT) == alone[:4]


def test_nothing_asked_is_nothing_answered(generator: Generator) -> None:
    assert generator.answer([], LIMIT) == []
