"""One training run on a Ray cluster, from a config to a published bundle."""

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
from ray.train.torch import TorchConfig, TorchTrainer

from pefomed_ray.artifacts.base import base_folder
from pefomed_ray.artifacts.manifests import load_bundle_manifest
from pefomed_ray.artifacts.storage import read_json
from pefomed_ray.config import TrainConfig, save_config
from pefomed_ray.errors import ConfigError, original_error
from pefomed_ray.training.feed import DATA_WORKER_CPUS, RenderSettings, execution_options, training_dataset
from pefomed_ray.training.loop import WHAT_LEARNS_FILE
from pefomed_ray.training.order import TrainingOrder, rows_of
from pefomed_ray.training.preflight import check_run, output_dir, with_absolute_paths
from pefomed_ray.training.worker import train_worker

COLLECTIVE_TIMEOUT_S = 300
"""A rank that waits longer for the others gives up; Ray's own default is 30 minutes."""
WATCH_INTERVAL_S = 0.5

OnStart = Callable[[dict[str, Any]], None]
OnEpoch = Callable[[int, dict[str, Any]], None]


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
    if resources.use_gpu:
        need["GPU"] = float(resources.workers)
    else:
        need["CPU"] += resources.workers * resources.cpus_per_worker
    for name, amount in need.items():
        if amount > have.get(name, 0.0):
            raise ConfigError(
                f"the run needs {amount:g} {name} (resources.workers={resources.workers}, "
                f"resources.data_workers={resources.data_workers}), the cluster has {have.get(name, 0.0):g}"
            )


def train(
    config: TrainConfig,
    on_epoch: OnEpoch = lambda epoch, row: None,
    on_start: OnStart = lambda learning: None,
) -> TrainResult:
    """Run `config` on the cluster Ray is connected to; publish the best epoch's bundle as `<output>/bundle`.

    `on_start` is told once, before the first step, what learns (`model.lora.what_learns`).

    Raises the worker's own error (DivergedError, DataError, ...) rather than Ray's wrapping of it.
    """
    check_run(config)
    check_resources(config)
    config = with_absolute_paths(config)
    output = output_dir(config)
    output.mkdir(parents=True, exist_ok=True)
    save_config(config, output / "run.yaml")
    with _watching(output, on_start, on_epoch):
        try:
            _trainer(config, output).fit()
        except Exception as error:
            raise original_error(error) from error
    return publish(output)


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


def dataset(config: TrainConfig) -> ray.data.Dataset:
    """The run's stream of rendered rows."""
    order = TrainingOrder.of(rows_of(config, "train"), config)
    return training_dataset(order, render_settings(config), config.resources.data_workers)


def _trainer(config: TrainConfig, output: Path) -> TorchTrainer:
    resources = config.resources
    each = None if resources.use_gpu else {"CPU": resources.cpus_per_worker}
    return TorchTrainer(
        train_worker,
        train_loop_config={"config": config.model_dump(mode="json"), "output": str(output)},
        scaling_config=ray.train.ScalingConfig(
            num_workers=resources.workers, use_gpu=resources.use_gpu, resources_per_worker=each
        ),
        run_config=ray.train.RunConfig(name="ray", storage_path=str(output)),
        torch_config=TorchConfig(timeout_s=COLLECTIVE_TIMEOUT_S),
        datasets={"train": lambda: dataset(config)},
        dataset_config=ray.train.DataConfig(datasets_to_split=["train"], execution_options=execution_options()),
    )


@contextmanager
def _watching(output: Path, on_start: OnStart, on_epoch: OnEpoch) -> Iterator[None]:
    """Call `on_start(what learns)`, then `on_epoch(number from 1, row)` for each epoch, as rank 0 writes of them."""
    start, epochs = output / WHAT_LEARNS_FILE, output / "epochs.json"
    done = threading.Event()
    started, reported = False, 0

    def look() -> None:
        nonlocal started, reported
        if not started and start.is_file():
            started = True
            on_start(read_json(start))
        if epochs.is_file():
            for row in read_json(epochs)["epochs"][reported:]:
                reported += 1
                on_epoch(reported, row)

    def watch() -> None:
        while not done.wait(WATCH_INTERVAL_S):
            look()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
    look()
