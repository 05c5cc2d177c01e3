"""`data prepare`: Ray Data writes a corpus as Parquet shards, the same bytes whatever the number of workers.

The driver reads names and texts, orders them and cuts them into shards; a task reads the images of one shard, checks
every row and writes one file. A task that is run twice writes the same file, a run that was cut off goes on where it
stood, and the folder is published by one step once every sum is right.
"""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray

from pefomed_ray import __version__
from pefomed_ray.artifacts.folders import Folder, LocalFolder, open_folder
from pefomed_ray.artifacts.manifests import ShardManifest
from pefomed_ray.artifacts.records import SPLITS
from pefomed_ray.artifacts.storage import digest_of, json_bytes
from pefomed_ray.data.intake import Intake, Quarantined, Tally, dirt_verdict, take_in
from pefomed_ray.data.options import DataOptions
from pefomed_ray.data.output import Output, check_is_free, unfinished
from pefomed_ray.data.quiet import quiet_ray_data
from pefomed_ray.data.shard_file import ShardResult, ShardSpec, inputs_digest, plan_shards, write_shard
from pefomed_ray.errors import DataError, DiskFullError, PefomedError, original_error

OnProgress = Callable[[int, int], None]
"""Called with rows done and rows in all."""


def prepare(
    root: str | Path,
    output: str | Path,
    options: DataOptions | None = None,
    on_progress: OnProgress | None = None,
) -> ShardManifest:
    """Write the corpus in `root` as shards in `output`, a folder that must not hold anything yet.

    Both may be local paths or `s3://` URLs, visible to every node. Ray must have been started.
    Raises ConfigError and DataError as `take_in` does; DataError where a split has more bad rows than
    `max_bad_fraction`, or no good one; DiskFullError; PefomedError where a store does not answer. Nothing is published
    then. Work that was cut off is kept beside the output for the same call to go on with.
    """
    options = options or DataOptions()
    source, target = open_folder(root), open_folder(output)
    check_is_free(target)
    if not ray.is_initialized():
        raise PefomedError("prepare needs Ray: call ray.init() first")
    intake = take_in(source, options)
    specs = plan_shards(intake.references, source, options.seed, options.shard_bytes)
    texts = [spec.to_json() for spec in specs]
    inputs = digest_of([inputs_digest(text, intake.source, options) for text in texts])
    with unfinished(target, inputs) as work:
        try:
            _check_space(work, specs)
            results = _run(texts, source, work, intake, options, on_progress)
        except DiskFullError:
            work.discard()
            raise
        quarantined = [*intake.quarantined, *(row for result in results for row in result.quarantined)]
        quarantined.sort(key=lambda row: row.position)
        if verdict := dirt_verdict(intake, quarantined, options.max_bad_fraction):
            work.discard()
            raise DataError(f"corpus {str(source)!r}, {verdict}")
        manifest = _manifest(intake, results, quarantined, options)
        work.publish(
            _quarantine_files(quarantined, intake.source),
            {file.path: file.bytes for file in manifest.files},
            json_bytes(manifest.model_dump(mode="json")),
        )
    return manifest


def _run(
    specs: list[str],
    root: Folder,
    work: Output,
    intake: Intake,
    options: DataOptions,
    on_progress: OnProgress | None,
) -> list[ShardResult]:
    """One Ray Data row, block and task per shard; results in the order of the specs."""
    if not specs:
        return []
    items = [{"number": number, "spec": spec} for number, spec in enumerate(specs)]
    dataset = ray.data.from_items(items, override_num_blocks=len(items))
    dataset.context.enable_progress_bars = False  # the command line draws its own
    given = {"root": root, "output": work.work, "source": intake.source, "options": options}
    dataset = dataset.map(_task, fn_kwargs=given)
    results: dict[int, ShardResult] = {}
    rows, rows_done = len(intake.references), 0
    with quiet_ray_data():
        try:
            for row in dataset.iter_rows():
                result = results[row["number"]] = ShardResult.from_json(row["result"])
                rows_done += result.rows_in
                if on_progress:
                    on_progress(rows_done, rows)
        except Exception as error:
            raise original_error(error) from error
    return [results[number] for number in range(len(specs))]


def _task(item: dict[str, Any], root: Folder, output: Folder, source: str, options: DataOptions) -> dict[str, Any]:
    result = write_shard(item["spec"], root, output, source, options)
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
            "taken_from_train": dict(intake.taken_splits),
            "rows_digest": intake.digest,
            "version": __version__,
        },
    )


def _quarantine_files(quarantined: list[Quarantined], source: str) -> dict[str, bytes]:
    lines = {
        split: [json.dumps(row.document(source)) + "\n" for row in quarantined if row.split == split]
        for split in SPLITS
    }
    return {f"quarantine/{split}.jsonl": "".join(found).encode() for split, found in lines.items() if found}


def _check_space(work: Output, specs: list[ShardSpec]) -> None:
    """Better now than after an hour. Nothing of it holds for S3."""
    if not isinstance(work.work, LocalFolder):
        return
    files = {name: entry.size for spec in specs for name, entry in spec.entries.items() if entry}
    done = sum(entry.size for entry in work.work.entries(work.work.files()) if entry)
    needed = sum(files.values()) - done
    free = shutil.disk_usage(work.work.path).free
    if needed > free:
        raise DiskFullError(
            f"{str(work.work.path.parent)!r} has {free:,} bytes free, the images alone take {needed:,}; free some space"
        )
