"""Tiny random bases of every Hugging Face vision-language family, with the files that a downloaded one has.

Nothing is downloaded: tokenizers are trained on a few lines, weights are drawn with a fixed seed. Special tokens, chat
templates and how pictures are cut are those of the published models, at a smaller size.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    GemmaTokenizer,
    PreTrainedTokenizerBase,
    TokenizersBackend,
)

CORPUS = (
    "The quick brown fox. Is this a CT of the chest? Yes, no; left and right lung, heart, liver.",
    "user assistant system model User Assistant USER ASSISTANT: You are a helpful assistant.",
    "What is seen in this image? A radiograph of the lungs shows no effusion.\n\nFindings:\n",
)
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "initializer_range": 0.15,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.15,
}
QWEN_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 32,
    "initializer_range": 0.15,
}


@dataclass(frozen=True)
class Recipe:
    """What one family is made of. `config` takes token -> id and how many tokens there are."""

    tokenizer: Callable[[], PreTrainedTokenizerBase]
    image_processor: str
    image_fields: dict[str, Any]
    processor: str
    config: Callable[[Callable[[str], int], int], dict[str, Any]]
    processor_fields: dict[str, Any] = field(default_factory=dict)
    chat_template: str | None = None
    ends: tuple[str, ...] = ()
    """What `generation_config.json` lets an answer end with."""


def make_base(family: str, folder: Path) -> Path:
    """Write the family's base to `folder`."""
    recipe = RECIPES[family]
    tokenizer = recipe.tokenizer()
    tokenizer.save_pretrained(folder)
    getattr(transformers, recipe.image_processor + "Pil")(**recipe.image_fields).save_pretrained(folder)
    fields = {"processor_class": recipe.processor, **recipe.processor_fields}
    (folder / "processor_config.json").write_text(json.dumps(fields))
    if recipe.chat_template is not None:
        (folder / "chat_template.jinja").write_text(recipe.chat_template)
    config = AutoConfig.for_model(family, **recipe.config(tokenizer.convert_tokens_to_ids, len(tokenizer)))
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():  # Gemma 3 starts its projector at zero: no picture would show
            torch.nn.init.normal_(parameter, std=0.15)
    with torch.no_grad():  # where head and embeddings are tied a large one only repeats the last token
        model.get_input_embeddings().weight.mul_(0.2)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = [tokenizer.convert_tokens_to_ids(end) for end in recipe.ends]
    model.save_pretrained(folder)
    return folder


# Tokenizers: two kinds, as the published ones are.


def _byte_level(name: str, first: Sequence[str], **fields: Any) -> PreTrainedTokenizerBase:
    """BPE over bytes (GPT-2, Qwen, Llama 3), as the class `name` sets it up; `first` are its special tokens."""
    vocabulary, merges = _learn(pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.ByteLevel.alphabet())
    names = _numbered([*vocabulary, *first])
    if name == "TokenizersBackend":
        tokenizer = Tokenizer(models.BPE(names, merges))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        return TokenizersBackend(tokenizer_object=tokenizer, extra_special_tokens=list(first), **fields)
    return getattr(transformers, name)(vocab=names, merges=merges, **fields)


