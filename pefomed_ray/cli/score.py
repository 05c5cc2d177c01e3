"""`score`: predictions made anywhere, and two such files against each other."""

from typing import Annotated

import typer

from pefomed_ray.cli.console import exits_with_code, finish, say


@exits_with_code
def score(
    predictions: str,
    task: Annotated[str, typer.Option(help="vqa, report or caption.")] = "vqa",
    normalizer: Annotated[str, typer.Option(help="strict or pefomed.")] = "strict",
    against: Annotated[str | None, typer.Option(help="Another such file: compare on the ids that both have.")] = None,
    also: Annotated[str, typer.Option(help="Metrics of the radeval extra, with commas: radgraph,bertscore")] = "",
    json: Annotated[bool, typer.Option("--json", help="End stdout with one JSON object.")] = False,
) -> None:
    """Score predictions made anywhere: JSONL rows of id, question, answer, prediction, answer_type, references, ..."""
    from pefomed_ray.artifacts.storage import local_path
    from pefomed_ray.cli.options import task_named
    from pefomed_ray.errors import ConfigError

    chosen, path = task_named(task), local_path(predictions)
    names = [name.strip() for name in also.split(",") if name.strip()]
    if against is None:
        from pefomed_ray.evaluation.score import score_file

        finish(score_file(path, chosen, normalizer, names), as_json=json)
        return
    if names:
        raise ConfigError("--also scores one file; leave it out with --against")
    from pefomed_ray.evaluation.compare import compare_files

    result = compare_files(path, local_path(against), chosen, normalizer)
    say(
        f"{result['common']} ids in both, {result['only_first']} only in {predictions}, "
        f"{result['only_second']} only in {against}; differences are first - second"
    )
    finish(result, as_json=json)
