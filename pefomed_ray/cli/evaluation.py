"""`pefomed-ray evaluate` and `promote`: numbers about a model, and what may follow of them."""

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from pefomed_ray.cli.console import exits_with_code, finish, say
from pefomed_ray.evaluation.endpoint import KEY_ENV

Json = Annotated[bool, typer.Option("--json", help="End stdout with one JSON object.")]


@exits_with_code
def evaluate(
    data: Annotated[str, typer.Option(help="Folder of shards.")],
    model: Annotated[
        str | None, typer.Argument(help="A bundle, the folder of a base, or `embedded`; not with --endpoint.")
    ] = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    output: Annotated[str | None, typer.Option(help="Default for a bundle: <bundle>/../evaluation-<split>.")] = None,
    normalizer: Annotated[str, typer.Option(help="strict or pefomed.")] = "strict",
    workers: Annotated[int, typer.Option(help="Generating processes.", min=1)] = 1,
    use_gpu: Annotated[bool, typer.Option(help="One GPU a worker.")] = False,
    rows: Annotated[int | None, typer.Option(help="Only the first rows of the split.", min=1)] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Cut answers there. Default: 64 vqa, 128 caption, 256 report.", min=1)
    ] = None,
    feature_cache: Annotated[str | None, typer.Option(help="Folder of `data cache`: its features for images.")] = None,
    endpoint: Annotated[str | None, typer.Option(help="Ask an OpenAI-compatible endpoint: its URL up to /v1.")] = None,
    model_name: Annotated[str | None, typer.Option("--model", help="Model to ask for at --endpoint.")] = None,
    key_env: Annotated[str, typer.Option(help="Environment variable that holds the endpoint's key.")] = KEY_ENV,
    local: Annotated[
        bool, typer.Option("--local", help="The endpoint is ours: restricted corpora may go there, no proxy is used.")
    ] = False,
    concurrency: Annotated[int, typer.Option(help="Requests to the endpoint at once.", min=1)] = 8,
    skip_image_controls: Annotated[
        bool, typer.Option("--skip-image-controls", help="Do not ask three times more with other pictures.")
    ] = False,
    judge: Annotated[str | None, typer.Option(help="Folder of `judge` about these predictions.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Ask only what is missing; score and write the report again.")
    ] = False,
    json: Json = False,
) -> None:
    """Generate answers for a split, score them beside controls, write predictions, metrics.json and report.html."""
    from pefomed_ray.artifacts.storage import local_path
    from pefomed_ray.cli.options import split_named
    from pefomed_ray.errors import ConfigError
    from pefomed_ray.evaluation.endpoint import Endpoint, open_endpoint
    from pefomed_ray.evaluation.preflight import check_evaluation, is_base, is_finished

    asked: str | Endpoint
    if endpoint is not None:
        if model is not None:
            raise ConfigError(f"both a model, {model!r}, and --endpoint; name the model to ask for there by --model")
        asked = open_endpoint(endpoint, model_name, key_env, local=local, concurrency=concurrency)
    elif model is None:
        raise ConfigError("name what to evaluate: a bundle, the folder of a base, `embedded`, or --endpoint URL")
    elif model_name is not None or local:
        raise ConfigError("--model and --local are about an --endpoint, which is not given")
    else:
        asked = model
    split_named(split)
    if output is None and (isinstance(asked, Endpoint) or is_base(asked)):
        raise ConfigError("--output: name a folder; there is a default for a bundle only")
    target = local_path(output) if output else local_path(str(asked)).parent / f"evaluation-{split}"
    cache = local_path(feature_cache) if feature_cache else None
    check_evaluation(asked, local_path(data), split, target, normalizer, cache, use_gpu=use_gpu, resume=resume)
    from pefomed_ray.cli.cluster import cluster
    from pefomed_ray.cli.progress import bar, metrics_table
    from pefomed_ray.evaluation.evaluate import evaluate as run
    from pefomed_ray.evaluation.predict import GenerationSettings

    generates = not isinstance(asked, Endpoint) and not is_finished(target)
    try:
        with cluster() if generates else nullcontext(), bar("answering", "answers") as on_progress:
            result = run(
                asked,
                local_path(data),
                split,
                target,
                settings=GenerationSettings(
                    workers=workers,
                    use_gpu=use_gpu,
                    max_new_tokens=max_new_tokens,
                    feature_cache=str(cache) if cache else None,
                ),
                normalizer=normalizer,
                rows_limit=rows,
                image_controls=not skip_image_controls,
                judge=judge,
                resume=resume,
                on_progress=on_progress,
            )
    except KeyboardInterrupt:
        say("the answers there are have been kept; the same command with --resume goes on")
        raise
    metrics_table(Path(result["metrics"]))
    finish(result, as_json=json)