def _sentence_piece(first: Sequence[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Pieces and merges of BPE over characters that falls back to bytes (Llama 2, Gemma); `first` come first."""
    vocabulary, merges = _learn(pre_tokenizers.Metaspace(prepend_scheme="never"), [])
    return _numbered([*first, *(f"<0x{byte:02X}>" for byte in range(256)), *vocabulary]), merges


def _begun(tokenizer: Any) -> Any:
    """The tokenizer, which now writes its own token of beginning before a text."""
    first = tokenizer.bos_token
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A", special_tokens=[(first, tokenizer.bos_token_id)]
    )
    return tokenizer


def _learn(pre_tokenizer: Any, alphabet: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), [tuple(merge) for merge in model["merges"]]


def _numbered(tokens: Sequence[str]) -> dict[str, int]:
    return {token: number for number, token in enumerate(dict.fromkeys(tokens))}


def _llama_2() -> PreTrainedTokenizerBase:
    vocabulary, merges = _sentence_piece(("<unk>", "<s>", "</s>", "<image>", "<pad>"))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(back)
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return _begun(TokenizersBackend(tokenizer_object=tokenizer, extra_special_tokens=["<image>"], **names))


def _llama_3() -> PreTrainedTokenizerBase:
    first = (
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|eot_id|>",
        "<fake_token_around_image>",
        "<image>",
        "<end_of_utterance>",
    )
    return _begun(
        _byte_level(
            "TokenizersBackend", first, bos_token=first[0], eos_token=first[1], pad_token=first[1], padding_side="left"
        )
    )


def _smol() -> PreTrainedTokenizerBase:
    tiles = [f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7)]
    first = (
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<fake_token_around_image>",
        "<image>",
        "<end_of_utterance>",
    )
    return _byte_level(
        "TokenizersBackend",
        (*first, "<global-img>", *tiles),
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        padding_side="left",
    )


def _qwen(*more: str, named: dict[str, str] | None = None) -> PreTrainedTokenizerBase:
    first = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *more)
    return _byte_level(
        "Qwen2Tokenizer",
        first,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>", "<|im_end|>", *more],
        model_specific_special_tokens=named,
    )


def _qwen_vl() -> PreTrainedTokenizerBase:
    return _qwen("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")


def _gemma(more: Sequence[str], plain: Sequence[str], named: dict[str, str] | None = None) -> PreTrainedTokenizerBase:
    """`more` are special, though the tokenizer's own list of special tokens lacks them; `plain` are added tokens."""
    first = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *more, "\n", "\n\n", *plain)
    vocabulary, merges = _sentence_piece(first)
    tokenizer = GemmaTokenizer(vocabulary, merges, model_specific_special_tokens=named)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in more])
    tokenizer.add_tokens(["\n", "\n\n", *plain])
    return _begun(tokenizer)


def _gemma_3() -> PreTrainedTokenizerBase:
    named = {
        "image_token": "<image_soft_token>",
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
    }
    return _gemma(("<start_of_turn>", "<end_of_turn>", *named.values()), ("<b>", "</b>"), named)


def _paligemma() -> PreTrainedTokenizerBase:
    places = [f"<loc{number:04}>" for number in range(1024)] + [f"<seg{number:03}>" for number in range(128)]
    return _gemma(("<image>",), places)


# Chat templates: what the published ones render for text and images.

