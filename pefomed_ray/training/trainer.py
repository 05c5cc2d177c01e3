"""One training run on a Ray cluster, from a config to a published bundle."""

import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.data
import ray.train
from ray.exceptions import RayActorError
from ray.train.torch import TorchConfig, TorchTrainer

from pefomed_ray.artifacts.base import base_folder
from pefomed_ray.artifacts.manifests import load_bundle_manifest
from pefomed_ray.artifacts.storage import read_json
from pefomed_ray.config import TrainConfig, save_config
from pefomed_ray.config.schema import ResourcesConfig
from pefomed_ray.errors import ConfigError, PefomedError, original_error
from pefomed_ray.training.feed import DATA_WORKER_CPUS, RenderSettings, execution_options, training_dataset
from pefomed_ray.training.journal import EPOCHS_FILE, STEPS_FILE
from pefomed_ray.training.keeper import START_FILE, hold
from pefomed_ray.training.order import TrainingOrder, rows_of
from pefomed_ray.training.outcome import FAILURES_FILE, clear_stop, raise_stop, that_fits
from pefomed_ray.training.preflight import check_run, output_dir, with_absolute_paths
from pefomed_ray.training.progress import step_of_newest
from pefomed_ray.training.worker import train_worker

WATCH_INTERVAL_S = 0.5

TAIL_BYTES = 4096
"""Longer than any line of `steps.jsonl`."""


def _nobody(*_: Any) -> None:
    """Does not listen."""


@dataclass(frozen=True)
class Watch:
    """Whom to tell how a run goes, a while after it does."""

    start: Callable[[dict[str, Any]], None] = _nobody
    """What learns, what a step will send, and from which step on (`start.json`); again where workers start again."""
    step: Callable[[dict[str, Any]], None] = _nobody
    """The latest line of `steps.jsonl`; not every step is told."""
    epoch: Callable[[int, dict[str, Any]], None] = _nobody
    """An epoch's number, from 1, and its row of `epochs.json`."""
    failure: Callable[[dict[str, Any]], None] = _nobody
    """A worker that gave up (`failures.jsonl`)."""


@dataclass(frozen=True)
class TrainResult:
    """Where a run's artifacts are."""

    output: Path
    bundle: Path
    digest: str
    best_epoch: int
    epochs: list[dict[str, Any]]


def check_resources(config: TrainConfig) -> None:
    """Raise ConfigError where the cluster can never hold the run: Ray would wait for ever."""
    have = ray.cluster_resources()
    resources = config.resources
    need = {"CPU": resources.data_workers * DATA_WORKER_CPUS}
    workers = resources.fewest_workers
    if resources.use_gpu:
        need["GPU"] = float(workers)
    else:
        need["CPU"] += workers * resources.cpus_per_worker
    for name, amount in need.items():
        if amount > have.get(name, 0.0):
            raise ConfigError(
                f"the run needs {amount:g} {name} ({workers} workers, "
                f"resources.data_workers={resources.data_workers}), the cluster has {have.get(name, 0.0):g}"
            )


def train(config: TrainConfig, watch: Watch | None = None, *, resume: bool = False) -> TrainResult:
    """Run `config` on the cluster Ray is connected to; publish the best epoch's bundle as `<output>/bundle`.

    With `resume` the run goes on where its output folder says it stood, at the beginning where it says nothing.
    Raises the worker's own error (DivergedError, DataError, ...) rather than Ray's wrapping of it, and PefomedError
    where workers were lost more often than the config allows.
    """
    check_run(config, resume=resume)
    check_resources(config)
    config = with_absolute_paths(config)
    output = output_dir(config)
    output.mkdir(parents=True, exist_ok=True)
    hold(output).release()
    save_config(config, output / "run.yaml")
    clear_stop(output)
    (output / START_FILE).unlink(missing_ok=True)  # of an earlier try
    with _watching(output, watch or Watch()):
        try:
            _trainer(config, output).fit()
        except Exception as error:
            raise_stop(output)
            raise _in_our_words(error, config.resources) from error
    raise_stop(output)
    return publish(output)


def _in_our_words(error: Exception, resources: ResourcesConfig) -> BaseException:
    if isinstance(error, ray.train.PreemptionError):
        return PefomedError(
            f"nodes were taken away more often than resources.max_preemptions={resources.max_preemptions} allows"
        )
    if isinstance(error, RayActorError):
        return PefomedError("the process that leads the run was lost, with the node it ran on or for lack of memory")
    failures = getattr(error, "worker_failures", {}).values()
    if any(isinstance(getattr(failure, "health_check_failure", failure), RayActorError) for failure in failures):
        return PefomedError(
            f"workers were lost more often than resources.max_failures={resources.max_failures} allows: a process that "
            "was killed (by the system where memory ran out, most often) or a node that went away"
        )
    return original_error(error)


