"""A Hugging Face processor for pictures and text alone, from the folder of its model.

`AutoProcessor` asks for torchvision wherever a family can also watch videos (LLaVA-OneVision, Qwen-VL, SmolVLM,
InternVL), and SmolVLM's for num2words, which spells numbers of frames. Nothing here is a video: a processor is put
together from its tokenizer and image processor, with nothing in the place of the third. Pillow resizes pictures on
every machine: where torchvision is installed transformers would otherwise take that, and pixels would differ.
"""

import json
from pathlib import Path
from typing import Any

from pefomed_ray.errors import ConfigError

WITHOUT_VIDEO = {"SmolVLMProcessor": "Idefics3Processor"}
"""Processors that open no other way, and those that make the same of pictures and text."""


def open_processor(folder: Path) -> Any:
    """The processor of the model in `folder`.

    Raises ConfigError where the folder does not name its processor, or names one that this transformers does not have.
    """
    import transformers  # seconds that data workers of `pefomed` bases need not spend

    name = _class_name(folder)
    named = getattr(transformers, WITHOUT_VIDEO.get(name, name), None)
    if named is None:
        raise ConfigError(
            f"base.path: {str(folder)!r} wants {name!r}, which transformers {transformers.__version__} does not have"
        )

    class ImageTextProcessor(named):  # type: ignore[misc, valid-type]
        """Takes None for a video processor; the check of its class fails without torchvision."""

        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name == "video_processor":
                return None
            return super().check_argument_for_proper_class(argument_name, argument)

    ImageTextProcessor.__name__ = name  # what `save_pretrained` writes
    parts = {
        "image_processor": lambda: transformers.AutoImageProcessor.from_pretrained(
            folder, backend="pil", local_files_only=True
        ),
        "tokenizer": lambda: transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True),
        "video_processor": lambda: None,
    }
    fields, _ = ImageTextProcessor.get_processor_dict(folder, local_files_only=True)
    return ImageTextProcessor.from_args_and_dict([parts[part]() for part in named.get_attributes()], fields)


def _class_name(folder: Path) -> str:
    """As `processor_class` in one of the files that may say it."""
    for name in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        path = folder / name
        found = json.loads(path.read_text(encoding="utf-8")).get("processor_class") if path.is_file() else None
        if found is not None:
            return str(found)
    raise ConfigError(
        f"base.path: no file in {str(folder)!r} says its processor_class; take a folder of a model with its processor"
    )
