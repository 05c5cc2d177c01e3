"""What a Hugging Face model reads: its own processor and chat template around our words, for a base of each family."""

import io
import json
import shutil
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load, save

from pefomed_ray.errors import ConfigError, DataError
from pefomed_ray.rendering.batches import IGNORED_LABEL, OF_TOKENS, Rendered, training_batch
from pefomed_ray.rendering.chat import ChatRenderer
from pefomed_ray.rendering.templates import template_named
from tests.tiny_bases import FAMILIES

END = {
    "llava": "</s>",
    "llava_onevision": "<|im_end|>",
    "qwen2_5_vl": "<|im_end|>",
    "qwen3_vl": "<|im_end|>",
    "gemma3": "<end_of_turn>",
    "paligemma": "<eos>",
    "idefics3": "<end_of_utterance>",
    "smolvlm": "<end_of_utterance>",
    "internvl": "<|im_end|>",
}
WORDS = "Answer the question about the image in as few words as possible. Is this a CT?"
TILES = "".join(
    f"<fake_token_around_image>{name}<image><image><image><image>{end}"
    for name, end in [
        ("<row_1_col_1>", ""),
        ("<row_1_col_2>", "\n"),
        ("<row_2_col_1>", ""),
        ("<row_2_col_2>", "\n\n"),
        ("<global-img>", "<fake_token_around_image>"),
    ]
)
QWEN = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{}<|im_end|>\n<|im_start|>assistant\n"
PROMPT = {
    "llava": "<s> USER: <image><image><image><image> \n{} ASSISTANT:",
    "llava_onevision": "<|im_start|>user " + 10 * "<image>" + "\n{}<|im_end|><|im_start|>assistant\n",
    "qwen2_5_vl": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" + QWEN,
    "qwen3_vl": QWEN,
    "gemma3": "<bos><start_of_turn>user\n\n\n<start_of_image>"
    + 4 * "<image_soft_token>"
    + "<end_of_image>\n\n{}<end_of_turn>\n<start_of_turn>model\n",
    "paligemma": "<image><image><image><image><bos>{}\n",
    "idefics3": "<|begin_of_text|>User:" + TILES + "{}<end_of_utterance>\nAssistant:",
    "smolvlm": "<|im_start|>User:" + TILES + "{}<end_of_utterance>\nAssistant:",
    "internvl": "<|im_start|>user\n<img>" + 4 * "<IMG_CONTEXT>" + "</img>\n{}<|im_end|>\n<|im_start|>assistant\n",
}
"""What the published templates make of one picture of 28x28 px and WORDS."""
INPUTS = {
    "llava": {"pixel_values"},
    "llava_onevision": {"pixel_values", "image_sizes", "batch_num_images"},
    "qwen2_5_vl": {"pixel_values", "image_grid_thw", "mm_token_type_ids"},
    "qwen3_vl": {"pixel_values", "image_grid_thw", "mm_token_type_ids"},
    "gemma3": {"pixel_values", "token_type_ids"},
    "paligemma": {"pixel_values", "token_type_ids"},
    "idefics3": {"pixel_values", "pixel_attention_mask"},
    "smolvlm": {"pixel_values", "pixel_attention_mask"},
    "internvl": {"pixel_values"},
}
"""What the models must be given beside ids and mask; Qwen2.5-VL and Gemma 3 would do without, but see other positions
and another mask."""
SPELT = [
    "<image>",
    "<|im_end|>",
    "</s>",
    "<s>",
    "<eos>",
    "<bos>",
    "<end_of_turn>",
    "<end_of_utterance>",
    "<|image_pad|>",
]
SPELT += [
    "<start_of_image>",
    "<image_soft_token>",
    "<IMG_CONTEXT>",
    "<|im_start|>",
    "<fake_token_around_image>",
    "<ima",
]
QUESTIONS = [
    "Is this a CT?",
    "Où est la lésion ? 肺 🫁 µm²",
    "{{ 7 * 7 }} {% raw %} <b>",
    "".join(SPELT),
    " ".join(SPELT),
]
ANSWERS = ["yes", "Ødème, 肺 🫁 ≥3 mm", "a </s> <|im_end|><end_of_turn><eos><end_of_utterance> b", "-5", "1. a\n\n2. b"]

MakeBase = Callable[[str], Path]


@cache
def opened(folder: Path) -> ChatRenderer:
    return ChatRenderer.open(folder, template_named("chat"))


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def renderer(family: str, tiny_base: MakeBase) -> ChatRenderer:
    return opened(tiny_base(family))


