"""Configs: every shipped file loads, mistakes are named with the nearest key, aliases land where they should."""

from pathlib import Path
from typing import Any

import pytest

from pefomed_ray.config import SearchConfig, TrainConfig, build_config, load_config, save_config
from pefomed_ray.config.load import ALIASES, read_yaml, set_key
from pefomed_ray.errors import ConfigError
from pefomed_ray.search.space import check_space, preset_values, trial_config

ROOT = Path(__file__).parents[3]
PRESETS = sorted((ROOT / "configs").rglob("*.yaml"))
SPACES = sorted((ROOT / "search_spaces").glob("*.yaml"))
MINIMAL = {"name": "a", "task": "vqa", "data": {"shards": "x"}}


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_every_preset_loads_and_survives_saving(path: Path, tmp_path: Path) -> None:
    config = load_config(TrainConfig, path)
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(TrainConfig, tmp_path / "saved.yaml") == config


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "paper").glob("*.yaml")), ids=lambda path: path.stem)
def test_paper_presets_hold_the_papers_values(path: Path) -> None:
    config = load_config(TrainConfig, path)
    assert (config.lora.rank, config.lora.alpha, config.lora.dropout) == (64, 16, 0.05)
    assert config.lora.target_modules == ("q_proj", "v_proj")
    assert config.optimizer.weight_decay == 0.05
    assert config.seed == 42
    assert config.optimizer.learning_rate == (3e-5 if "iu-xray" in path.stem else 1e-5)
    assert "448px" in config.base.path


@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.stem)
def test_every_search_space_validates_at_both_ends(path: Path) -> None:
    search = load_config(SearchConfig, path)
    check_space(search, preset_values(search, path))


def test_a_search_space_with_a_bad_path_or_end_is_refused() -> None:
    space = {"name": "s", "preset": "p", "space": {"lora.rnak": {"choice": [1]}}}
    with pytest.raises(ConfigError, match=r"lora\.rnak.*did you mean 'lora\.rank'"):
        check_space(build_config(SearchConfig, space, "s"), MINIMAL)
    space["space"] = {"lora.rank": {"choice": [8, 0]}}  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match=r"lora\.rank"):
        check_space(build_config(SearchConfig, space, "s"), MINIMAL)
    space["space"] = {"lora.rank": {"choice": [8, 16]}}  # type: ignore[dict-item]
    check_space(build_config(SearchConfig, space, "s"), MINIMAL)
    space["points"] = [{"lora.rank": 4}]  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="outside its range"):
        check_space(build_config(SearchConfig, space, "s"), MINIMAL)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({**MINIMAL, "lora": {"rnak": 3}}, "unknown key 'lora.rnak'; did you mean 'lora.rank'"),
        ({**MINIMAL, "optimiser": {}}, "did you mean 'optimizer'"),
        ({**MINIMAL, "task": "vq"}, "task: .*'vq'"),
        ({**MINIMAL, "optimizer": {"learning_rate": -1}}, "optimizer.learning_rate: .*greater than 0.*-1"),
        ({**MINIMAL, "optimizer": {"learning_rate": 1e-7}}, "min_learning_rate 1e-06 is above"),
        ({**MINIMAL, "training": {"batch_size": 9}}, "batch_size 9 is not a multiple"),
        ({"task": "vqa", "data": {"shards": "x"}}, "key 'name' is missing"),
        ({**MINIMAL, "name": "../up"}, "name: "),
    ],
)
def test_mistakes_are_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config(TrainConfig, values, "file.yaml")


def test_a_config_is_frozen() -> None:
    config = build_config(TrainConfig, MINIMAL, "file.yaml")
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 1  # type: ignore[misc]


def test_names_people_already_type_are_understood() -> None:
    typed = {
        "base_model": "dir",
        "lora_r": 8,
        "lora_alpha": 32,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 3,
        "num_train_epochs": 2,
    }
    config = build_config(TrainConfig, {**MINIMAL, **typed}, "file.yaml")
    assert config.base.path == "dir"
    assert (config.lora.rank, config.lora.alpha) == (8, 32)
    assert config.optimizer.learning_rate == 1e-3
    assert (config.training.micro_batch_size, config.training.batch_size, config.training.epochs) == (4, 12, 2)


def test_ways_to_adapt_and_to_quantise_as_others_spell_them() -> None:
    def config(**typed: Any) -> TrainConfig:
        return build_config(TrainConfig, {**MINIMAL, "resources": {"use_gpu": True}, **typed}, "file.yaml")

    lora = config(use_rslora=True, use_dora=True, loraplus_lr_ratio=16, lora_target="q_proj, v_proj").lora
    assert (lora.use_rslora, lora.use_dora, lora.loraplus_lr_ratio) == (True, True, 16.0)
    assert lora.target_modules == ("q_proj", "v_proj")
    for all_of_them in ("all", "all-linear", ["all-linear"]):
        assert config(lora_target=all_of_them).lora.target_modules == ("all-linear",)
    for typed, expected in (
        ({"quantization_bit": 4}, "nf4"),
        ({"quantization_bit": 8}, "int8"),
        ({"quantization_bit": None}, "none"),
        ({"load_in_4bit": True, "load_in_8bit": False}, "nf4"),
        ({"load_in_8bit": True, "load_in_4bit": False}, "int8"),
        ({"load_in_4bit": False}, "none"),
    ):
        assert config(**typed).base.quantization == expected
    assert config(torch_dtype="bfloat16").base.dtype == "bfloat16"
    for wrong in ({"quantization_bit": 3}, {"load_in_4bit": "yes"}, {"quantization_bit": [4]}):
        with pytest.raises(ConfigError, match=f"{next(iter(wrong))}: .* is not one of"):
            config(**wrong)


