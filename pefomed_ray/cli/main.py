"""`pefomed-ray VERB ...`. A verb parses, calls one room and prints where the artifact is; rooms load on use."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from pefomed_ray import __version__
from pefomed_ray.cli.agree import agree
from pefomed_ray.cli.console import exits_with_code, finish, say
from pefomed_ray.cli.convert import convert_app
from pefomed_ray.cli.environment import set_defaults
from pefomed_ray.cli.estimate import estimate
from pefomed_ray.cli.evaluation import evaluate
from pefomed_ray.cli.export import export
from pefomed_ray.cli.judge import judge
from pefomed_ray.cli.promotion import history, promote, rollback
from pefomed_ray.cli.rate import rate
from pefomed_ray.cli.score import score
from pefomed_ray.cli.serving import keys_app, query, serve

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Parameter-efficient fine-tuning of medical multimodal LLMs on Ray. Exit codes: 0 done, 1 our failure, "
    "2 bad configuration, 3 bad data, 4 diverged, 5 refused. Not for diagnosis.",
)
data_app = typer.Typer(no_args_is_help=True, help="Corpora: look at them, turn them into shards.")
app.add_typer(data_app, name="data")
app.add_typer(convert_app, name="convert")
app.add_typer(keys_app, name="keys")

Json = Annotated[bool, typer.Option("--json", help="End stdout with one JSON object.")]
Words = Annotated[list[str] | None, typer.Argument(help="dotted.key=value, applied over the file.")]


def main() -> None:
    """Entry point. What has to be checked is checked before a verb imports Ray or torch."""
    set_defaults()
    app()


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        sys.stdout.write(f"{__version__}\n")
        raise typer.Exit


@data_app.command("check")
@exits_with_code
def data_check(
    root: str,
    options: Words = None,
    html: Annotated[str | None, typer.Option(help="Page to write, a new file: the same, with pictures.")] = None,
    json: Json = False,
) -> None:
    """What is in a corpus folder, and what is wrong with it; writes nothing but the page that is asked for."""
    from pefomed_ray.artifacts.storage import local_path
    from pefomed_ray.cli.dirt import IN_FULL_ONLY_AS_JSON, show_dirt
    from pefomed_ray.cli.options import data_options
    from pefomed_ray.cli.progress import bar
    from pefomed_ray.data.check import check
    from pefomed_ray.errors import DataError

    chosen, page = data_options(options), local_path(html) if html else None
    with bar("checking", "rows") as on_progress:
        found = check(root, chosen, on_progress, page)
    if page is not None:
        found["page"] = str(page)
    if not json:
        show_dirt(found)
    finish({key: found[key] for key in found if json or key not in IN_FULL_ONLY_AS_JSON}, as_json=json)
    if found["problem"]:
        raise DataError(found["problem"])


@data_app.command("prepare")
@exits_with_code
def data_prepare(root: str, output: str, options: Words = None, json: Json = False) -> None:
    """Read a corpus in its publisher's layout and write Parquet shards, quarantine and manifest to OUTPUT."""
    from pefomed_ray.artifacts.folders import open_folder
    from pefomed_ray.cli.cluster import cluster
    from pefomed_ray.cli.options import data_options
    from pefomed_ray.cli.progress import bar
    from pefomed_ray.data.corpora import open_corpus
    from pefomed_ray.data.output import check_is_free
    from pefomed_ray.data.shards import prepare

    source, target, chosen = open_folder(root), open_folder(output), data_options(options)
    open_corpus(source, chosen.corpus)
    check_is_free(target)
    with cluster(), bar("preparing shards", "rows") as on_progress:
        manifest = prepare(source.url, target.url, chosen, on_progress)
    finish(
        {
            "manifest": target.url_of("manifest.json"),
            "rows": manifest.rows,
            "quarantined": manifest.quarantined,
            "answer_types": manifest.answer_types,
            "image_overlap": manifest.image_overlap,
            "licence": manifest.licence,
            "source": manifest.source,
            "digest": manifest.digest,
        },
        as_json=json,
    )


