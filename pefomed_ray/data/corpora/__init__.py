"""One module a corpus, each reading one publisher's folder as it unpacks. To add one: write a Reader, name it here."""

from pefomed_ray.artifacts.folders import Folder
from pefomed_ray.data.corpora import (
    imageclef,
    jsonl,
    medicat,
    mimic_cxr,
    open_i,
    pathvqa,
    r2gen,
    roco,
    rocov2,
    slake,
    vqa_rad,
)
from pefomed_ray.data.corpora.reading import Reader
from pefomed_ray.errors import ConfigError, DataError

READERS: dict[str, Reader] = {
    reader.NAME: reader
    for reader in (slake, vqa_rad, pathvqa, roco, rocov2, imageclef, medicat, r2gen, open_i, mimic_cxr, jsonl)
}


def open_corpus(root: Folder, name: str | None = None) -> Reader:
    """The reader called `name`, else the one whose layout `root` has.

    Raises ConfigError where there is no such folder or reader, DataError where it has no known layout, or several.
    """
    if not root.exists():
        raise ConfigError(
            f"corpus folder {str(root)!r} is not there; give the folder that the publisher's archive unpacks to"
        )
    if name is not None:
        return _named(root, name)
    found = [reader for reader in READERS.values() if reader.detect(root)]
    if len(found) > 1:
        several = " and ".join(reader.NAME for reader in found)
        raise DataError(
            f"{str(root)!r} looks like several corpora at once: {several}; give each a folder of its own, "
            "or say which one is meant with corpus=NAME"
        )
    if not found:
        names = root.names()
        seen = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "") or "nothing"
        layouts = "\n".join(f"  {reader.NAME}: {reader.LAYOUT}" for reader in READERS.values())
        raise DataError(f"{str(root)!r} has no known corpus layout; it holds {seen}. Known layouts:\n{layouts}")
    return found[0]


def _named(root: Folder, name: str) -> Reader:
    if name not in READERS:
        raise ConfigError(f"corpus is {name!r}; known layouts: {', '.join(READERS)}")
    reader = READERS[name]
    if not reader.detect(root):
        raise DataError(f"{str(root)!r} does not have the layout of {name}: {reader.LAYOUT}")
    return reader
