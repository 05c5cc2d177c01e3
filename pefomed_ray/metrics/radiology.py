"""RadGraph, CheXbert, BERTScore and other measures of radiology reports, by the `RadEval` package.

Xu et al., EMNLP 2025 (demonstrations). The package is the extra `radeval`; it fetches a metric's weights when it is
first asked for it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from pefomed_ray.errors import ConfigError, PefomedError

RADIOLOGY_METRICS = (
    "bertscore",
    "f1chexbert",
    "f1radbert_ct",
    "radcliq",
    "radeval_bertscore",
    "radgraph",
    "radgraph_radcliq",
    "ratescore",
    "srrbert",
    "temporal",
)
"""Those of RadEval 2.2 that run on this machine."""
_LEFT_OUT = {
    "bleu": "`score` has BLEU by pycocoevalcap",
    "rouge": "`score` has ROUGE-L by rouge-score and by pycocoevalcap",
    "green": "it runs code that is downloaded with its weights",
    "mammo_green": "it sends the texts to a provider",
    "crimson": "it sends the texts to a provider",
    "radfact_ct": "it sends the texts to a provider",
}
_IN_BOUNDS = ("bertscore", "f1", "radgraph_", "ratescore", "srrbert_", "temporal_f1")
"""Begin the names of numbers in [0, 1]. RadCliQ is a distance without bounds, lower is better; RadGraph-RadCliQ is
in [0, 1] too."""


@dataclass(frozen=True)
class Radiology:
    """Numbers under the names that RadEval gives them."""

    items: dict[str, list[float | None]]
    """One an item; None where RadEval gave no number."""
    corpus: dict[str, float]
    """Numbers of all items together that are no mean of theirs, such as CheXbert's micro F1."""


def check_radiology(names: Sequence[str]) -> None:
    """Raises ConfigError for a name that is none, or left out for a reason, and where the package is missing."""
    for name in names:
        if name in _LEFT_OUT:
            raise ConfigError(f"metric {name!r} of RadEval is not offered: {_LEFT_OUT[name]}")
        if name not in RADIOLOGY_METRICS:
            near = get_close_matches(name, RADIOLOGY_METRICS, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"metric {name!r} is not known{hint} (allowed: {', '.join(RADIOLOGY_METRICS)})")
    if names and find_spec("radeval") is None:
        raise ConfigError(f"{', '.join(names)}: needs the extra `radeval`: pip install 'pefomed-ray[radeval]'")


def radiology_metrics(names: Sequence[str], references: Sequence[str], predictions: Sequence[str]) -> Radiology:
    """Each named metric of the predictions, one an item, against one reference each.

    Raises what `check_radiology` raises; PefomedError where RadEval fails, say without weights, naming the metric and
    the kind of failure, never a text, and where it answers with another number of items.
    """
    check_radiology(names)
    items: dict[str, list[float | None]] = {}
    corpus: dict[str, float] = {}
    for name in names:
        each, together = _compute(name, list(references), list(predictions))
        for key, values in each.items():
            if not isinstance(values, list) or len(values) != len(predictions):
                raise PefomedError(f"RadEval's {key} is not one number for each of {len(predictions)} items")
            items[key] = [_finite(value) for value in values]
        corpus |= {key: float(value) for key, value in together.items() if key not in each}
    return Radiology(items, corpus)


def highest(name: str) -> float | None:
    """What a faultless item scores by one of RadEval's numbers; None where it has no bounds."""
    return 1.0 if name.startswith(_IN_BOUNDS) else None


def _compute(name: str, references: list[str], predictions: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """By item, and together where RadEval's number together is under a name that the items have not."""
    try:
        # Here, as the extra may be missing and brings torch.
        evaluator = import_module("radeval").RadEval(metrics=[name], per_sample=True, show_progress=False)
        each = evaluator(refs=references, hyps=predictions)
        if set(evaluator.metric_keys) <= set(each):
            return each, {}
        evaluator.per_sample = False
        return each, evaluator(refs=references, hyps=predictions)
    except Exception as error:
        raise PefomedError(
            f"RadEval could not compute {name} ({type(error).__name__}); it fetches weights when a metric is first "
            "asked for: is the network there, or are they in its cache?"
        ) from error


def _finite(value: Any) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None