@data_app.command("cache")
@exits_with_code
def data_cache(
    shards: Annotated[str, typer.Argument(help="Folder of shards; several, joined by commas, for a mixture.")],
    output: str,
    options: Annotated[list[str] | None, typer.Argument(help="key=value: base=embedded template=short ...")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Make it however large it is.")] = False,
    json: Json = False,
) -> None:
    """Run the frozen tower once over the images of shards and store its features in OUTPUT."""
    from pefomed_ray.artifacts.base import base_folder, features_shape
    from pefomed_ray.artifacts.folders import open_folder
    from pefomed_ray.artifacts.storage import local_path
    from pefomed_ray.cli.cache_size import accept_size
    from pefomed_ray.cli.options import feature_cache_config
    from pefomed_ray.data.cache_plan import plan_cache
    from pefomed_ray.rendering.key import features_key

    config, target = feature_cache_config(options or []), local_path(output)
    sources = [open_folder(folder).url for folder in shards.split(",")]
    base = base_folder(config.base)
    key = features_key(base, config.template)
    plan = plan_cache(sources, target, features_shape(base), config.splits)
    accept_size(plan, config.limit_gb, yes=yes)
    from functools import partial

    from pefomed_ray.cli.cluster import cluster
    from pefomed_ray.cli.progress import bar
    from pefomed_ray.data.cache import build_cache
    from pefomed_ray.model.tower import open_tower

    tower = partial(open_tower, str(base), config.template, "cuda" if config.use_gpu else "cpu")
    with cluster(), bar("features", "images") as on_progress:
        manifest = build_cache(plan, target, key, tower, config, on_progress)
    finish(
        {
            "cache": str(target),
            "images": manifest.images,
            "bytes": manifest.bytes,
            "dtype": manifest.dtype,
            "shape": list(manifest.shape),
            "digest": manifest.digest,
        },
        as_json=json,
    )


@app.command()
@exits_with_code
def train(
    config: str,
    overrides: Words = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in output_dir.")] = False,
    json: Json = False,
) -> None:
    """Fine-tune an adapter; the best epoch's bundle is published as <output_dir>/bundle."""
    from pefomed_ray.config import TrainConfig, load_config
    from pefomed_ray.training.preflight import check_run, output_dir

    checked = load_config(TrainConfig, config, overrides or [])
    check_run(checked, resume=resume)
    from pefomed_ray.cli.cluster import cluster
    from pefomed_ray.cli.training import reporting, watching
    from pefomed_ray.training.trainer import train as run

    with reporting(output_dir(checked)), cluster(), watching() as watch:
        result = run(checked, watch, resume=resume)
    best = result.epochs[result.best_epoch - 1]
    finish(
        {
            "bundle": str(result.bundle),
            "metrics": str(result.bundle / "metrics.json"),
            "digest": result.digest,
            "output_dir": str(result.output),
            "report": str(result.output / "report.html"),
            "best_epoch": result.best_epoch,
            "epochs": len(result.epochs),
            "validation": {name: best[name] for name in ("exact_match", "rougeL", "loss", "n")},
            "trainable_parameters": best["trainable_parameters"],
            "parameters": best["parameters"],
        },
        as_json=json,
    )


@app.command()
@exits_with_code
def search(
    space: str,
    overrides: Words = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the search in output_dir.")] = False,
    json: Json = False,
) -> None:
    """Search hyperparameters with Ray Tune and Optuna; writes the leaderboard, who wins and why, and report.html."""
    from pefomed_ray.config import SearchConfig, load_config
    from pefomed_ray.search.space import check_search, preset_values
    from pefomed_ray.search.storage import check_storage

    checked = load_config(SearchConfig, space, overrides or [])
    values = preset_values(checked, Path(space))
    first = check_search(checked, values, resume=resume)
    check_storage(checked, resume=resume)
    from pefomed_ray.cli.cluster import cluster
    from pefomed_ray.cli.trials import leaderboard, resumable, shown_trials
    from pefomed_ray.search.study import run_search

    table = shown_trials(checked.metric, first.training.epochs, checked.trials)
    with resumable(space, overrides or []), cluster(), table as shown:
        result = run_search(checked, values, shown, resume=resume)
    leaderboard(result.rows, checked.metric)
    say(result.why)
    finish(
        {
            "leaderboard": str(result.leaderboard),
            "report": str(result.report),
            "bundle": str(result.bundle),
            "best": asdict(result.best),
            "best_config": str(result.best_config),
            "output_dir": str(result.output),
            "trials": len(result.rows),
            "failed": sum(row.state == "failed" for row in result.rows),
        },
        as_json=json,
    )


app.command()(evaluate)
app.command()(score)
app.command()(promote)
app.command()(rollback)
app.command()(history)
app.command()(serve)
app.command()(query)
app.command()(estimate)
app.command()(export)
app.command()(judge)
app.command()(rate)
app.command()(agree)


@app.command()
@exits_with_code
def demo(
    output: Annotated[str, typer.Option(help="Folder for everything the demo writes.")] = "demo-output",
    keep: Annotated[bool, typer.Option("--keep", help="Leave the endpoint up until interrupted.")] = False,
    port: Annotated[int, typer.Option(help="Port of the endpoint.")] = 8000,
    json: Json = False,
) -> None:
    """The whole system on phantoms: corpus, shards, search, train, evaluate, promote, serve, query."""
    from pefomed_ray.cli.demo import run_demo

    finish(run_demo(output, keep=keep, port=port), as_json=json)


@app.command()
@exits_with_code
def doctor(json: Json = False) -> None:
    """What this machine offers: versions, cores, memory, GPUs, the embedded base's checksums."""
    from pefomed_ray.cli.doctor import examine

    finish(examine(), as_json=json)


if __name__ == "__main__":
    main()
