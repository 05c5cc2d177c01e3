"""A `pefomed` base with random weights that trains on two cores, and batches for it.

What a step costs does not depend on what the weights know, but on how its parts compare. They compare as in models that
people train: the head is 0.39 of the rest of the language model, as Qwen2.5-0.5B's is (136 over 358 million), and the
tower costs about a quarter of the language model's share of a step, as in the paper. Answers are short, prompts long,
as in visual question answering.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import _bases
from pefomed_ray.config.schema import LoraConfig
from pefomed_ray.model.base import Base, open_base
from pefomed_ray.model.lora import attach_lora
from pefomed_ray.rendering.batches import Batch, Rendered, training_batch

SIZE_PX = 224
"""49 visual tokens an image."""
MAX_ANSWER_TOKENS = 32
LORA = LoraConfig(rank=16, alpha=16, dropout=0.0, target_modules=("all-linear",))
QUESTIONS = (
    "Is there a fracture?",
    "Which organ is abnormal in this picture?",
    "What modality is used to take this image?",
    "Are the lungs clear, and is the heart of normal size?",
)
ANSWERS = ("Yes", "No", "X-Ray", "Upper Left Lung, Lower Right Lung", "Liver")


def make_base(folder: Path) -> Path:
    """The base's folder: a language model of 14 million parameters and a head of 5.5, a tower of 3."""
    torch.manual_seed(0)
    vision = {
        "hidden_size": 192,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 3,
        "image_size": SIZE_PX,
        "patch_size": 16,
    }
    text = {
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 8,
        "num_attention_heads": 6,
        "vocab_size": 14336,
        "tie_word_embeddings": True,
    }
    _bases.make_base(folder, text, vision)
    return folder


def open_trainable(folder: Path) -> Base:
    """The base with fresh adapters, the same for each call, in training mode; its projector learns too."""
    base = open_base(str(folder), "short")
    torch.manual_seed(1)
    attach_lora(base, LORA, train_projector=True)
    base.model.train()
    return base


def make_batches(
    base: Base, count: int, rows: int, questions: Sequence[str] = QUESTIONS, answers: Sequence[str] = ANSWERS
) -> list[Batch]:
    """The same `count` batches for each call: pictures of noise, each with a question and its answer."""
    renderer: Any = base.renderer
    side = renderer.image_spec.size_px
    generator = torch.Generator().manual_seed(2)

    def row(number: int) -> Rendered:
        pixels = torch.randint(0, 256, (1, 3, side, side), dtype=torch.uint8, generator=generator)
        question, answer = questions[number % len(questions)], answers[number % len(answers)]
        return renderer.render("vqa", question, {"pixel_values": pixels}, answer, MAX_ANSWER_TOKENS)

    return [
        training_batch([row(rows * batch + number) for number in range(rows)], renderer.pad_token_id)
        for batch in range(count)
    ]
