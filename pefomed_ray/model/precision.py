"""What a frozen base is held in: float32, bfloat16, or nf4 or int8 for the language model's linear layers.

What is trained stays float32. PEFT's layers cast what comes to them and goes from them; a projector is wrapped here.
"""

import logging
import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.utils import is_bitsandbytes_available

from pefomed_ray.artifacts.family import Family
from pefomed_ray.config.schema import Precision
from pefomed_ray.errors import ConfigError

FLOAT32 = Precision()


def check_precision(precision: Precision, device: torch.device) -> None:
    """Raise ConfigError where a quantised base cannot be held on `device`, saying why."""
    wanted = f"base.quantization: {precision.quantization}"
    if precision.quantization == "none":
        return
    if precision.quantization == "int8" and device.type != "cuda":
        raise ConfigError(f"{wanted} needs a CUDA device, and this process computes on the {device.type.upper()}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"{wanted} needs a CUDA device, and torch {torch.__version__} sees none on this machine")
    if not is_bitsandbytes_available():
        raise ConfigError(f"{wanted} needs the package bitsandbytes, which is not installed on this machine")


def loading_arguments(precision: Precision, family: Family, device: torch.device) -> dict[str, Any]:
    """Keyword arguments with which `from_pretrained` loads a base so: each tensor in its final type at once.

    A quantised base goes to `device`, where bitsandbytes quantises tensor by tensor; its decoder layers' linear maps
    alone are quantised, neither tower nor projector nor head.
    """
    arguments: dict[str, Any] = {"dtype": getattr(torch, precision.dtype)}
    if precision.quantization != "none":
        outside_the_layers = rf"(?!{re.escape(family.layers)}\.).*"  # transformers reads these names as patterns
        arguments["quantization_config"] = BitsAndBytesConfig(
            **_bitsandbytes(precision.quantization), llm_int8_skip_modules=[outside_the_layers]
        )
        arguments["device_map"] = {"": device}
        # int8 says at each call that it casts its input.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return arguments


def _bitsandbytes(quantization: str) -> dict[str, Any]:
    if quantization == "int8":
        return {"load_in_8bit": True}
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
        "bnb_4bit_quant_storage": torch.bfloat16,  # FSDP2 shards what has a float's type
    }


def keep_unpacked(model: nn.Module) -> None:
    """Keep bitsandbytes 0.50 from repacking nf4 weights in evaluation mode, as it does on CPUs with AVX512-BF16.

    Each layer remembers that it did, whereas FSDP2 gathers the weights anew as they were: from the second forward pass
    on they would be misread, silently.
    """
    from bitsandbytes.nn.modules import Linear4bit  # takes long; most bases are not quantised

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def hold_in_float32(module: nn.Module) -> None:
    """Turn a module to float32 where it stands, among others of another type: it takes and gives what these do."""
    outside = next(module.parameters()).dtype
    if outside == torch.float32:
        return

    def cast_in(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(value.float() if isinstance(value, Tensor) else value for value in arguments)

    def cast_out(_: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        return output.to(outside)

    module.float()
    module.register_forward_pre_hook(cast_in)
    module.register_forward_hook(cast_out)


def number_of(parameter: nn.Parameter) -> int:
    """How many weights a parameter holds; bitsandbytes packs several of 4 bits into one element."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(state.shape.numel())