def picture(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.radial_gradient("L").resize((width, height)).save(buffer, "PNG")
    return buffer.getvalue()


PICTURES = [picture(60, 40), picture(30, 50)]


def counts(family: str) -> tuple[int, ...]:
    """Numbers of pictures that a prompt may have."""
    return (1, 2) if family == "paligemma" else (0, 1, 2)


def row(renderer: ChatRenderer, question: str, images: int, answer: str | None = None) -> Rendered:
    return renderer.render("vqa", question, renderer.read(PICTURES[:images]), answer)


def special_ids(renderer: ChatRenderer) -> set[int]:
    return {number for number, token in renderer.processor.tokenizer.added_tokens_decoder.items() if token.special}


def text(renderer: ChatRenderer, ids: list[int]) -> str:
    return str(renderer.processor.tokenizer.decode(ids))


def test_a_prompt_reads_as_the_published_template_has_it(family: str, renderer: ChatRenderer) -> None:
    prompt = renderer.render("vqa", "Is this a CT?", renderer.read([picture(28, 28)])).prompt
    assert text(renderer, prompt) == PROMPT[family].format(WORDS)


def test_the_model_is_given_all_that_its_processor_makes(family: str, renderer: ChatRenderer) -> None:
    batch = training_batch([row(renderer, "Is this a CT?", 1, "yes")], renderer.pad_token_id)
    assert set(renderer.inputs(batch)) == {"input_ids", "attention_mask"} | INPUTS[family]


@pytest.mark.parametrize("task", ["vqa", "caption", "report"])
def test_a_generation_prompt_begins_the_training_example(family: str, renderer: ChatRenderer, task: Any) -> None:
    for images in counts(family):
        for question, answer in zip(QUESTIONS, ANSWERS, strict=True):
            pictures = renderer.read(PICTURES[:images])
            asked = renderer.render(task, question, pictures)
            taught = renderer.render(task, question, pictures, answer)
            assert (taught.prompt, asked.answer) == (asked.prompt, [])
            assert taught.tensors.keys() == asked.tensors.keys()
            for name, value in asked.tensors.items():
                if name in OF_TOKENS:
                    assert value.shape == (1, len(asked.prompt))
                    assert taught.tensors[name].shape == (1, len(asked.prompt) + len(taught.answer))
                    assert torch.equal(taught.tensors[name][:, : len(asked.prompt)], value)
                else:
                    assert torch.equal(taught.tensors[name], value)


def test_a_row_survives_the_way_from_a_data_worker(renderer: ChatRenderer) -> None:
    tensors = row(renderer, "Is this a CT?", 2, "yes").tensors
    again = load(save(tensors))
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], value) and again[name].dtype == value.dtype for name, value in tensors.items())


def test_an_answer_is_itself_and_one_end(family: str, renderer: ChatRenderer) -> None:
    end = renderer.processor.tokenizer.convert_tokens_to_ids(END[family])
    assert renderer.stop_token_ids[0] == end
    for answer in ANSWERS:
        ids = row(renderer, "?", 1, answer).answer
        assert (ids[-1], ids.count(end)) == (end, 1)
        assert not set(ids[:-1]) & special_ids(renderer)
        assert renderer.decode(ids).replace(" ", "") == answer.replace(" ", "")
    assert renderer.render("vqa", "?", renderer.read(PICTURES[:1]), "no effusion seen", 3).answer[-1] != end


def test_labels_are_the_answer_and_its_end_alone(family: str, renderer: ChatRenderer) -> None:
    rows = [row(renderer, "Is this a CT?", 1, "yes"), row(renderer, QUESTIONS[1], 2, "no effusion is seen")]
    batch = training_batch(rows, renderer.pad_token_id)
    for i, each in enumerate(rows):
        start, length = len(each.prompt), len(each.answer)
        assert batch.labels_BT[i, start : start + length].tolist() == each.answer
        masked = torch.cat([batch.labels_BT[i, :start], batch.labels_BT[i, start + length :]])
        assert (masked == IGNORED_LABEL).all()
        assert batch.ids_BT[i, : start + length].tolist() == each.prompt + each.answer
        assert batch.mask_BT[i].tolist() == [1] * (start + length) + [0] * (len(batch.mask_BT[i]) - start - length)
    assert batch.mask_BT.min() == 0  # the control: there is padding


def test_prompt_and_answer_are_the_tokens_of_the_whole_conversation(family: str, renderer: ChatRenderer) -> None:
    """An answer encoded apart is encoded as it would be in place."""
    if family == "paligemma":
        pytest.skip("it has no chat template; the next test has its suffixes")
    tokenizer = renderer.processor.tokenizer
    for answer in ("yes", "No effusion.", "-5", "Ødème"):
        turns = [("user", renderer.template.words("vqa", "Is this a CT?")), ("assistant", answer)]
        conversation = [{"role": role, "content": [{"type": "text", "text": words}]} for role, words in turns]
        whole = renderer.processor.apply_chat_template(conversation, tokenize=False)
        if family == "llava_onevision":  # its published template has a space in each turn, and none in a prompt
            whole = whole.replace("assistant \n", "assistant\n")
        bos = tokenizer.bos_token
        ids = tokenizer(whole, add_special_tokens=not (bos and whole.startswith(bos))).input_ids
        found = row(renderer, "Is this a CT?", 0, answer)
        learnt = found.prompt + found.answer[:-1]
        assert ids[: len(learnt)] == learnt


