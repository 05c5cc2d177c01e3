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
    """The processor of the model in `folder`, of the class that transformers has for its `model_type`.

    Where the processor has no chat template of its own it takes its tokenizer's, as older folders have it. Raises
    ConfigError where a file of it is missing or broken.
    """
    import transformers  # seconds that data workers of `pefomed` bases need not spend
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    name = PROCESSOR_MAPPING_NAMES[json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]]
    named: Any = getattr(transformers, WITHOUT_VIDEO.get(name, name))

    class ImageTextProcessor(named):
        """Takes None for a video processor; the check of its class fails without torchvision."""

        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name == "video_processor":
                return None
            return super().check_argument_for_proper_class(argument_name, argument)

    ImageTextProcessor.__name__ = name  # what `save_pretrained` writes
    try:
        parts = {
            "image_processor": transformers.AutoImageProcessor.from_pretrained(
                folder, backend="pil", local_files_only=True
            ),
            "tokenizer": transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True),
            "video_processor": None,
        }
        fields, _ = ImageTextProcessor.get_processor_dict(folder, local_files_only=True)
        processor = ImageTextProcessor.from_args_and_dict([parts[part] for part in named.get_attributes()], fields)
    except (OSError, ValueError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"base.path: {name} cannot be opened from the files in {str(folder)!r}: {reason}") from None
    processor.chat_template = processor.chat_template or processor.tokenizer.chat_template
    return processor