def publish(output: Path) -> TrainResult:
    """Give the best epoch's bundle its final name; what `train` and a search's trials end with."""
    record = read_json(output / "epochs.json")
    bundle = output / "bundle"
    os.replace(output / "epochs" / f"{record['best']:03d}", bundle)
    return TrainResult(output, bundle, load_bundle_manifest(bundle).digest, record["best"], record["epochs"])


def render_settings(config: TrainConfig) -> RenderSettings:
    """What this run's data workers need."""
    return RenderSettings(
        base=str(base_folder(config.base.path)),
        template=config.template,
        max_answer_tokens=config.data.max_answer_tokens,
        cached_features=config.data.feature_cache is not None,
    )


def dataset(config: TrainConfig, output: Path) -> ray.data.Dataset:
    """The run's stream of rendered rows, from the step on that its newest checkpoint in `output` stands at."""
    config = that_fits(config, output)
    order = TrainingOrder.of(rows_of(config, "train"), config, step_of_newest(output))
    return training_dataset(order, render_settings(config), config.resources.data_workers)


def _dataset_of_its_own(config: TrainConfig, output: Path) -> ray.data.Dataset:
    """`dataset`, when nobody writes checkpoints any more: where it begins, the ranks will."""
    hold(output).release()
    return dataset(config, output)


def _trainer(config: TrainConfig, output: Path) -> TorchTrainer:
    resources = config.resources
    elastic = resources.fewest_workers < resources.workers
    each = None if resources.use_gpu else {"CPU": resources.cpus_per_worker}
    return TorchTrainer(
        train_worker,
        train_loop_config={"config": config.model_dump(mode="json"), "output": str(output)},
        scaling_config=ray.train.ScalingConfig(
            num_workers=(resources.fewest_workers, resources.workers) if elastic else resources.workers,
            use_gpu=resources.use_gpu,
            resources_per_worker=each,
        ),
        run_config=ray.train.RunConfig(
            # A name of its own each time: what Ray remembers of an earlier try may be torn, and is not needed.
            name=f"ray-{len(list(output.glob('ray-*'))) + 1}",
            storage_path=str(output),
            failure_config=ray.train.FailureConfig(
                max_failures=resources.max_failures,
                max_preemption_failures=resources.max_preemptions,
                controller_failure_limit=resources.max_failures,
            ),
        ),
        torch_config=TorchConfig(
            # What stays on the CPU is summed up there: NCCL cannot.
            backend="cpu:gloo,cuda:nccl" if resources.cpu_offload else None,
            timeout_s=int(resources.collective_timeout_s),
        ),
        datasets={"train": lambda: _dataset_of_its_own(config, output)},  # called each time before workers start
        dataset_config=ray.train.DataConfig(datasets_to_split=["train"], execution_options=execution_options()),
    )


@contextmanager
def _watching(output: Path, watch: Watch) -> Iterator[None]:
    """Tell `watch` what rank 0 writes, as it does."""
    done = threading.Event()
    tail = _Tail(output, watch)

    def look() -> None:
        while not done.wait(WATCH_INTERVAL_S):
            tail.look()

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
    tail.look()


class _Tail:
    """How much of what rank 0 writes has been told. A run that goes on takes steps back, and tells them again."""

    def __init__(self, output: Path, watch: Watch) -> None:
        self._output = output
        self._watch = watch
        self._start: dict[str, Any] | None = None
        self._step = 0
        self._epochs = len(self._read_epochs())  # a run that goes on has told them
        self._failures = len(self._read_failures())

    def look(self) -> None:
        """Tell what is new."""
        for failure in self._read_failures()[self._failures :]:
            self._failures += 1
            self._watch.failure(failure)
        start = self._output / START_FILE
        if start.is_file() and (begun := read_json(start)) != self._start:
            self._start = begun
            self._watch.start(begun)
        step = self._last_step()
        if step and step["step"] != self._step:
            self._step = step["step"]
            self._watch.step(step)
        for row in self._read_epochs()[self._epochs :]:
            self._epochs += 1
            self._watch.epoch(self._epochs, row)

    def _read_epochs(self) -> list[dict[str, Any]]:
        path = self._output / EPOCHS_FILE
        return read_json(path)["epochs"] if path.is_file() else []

    def _read_failures(self) -> list[dict[str, Any]]:
        path = self._output / FAILURES_FILE
        lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
        return [json.loads(line) for line in lines]

    def _last_step(self) -> dict[str, Any] | None:
        path = self._output / STEPS_FILE
        if not path.is_file():
            return None
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            lines = [line for line in file.read().split(b"\n")[:-1] if line.endswith(b"}")]
        return json.loads(lines[-1]) if lines else None
