"""What an operator applies is accepted by Ray's own schema, offline."""

import copy
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[3]


def validated(config: dict[str, Any]) -> dict[str, Any]:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared: dict[str, Any] = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


def load(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))
    return found


def test_ray_cluster_yaml_is_what_ray_up_accepts() -> None:
    config = load("ray_cluster.yaml")
    validated(config)
    config["available_node_types"]["gpu"]["max_worker"] = 1  # the control: a mistyped key is seen
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        validated(config)


def test_every_node_uses_imdsv2_and_the_dashboard_stays_on_loopback() -> None:
    config = load("ray_cluster.yaml")
    for node_type in config["available_node_types"].values():
        assert node_type["node_config"]["MetadataOptions"]["HttpTokens"] == "required"
    head = " ".join(config["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in head
    assert "RAY_AUTH_MODE=token" in head


def test_the_ray_version_is_the_pinned_one() -> None:
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert f"ray=={load('cluster/rayjob.yaml')['spec']['rayClusterSpec']['rayVersion']}\n" in pins