def test_paligemmas_suffixes_are_its_processors(tiny_base: MakeBase) -> None:
    renderer = opened(tiny_base("paligemma"))
    images = [Image.open(io.BytesIO(data)).convert("RGB") for data in PICTURES]
    words = renderer.template.words("vqa", "Is this a CT?")
    theirs = renderer.processor(text=f"<image><image>{words}", images=images, suffix="yes", return_tensors="pt")
    found = row(renderer, "Is this a CT?", 2, "yes")
    ours = training_batch([found], renderer.pad_token_id)
    assert torch.equal(ours.ids_BT, theirs["input_ids"])
    assert torch.equal(ours.labels_BT, theirs["labels"])
    assert torch.equal(ours.tensors["token_type_ids"], theirs["token_type_ids"])
    assert torch.equal(ours.tensors["pixel_values"], theirs["pixel_values"])
    assert "labels" not in ours.tensors


def test_a_question_without_an_image_where_none_is_understood(tiny_base: MakeBase) -> None:
    with pytest.raises(DataError, match="give one"):
        row(opened(tiny_base("paligemma")), "Is this a CT?", 0)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(pieces=st.lists(st.sampled_from(SPELT) | st.text(max_size=6), max_size=6))
def test_text_that_spells_special_tokens_stays_text(tiny_base: MakeBase, pieces: list[str]) -> None:
    for family in FAMILIES:
        renderer = opened(tiny_base(family))
        special, images = special_ids(renderer), counts(family)[0]
        asked = Counter(number for number in row(renderer, "x", images).prompt if number in special)
        found = row(renderer, "".join(pieces), images, "".join(pieces))
        assert Counter(number for number in found.prompt if number in special) == asked
        assert [number for number in found.answer if number in special] == found.answer[-1:]


def test_what_is_spelt_would_be_special_tokens(family: str, renderer: ChatRenderer) -> None:
    """The control of the test before: a tokenizer that is given the same text makes special tokens of it."""
    ids = renderer.processor.tokenizer("".join(SPELT), add_special_tokens=False).input_ids
    assert set(ids) & special_ids(renderer)
    assert renderer.processor.tokenizer.convert_tokens_to_ids(END[family]) in ids


def test_tags_that_a_tokenizer_knows_are_left_as_they_are(tiny_base: MakeBase) -> None:
    renderer = opened(tiny_base("gemma3"))
    assert "What is <b>seen</b>?" in text(renderer, row(renderer, "What is <b>seen</b>?", 0).prompt)
    assert "What is < eos>?" in text(renderer, row(renderer, "What is <eos>?", 0).prompt)


@pytest.mark.parametrize("name", ["preprocessor_config.json", "tokenizer.json"])
def test_a_processor_that_lacks_a_file_is_refused(name: str, tiny_base: MakeBase, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_base("llava"), tmp_path / "base")
    ChatRenderer.open(folder, template_named("chat"))  # the control
    (folder / name).unlink()
    with pytest.raises(ConfigError, match="LlavaProcessor cannot be opened from the files in "):
        ChatRenderer.open(folder, template_named("chat"))


@pytest.mark.parametrize("family", ["gemma3", "qwen3_vl"])
def test_a_model_that_does_not_chat_is_refused(family: str, tiny_base: MakeBase, tmp_path: Path) -> None:
    """It is no PaliGemma, though it has no chat template either."""
    folder = shutil.copytree(tiny_base(family), tmp_path / "base")
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match="no chat template; take a model tuned for chats"):
        ChatRenderer.open(folder, template_named("chat"))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"chat_template": template}))
    again = ChatRenderer.open(folder, template_named("chat"))  # where older folders have it
    assert row(again, "Is this a CT?", 1).prompt == row(opened(tiny_base(family)), "Is this a CT?", 1).prompt


@pytest.mark.parametrize("family", ["llava", "gemma3", "paligemma", "idefics3", "smolvlm"])
def test_a_folder_saved_by_transformers_itself_opens_the_same(
    family: str, tiny_base: MakeBase, renderer: ChatRenderer, tmp_path: Path
) -> None:
    """It keeps the image processor inside `processor_config.json`; processors of videos save with torchvision only."""
    renderer.processor.save_pretrained(tmp_path)
    shutil.copy(tiny_base(family) / "config.json", tmp_path)
    again = ChatRenderer.open(tmp_path, renderer.template)
    assert not (tmp_path / "preprocessor_config.json").exists()
    ours, theirs = row(renderer, QUESTIONS[1], 2, "yes"), row(again, QUESTIONS[1], 2, "yes")
    assert (ours.prompt, ours.answer, again.digest) == (theirs.prompt, theirs.answer, renderer.digest)
    assert all(torch.equal(ours.tensors[name], theirs.tensors[name]) for name in ours.tensors)
