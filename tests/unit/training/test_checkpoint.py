"""A run goes on exactly where its newest whole checkpoint stands, whatever a crash left."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pefomed_ray.artifacts import storage
from pefomed_ray.errors import ConfigError
from pefomed_ray.training.checkpoint import gather, newest, restore, save_checkpoint
from pefomed_ray.training.progress import FOLDER, STATE_FILE, Progress, step_of_newest

IDENTITY = {"optimizer": {"learning_rate": 0.1}, "seed": 1}


def model() -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1))
    made[0].requires_grad_(False)
    return made


def steps(made: nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> None:
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        made(torch.randn(8, 4, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def adamw(made: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], lr=0.1)


def saved(output: Path, step: int, tensors: dict[str, Tensor] | None = None) -> Path:
    return save_checkpoint(output, Progress(step=step), tensors or {"weight.x": torch.full((3,), step)}, IDENTITY)


def test_what_goes_on_ends_where_the_unbroken_run_does(tmp_path: Path) -> None:
    whole = model()
    optimizer = adamw(whole)
    steps(whole, optimizer, range(9))

    first = model()
    optimizer = adamw(first)
    steps(first, optimizer, range(5))
    save_checkpoint(tmp_path, Progress(step=5), gather(first, optimizer), IDENTITY)

    def go_on(with_moments: bool) -> Tensor:
        second = model()
        optimizer = adamw(second)
        found = newest(tmp_path, IDENTITY)
        assert found
        if not with_moments:
            for name in [name for name in found.tensors if not name.startswith("weight.")]:
                del found.tensors[name]
        restore(second, optimizer, found)
        steps(second, optimizer, range(found.progress.step, 9))
        return torch.cat([parameter.flatten() for parameter in second.parameters()]).detach()

    expected = torch.cat([parameter.flatten() for parameter in whole.parameters()]).detach()
    assert torch.equal(go_on(with_moments=True), expected)
    assert not torch.equal(go_on(with_moments=False), expected)  # the control: the optimizer's state matters


def test_frozen_weights_are_not_in_it(tmp_path: Path) -> None:
    made = model()
    optimizer = adamw(made)
    steps(made, optimizer, range(1))
    assert {name.partition(".")[2] for name in gather(made, optimizer)} == {"1.weight", "1.bias"}


def test_two_are_kept_and_the_later_step_is_the_newer_one(tmp_path: Path) -> None:
    for step in (8, 9, 10):
        saved(tmp_path, step)
    assert sorted(path.name for path in (tmp_path / FOLDER).iterdir()) == ["00000009", "00000010"]
    found = newest(tmp_path, IDENTITY)
    assert found
    assert (found.progress.step, step_of_newest(tmp_path)) == (10, 10)
    saved(tmp_path, 10, {"weight.x": torch.zeros(1)})  # a step that is taken again replaces what it left
    found = newest(tmp_path, IDENTITY)
    assert found
    assert found.tensors["weight.x"].tolist() == [0]


def _flip(folder: Path) -> None:
    data = bytearray((folder / STATE_FILE).read_bytes())
    data[-1] ^= 1
    (folder / STATE_FILE).write_bytes(data)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "flipped byte": _flip,
    "no state": lambda folder: (folder / STATE_FILE).unlink(),
    "short state": lambda folder: (folder / STATE_FILE).write_bytes((folder / STATE_FILE).read_bytes()[:-9]),
    "no document": lambda folder: (folder / "checkpoint.json").unlink(),
    "empty document": lambda folder: (folder / "checkpoint.json").write_bytes(b""),
    "torn document": lambda folder: (folder / "checkpoint.json").write_bytes(b'{"progress": {"st'),
    "unknown field": lambda folder: (folder / "checkpoint.json").write_text(
        json.dumps(json.loads((folder / "checkpoint.json").read_text()) | {"progress": {"pace": 1}})
    ),
    "nothing in it": lambda folder: [path.unlink() for path in folder.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_one_is_passed_over_and_named(damage: str, tmp_path: Path) -> None:
    saved(tmp_path, 4)
    DAMAGE[damage](saved(tmp_path, 6))
    found = newest(tmp_path, IDENTITY)
    assert found
    assert (found.progress.step, step_of_newest(tmp_path)) == (4, 4)
    assert [name.partition(" ")[0] for name in found.passed_over] == ["00000006"]


def test_an_undamaged_one_is_not_passed_over(tmp_path: Path) -> None:
    """The control."""
    saved(tmp_path, 4)
    saved(tmp_path, 6)
    found = newest(tmp_path, IDENTITY)
    assert found
    assert (found.progress.step, found.passed_over) == (6, ())


class Killed(BaseException):
    """Nobody catches it, as nobody catches SIGKILL."""


@pytest.fixture
def killed_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let the n-th of the steps that change the disk be the last; returns what was reached through `count`."""
    state: dict[str, Any] = {"left": None, "count": 0}

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            state["count"] += 1
            if state["left"] is not None:
                if state["left"] == 0:
                    raise Killed
                state["left"] -= 1
            return real(*args, **kwargs)

        return call

    for module, name in ((storage.os, "replace"), (storage.os, "chmod"), (storage.os, "fsync")):
        monkeypatch.setattr(module, name, counted(getattr(module, name)))
    monkeypatch.setattr("pefomed_ray.training.checkpoint.save_file", counted(_save_file))
    monkeypatch.setattr("pefomed_ray.training.checkpoint.shutil.rmtree", counted(shutil.rmtree))

    def arm(left: int) -> None:
        state["left"] = left

    return arm


def _save_file(tensors: dict[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file(tensors, path)


def test_killed_at_any_step_of_saving_leaves_the_one_before_or_the_new_one(
    killed_at: Callable[[int], None], tmp_path: Path
) -> None:
    seen = []
    for left in range(30):
        output = tmp_path / str(left)
        killed_at(10**6)
        saved(output, 1)
        saved(output, 2)
        killed_at(left)
        try:
            saved(output, 3)
        except Killed:
            found = newest(output, IDENTITY)
            assert found
            assert found.tensors["weight.x"].tolist() == [found.progress.step] * 3
            assert not found.passed_over
            seen.append(found.progress.step)
        else:
            assert step_of_newest(output) == 3
            break
    else:
        pytest.fail("saving takes more than 30 steps")
    assert len(seen) > 3
    assert set(seen) <= {2, 3}
    assert 2 in seen


def test_another_run_is_not_gone_on_with(tmp_path: Path) -> None:
    saved(tmp_path, 4)
    with pytest.raises(ConfigError, match=r"optimizer\.learning_rate was 0\.1 and is 0\.2"):
        newest(tmp_path, {"optimizer": {"learning_rate": 0.2}, "seed": 1})


def test_other_parameters_than_the_models_are_refused(tmp_path: Path) -> None:
    saved(tmp_path, 4)
    found = newest(tmp_path, IDENTITY)
    made = model()
    assert found
    with pytest.raises(ConfigError, match="other trained parameters"):
        restore(made, adamw(made), found)


def test_nothing_there_is_a_beginning(tmp_path: Path) -> None:
    assert newest(tmp_path, IDENTITY) is None
    assert step_of_newest(tmp_path) == 0
