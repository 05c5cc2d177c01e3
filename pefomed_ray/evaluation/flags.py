"""What a reader of an evaluation must know before believing it, in sentences; the page shows them in red."""

from typing import Any

FEW_OUTPUTS = 0.5
"""A model that says under half as many different things as the references do repeats itself."""
COPIED_REPORTS = 0.5
"""Share of written reports that stand verbatim in the training split."""
KNOWN_REPORTS = 0.05
"""Share of reference reports that do."""
MORE_NORMAL = 0.1
"""How much larger the share of normal reports may be than among the references."""
UNSCORED = 0.01
"""Share of rows without a score."""

CONTROL_WORDS = {
    "blank_image": "the same model shown grey pictures",
    "noise_image": "the same model shown noise",
    "shuffled_image": "the same model shown other patients' pictures",
    "majority": "always giving the most frequent training answer",
    "question_prior": "giving the most frequent training answer to the same question",
    "constant_text": "writing the same training text about every picture",
}
"""In the order of the page."""


def flags(metrics: dict[str, Any]) -> list[str]:
    """Sentences about a `metrics.json`, the gravest first; none where nothing is to be said against it."""
    return [*_controls(metrics), *_answers(metrics), *_overlap(metrics), *_judge(metrics)]


def _controls(metrics: dict[str, Any]) -> list[str]:
    found = []
    against = metrics["against_controls"]
    for name in CONTROL_WORDS.keys() & against.keys() | {"blank_image", "noise_image", "shuffled_image"}:
        difference = against.get(name)
        if difference is None or difference["ci95"] is None:
            found.append((name, f"Not measured: {CONTROL_WORDS[name]}. Nothing shows that the model is better."))
        elif difference["ci95"][0] <= 0:
            worse = "no better than" if difference["value"] <= 0 else "not clearly better than"
            found.append((name, f"The model is {worse} {CONTROL_WORDS[name]}."))
    order = list(CONTROL_WORDS)
    return [sentence for _, sentence in sorted(found, key=lambda pair: order.index(pair[0]))]


def _answers(metrics: dict[str, Any]) -> list[str]:
    found = []
    ours, theirs = metrics["unique_output_ratio"], metrics["unique_reference_ratio"]
    if ours is not None and ours < FEW_OUTPUTS * theirs:
        found.append(
            f"The model repeats itself: {_percent(ours)} of its outputs are different ones, "
            f"of the references {_percent(theirs)}."
        )
    normal = metrics["normal_reports_heuristic"]
    if normal and normal["predictions"]["value"] is not None:
        ours, theirs = normal["predictions"]["value"], normal["references"]["value"]
        if ours > theirs + MORE_NORMAL:
            found.append(
                f"The model calls more patients healthy than the references do: {_percent(ours)} of its reports look "
                f"normal (by a keyword rule), of the references {_percent(theirs)}."
            )
    unscored = metrics["answered"]["unscored"].get("image", {})
    count = sum(unscored.values())
    if count > UNSCORED * metrics["rows"]:
        reasons = ", ".join(f"{reason} {number}" for reason, number in sorted(unscored.items()))
        found.append(
            f"{count:,} of {metrics['rows']:,} rows have no answer and are in no score: {reasons}. "
            "Which rows those are may favour the model."
        )
    if len(metrics["answered"]["by"]) > 1:
        found.append("Several versions of the model answered: " + ", ".join(sorted(metrics["answered"]["by"])) + ".")
    return found


def _overlap(metrics: dict[str, Any]) -> list[str]:
    found = []
    images = metrics["image_overlap_with_training"]
    if images["value"]:
        found.append(
            f"{_percent(images['value'])} of the {images['n']} images are in the training split too: "
            "the model may know their answers by heart."
        )
    if metrics["task"] == "vqa":
        return found
    texts = metrics["text_overlap"]
    known, copied = texts["references"]["value"], texts["predictions"]["value"]
    if known is not None and known > KNOWN_REPORTS:
        found.append(f"{_percent(known)} of the reference texts stand word for word in the training split.")
    if copied is not None and copied > COPIED_REPORTS:
        found.append(f"{_percent(copied)} of the model's texts are copies of training texts.")
    return found


def _judge(metrics: dict[str, Any]) -> list[str]:
    judge = metrics["judge"]
    return [f"The judge {judge['judge']} is flagged: {flag}" for flag in judge["flags"]] if judge else []


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
