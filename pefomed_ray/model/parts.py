"""Parts that a base is assembled from: a folder or a Hugging Face Hub id, and its tensors, read only when written.

A part's weights lie in `model.safetensors`, or in the shards that `model.safetensors.index.json` names (the layout of
`save_pretrained`). Pickled weights (`*.bin`, `*.pth`) are not opened: reading one may run code.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pefomed_ray.artifacts.storage import read_json, write_json
from pefomed_ray.errors import ConfigError, DataError

HUB_ID = re.compile(r"(\w[\w.-]*/[\w.-]+)(?:@([\w./-]+))?")
"""`owner/name` or `owner/name@revision`."""
HUB_FILES = ("*.json", "*.model", "*.txt", "model*.safetensors")
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SOURCES_FILE = "assembled.json"
"""In a base: where its parts came from."""
MAX_SHARD_BYTES = 2 << 30


@dataclass(frozen=True)
class Part:
    """Where a part was found."""

    folder: Path
    source: str
    """The folder or Hub id, as it was given."""
    revision: str | None = None
    """The Hub's commit; none for a folder."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file, not read yet."""

    file: Path
    name: str
    shape: torch.Size
    dtype: torch.dtype

    @property
    def on_meta(self) -> Tensor:
        """Its shape and dtype without its numbers."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


Tensors = Mapping[str, Stored | Tensor]


def find_part(name: str) -> Part:
    """A folder, or what the Hub has under an id, fetched to its cache and pinned to a commit.

    Raises ConfigError where it is neither, or the Hub does not give it.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return Part(folder.resolve(), name)
    found = HUB_ID.fullmatch(name)
    if found is None:
        raise ConfigError(f"{name!r} is no folder, nor a Hub id (owner/name or owner/name@revision)")
    repository, revision = found.groups()
    try:
        snapshot = Path(snapshot_download(repository, revision=revision, allow_patterns=list(HUB_FILES)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"{name!r} is no folder, and the Hugging Face Hub did not give it ({type(error).__name__}); check the name "
            "and the network, log in with `hf auth login` where a licence has to be accepted, or give a folder"
        ) from None
    return Part(snapshot, repository, snapshot.name)


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """All tensors of a part, by name; headers are read, not the numbers.

    Raises ConfigError where there are no safetensors weights, DataError where a file is missing or damaged.
    """
    tensors: dict[str, Stored] = {}
    for path in _weight_files(folder):
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                tensor = file.get_tensor(name)  # a view of the mapped file
                tensors[name] = Stored(path, name, tensor.shape, tensor.dtype)
    return tensors


def read_tensor(stored: Stored) -> Tensor:
    """One tensor, as it is stored."""
    with _opened(stored.file) as file:
        return file.get_tensor(stored.name)


def write_weights(tensors: Tensors, folder: Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write tensors in shards and their index as `save_pretrained` does; stored ones are copied as they are.

    Of the files read only what one shard takes is mapped at a time: memory does not grow with the weights.
    """
    sizes = {name: value.on_meta if isinstance(value, Stored) else value for name, value in tensors.items()}
    plan = split_torch_state_dict_into_shards(
        sizes, max_shard_size=max_shard_bytes, filename_pattern="model{suffix}.safetensors"
    )
    for file_name, names in plan.filename_to_tensors.items():
        with ExitStack() as stack:
            files = {
                value.file: stack.enter_context(_opened(value.file))
                for value in (tensors[name] for name in names)
                if isinstance(value, Stored)
            }
            shard = {name: _tensor(tensors[name], files).contiguous() for name in names}
            save_file(shard, folder / file_name, metadata={"format": "pt"})
            del shard  # the mapping lives as long as a tensor of it
    if plan.is_sharded:
        write_json(folder / INDEX, {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename})


def _tensor(value: Stored | Tensor, files: Mapping[Path, safe_open]) -> Tensor:
    return files[value.file].get_tensor(value.name) if isinstance(value, Stored) else value


def _weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        names = sorted(set(read_json(folder / INDEX)["weight_map"].values()))
    elif (folder / WEIGHTS).is_file():
        names = [WEIGHTS]
    else:
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pth", ".pt"))
        why = f"; {pickled[0]} is a pickle, which may run code when opened, and is not read" if pickled else ""
        raise ConfigError(
            f"{str(folder)!r} has neither {WEIGHTS} nor {INDEX}{why}. Where you trust the files, transformers' "
            "`from_pretrained(...).save_pretrained(...)` writes safetensors of them"
        )
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise DataError(f"{str(folder / INDEX)!r} names {name!r}, which is not a file beside it; fetch it again")
    return [folder / name for name in names]


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        raise DataError(f"{str(path)!r} is not a whole safetensors file ({error}); fetch it again") from None
