"""`data check`: the counts that `data prepare` would give, in this process, writing nothing."""

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from pefomed_ray.artifacts.folders import open_folder
from pefomed_ray.data.images import read_image
from pefomed_ray.data.intake import RecordMaker, Tally, dirt_verdict, image_order, quarantine, take_in
from pefomed_ray.data.options import DataOptions
from pefomed_ray.data.reasons import RowError


def check(root: str | Path, options: DataOptions | None = None) -> dict[str, Any]:
    """Read and check every row and image of the corpus in `root`.

    Returns `source`, `licence`, `rows`, `tasks`, `answer_types`, `quarantined` (all as in ShardManifest),
    `image_overlap`, `bad_rows` (the quarantine entries, in the publisher's order) and `problem`: why `prepare` would
    refuse the corpus, or None. Raises what `take_in` raises.
    """
    options = options or DataOptions()
    folder = open_folder(root)
    intake = take_in(folder, options)
    maker = RecordMaker(partial(read_image, folder), intake.source, options)
    tally, bad = Tally(), list(intake.quarantined)
    for rows_of_image in image_order(intake.references, options.seed):
        for position, reference in rows_of_image:
            try:
                tally.add(maker.make(reference))
            except RowError as error:
                bad.append(quarantine(position, reference, error.reason))
    bad.sort(key=lambda row: row.position)
    return {
        "source": intake.source,
        "licence": intake.licence,
        "rows": tally.rows_by_split(),
        "tasks": dict(sorted(tally.tasks.items())),
        "answer_types": dict(sorted(tally.answer_types.items())),
        "quarantined": dict(sorted(Counter(row.reason for row in bad).items())),
        "image_overlap": tally.image_overlap(),
        "bad_rows": [row.document(intake.source) for row in bad],
        "problem": dirt_verdict(intake, bad, options.max_bad_fraction),
    }
