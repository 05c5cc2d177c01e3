"""LoRA on the language model, and nothing else but the projector left to learn."""

from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from torch import nn

from pefomed_ray.artifacts.base import check_lora_targets
from pefomed_ray.config.schema import LoraConfig
from pefomed_ray.model.base import Base
from pefomed_ray.model.pefomed import PefomedForConditionalGeneration


def attach_lora(base: Base, config: LoraConfig, *, train_projector: bool) -> None:
    """Freeze a base and wrap its language model in fresh PEFT adapters.

    Adapter weights and projector are float32 and the only ones that ask for gradients. Raises ConfigError where a
    target matches no linear layer of the language model.
    """
    model = base.model
    model.requires_grad_(False)
    peft_config = PeftLoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=check_lora_targets(base.path, config.target_modules),
        task_type="CAUSAL_LM",
    )
    model.language_model = get_peft_model(model.language_model, peft_config)
    make_trainable(model, train_projector=train_projector)


def load_lora(model: PefomedForConditionalGeneration, directory: str, *, trainable: bool) -> None:
    """Wrap the language model in the adapter saved in `directory` by PEFT (safetensors only)."""
    model.requires_grad_(False)
    model.language_model = PeftModel.from_pretrained(model.language_model, directory, is_trainable=trainable)


def make_trainable(model: PefomedForConditionalGeneration, *, train_projector: bool) -> None:
    """Let the adapter and, if asked, the projector learn, in float32 whatever the base is stored in."""
    for name, parameter in model.language_model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
    if train_projector:
        model.projector.float().requires_grad_(True)


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) numbers of parameters."""
    counts = [(p.numel() if p.requires_grad else 0, p.numel()) for p in model.parameters()]
    return sum(trainable for trainable, _ in counts), sum(total for _, total in counts)
