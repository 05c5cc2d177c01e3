"""The model card: what an adapter learnt from what, how well, what it is for and what not.

The header is Hugging Face's (https://huggingface.co/docs/hub/model-cards), the text is `card.md.j2`. Names and numbers
only: no question, answer or image of a corpus gets here, and no path. The licence is left to whoever passes it on.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pefomed_ray.artifacts.base import family_of
from pefomed_ray.artifacts.family import PEFOMED
from pefomed_ray.artifacts.storage import read_json
from pefomed_ray.config import TrainConfig
from pefomed_ray.model.parts import SOURCES_FILE

Form = Literal["bundle", "peft", "merged"]
Score = Mapping[str, Any]
"""Of a `metrics.json`: value, n, unscored, ci95."""

_WHAT: dict[Form, str] = {
    "bundle": "An adapter bundle: LoRA in PEFT's files, what was trained beside it, and how it came about.",
    "peft": "A LoRA adapter in PEFT's format.",
    "merged": "A vision-language model whose weights have taken up a LoRA adapter.",
}
_SHOWN_OF_CONTROLS = ("exact_match", "rougeL")


def model_card(
    config: TrainConfig, lineage: Mapping[str, Any], metrics: Mapping[str, Any], base: Path, form: Form
) -> str:
    """README.md of a bundle, or of what is exported from one; `base` is the folder of its base.

    `metrics` are the bundle's own, of validation rows, or the `metrics.json` of an evaluation, which has controls too.
    """
    controls = [
        (control, name, scores[name])
        for control, scores in metrics.get("controls", {}).items()
        for name in _SHOWN_OF_CONTROLS
        if name in scores
    ]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, keep_trailing_newline=True
    )
    return environment.get_template("card.md.j2").render(
        header=_header(config, lineage, metrics, base, form),
        config=config,
        lineage=lineage,
        metrics=metrics,
        scores=_scores(metrics),
        controls=controls,
        numbers=_numbers,
        form=form,
        what=_WHAT[form],
        own_architecture=family_of(base).model_type == PEFOMED,
        base=" + ".join(base_models(base)) or Path(config.base.path).name,
    )


def base_models(base: Path) -> list[str]:
    """Hub ids of what a base was made of: of one that was assembled from the Hub; else none are known."""
    path = base / SOURCES_FILE
    sources = read_json(path).values() if path.is_file() else ()
    return [source["source"] for source in sources if source.get("revision")]


def _header(config: TrainConfig, lineage: Mapping[str, Any], metrics: Mapping[str, Any], base: Path, form: Form) -> str:
    source = str(metrics.get("source", lineage.get("source", "unknown")))
    results = [
        EvalResult(
            task_type="image-text-to-text",
            dataset_type=source,
            dataset_name=source,
            dataset_split=metrics.get("split"),
            metric_type=name,
            metric_value=round(score["value"], 4),
        )
        for name, score in _scores(metrics).items()
        if score["value"] is not None
    ]
    card = ModelCardData(
        base_model=base_models(base) or None,
        library_name="transformers" if form == "merged" else "peft",
        pipeline_tag="image-text-to-text",
        tags=["medical", "vision-language", "lora", "pefomed", config.task],
        model_name=config.name if results else None,
        eval_results=results or None,
    )
    return card.to_yaml()


def _scores(metrics: Mapping[str, Any]) -> dict[str, Score]:
    return {name: found for name, found in metrics.items() if isinstance(found, dict) and {"value", "n"} <= set(found)}


def _numbers(score: Score) -> str:
    """The cells of a row of a table."""
    interval = "{:.3f} to {:.3f}".format(*score["ci95"]) if score.get("ci95") else "not computed"
    value = "none" if score["value"] is None else f"{score['value']:.3f}"
    return f"{value} | {interval} | {score['n']} | {score.get('unscored', 0)}"
