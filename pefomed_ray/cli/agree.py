"""`pefomed-ray agree`: which of several measures of the same answers to trust. No torch, no Ray."""

from typing import Annotated, Any

import typer

from pefomed_ray.cli.console import exits_with_code, finish, say, table


@exits_with_code
def agree(
    predictions: Annotated[str, typer.Argument(help="JSONL of the answers that were scored.")],
    output: Annotated[str, typer.Option(help="Folder for agreement.html, .json, .csv and figure.svg.")],
    task: Annotated[str, typer.Option(help="vqa, report or caption.")] = "vqa",
    judge: Annotated[
        list[str] | None, typer.Option(help="judgements.jsonl of `judge`, or its folder; once for each judge.")
    ] = None,
    ratings: Annotated[list[str] | None, typer.Option(help="CSV of `rate`; several are put together.")] = None,
    normalizer: Annotated[str, typer.Option(help="strict or pefomed.")] = "strict",
    metric: Annotated[
        list[str] | None, typer.Option(help="Only this automatic metric; may be given several times. Default: all.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Whose answers these are, where a CSV holds several models'.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Shards, for pictures; texts are shown only with them.")] = None,
    split: Annotated[str, typer.Option(help="Of the shards: train, validation or test.")] = "test",
    json: Annotated[bool, typer.Option("--json", help="End stdout with one JSON object.")] = False,
) -> None:
    """Hold automatic metrics, judges and people against each other on the same answers."""
    from pefomed_ray.artifacts.storage import check_output_is_free, local_path
    from pefomed_ray.cli.options import split_named, task_named
    from pefomed_ray.errors import ConfigError
    from pefomed_ray.metrics.vqa import normalizer_named

    target = local_path(output)
    check_output_is_free(target)
    normalizer_named(normalizer)
    chosen_task, chosen_split = task_named(task), split_named(split)
    if not judge and not ratings:
        raise ConfigError("nothing to compare with: give --judge or --ratings, or both")
    for path in (predictions, *(judge or ()), *(ratings or ()), *([data] if data else ())):
        if not local_path(path).exists():
            raise ConfigError(f"{path!r} does not exist")
    from pefomed_ray.evaluation.agree import FILES, Asked, agree
    from pefomed_ray.evaluation.agreement_page import cautions, headline

    found = agree(
        Asked(
            predictions=local_path(predictions),
            task=chosen_task,
            judges=tuple(local_path(path) for path in judge or ()),
            ratings=tuple(local_path(path) for path in ratings or ()),
            normalizer=normalizer,
            metrics=tuple(metric) if metric else None,
            model=model,
            shards=local_path(data) if data else None,
            split=chosen_split,
        ),
        target,
    )
    _show(found)
    for sentence in (*headline(found), *cautions(found)):
        say(sentence)
    result: dict[str, Any] = {key: str(target / name) for key, name in FILES.items()}
    result |= {"reference": found["reference"]["name"], "compared": found["answer_types"]["all"]["compared"]}
    finish(result, as_json=json)


def _show(found: dict[str, Any]) -> None:
    from pefomed_ray.evaluation.agreement_figure import figure_rows, kappa_name

    kappa = kappa_name(found)
    rows = [
        (
            found["measures"][row["measure"]]["label"],
            row["n"],
            *(_cell(row["statistics"]["ordered"], 100, 0) + _cell(row["statistics"][kappa], 1, 2)),
        )
        for row in figure_rows(found)
    ]
    columns = [
        "measure",
        "items",
        "same order of 100",
        "95 %",
        "kappa" if kappa == "kappa" else "weighted kappa",
        "95 %",
    ]
    table(f"held against: {found['reference']['label']}; each rater against the others", columns, rows)


def _cell(statistic: dict[str, Any], times: float, digits: int) -> tuple[str, str]:
    def written(value: float) -> str:
        return f"{times * value:.{digits}f}"

    if statistic["value"] is None:
        return "-", ""
    return written(statistic["value"]), " to ".join(written(end) for end in statistic["ci95"] or ())
