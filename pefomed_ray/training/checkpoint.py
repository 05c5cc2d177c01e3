"""What resumes a run, and nothing that ships: trained tensors, optimizer moments, and how far the run is.

    <output_dir>/checkpoints/00000120/state.safetensors   weights and moments, whole, by parameter name
    <output_dir>/checkpoints/00000120/checkpoint.json     step, epochs so far, what the run was, sha256; written last

Tensors are stored whole, so that any number of workers can take them up. Nothing random is stored: dropout at a step is
drawn from (seed, step, rank), and the order of rows is fixed by (seed, epoch). A run continues from the newest
checkpoint that is whole; Ray's own snapshots are not asked.
"""

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from pefomed_ray.artifacts.storage import publishing, read_json, sha256_file, write_json
from pefomed_ray.errors import ConfigError
from pefomed_ray.training.progress import CHECKPOINT_FILE, FOLDER, STATE_FILE, Progress, folders

KEPT = 2
"""The newest, and one to fall back on where that is damaged."""
WEIGHT, MOMENTS = "weight", ("exp_avg", "exp_avg_sq")
"""What is stored of a parameter: itself, and AdamW's moments; `<kind>.<name>` in the file."""


@dataclass(frozen=True)
class Checkpoint:
    """One that was read: whole, and of this run."""

    progress: Progress
    tensors: dict[str, Tensor]
    passed_over: tuple[str, ...]
    """Newer ones that could not be used, and why."""


def gather(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Everything that `restore` needs, whole and on the CPU; every rank must call."""
    if isinstance(model, FSDPModule):
        model.reshard()  # validation leaves the root whole, under other parameters than the optimizer knows
    tensors = {}
    for name, parameter in _trained(model).items():
        tensors[f"{WEIGHT}.{name}"] = _whole(parameter)
        state = optimizer.state.get(parameter, {})
        for kind in MOMENTS:
            if kind in state:
                tensors[f"{kind}.{name}"] = _whole(state[kind])
    return tensors


def weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The trained parameters among what `gather` gave, by their names in the model."""
    return of_kind(tensors, WEIGHT)


def of_kind(tensors: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Of what `gather` gave, the weights or one of the moments, by their names in the model."""
    prefix = f"{kind}."
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def restore(model: nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Checkpoint) -> None:
    """Put weights and moments in place, on any number of ranks; every rank must call.

    Raises ConfigError where what learns is not what the checkpoint holds.
    """
    trained = _trained(model)
    stored = weights(checkpoint.tensors)
    if set(stored) != set(trained):
        raise ConfigError(
            f"the checkpoint holds other trained parameters than the model: {sorted(set(stored) ^ set(trained))[:3]}; "
            "start the run anew in another output_dir"
        )
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(_like(parameter, stored[name]))
            moments = {kind: checkpoint.tensors.get(f"{kind}.{name}") for kind in MOMENTS}
            if any(moment is None for moment in moments.values()):
                continue
            optimizer.state[parameter] = {
                # Steps that were left out moved nothing, so AdamW has not counted them.
                "step": torch.tensor(float(checkpoint.progress.step - checkpoint.progress.bad_steps)),
                **{kind: _like(parameter, moment).clone() for kind, moment in moments.items() if moment is not None},
            }


def save_checkpoint(output: Path, progress: Progress, tensors: dict[str, Tensor], identity: dict[str, Any]) -> Path:
    """Publish a checkpoint of `output`'s run; one rank calls. `identity` says what the run is: `newest` checks it."""
    folder = output / FOLDER / f"{progress.step:08d}"
    if folder.exists():
        shutil.rmtree(folder)  # this run was here before, and what it left was of no use
    with publishing(folder) as partial:
        save_file(tensors, partial / STATE_FILE)
        document = {
            "schema_version": 1,
            "progress": asdict(progress),
            "identity": identity,
            "sha256": sha256_file(partial / STATE_FILE),
        }
        write_json(partial / CHECKPOINT_FILE, document)
    for old in folders(output)[KEPT:]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def newest(output: Path, identity: dict[str, Any]) -> Checkpoint | None:
    """The newest checkpoint of `output`'s run that is whole; None where there is none.

    Raises ConfigError where it is of another run, naming what differs.
    """
    passed_over: list[str] = []
    for folder in folders(output):
        try:
            document = read_json(folder / CHECKPOINT_FILE)
            if sha256_file(folder / STATE_FILE) != document["sha256"]:
                raise ValueError(f"{STATE_FILE} does not match its sha256")
            progress = Progress(**document["progress"])
            tensors = load_file(folder / STATE_FILE)
        except Exception as error:  # torn, empty, of another version: what a crash leaves is hard to foresee
            passed_over.append(f"{folder.name} ({error})")
            continue
        _check_same_run(document["identity"], identity, output)
        return Checkpoint(progress, tensors, tuple(passed_over))
    return None


def _check_same_run(found: dict[str, Any], wanted: dict[str, Any], output: Path) -> None:
    found, wanted = _flat(found), _flat(wanted)
    different = [name for name in sorted(set(found) | set(wanted)) if found.get(name) != wanted.get(name)]
    if different:
        what = "; ".join(f"{name} was {found.get(name)!r} and is {wanted.get(name)!r}" for name in different[:3])
        raise ConfigError(
            f"the run in {str(output)!r} cannot be continued with other settings: {what}. Resume it with its own "
            "run.yaml, or start anew in another output_dir"
        )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _whole(tensor: Tensor) -> Tensor:
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().cpu().clone().contiguous()


def _like(parameter: Tensor, whole: Tensor) -> Tensor:
    """A whole tensor as this rank holds `parameter`."""
    if isinstance(parameter, DTensor):
        whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements)
    return whole.to(parameter.device)  # not the mesh's own where weights stay on the CPU
