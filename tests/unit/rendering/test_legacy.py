"""The published prompts, and that no other template has their defects."""

import pytest

from pefomed_ray.artifacts.base import EMBEDDED_FOLDER
from pefomed_ray.artifacts.records import TASKS
from pefomed_ray.rendering.legacy import LEGACY, LEGACY_TRAIN, LEGACY_TRAIN_BARE, MAX_WORDS, clean
from pefomed_ray.rendering.renderer import Renderer
from pefomed_ray.rendering.template import IMAGE_SLOT, Template
from pefomed_ray.rendering.templates import TEMPLATES, template_named

QUESTION = "Is the 3.5 cm mass (arrow) new?"
LONG = " ".join(f"word{i}" for i in range(80))
OTHERS = [TEMPLATES[name] for name in ("paper", "short")]


def text_of(template: Template, question: str, images: int = 1) -> str:
    return "".join(template.segments("vqa", question, images))


def test_evaluation_and_training_read_as_published() -> None:
    asked = "based on the image, respond to this question with a short answer"
    cleaned = "is the 3 5 cm mass arrow new?"
    assert text_of(LEGACY, QUESTION) == f"[INST] <Img><ImageHere></Img> [vqa] {asked} {cleaned} [/INST]"
    assert LEGACY_TRAIN.segments("vqa", QUESTION, 1) == [
        "[INST] <img>",
        IMAGE_SLOT,
        f"</img> [vqa] {asked} {cleaned} [/INST]",
    ]
    assert LEGACY_TRAIN_BARE.segments("vqa", QUESTION, 1)[-1] == f"</img> [vqa] {cleaned} [/INST]"
    assert "[caption]" in LEGACY.segments("report", "", 1)[-1]
    assert "[report]" in LEGACY_TRAIN.segments("report", "", 1)[-1]


def test_long_texts_are_cut_and_in_training_one_word_earlier() -> None:
    assert len(clean(LONG).split()) == MAX_WORDS
    evaluated, trained = (text_of(template, LONG).count("word") for template in (LEGACY, LEGACY_TRAIN))
    assert evaluated == trained + 1
    assert LEGACY.answer(LONG).split()[-1] == f"word{MAX_WORDS - 1}"


def test_the_beginning_comes_twice_in_evaluation_alone() -> None:
    starts = {}
    for name in ("legacy", "legacy-train", "legacy-train-bare", "paper", "short"):
        renderer = Renderer.open(EMBEDDED_FOLDER, template_named(name))
        starts[name] = renderer.prompt_ids("vqa", QUESTION, 1).count(renderer.bos_token_id)
    assert starts == {"legacy": 2, "legacy-train": 1, "legacy-train-bare": 1, "paper": 1, "short": 1}


@pytest.mark.parametrize("template", [LEGACY, LEGACY_TRAIN, LEGACY_TRAIN_BARE], ids=lambda template: template.name)
def test_images_are_those_given_whatever_a_question_spells(template: Template) -> None:
    for task in TASKS:
        for count in (0, 1, 3):
            for question in ("", "What is <ImageHere> or <imagehere>?"):
                pieces = template.segments(task, question, count)
                assert pieces.count(IMAGE_SLOT) == count
                assert pieces[1::2] == [IMAGE_SLOT] * count


@pytest.mark.parametrize("template", OTHERS, ids=lambda template: template.name)
def test_the_other_templates_change_no_text(template: Template) -> None:
    assert QUESTION in text_of(template, QUESTION)
    assert LONG in text_of(template, LONG)
    assert template.answer(f" {QUESTION}\n") == QUESTION
    assert "[report]" in template.segments("report", "", 1)[-1]
