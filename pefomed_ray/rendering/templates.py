"""Prompt templates: the one place that spells what a model reads.

A template is data, named and versioned; its digest is stored in every bundle, because weights trained under one wording
score quietly worse under another (the published code trains reports under ``[report]`` and evaluates ``[caption]``).
"""

from pefomed_ray.artifacts.family import PEFOMED, Family
from pefomed_ray.errors import ConfigError
from pefomed_ray.rendering.legacy import LEGACY, LEGACY_TRAIN, LEGACY_TRAIN_BARE
from pefomed_ray.rendering.template import IMAGE_SLOT, Template

_PAPER = Template(
    name="paper",
    version=1,
    image=f"<Img>{IMAGE_SLOT}</Img>",
    prompts={
        "caption": "[INST] {images} [caption] Describe this image in detail. {question} [/INST]",
        "vqa": "[INST] {images} [vqa] Based on the image, respond to this question with a short answer: "
        "{question} [/INST]",
        "report": "[INST] {images} [report] Write the findings of this study. {question} [/INST]",
    },
)
"""Wording of the paper's instructions with one tag a task, the same in training and generation."""

_SHORT = Template(
    name="short",
    version=1,
    image=f"<Img>{IMAGE_SLOT}</Img>",
    prompts={
        "caption": "[INST]{images}[caption]{question}[/INST]",
        "vqa": "[INST]{images}[vqa]{question}[/INST]",
        "report": "[INST]{images}[report]{question}[/INST]",
    },
)
"""Tags only: what the embedded base was trained with; every prompt token costs time on a CPU."""

_CHAT = Template(
    name="chat",
    version=1,
    image=IMAGE_SLOT,
    prompts={
        "caption": "{images}Describe this image in detail. {question}",
        "vqa": "{images}Answer the question about the image in as few words as possible. {question}",
        "report": "{images}Write the findings of this study. {question}",
    },
    chat=True,
)
"""What a user says to a model that has been taught to chat; its own template does the rest."""

TEMPLATES: dict[str, Template] = {
    template.name: template for template in (_PAPER, _SHORT, _CHAT, LEGACY, LEGACY_TRAIN, LEGACY_TRAIN_BARE)
}


def template_named(name: str) -> Template:
    """The template, or ConfigError with the names there are."""
    if name not in TEMPLATES:
        raise ConfigError(f"template: {name!r} is not known; allowed: {', '.join(sorted(TEMPLATES))}")
    return TEMPLATES[name]


def template_for(name: str, family: Family) -> Template:
    """The template of that name. Raises ConfigError where there is none, or it is not of the kind the family takes."""
    template = template_named(name)
    chat = family.model_type != PEFOMED
    if template.chat != chat:
        allowed = ", ".join(sorted(name for name, other in TEMPLATES.items() if other.chat == chat))
        raise ConfigError(f"template: {name!r} is not for a {family.model_type} base; allowed: {allowed}")
    return template
