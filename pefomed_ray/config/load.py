"""YAML files and `dotted.key=value` words to a checked, frozen config; mistakes named with the nearest valid key."""

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from pefomed_ray.config.schema import ResourcesConfig, Section, TrainingConfig
from pefomed_ray.errors import ConfigError

C = TypeVar("C", bound=Section)

ALIASES = {
    "base_model": "base.path",
    "model_name_or_path": "base.path",
    "torch_dtype": "base.dtype",
    "lora_rank": "lora.rank",
    "lora_r": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_target_modules": "lora.target_modules",
    "lora_target": "lora.target_modules",
    "use_rslora": "lora.use_rslora",
    "use_dora": "lora.use_dora",
    "loraplus_lr_ratio": "lora.loraplus_lr_ratio",
    "learning_rate": "optimizer.learning_rate",
    "weight_decay": "optimizer.weight_decay",
    "max_grad_norm": "optimizer.max_grad_norm",
    "num_train_epochs": "training.epochs",
    "num_epochs": "training.epochs",
    "max_steps": "training.max_steps",
    "group_by_length": "training.group_by_length",
    "per_device_train_batch_size": "training.micro_batch_size",
    "micro_batch_size": "training.micro_batch_size",
    "dataset": "data.shards",
    "num_workers": "resources.workers",
}
"""Names people type from LLaMA-Factory, ms-swift, Axolotl and Transformers -> ours. Accepted at the top level."""

QUANTIZATION: dict[str, dict[Any, str | None]] = {
    "quantization_bit": {4: "nf4", 8: "int8", None: None},
    "load_in_4bit": {True: "nf4", False: None},
    "load_in_8bit": {True: "int8", False: None},
}
"""How others ask for `base.quantization`, and what each value means; None says nothing."""

GRADIENT_ACCUMULATION = "gradient_accumulation_steps"


def load_config(kind: type[C], path: str | Path, overrides: Iterable[str] = ()) -> C:
    """The config in a YAML file, with `dotted.key=value` words applied over it (values are YAML).

    Raises ConfigError naming the file, the key, what was seen and what is allowed.
    """
    values = read_yaml(path)
    for key, value in parse_words(overrides).items():
        set_key(values, key, value)
    return build_config(kind, values, str(path))


_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""Safe, both. The one in C takes a tenth of the time: the other took half of what an exchange of adapters behind an
endpoint takes."""


def parse_words(words: Iterable[str]) -> dict[str, Any]:
    """`key=value` words, values read as YAML. Raises ConfigError for a word of another form."""
    values = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise ConfigError(f"{word!r} is not of the form key=value")
        values[key] = _parse_value(key, text)
    return values


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file's mapping. Raises ConfigError where there is no such file, or it holds something else."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(f"config file {str(path)!r} does not exist")
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), _LOADER)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {str(path)!r} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"config file {str(path)!r} must hold `key: value` lines, not a {type(values).__name__}")
    return values


def build_config(kind: type[C], values: Mapping[str, Any], where: str) -> C:
    """Check plain values against a schema. Raises ConfigError for the first mistake, `where` named."""
    try:
        return kind.model_validate(_resolve_aliases(kind, values))
    except ValidationError as error:
        raise ConfigError(f"{where}: {_describe(kind, error)}") from None


def set_key(values: dict[str, Any], dotted: str, value: Any) -> None:
    """Set `a.b.c` in nested dicts, making levels that are missing."""
    *levels, last = ALIASES.get(dotted, dotted).split(".")
    for level in levels:
        inner = values.setdefault(level, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{dotted}: {level!r} is a value, not a section")
        values = inner
    values[last] = value


def save_config(config: Section, path: Path) -> None:
    """Write the resolved config as YAML that `load_config` reads back equal."""
    path.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), encoding="utf-8")


def _resolve_aliases(kind: type[Section], values: Mapping[str, Any]) -> dict[str, Any]:
    resolved: dict[str, Any] = {k: dict(v) if isinstance(v, dict) else v for k, v in values.items()}
    for name in [key for key in resolved if key in ALIASES and key not in kind.model_fields]:
        value = resolved.pop(name)
        dotted = ALIASES[name]
        if dotted.split(".")[0] in kind.model_fields:
            set_key(resolved, dotted, value)
        else:
            resolved[name] = value
    if "training" in kind.model_fields:
        _resolve_quantization(resolved)
    if GRADIENT_ACCUMULATION in resolved and "training" in kind.model_fields:
        steps = resolved.pop(GRADIENT_ACCUMULATION)
        micro_batch_size = resolved.get("training", {}).get("micro_batch_size", TrainingConfig().micro_batch_size)
        rows = micro_batch_size * resolved.get("resources", {}).get("workers", ResourcesConfig().workers)
        set_key(resolved, "training.batch_size", rows * steps)
    return resolved


def _resolve_quantization(values: dict[str, Any]) -> None:
    for name in [name for name in QUANTIZATION if name in values]:
        value, meanings = values.pop(name), QUANTIZATION[name]
        if value not in list(meanings):
            allowed = ", ".join(str(meaning) for meaning in meanings if meaning is not None)
            raise ConfigError(f"{name}: {value!r} is not one of {allowed}")
        if meanings[value] is not None:
            set_key(values, "base.quantization", meanings[value])


def _parse_value(key: str, text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"{key}: the value {text!r} is not valid YAML") from None
    # YAML 1.1 reads 1e-4 as a string; people mean the number.
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _describe(kind: type[Section], error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    path = [str(part) for part in first["loc"]]
    dotted = ".".join(path)
    if first["type"] == "extra_forbidden":
        allowed = _fields_at(kind, path[:-1])
        near = difflib.get_close_matches(path[-1], allowed, n=1, cutoff=0.5)
        hint = f"; did you mean {'.'.join([*path[:-1], near[0]])!r}?" if near else ""
        return f"unknown key {dotted!r}{hint} (allowed here: {', '.join(sorted(allowed))})"
    if first["type"] == "missing":
        return f"key {dotted!r} is missing"
    message = first["msg"].removeprefix("Value error, ")
    return f"{dotted}: {message}, but got {first['input']!r}" if dotted else message


def _fields_at(kind: type[BaseModel], path: list[str]) -> list[str]:
    for part in path:
        annotation = kind.model_fields[part].annotation if part in kind.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        kind = annotation
    return list(kind.model_fields)