LLAVA = """\
{%- for message in messages -%}
{{ message.role.upper() }}: {% for part in message.content if part.type == 'image' %}{{ '<image>\\n' }}{% endfor -%}
{% for part in message.content if part.type == 'text' %}{{ part.text }} {% endfor -%}
{%- endfor -%}
{%- if add_generation_prompt %}ASSISTANT:{% endif -%}
"""
LLAVA_ONEVISION = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + ' ' }}
{%- for part in message.content if part.type == 'image' %}<image>{% endfor -%}
{%- for part in message.content if part.type == 'text' %}{{ '\\n' + part.text }}{% endfor -%}
{{ '<|im_end|>' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}
"""
_CHATML = """\
{%- for message in messages -%}
SYSTEM{{ '<|im_start|>' + message.role + '\\n' }}
{%- for part in message.content -%}
{%- if part.type == 'image' %}{{ 'IMAGE' }}{% else %}{{ part.text }}{% endif -%}
{%- endfor -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}
"""
QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
QWEN_SYSTEM = (
    "{% if loop.first and message.role != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
)
QWEN2_5_VL = _CHATML.replace("SYSTEM", QWEN_SYSTEM).replace("IMAGE", QWEN_IMAGE)
QWEN3_VL = _CHATML.replace("SYSTEM", "").replace("IMAGE", QWEN_IMAGE)
INTERNVL = _CHATML.replace("SYSTEM", "").replace("IMAGE", "<IMG_CONTEXT>\\n")
IDEFICS3 = """\
{{- 'BOS' -}}
{%- for message in messages -%}
{{ message.role | capitalize }}{{ ':' if message.content[0].type == 'image' else ': ' }}
{%- for part in message.content %}{{ '<image>' if part.type == 'image' else part.text }}{% endfor -%}
{{ '<end_of_utterance>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ 'Assistant:' }}{% endif -%}
"""
GEMMA_3 = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif -%}
{{ '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' }}
{%- for part in message.content %}{{ '<start_of_image>' if part.type == 'image' else part.text | trim }}{% endfor -%}
{{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif -%}
"""

# Families.


def _siglip(**fields: Any) -> dict[str, Any]:
    return {"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14, **VISION, **fields}


def _text(model_type: str, size: int, **fields: Any) -> dict[str, Any]:
    return {"model_type": model_type, "vocab_size": size, **TEXT, **fields}


def _llava_config(token: Callable[[str], int], size: int) -> dict[str, Any]:
    vision = {"model_type": "clip_vision_model", "image_size": 28, "patch_size": 14, "projection_dim": 32, **VISION}
    ids = {"bos_token_id": token("<s>"), "eos_token_id": token("</s>"), "pad_token_id": token("<pad>")}
    return {
        "vision_config": vision,
        "text_config": _text("llama", size, **ids),
        "image_token_index": token("<image>"),
        "image_seq_length": 4,
    }


def _llava_onevision_config(token: Callable[[str], int], size: int) -> dict[str, Any]:
    return {
        "vision_config": _siglip(vision_use_head=False),
        "text_config": _text("qwen2", size, eos_token_id=token("<|im_end|>"), bos_token_id=token("<|endoftext|>")),
        "image_token_index": token("<image>"),
        "video_token_index": token("<video>"),
        "image_grid_pinpoints": TILES,
    }


def _qwen_vl_config(token: Callable[[str], int], size: int, vision: dict[str, Any], rope: Any) -> dict[str, Any]:
    ids = {"bos_token_id": token("<|endoftext|>"), "eos_token_id": token("<|im_end|>")}
    text = {"vocab_size": size, **TEXT, **ids, "rope_parameters": {"rope_type": "default", **rope}}
    return {
        "vision_config": QWEN_VISION | vision,
        "text_config": text,
        "image_token_id": token("<|image_pad|>"),
        "video_token_id": token("<|video_pad|>"),
        "vision_start_token_id": token("<|vision_start|>"),
        "vision_end_token_id": token("<|vision_end|>"),
    }


def _qwen2_5_vl_config(token: Callable[[str], int], size: int) -> dict[str, Any]:
    vision = {"window_size": 56, "fullatt_block_indexes": [1]}
    return _qwen_vl_config(token, size, vision, {"mrope_section": [2, 3, 3]})


def _qwen3_vl_config(token: Callable[[str], int], size: int) -> dict[str, Any]:
    vision = {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    return _qwen_vl_config(token, size, vision, {"mrope_section": [4, 2, 2], "mrope_interleaved": True})


def _gemma_3_config(token: Callable[[str], int], size: int) -> dict[str, Any]:
    layers = ["sliding_attention", "full_attention"]
    text = TEXT | {"vocab_size": size, "query_pre_attn_scalar": 16, "sliding_window": 16, "layer_types": layers}
    return {
        "vision_config": _siglip(patch_size=7, vision_use_head=False),
        "text_config": text,
        "mm_tokens_per_image": 4,
        "boi_token_index": token("<start_of_image>"),
        "eoi_token_index": token("<end_of_image>"),
        "image_token_index": token("<image_soft_token>"),
    }


def _paligemma_config(token: Callable[[str], int], size: int) -> dict[str, Any]:
    return {
        "vision_config": _siglip(vision_use_head=False),
        "text_config": _text("gemma", size, pad_token_id=0, eos_token_id=1, bos_token_id=2),
        "image_token_index": token("<image>"),
        "projection_dim": 32,
        "hidden_size": 32,
    }


def _idefics3_config(token: Callable[[str], int], size: int) -> dict[str, Any]:
    return {
        "vision_config": {"image_size": 28, "patch_size": 7, **VISION},
        "text_config": _text("llama", size, pad_token_id=token("<end_of_utterance>")),
        "image_token_id": token("<image>"),
    }


def _internvl_config(token: Callable[[str], int], size: int) -> dict[str, Any]:
    return {
        "vision_config": {"image_size": [28, 28], "patch_size": [7, 7], **VISION},
        "text_config": _text("qwen2", size, eos_token_id=token("<|im_end|>"), bos_token_id=token("<|endoftext|>")),
        "image_token_id": token("<IMG_CONTEXT>"),
        "image_seq_length": 4,
    }


TILES = [[28, 28], [28, 56], [56, 28], [56, 56]]
SQUARE = {"height": 28, "width": 28}
CUT = {"size": {"longest_edge": 56}, "max_image_size": {"longest_edge": 28}}
INTERNVL_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}

RECIPES = {
    "llava": Recipe(
        _llama_2,
        "CLIPImageProcessor",
        {"size": {"shortest_edge": 28}, "crop_size": SQUARE},
        "LlavaProcessor",
        _llava_config,
        {"patch_size": 14, "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"},
        LLAVA,
        ("</s>",),
    ),
    "llava_onevision": Recipe(
        lambda: _qwen("<image>", "<video>"),
        "LlavaOnevisionImageProcessor",
        {"size": SQUARE, "image_grid_pinpoints": TILES},
        "LlavaOnevisionProcessor",
        _llava_onevision_config,
        {"num_image_tokens": 4, "vision_feature_select_strategy": "full"},
        LLAVA_ONEVISION,
        ("<|im_end|>",),
    ),
    "qwen2_5_vl": Recipe(
        _qwen_vl,
        "Qwen2VLImageProcessor",
        {"patch_size": 14, "size": {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}},
        "Qwen2_5_VLProcessor",
        _qwen2_5_vl_config,
        {},
        QWEN2_5_VL,
        ("<|im_end|>", "<|endoftext|>"),
    ),
    "qwen3_vl": Recipe(
        _qwen_vl,
        "Qwen2VLImageProcessor",
        {"patch_size": 16, "size": {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}},
        "Qwen3VLProcessor",
        _qwen3_vl_config,
        {},
        QWEN3_VL,
        ("<|im_end|>", "<|endoftext|>"),
    ),
    "gemma3": Recipe(
        _gemma_3,
        "Gemma3ImageProcessor",
        {"size": SQUARE},
        "Gemma3Processor",
        _gemma_3_config,
        {"image_seq_length": 4},
        GEMMA_3,
        ("<eos>", "<end_of_turn>"),
    ),
    "paligemma": Recipe(
        _paligemma,
        "SiglipImageProcessor",
        {"size": SQUARE, "image_seq_length": 4},
        "PaliGemmaProcessor",
        _paligemma_config,
        ends=("<eos>",),
    ),
    "idefics3": Recipe(
        _llama_3,
        "Idefics3ImageProcessor",
        CUT,
        "Idefics3Processor",
        _idefics3_config,
        {"image_seq_len": 4},
        IDEFICS3.replace("BOS", "<|begin_of_text|>"),
        ("<|end_of_text|>", "<end_of_utterance>"),
    ),
    "smolvlm": Recipe(
        _smol,
        "SmolVLMImageProcessor",
        CUT,
        "SmolVLMProcessor",
        _idefics3_config,
        {"image_seq_len": 4},
        IDEFICS3.replace("BOS", "<|im_start|>"),
        ("<end_of_utterance>",),
    ),
    "internvl": Recipe(
        lambda: _qwen(*INTERNVL_TOKENS.values(), named=INTERNVL_TOKENS),
        "GotOcr2ImageProcessor",
        {"size": SQUARE, "crop_to_patches": True, "min_patches": 1, "max_patches": 4},
        "InternVLProcessor",
        _internvl_config,
        {"image_seq_length": 4},
        INTERNVL,
        ("<|im_end|>",),
    ),
}
FAMILIES = tuple(RECIPES)
