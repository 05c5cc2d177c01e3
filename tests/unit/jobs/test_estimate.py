"""Estimates at the paper's size: what fits, how hours and cost follow from what is asked for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from pefomed_ray.artifacts.base import EMBEDDED_FOLDER
from pefomed_ray.artifacts.family import FAMILIES, PEFOMED
from pefomed_ray.config import SearchConfig, TrainConfig, build_config
from pefomed_ray.config.schema import AshaConfig
from pefomed_ray.data.plan import open_index, read_rows
from pefomed_ray.errors import ConfigError
from pefomed_ray.jobs.estimate import estimate_run, estimate_search, halving, most_adapters, read_work
from pefomed_ray.jobs.prices import Device, device_named, read_prices
from pefomed_ray.jobs.texts import expected_largest
from pefomed_ray.rendering.opening import open_renderer

GIB = 2**30
Values = Callable[..., dict[str, Any]]


def config_of(values: dict[str, Any]) -> TrainConfig:
    return build_config(TrainConfig, values, "test")


def search_of(**fields: Any) -> SearchConfig:
    values = {"name": "s", "preset": "p", "space": {"lora.rank": {"choice": [8, 64]}}, "trials": 16, **fields}
    return build_config(SearchConfig, values, "test")


@pytest.fixture
def h100() -> Device:
    return device_named(read_prices(None), "h100")


def test_rows_are_as_long_as_the_renderer_makes_them(shards: Path) -> None:
    values = {"name": "r", "task": "vqa", "template": "short", "data": {"shards": str(shards)}}
    work = read_work(config_of(values))
    renderer: Any = open_renderer(EMBEDDED_FOLDER, FAMILIES[PEFOMED], "short")
    records = read_rows(open_index(shards, "train"), np.arange(27))
    prompts = [len(renderer.prompt_ids(r["task"], r["question"], len(r["images"]))) for r in records]
    assert np.abs(work.texts.prompts - prompts).max() <= 2  # pieces around an image are encoded apart
    assert work.texts.answers.tolist() == [len(renderer.answer_ids(r["answer"], 256)) for r in records]
    assert work.texts.rows == {"train": 27, "validation": 6}
    assert len(work.texts.prompts) == 27
    assert work.texts.images_per_row == 1
    assert work.texts.distinct_images == pytest.approx((27 + 6) / 3)


def test_the_expected_largest_is_that_of_many_draws() -> None:
    values = np.array([1, 2, 5, 9])
    drawn = np.random.default_rng(0).choice(values, size=(20000, 3)).max(axis=1).mean()
    assert expected_largest(values, 3) == pytest.approx(drawn, rel=0.01)
    assert expected_largest(values, 1) == pytest.approx(values.mean())


def test_more_memory_holds_more_adapters(paper_values: Values) -> None:
    config = config_of(paper_values())
    most = {gib: most_adapters(config, 64, gib * GIB) for gib in (12, 24, 80, 141)}
    assert most[12] == 0  # the base alone is 14.5 GiB
    assert 1 <= most[24] < most[80] < most[141]
    assert most_adapters(config, 8, 80 * GIB) > most[80]


@pytest.mark.parametrize("gib", [24, 80])
def test_the_most_adapters_fit_and_one_more_does_not(gib: int, paper_values: Values) -> None:
    config = config_of(paper_values())
    most, work = most_adapters(config, 64, gib * GIB), read_work(config)
    assert work.memory(most, gib * GIB).total <= gib * GIB < work.memory(most + 1, gib * GIB).total


def test_memory_counts_what_a_device_holds(paper_values: Values) -> None:
    work = read_work(config_of(paper_values()))
    memory = work.memory(4, 80 * GIB)
    assert memory.learning == 4 * 16 * 56_627_200
    assert sum(memory.base.values()) == pytest.approx(2 * 7.75e9, rel=0.02)
    cached = read_work(
        config_of(paper_values(data={"shards": work.config.data.shards[0].shards, "feature_cache": "x"}))
    )
    assert cached.memory(4, 80 * GIB).base["tower"] == 0
    assert memory.base["tower"] == pytest.approx(2 * 0.987e9, rel=0.01)


def test_a_sharded_device_holds_its_part(paper_values: Values) -> None:
    whole = read_work(config_of(paper_values(resources={"use_gpu": True, "workers": 2, "strategy": "ddp"})))
    parts = read_work(config_of(paper_values(resources={"use_gpu": True, "workers": 2})))
    on_80, on_24 = parts.memory(1, 80 * GIB), parts.memory(1, 24 * GIB)
    assert on_80 == whole.memory(1, 24 * GIB)  # auto: it takes less than half
    assert sum(on_24.base.values()) < 0.6 * sum(on_80.base.values())
    assert on_24.learning == on_80.learning / 2


def test_steps_decide_the_hours(paper_values: Values, h100: Device) -> None:
    def hours(**training: Any) -> float:
        section = {"epochs": 9, "batch_size": 2, "micro_batch_size": 1, **training}
        return estimate_run(config_of(paper_values(training=section)), h100).alone.device_hours[1]

    assert hours(epochs=18) == pytest.approx(2 * hours())
    assert hours(max_steps=63) == pytest.approx(hours() / 2)  # of 14 steps an epoch
    assert hours(gradient_checkpointing=True) >= hours()


def test_packing_is_cheaper_and_pruning_cheaper_still(paper_values: Values, h100: Device) -> None:
    config = config_of(paper_values())
    found = estimate_search(search_of(), config, h100, can_pack=True)
    assert found.packed is not None
    assert found.packed.adapters == 10  # as many at a time as are drawn at random, as a search does
    for least_alone, least_packed in zip(found.alone.cost_usd, found.packed.cost_usd, strict=True):
        assert least_packed < least_alone
    assert found.alone.device_hours[0] < found.alone.device_hours[1]
    assert found.alone.cost_usd[1] == pytest.approx(h100.usd_per_hour * found.alone.device_hours[1])
    unpruned = estimate_search(search_of(scheduler="none"), config, h100, can_pack=False)
    assert unpruned.packed is None
    assert unpruned.alone.device_hours == (found.alone.device_hours[1],) * 2


def test_halving_lets_a_third_go_on() -> None:
    assert list(halving(27, 9, AshaConfig())) == [(27, 1), (9, 2), (3, 6)]
    assert list(halving(2, 4.5, AshaConfig(reduction_factor=2))) == [(2, 1), (1, 1), (1, 2), (1, 0.5)]


def test_own_prices_are_laid_over_the_table(tmp_path: Path, h100: Device) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(yaml.safe_dump({"devices": {"h100": h100.model_dump() | {"usd_per_hour": 1.5}}}))
    devices = read_prices(own)
    assert devices["h100"].usd_per_hour == 1.5
    assert devices["l4"] == read_prices(None)["l4"]
    with pytest.raises(ConfigError, match=r"'h300' is not in the table of prices; it has .*h100"):
        device_named(devices, "h300")
    own.write_text("devices: {h100: {name: x}}")
    with pytest.raises(ConfigError, match=r"own\.yaml"):
        read_prices(own)
