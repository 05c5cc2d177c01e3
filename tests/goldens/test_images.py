"""Images for the tower, as the published evaluation transform makes them: Pillow's bicubic, then CLIP's statistics.

Tolerance: 1 level of 255 (2 for one value in a million): torch's resize has weights of 15 bits, Pillow's of 22. A
picture of 16 bits is scaled by its largest value here; the published code clips every value above 255 to white.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pefomed_ray.rendering.images import ImageSpec, decode_pixels, image_pixels, normalise

SIXTEEN_BITS = "s_16bit_120x90.png"


@pytest.fixture(scope="module")
def arrays(parity_dir: Path) -> dict[str, np.ndarray]:
    with np.load(parity_dir / "preprocess" / "preprocess.npz") as found:
        return {name: found[name] for name in found.files}


def levels(normalised_CHW: Tensor, spec: ImageSpec) -> Tensor:
    """Back to the scale of 0 to 255."""
    mean_C11, std_C11 = (torch.tensor(values).view(3, 1, 1) for values in (spec.mean, spec.std))
    return (normalised_CHW.double() * std_C11 + mean_C11) * 255


def ours(parity_dir: Path, name: str, spec: ImageSpec) -> Tensor:
    data = (parity_dir / "preprocess" / "images" / name).read_bytes()
    return normalise(image_pixels(decode_pixels(data), spec)[None], spec)[0]


def test_pixels_decode_to_the_published_ones(parity_dir: Path, arrays: dict[str, np.ndarray]) -> None:
    decoded = {name.removeprefix("decoded_rgb/"): a for name, a in arrays.items() if name.startswith("decoded_rgb/")}
    compared = 0
    for name, expected in decoded.items():
        found = decode_pixels((parity_dir / "preprocess" / "images" / name).read_bytes())
        if name == SIXTEEN_BITS:
            assert (expected == 255).mean() > 0.5, "the published code saturates"
            assert (found == 255).mean() < 0.1
        elif expected.size:
            compared += 1
            assert np.array_equal(found, expected), name
    assert compared >= 8


def test_resized_and_normalised_as_published(parity_dir: Path, arrays: dict[str, np.ndarray]) -> None:
    values, off_by_two = 0, 0
    for key, expected in arrays.items():
        transform, _, name = key.partition("/")
        if not transform.startswith("eval") or name == SIXTEEN_BITS:
            continue
        spec = ImageSpec(int(transform.removeprefix("eval").removesuffix("_float16")))
        rounding = 0.25 if expected.dtype == np.float16 else 1e-3
        far = (levels(ours(parity_dir, name, spec), spec) - levels(torch.from_numpy(expected), spec)).abs()
        assert far.max() <= 2 + rounding, key
        values += far.numel()
        off_by_two += int((far > 1 + rounding).sum())
    assert values > 700_000
    assert off_by_two <= max(1, values // 1_000_000)


def test_another_filter_is_seen(parity_dir: Path, arrays: dict[str, np.ndarray]) -> None:
    """The control: bilinear is more than two levels away."""
    spec = ImageSpec(56)
    data = (parity_dir / "preprocess" / "images" / "s_rgb_300x200.png").read_bytes()
    pixels_1CHW = torch.from_numpy(decode_pixels(data)).permute(2, 0, 1)[None].float()
    bilinear = torch.nn.functional.interpolate(pixels_1CHW, (56, 56), mode="bilinear", antialias=True)[0]
    expected = levels(torch.from_numpy(arrays["eval56/s_rgb_300x200.png"]), spec)
    assert (bilinear - expected).abs().max() > 3
