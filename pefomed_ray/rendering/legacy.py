"""The published prompts, defects included, for checkpoints that were trained and evaluated with them.

What a published checkpoint needs to give its numbers: texts lower-cased, some punctuation replaced by spaces, cut after
50 words; other image tags in training than in evaluation; the beginning of sequence twice in evaluation; `[caption]`
where reports were trained under `[report]`. None of it is in any other template.
"""

import re
from dataclasses import dataclass

from pefomed_ray.artifacts.records import Task
from pefomed_ray.rendering.template import IMAGE_SLOT, Template

MAX_WORDS = 50

_SHORT_ANSWER = "[vqa] Based on the image, respond to this question with a short answer: {question}"
_INSTRUCTIONS: dict[Task, str] = {
    "caption": "Briefly describe this image.",
    "vqa": "",
    "report": "Describe the given chest x-ray image in detail.",
}
"""Stands in for an empty question. The published code draws one of 15 or 17, at evaluation too; this is its first."""


def clean(text: str) -> str:
    """A text as the published processor leaves it: for questions and, in training, for answers.

    A line break alone is no space to it, so two words around one count as one word.
    """
    text = re.sub(r"[.!\"()*#:;~]", " ", text.lower())
    text = re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")
    return " ".join(text.split(" ")[:MAX_WORDS])


@dataclass(frozen=True)
class LegacyTemplate(Template):
    """`prompts` hold the instruction that stands after the images, inside of [INST] and [/INST]."""

    cleans_image_tags: bool = False
    """As in training: tags are lower-cased, and the one word they make counts towards the 50."""

    def segments(self, task: Task, question: str, image_count: int) -> list[str]:
        """As `Template.segments`. The published code knows one image; several stand side by side."""
        images = self.image * image_count
        instruction = self.prompts[task].replace("{question}", question if question.strip() else _INSTRUCTIONS[task])
        if self.cleans_image_tags:
            text, slot = clean(f"{images} {instruction} "), IMAGE_SLOT.lower()
        else:
            text, slot = f"{images} {clean(instruction)}", IMAGE_SLOT
        first, *others = (
            f"[INST] {text} [/INST]".split(slot, image_count) if image_count else [f"[INST] {text} [/INST]"]
        )
        return [first, *(piece for text in others for piece in (IMAGE_SLOT, text))]

    def answer(self, text: str) -> str:
        """As `Template.answer`, cleaned and cut."""
        return clean(text)


LEGACY = LegacyTemplate(
    name="legacy",
    version=1,
    image=f"<Img>{IMAGE_SLOT}</Img>",
    prompts={"caption": "[caption] {question}", "vqa": _SHORT_ANSWER, "report": "[caption] {question}"},
    bos_tokens=2,
)
"""Evaluation. A converted checkpoint is asked this way."""

LEGACY_TRAIN = LegacyTemplate(
    name="legacy-train",
    version=1,
    image=f"<Img>{IMAGE_SLOT}</Img>",
    prompts={"caption": "[caption] {question}", "vqa": _SHORT_ANSWER, "report": "[report] {question}"},
    cleans_image_tags=True,
)
"""Training, with the longer one of the two wordings of a question that the published code draws from."""

LEGACY_TRAIN_BARE = LegacyTemplate(
    name="legacy-train-bare",
    version=1,
    image=f"<Img>{IMAGE_SLOT}</Img>",
    prompts={"caption": "[caption] {question}", "vqa": "[vqa] {question}", "report": "[report] {question}"},
    cleans_image_tags=True,
)
"""Training, with the other wording: the question alone."""
