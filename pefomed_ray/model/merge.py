"""An adapter taken up by the base's weights: one model folder that needs neither PEFT nor, but for `pefomed`, us.

Merging is done in float32, then the weights are cast to what is asked for. Before the folder appears it is loaded again
and asked about a picture, as the bundle was before merging.

Letters: T tokens of the prompt, V entries of the vocabulary.
"""

import io
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from torch import Tensor

from pefomed_ray.artifacts.base import base_folder, processor_files
from pefomed_ray.artifacts.manifests import verify_bundle
from pefomed_ray.artifacts.records import Task
from pefomed_ray.artifacts.storage import check_output_is_free, publishing, read_json, write_json
from pefomed_ray.config import TrainConfig, load_config
from pefomed_ray.config.schema import Precision
from pefomed_ray.errors import ConfigError, DataError, PefomedError
from pefomed_ray.model.base import Base, open_base
from pefomed_ray.model.bundle import NOT_COPIED, open_bundle
from pefomed_ray.model.card import model_card
from pefomed_ray.model.generate import Generator, Prompt
from pefomed_ray.rendering.batches import generation_batch

Dtype = Literal["float32", "bfloat16"]
DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16")
TOLERANCE: dict[Dtype, float] = {"float32": 1e-4, "bfloat16": 0.05}
"""Largest difference of a logit, relative to the largest logit. bfloat16 has 8 bits: 0.4 % at each rounding."""
MERGED_FILE = "merged.json"
"""In a merged model: the bundle it comes from, and the template whose wording it was trained under."""
MAX_SHARD_SIZE = "2GB"
PROBE_QUESTION = "What is shown in this image?"
PROBE_TOKENS = 16


@dataclass(frozen=True)
class Probe:
    """What a model makes of a picture and a question."""

    logits_TV: Tensor
    answer: str


def merge(bundle: Path, target: Path, dtype: Dtype, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Publish the model of `bundle` as a folder in `dtype` at `target`; `metrics` are for its card.

    Gives the probe's largest difference after merging and of what was written, and what is tolerated. Raises
    ConfigError for an adapter trained on a quantised base, DataError where the bundle is not whole or the adapter not
    finite, and PefomedError, with nothing published, where the merged model does not say what the bundle says.
    """
    check_output_is_free(target)
    manifest = verify_bundle(bundle)
    config = load_config(TrainConfig, bundle / "run.yaml")
    _check_can_merge(bundle, config, base_folder(manifest.base))
    base, _ = open_bundle(bundle, precision=Precision())
    expected = probe(base, config.task)
    _take_up(base, bundle)
    in_memory = _compare(expected, probe(base, config.task), "float32")
    with publishing(target) as folder:
        _save(base, folder, dtype)
        card = model_card(config, read_json(bundle / "lineage.json"), metrics, base.path, "merged")
        (folder / "README.md").write_text(card, encoding="utf-8")
        said = {name: getattr(manifest, name) for name in ("template", "template_digest")}
        write_json(folder / MERGED_FILE, {"bundle": manifest.digest} | said)
        del base  # two of them may not fit
        written = probe(open_base(str(folder), manifest.template, Precision(dtype=dtype)), config.task)
        difference = _compare(expected, written, dtype)
    return {"merged_difference": in_memory, "written_difference": difference, "tolerance": TOLERANCE[dtype]}


def probe(base: Base, task: Task) -> Probe:
    """Logits and greedy answer for a drawn picture, by the base's own rendering."""
    buffer = io.BytesIO()
    Image.radial_gradient("L").convert("RGB").save(buffer, "PNG")
    picture = buffer.getvalue()
    row = base.renderer.render(task, PROBE_QUESTION, base.renderer.read([picture]))  # type: ignore[arg-type]
    batch = generation_batch([row], base.renderer.pad_token_id)
    model: Any = base.model
    with torch.inference_mode():
        logits_TV = model(**base.renderer.inputs(batch)).logits[0].float()
    answer = Generator(base).answer([Prompt(task, PROBE_QUESTION, (picture,))], PROBE_TOKENS)[0]
    return Probe(logits_TV, answer.text)


def _check_can_merge(bundle: Path, config: TrainConfig, base: Path) -> None:
    held = config.base.quantization
    stored = read_json(base / "config.json").get("quantization_config") is not None
    if held != "none" or stored:
        raise ConfigError(
            f"bundle {str(bundle)!r} cannot be merged: its base was quantised ({'as stored' if stored else held}) when "
            "the adapter was trained. Quantised weights cannot take an adapter up without being rounded again, and on "
            "the weights before quantisation it is another model than the one evaluated; export without --merged"
        )


def _take_up(base: Base, bundle: Path) -> None:
    """Every adapted layer becomes a plain one again, its weight with the adapter's update."""
    adapted: Any = base.adapted
    for name, layer in list(adapted.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            try:
                layer.merge(safe_merge=True)
            except ValueError as error:
                raise DataError(f"the adapter of bundle {str(bundle)!r} is not finite at {name!r}: {error}") from None
            adapted.set_submodule(name, layer.get_base_layer())
    del adapted.peft_config


def _save(base: Base, folder: Path, dtype: Dtype) -> None:
    model: Any = base.model
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
    for path in processor_files(base.path):
        if path.name not in NOT_COPIED:
            shutil.copyfile(path, folder / path.name)
    # A base's own settings of generation were set aside when it was opened.
    for name in ("generation_config.json", "tokenizer_config.json"):
        if (base.path / name).is_file():
            shutil.copyfile(base.path / name, folder / name)


def _compare(expected: Probe, found: Probe, dtype: Dtype) -> float:
    """The largest difference of a logit, relative to the largest logit. Raises PefomedError where it is too large."""
    difference = float((found.logits_TV - expected.logits_TV).abs().max() / expected.logits_TV.abs().max())
    same_answer = found.answer == expected.answer or dtype != "float32"
    if not difference <= TOLERANCE[dtype] or not same_answer:
        raise PefomedError(
            f"merging did not keep the model: on a probe its logits differ by {difference:.2g} of the largest, allowed "
            f"is {TOLERANCE[dtype]:g} in {dtype}{'' if same_answer else ', and its greedy answer differs'}. Nothing "
            "was written; export without --merged, and please report this"
        )
    return difference