def test_a_quantised_base_is_refused_where_it_cannot_run() -> None:
    def config(quantization: str, **resources: Any) -> TrainConfig:
        values = {"base": {"quantization": quantization}, "resources": resources, "training": {"batch_size": 16}}
        return build_config(TrainConfig, MINIMAL | values, "file.yaml")

    assert config("int8", use_gpu=True).base.quantization == "int8"
    with pytest.raises(ConfigError, match=r"int8 needs resources\.use_gpu=true; on CPUs take nf4"):
        config("int8")
    for use_gpu in (False, True):
        assert config("nf4", use_gpu=use_gpu, workers=2).resources.workers == 2
    with pytest.raises(ConfigError, match="int8 runs on one worker, not 2: its weights cannot be sharded"):
        config("int8", use_gpu=True, workers=2)
    assert config("none").base.quantization == "none"


def test_offloading_is_refused_where_it_cannot_be() -> None:
    def config(quantization: str = "none", **resources: Any) -> TrainConfig:
        values = {"base": {"quantization": quantization}, "training": {"batch_size": 16}}
        offloaded = {"cpu_offload": True, "use_gpu": True, "workers": 2} | resources
        return build_config(TrainConfig, MINIMAL | values | {"resources": offloaded}, "file.yaml")

    for strategy in ("auto", "fsdp"):
        assert config(strategy=strategy).resources.cpu_offload
    for refused, reason in (
        ({"use_gpu": False}, "in the CPU's memory already"),
        ({"strategy": "ddp"}, "needs resources.strategy fsdp or auto"),
        ({"workers": 1}, "one alone does not shard"),
        ({"min_workers": 1}, "one alone does not shard"),
        ({"quantization": "nf4"}, "not for a base in nf4"),
    ):
        with pytest.raises(ConfigError, match=reason):
            config(**refused)  # type: ignore[arg-type]


def test_every_alias_names_a_real_key() -> None:
    for dotted in ALIASES.values():
        section, key = dotted.split(".")
        annotation = TrainConfig.model_fields[section].annotation
        assert annotation is not None
        assert key in annotation.model_fields


def test_shards_are_a_folder_or_a_mixture() -> None:
    def shards(value: Any) -> Any:
        return build_config(TrainConfig, {**MINIMAL, "data": {"shards": value}}, "f").data.shards

    assert [(part.shards, part.weight) for part in shards("a")] == [("a", 1.0)]
    mixture = shards([{"shards": "a", "weight": 0.7}, {"shards": "s3://b/c"}])
    assert [(part.shards, part.weight) for part in mixture] == [("a", 0.7), ("s3://b/c", 1.0)]
    for wrong, named in ((5, "give a folder"), ([], "give a folder"), ([{"shards": "a", "weight": 0}], "0.weight")):
        with pytest.raises(ConfigError, match=f"data.shards.*{named}"):
            shards(wrong)


def test_words_override_the_file(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("name: a\ntask: vqa\ndata: {shards: x}\n", encoding="utf-8")
    config = load_config(TrainConfig, path, ["lora.rank=8", "learning_rate=1e-4", "lora.target_modules=[k_proj]"])
    assert (config.lora.rank, config.optimizer.learning_rate) == (8, 1e-4)
    assert config.lora.target_modules == ("k_proj",)
    with pytest.raises(ConfigError, match="not of the form"):
        load_config(TrainConfig, path, ["lora.rank"])


def test_files_that_are_not_configs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        read_yaml(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="not a list"):
        read_yaml(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="not valid YAML"):
        read_yaml(tmp_path / "broken.yaml")


def test_set_key_refuses_to_go_below_a_value() -> None:
    with pytest.raises(ConfigError, match="'seed' is a value"):
        set_key({"seed": 1}, "seed.x", 2)


def test_a_trial_is_the_preset_with_its_parameters() -> None:
    config = trial_config(MINIMAL, {"lora.rank": 4, "optimizer.learning_rate": 1e-3}, name="t1")
    assert (config.name, config.lora.rank, config.optimizer.learning_rate) == ("t1", 4, 1e-3)
    assert "lora" not in MINIMAL


def test_a_number_of_workers_that_may_change_needs_a_batch_that_all_of_them_share_evenly() -> None:
    def config(**training: int) -> TrainConfig:
        return build_config(
            TrainConfig, MINIMAL | {"training": training, "resources": {"min_workers": 2, "workers": 4}}, "test"
        )

    assert config(batch_size=24, micro_batch_size=2).resources.lanes == 12
    with pytest.raises(ConfigError, match=r"batch_size 16 is not a multiple of 12 \(what all numbers .*= 24"):
        config(batch_size=16, micro_batch_size=2)
    with pytest.raises(ConfigError, match="min_workers 3 is above workers 2"):
        build_config(TrainConfig, MINIMAL | {"resources": {"min_workers": 3, "workers": 2}}, "test")
