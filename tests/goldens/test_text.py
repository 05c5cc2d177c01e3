"""Published text cleaning, and token ids of the published tokenizer."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer

from pefomed_ray.artifacts.storage import read_json
from pefomed_ray.rendering.images import ImageSpec
from pefomed_ray.rendering.legacy import clean
from pefomed_ray.rendering.renderer import Renderer
from pefomed_ray.rendering.templates import template_named

SPECIAL = ("<s>", "</s>", "<unk>")


@pytest.fixture(scope="module")
def cases(parity_dir: Path) -> list[dict]:
    found = read_json(parity_dir / "text" / "tokenizer_cases.json")["cases"]
    assert len(found) == 458
    return found


def tokenizer(parity_dir: Path, *, special_text: bool) -> Tokenizer:
    """As the renderer has it, or as the published code: text that spells a special token becomes one."""
    opened = Tokenizer.from_file(str(parity_dir / "text" / "tokenizer" / "tokenizer.json"))
    opened.encode_special_tokens = not special_text
    return opened


def test_cleaning_equals_the_published_one(parity_dir: Path) -> None:
    pairs = read_json(parity_dir / "text" / "blip_caption_cases.json")
    assert pairs
    assert [pair["input"] for pair in pairs if clean(pair["input"]) != pair["output"]] == []
    assert [pair for pair in pairs if pair["input"].strip() != pair["output"]], "the control: cleaning does something"


def test_every_string_gets_the_published_ids(parity_dir: Path, cases: list[dict]) -> None:
    published = tokenizer(parity_dir, special_text=True)
    wrong = []
    for case in cases:
        ids = published.encode(case["text"], add_special_tokens=False).ids
        if case["add_special_tokens"]:
            ids = [1, *ids]
        wrong += [case["text"]] if ids != case["ids"] else []
    assert wrong == []


def test_the_renderer_gives_them_too_but_for_text_that_spells_a_special_token(
    parity_dir: Path, cases: list[dict]
) -> None:
    """That stays text: a question cannot end a prompt. An answer's end token is added as an id."""
    opened = tokenizer(parity_dir, special_text=False)
    size = opened.get_vocab_size()
    renderer = Renderer(opened, ImageSpec(56), template_named("legacy"), 0, 1, 2, size, 4)
    plain = [case for case in cases if not any(token in case["text"] for token in SPECIAL)]
    assert len(plain) > 200
    assert [case["text"] for case in plain if encoded(renderer, case["text"]) != ids_of(case)] == []
    answers = [case for case in cases if case["text"].endswith("</s>") and case["text"].count("<") == 1]
    assert len(answers) > 50
    for case in answers:
        answer = case["text"].removesuffix("</s>")
        assert [*encoded(renderer, answer), renderer.eos_token_id] == ids_of(case)
    assert renderer.eos_token_id not in encoded(renderer, "is this </s> the end?")


def encoded(renderer: Renderer, text: str) -> list[int]:
    """Ids of a piece of text as the renderer encodes it."""
    return renderer.tokenizer.encode(text, add_special_tokens=False).ids


def ids_of(case: dict) -> list[int]:
    """Without the beginning token, which the renderer adds itself."""
    return case["ids"][1:] if case["add_special_tokens"] else case["ids"]
