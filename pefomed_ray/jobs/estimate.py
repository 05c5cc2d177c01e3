"""What a run or a search will need, before anything is spent: memory of a device, hours, cost; packed and not.

Nothing is started: sizes come from the headers of the weights, lengths from a sample of the texts, rates and prices
from a table. What is left out: starting processes, loading weights, reading and decoding of images where they do not
keep up, checkpoints, data that travel between workers.

Letters: K adapters of a pack.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil, prod

from pefomed_ray.artifacts.base import base_folder, family_of
from pefomed_ray.artifacts.family import PEFOMED
from pefomed_ray.config import SearchConfig, TrainConfig
from pefomed_ray.config.schema import AshaConfig
from pefomed_ray.jobs.flops import Matrices, step_flops
from pefomed_ray.jobs.memory import Memory, device_memory
from pefomed_ray.jobs.prices import Device
from pefomed_ray.jobs.sizes import BaseSizes, lora_targets, read_sizes
from pefomed_ray.jobs.texts import Texts, read_texts

MOST_IN_A_PACK = 1024
OPERATIONS_PER_LAYER = 220
"""Of a decoder layer, forward and backward, that start something on the device; counted on a small model, where a pack
has as many (210) as one adapter alone (224), whatever its K."""
OPERATIONS_PER_TOWER_BLOCK = 20
TRAINED = ("projector", "lora")
"""Parts of a step whose products are in float32 whatever the base is in."""

Range = tuple[float, float]
"""Least and most."""


@dataclass(frozen=True)
class Work:
    """A run's config, or that of a search's largest trial, with all that was read for it."""

    config: TrainConfig
    sizes: BaseSizes
    targets: list[str]
    texts: Texts
    reads_features: bool
    """Whether a feature cache stands in for the tower."""

    @cached_property
    def matrices(self) -> Matrices:
        """Of the base with this rank's adapters."""
        sizes, image = self.sizes, self.sizes.image
        layers = sum(linear.entries for linear in sizes.linears)
        rank = self.config.lora.rank
        blocks = [shape for shape in sizes.tower.values() if len(shape) == 2]
        embedding = [shape for shape in sizes.tower.values() if len(shape) > 3]
        first = [linear for linear in sizes.linears if linear.layer == 0]
        return Matrices(
            patch_embedding=sum(prod(shape) for shape in embedding),
            tower=sum(prod(shape) for shape in blocks),
            projector=sum(prod(shape) for shape in sizes.projector.values() if len(shape) == 2),
            layers=layers,
            adapters=sum(rank * (linear.inputs + linear.outputs) for linear in sizes.adapted(self.targets)),
            head=sizes.vocabulary * sizes.width,
            tower_depth=sizes.tower_depth,
            tower_width=embedding[0][0] if embedding else 0,
            depth=sizes.depth,
            attention_width=next(linear.outputs for linear in first if linear.name == "q_proj"),
            patches=image.patches,
            tiles=image.tiles,
            image_tokens=image.tokens,
        )

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in a pass over the data."""
        return ceil(self.texts.rows["train"] / self.config.training.batch_size)

    @property
    def epochs(self) -> float:
        """Passes over the data, of which `max_steps` may cut the last one short."""
        training = self.config.training
        steps = training.epochs * self.steps_per_epoch
        return min(steps, training.max_steps or steps) / self.steps_per_epoch

    def memory(self, adapters: int, device_bytes: float) -> Memory:
        """Of one device of that size, on which `strategy: auto` depends."""
        resources = self.config.resources
        base = sum(self.sizes.frozen_bytes(self.config.base).values())
        too_large = resources.strategy == "auto" and base > device_bytes / 2
        return device_memory(
            self.config,
            self.sizes,
            self.texts,
            self.targets,
            adapters,
            with_tower=not self.reads_features,
            is_sharded=resources.workers > 1 and (resources.strategy == "fsdp" or resources.cpu_offload or too_large),
        )


@dataclass(frozen=True)
class Way:
    """One way to do the work."""

    adapters: int
    """That one device trains at once."""
    memory: Memory
    fits: bool
    device_hours: Range
    """Of all devices together; the least is with the pruning that is to be expected, the most without any."""
    cost_usd: Range


@dataclass(frozen=True)
class Estimate:
    """Both ways; `packed` is None where there is nothing to pack, or it cannot be."""

    device: Device
    alone: Way
    packed: Way | None
    texts: Texts

    @property
    def best(self) -> Way:
        """Packed where that is possible and fits, as a search does it by itself."""
        return self.packed if self.packed and self.packed.fits else self.alone


def read_work(config: TrainConfig) -> Work:
    """All that is known of a run without starting it.

    Raises ConfigError for a base or target layers that are not there, DataError for missing shards.
    """
    folder = base_folder(config.base.path)
    sizes = read_sizes(folder)
    texts = read_texts(config, folder, sizes.image.tokens)
    return Work(config, sizes, lora_targets(folder, config.lora), texts, config.data.feature_cache is not None)


def most_adapters(config: TrainConfig, largest_rank: int, device_bytes: float) -> int:
    """How many adapters of up to that rank one device trains at once; 0 where it cannot train even one.

    As `config` says, with the tower unless it names a feature cache. Raises what `read_work` raises.
    """
    lora = config.lora.model_copy(update={"rank": largest_rank})
    return _most(read_work(config.model_copy(update={"lora": lora})), device_bytes)


def estimate_run(config: TrainConfig, device: Device) -> Estimate:
    """Of one run on its workers, each with one such device."""
    work = read_work(config)
    return Estimate(device, _way(work, device, 1, [[(1, work.epochs)]], filling_s=0.0), None, work.texts)


def estimate_search(search: SearchConfig, largest: TrainConfig, device: Device, *, can_pack: bool) -> Estimate:
    """Of a search's trials; `largest`: the config of the one that needs most.

    Packed trials of a `pefomed` base read features that the tower makes once, which is counted.
    """
    work = read_work(largest)
    schedules = [[(search.trials, work.epochs)]]
    if search.scheduler == "asha":
        schedules.append(list(halving(search.trials, work.epochs, search.asha)))
    alone = _way(work, device, 1, schedules, filling_s=0.0)
    if not can_pack:
        return Estimate(device, alone, None, work.texts)
    filling_s = 0.0
    if not work.reads_features and family_of(base_folder(largest.base.path)).model_type == PEFOMED:
        flops = step_flops(work.matrices, 0, 0, 0, images=work.texts.distinct_images)["tower"]
        filling_s = flops / device.flops_per_s(largest.base.dtype)
        work = replace(work, reads_features=True)
    most = min(_most(work, device.memory_bytes), search.packed_at_once)
    return Estimate(device, alone, _way(work, device, max(most, 1), schedules, filling_s=filling_s), work.texts)


def halving(trials: int, epochs: float, asha: AshaConfig) -> Iterator[tuple[int, float]]:
    """(trials, epochs that each of them does) of each rung, where just the best 1 / reduction_factor go on
    (arXiv 1810.05934, section 3.1). An asynchronous search lets some more through."""
    done, rung = 0.0, float(asha.grace_period_epochs)
    while done < epochs:
        upto = min(rung, epochs)
        yield trials, upto - done
        done, rung = upto, rung * asha.reduction_factor
        trials = max(trials // asha.reduction_factor, 1)


def epoch_s(work: Work, device: Device, adapters: int) -> float:
    """Seconds that one device takes for an epoch of so many adapters at once, with its validation; at the end all
    workers are done."""
    training = work.config.training
    rows_per_pass = training.micro_batch_size * work.config.resources.workers
    passes = work.steps_per_epoch * training.batch_size // rows_per_pass
    return passes * pass_s(work, device, adapters) + validation_s(work, device, adapters)


def pass_s(work: Work, device: Device, adapters: int) -> float:
    """Seconds of one micro-batch of each adapter, forward and backward: what it computes, or what it takes to begin all
    the operations, if that is more. Adapters see the same images; where their features are not stored the tower
    runs once for all."""
    rows = work.config.training.micro_batch_size
    texts = work.texts
    flops = step_flops(work.matrices, rows, texts.padded(rows), texts.columns(rows), rows * texts.images_per_row)
    if work.config.training.gradient_checkpointing:
        again = {"layers": 3 / 2, "lora": 4 / 3, "attention": 4 / 3}
        flops = {part: amount * again.get(part, 1) for part, amount in flops.items()}
    tower = 0.0 if work.reads_features else flops["tower"]
    frozen = tower + adapters * sum(flops[part] for part in ("layers", "attention", "head"))
    trained = adapters * sum(flops[part] for part in TRAINED)
    computing = frozen / device.flops_per_s(work.config.base.dtype) + trained / device.flops_per_s("float32")
    operations = work.matrices.depth * OPERATIONS_PER_LAYER
    if not work.reads_features:
        operations += work.matrices.tower_depth * OPERATIONS_PER_TOWER_BLOCK
    return max(computing, operations * device.launch_us / 1e6)


def validation_s(work: Work, device: Device, adapters: int) -> float:
    """Seconds of one validation on one worker: prompts, answers token by token, and the loss."""
    validation, texts = work.config.validation, work.texts
    rows = ceil(min(validation.rows, texts.rows["validation"]) / work.config.resources.workers)
    together = max(validation.batch_size // adapters, 1)
    batches = ceil(rows / together)
    flops = step_flops(
        work.matrices, rows, texts.padded(together), texts.columns(together), rows * texts.images_per_row
    )
    # Forward only: half of a frozen product, a third of a trained one and of attention; for answers, and for the loss.
    forward = adapters * 2 * (flops["layers"] / 2 + flops["head"] / 2 + flops["attention"] / 3 + flops["lora"] / 3)
    tower = 0.0 if work.reads_features else 2 * flops["tower"]
    read_s = sum(work.sizes.frozen_bytes(work.config.base).values()) / (device.bandwidth_gb_s * 1e9)
    begin_s = work.matrices.depth * OPERATIONS_PER_LAYER / 3 * device.launch_us / 1e6
    return (forward + tower) / device.flops_per_s(work.config.base.dtype) + batches * validation.max_new_tokens * max(
        read_s, begin_s
    )


def _way(
    work: Work, device: Device, adapters: int, schedules: list[list[tuple[int, float]]], *, filling_s: float
) -> Way:
    """`schedules`: each is how many trials do how many epochs, rung by rung."""
    workers = work.config.resources.workers
    hours = [
        workers
        * (filling_s + sum(epochs * _cohorts_s(work, device, trials, adapters) for trials, epochs in rungs))
        / 3600
        for rungs in schedules
    ]
    least, most = min(hours), max(hours)
    memory = work.memory(adapters, device.memory_bytes)
    price = device.usd_per_hour
    return Way(adapters, memory, memory.total <= device.memory_bytes, (least, most), (least * price, most * price))


def _cohorts_s(work: Work, device: Device, trials: int, adapters: int) -> float:
    """Seconds of one epoch of all trials, so many at once, one such pack after the other."""
    packs, left = divmod(trials, adapters)
    return packs * epoch_s(work, device, adapters) + (epoch_s(work, device, left) if left else 0.0)


def _most(work: Work, device_bytes: float) -> int:
    fitting, too_many = 0, MOST_IN_A_PACK + 1
    while too_many - fitting > 1:
        tried = (fitting + too_many) // 2
        if work.memory(tried, device_bytes).total <= device_bytes:
            fitting = tried
        else:
            too_many = tried
    return fitting
