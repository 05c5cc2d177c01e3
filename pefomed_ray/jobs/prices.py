"""Devices and what an hour of one costs: a table in the package, over which a person lays their own."""

from pathlib import Path

from pefomed_ray.config import build_config
from pefomed_ray.config.load import read_yaml
from pefomed_ray.config.schema import Fraction, PositiveFloat, Section
from pefomed_ray.errors import ConfigError

EXAMPLES = Path(__file__).parent / "prices.yaml"
CPU = "cpu"
"""The device that stands for one core."""
DEFAULT_GPU = "h100"


class Device(Section):
    """One device; prices.yaml says what each figure means."""

    name: str
    memory_gib: PositiveFloat
    bf16_tflops: PositiveFloat
    fp32_tflops: PositiveFloat
    bandwidth_gb_s: PositiveFloat
    utilisation: Fraction
    launch_us: PositiveFloat
    usd_per_hour: float
    rates_from: str
    price_from: str

    @property
    def memory_bytes(self) -> float:
        """That programs can have."""
        return self.memory_gib * 2**30

    def flops_per_s(self, dtype: str) -> float:
        """Reached in a step, of products in float32 or bfloat16."""
        tflops = self.bf16_tflops if dtype == "bfloat16" else self.fp32_tflops
        return tflops * 1e12 * self.utilisation

    def times(self, cores: int) -> "Device":
        """So many cores as one device; how fast operations are begun stays."""
        scaled = ("memory_gib", "bf16_tflops", "fp32_tflops", "bandwidth_gb_s", "usd_per_hour")
        name = self.name if cores == 1 else f"{cores} times {self.name}"
        return self.model_copy(update={"name": name} | {key: cores * getattr(self, key) for key in scaled})


class PriceTable(Section):
    """What prices.yaml holds."""

    devices: dict[str, Device]


def read_prices(own: Path | None) -> dict[str, Device]:
    """The devices of the package, those of a person's own file over them. Raises ConfigError as any config does."""
    files = [EXAMPLES] if own is None else [EXAMPLES, own]
    devices: dict[str, Device] = {}
    for path in files:
        devices |= build_config(PriceTable, read_yaml(path), str(path)).devices
    return devices


def device_named(devices: dict[str, Device], name: str) -> Device:
    """The device. Raises ConfigError, naming those there are."""
    if name not in devices:
        raise ConfigError(f"device {name!r} is not in the table of prices; it has {', '.join(sorted(devices))}")
    return devices[name]
