"""`pefomed-ray rate`: people rate answers on a local page, or ratings go into and out of their store."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pefomed_ray.cli.console import exits_with_code, finish, say

if TYPE_CHECKING:
    from pefomed_ray.evaluation.rate.items import Items
    from pefomed_ray.evaluation.rate.store import Store


@exits_with_code
def rate(
    predictions: Annotated[list[str], typer.Argument(help="JSONL files; several models' are shown in one blind mix.")],
    data: Annotated[str, typer.Option(help="Folder of shards: the pictures.")],
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    store: Annotated[str, typer.Option(help="SQLite file of ratings; made where there is none.")] = "ratings.sqlite",
    port: Annotated[int, typer.Option(help="Port of the page; 0 for a free one.", min=0, max=65535)] = 0,
    sample: Annotated[int | None, typer.Option(help="Only so many rows, drawn by --seed.", min=1)] = None,
    seed: Annotated[int, typer.Option(help="Of the sample and of each rater's order.")] = 0,
    import_: Annotated[
        str | None, typer.Option("--import", help="Merge the ratings of this CSV file into the store and end.")
    ] = None,
    export: Annotated[
        str | None, typer.Option(help="Write the store's ratings to this CSV file and end, after any --import.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="End stdout with one JSON object.")] = False,
) -> None:
    """Serve a page on this machine, until interrupted, where people rate answers blind; ratings go into the store."""
    from pefomed_ray.artifacts.folders import open_folder
    from pefomed_ray.artifacts.storage import local_path
    from pefomed_ray.cli.options import split_named
    from pefomed_ray.evaluation.rate.items import open_items
    from pefomed_ray.evaluation.rate.store import Store
    from pefomed_ray.evaluation.ratings import read_ratings

    files, target = [local_path(file) for file in predictions], local_path(store)
    source, shards = local_path(import_) if import_ else None, open_folder(data).url
    items = open_items(files, shards, split_named(split), sample, seed)
    incoming = read_ratings(source) if source else []
    opened = Store(target, items.task)
    opened.add_answers(items.answers)
    if source or export:
        found: dict[str, Any] = {"store": str(target)}
        if source:
            merged = opened.merge(incoming)
            found |= {"new": merged.new, "same": merged.same, "conflicts": [asdict(one) for one in merged.conflicts]}
        if export:
            found |= {"ratings": str(local_path(export)), "rows": _export(opened, local_path(export))}
        finish(found | {"raters": opened.counts()}, as_json=json)
    else:
        _serve(items, opened, seed, port, as_json=json)


def _export(store: "Store", target: Path) -> int:
    """Write the ratings as CSV; answers how many."""
    from pefomed_ray.errors import ConfigError
    from pefomed_ray.evaluation.ratings import write_ratings

    ratings = store.ratings()
    try:
        write_ratings(target, ratings)
    except OSError as error:
        raise ConfigError(f"--export {str(target)!r} cannot be written ({error.strerror})") from None
    return len(ratings)


def _serve(items: "Items", store: "Store", seed: int, port: int, *, as_json: bool) -> None:
    from pefomed_ray.cli.waiting import wait_for_signal
    from pefomed_ray.evaluation.rate.server import serving

    with serving(items, store, seed, port) as url:
        about = {"task": items.task, "items": len(items.by_key), "answers": len(items.answers)}
        finish({"url": url, "store": str(store.path), **about, "unanswered": items.unanswered}, as_json=as_json)
        say("open the address in a browser on this machine; Ctrl-C ends it. Every rating is saved as it is given")
        wait_for_signal()
    for rater, count in store.counts().items():
        say(f"{rater}: {count['rated']} rated, {count['skipped']} skipped")
    say(f"ratings are in {store.path}; the same command goes on with them, with --export FILE.csv it writes them out")
