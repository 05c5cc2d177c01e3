"""`data prepare`: Ray Data writes a corpus as Parquet shards, the same bytes whatever the number of workers.

The driver reads names and texts, orders them and cuts them into shards; a task reads the images of one shard, checks
every row and writes one file, under a temporary name first. A task that is run twice writes the same file, and the
folder is published by one rename once every sum is right.
"""

import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray

from pefomed_ray import __version__
from pefomed_ray.artifacts.manifests import ShardManifest, save_document
from pefomed_ray.artifacts.records import SPLITS
from pefomed_ray.artifacts.storage import check_output_is_free, local_path, publishing
from pefomed_ray.data.intake import Intake, Quarantined, Tally, dirt_verdict, take_in
from pefomed_ray.data.options import DataOptions
from pefomed_ray.data.shard_file import ShardResult, ShardSpec, file_size, plan_shards, write_shard
from pefomed_ray.errors import DataError, PefomedError


def prepare(
    root: str | Path,
    output: str | Path,
    options: DataOptions | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> ShardManifest:
    """Write the corpus in `root` as shards in `output`, a folder that must not hold anything yet.

    Ray must have been started. Both folders must be visible to every node. `on_progress(done, total)` counts shards.
    Raises ConfigError and DataError as `take_in` does, and DataError where a split has more bad rows than
    `max_bad_fraction`, or no good one; nothing is published then.
    """
    options = options or DataOptions()
    folder, target = local_path(root), local_path(output)
    check_output_is_free(target)
    if not ray.is_initialized():
        raise PefomedError("prepare needs Ray: call ray.init() first")
    intake = take_in(folder, options)
    specs = plan_shards(intake.references, folder, options.seed, options.shard_bytes)
    with publishing(target) as partial:
        _check_space(partial, folder, intake)
        results = _run(specs, folder, partial, intake.source, on_progress)
        quarantined = [*intake.quarantined, *(row for result in results for row in result.quarantined)]
        quarantined.sort(key=lambda row: row.position)
        if verdict := dirt_verdict(intake.rows_in, quarantined, options.max_bad_fraction):
            raise DataError(f"corpus {str(folder)!r}, {verdict}")
        manifest = _manifest(intake, results, quarantined, options)
        _write_quarantine(partial / "quarantine", quarantined, intake.source)
        for leftover in partial.rglob(".*"):  # of a task that was cut off and run again
            leftover.unlink()
        save_document(manifest, partial / "manifest.json")
    return manifest


def _run(
    specs: list[ShardSpec], root: Path, output: Path, source: str, on_progress: Callable[[int, int], None] | None
) -> list[ShardResult]:
    """One Ray Data row, block and task per shard; results in the order of the specs."""
    if not specs:
        return []
    items = [{"number": number, "spec": spec.to_json()} for number, spec in enumerate(specs)]
    dataset = ray.data.from_items(items, override_num_blocks=len(items))
    dataset.context.enable_progress_bars = False  # the command line draws its own
    dataset = dataset.map(_task, fn_kwargs={"root": str(root), "output": str(output), "source": source})
    results: dict[int, ShardResult] = {}
    with _quiet_ray_data():
        for row in dataset.iter_rows():
            results[row["number"]] = ShardResult.from_json(row["result"])
            if on_progress:
                on_progress(len(results), len(specs))
    return [results[number] for number in range(len(specs))]


@contextmanager
def _quiet_ray_data() -> Iterator[None]:
    """Errors only, on the terminal and in Ray's log files: every run says that bars are off, and prints its plan."""
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _task(item: dict[str, Any], root: str, output: str, source: str) -> dict[str, Any]:
    result = write_shard(ShardSpec.from_json(item["spec"]), Path(root), Path(output), source)
    return {"number": item["number"], "result": result.to_json()}


def _manifest(
    intake: Intake, results: list[ShardResult], quarantined: list[Quarantined], options: DataOptions
) -> ShardManifest:
    tally = Tally()
    for result in results:
        tally.merge(result.tally)
    rows_in, rows_out = intake.rows_in.total(), tally.rows.total()
    if rows_in != rows_out + len(quarantined):
        raise PefomedError(
            f"{rows_in} rows were read, {rows_out} written and {len(quarantined)} quarantined: some got lost"
        )
    files = tuple(result.file for result in results if result.file)
    return ShardManifest(
        source=intake.source,
        licence=intake.licence,
        rows=tally.rows_by_split(),
        tasks=dict(sorted(tally.tasks.items())),
        answer_types=dict(sorted(tally.answer_types.items())),
        bytes={split: sum(file.bytes for file in files if file.split == split) for split in SPLITS},
        quarantined=dict(sorted(Counter(row.reason for row in quarantined).items())),
        image_overlap=tally.image_overlap(),
        files=files,
        made_by={
            "reader": intake.reader.NAME,
            "options": asdict(options),
            "rows_in": {split: intake.rows_in[split] for split in SPLITS},
            "rows_digest": intake.digest,
            "version": __version__,
        },
    )


def _write_quarantine(folder: Path, quarantined: list[Quarantined], source: str) -> None:
    folder.mkdir()
    for split in SPLITS:
        lines = [json.dumps(row.document(source)) + "\n" for row in quarantined if row.split == split]
        if lines:
            (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


def _check_space(output: Path, root: Path, intake: Intake) -> None:
    images = {path for _, reference in intake.references for path in reference.image_paths}
    needed = sum(file_size(root, path) for path in images)
    free = shutil.disk_usage(output).free
    if needed > free:
        raise PefomedError(
            f"{str(output.parent)!r} has {free:,} bytes free, the images alone take {needed:,}; free some space"
        )
