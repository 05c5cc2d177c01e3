"""Encoded picture to normalised tensor: ours beside Pillow with numpy, and beside transformers' own processor.

All arms start from the same JPEG bytes (1024 px) and end with the same float32 [3, 448, 448]. CPU time counts: the
work runs in data workers, several at once.
"""

import io
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import typer
from PIL import Image
from transformers import CLIPImageProcessorPil

from benchmarks._measure import JsonOption, QuickOption, Sample, a_a, finish, per_arm, ratio, run_rounds, timed
from benchmarks._pictures import radiograph
from pefomed_ray.rendering.images import ImageSpec, decode_pixels, image_pixels, normalise

SOURCE_PX = 1024
SPEC = ImageSpec(448)
MEAN = np.array(SPEC.mean, dtype=np.float32)
STD = np.array(SPEC.std, dtype=np.float32)
TOLERANCE = 1.001
"""Levels of 255."""


def ours(data: bytes) -> np.ndarray:
    """float32 [3, H, W]."""
    return normalise(image_pixels(decode_pixels(data), SPEC)[None], SPEC)[0].numpy()


def pillow(data: bytes) -> np.ndarray:
    """What most training scripts do, with the conversion to float32 already in its cheap place."""
    size = (SPEC.size_px, SPEC.size_px)
    image = Image.open(io.BytesIO(data)).convert("RGB").resize(size, Image.Resampling.BICUBIC)
    pixels_HWC = (np.asarray(image, dtype=np.float32) / 255 - MEAN) / STD
    return np.ascontiguousarray(pixels_HWC.transpose(2, 0, 1))


def main(json_: JsonOption = False, quick: QuickOption = False) -> None:
    """Measure and report."""
    torch.set_num_threads(1)
    pictures = [radiograph(seed, SOURCE_PX) for seed in range(2 if quick else 12)]
    expected = [pillow(data) for data in pictures]
    square = {"height": SPEC.size_px, "width": SPEC.size_px}
    processor = CLIPImageProcessorPil(
        size=square, do_center_crop=False, image_mean=list(SPEC.mean), image_std=list(SPEC.std)
    )

    def transformers_slow(data: bytes) -> np.ndarray:
        return np.asarray(processor(Image.open(io.BytesIO(data)), return_tensors="np")["pixel_values"][0])

    def all_pictures(one: Callable[[bytes], np.ndarray]) -> tuple[list[np.ndarray], Sample]:
        return timed(lambda: [one(data) for data in pictures])

    def check(arm: str, results: list[np.ndarray]) -> None:
        for result, wanted in zip(results, expected, strict=True):
            levels = float((np.abs(result - wanted).max(axis=(1, 2)) * STD * 255).max())
            if result.dtype != np.float32 or levels > TOLERANCE:
                raise AssertionError(f"{arm}: {levels:.2f} levels from Pillow, {result.dtype}")

    arms = {"ours": ours, "pil": pillow, "hf_slow": transformers_slow}
    rounds = run_rounds(
        {name: partial(all_pictures, one) for name, one in arms.items()}, check, rounds=3 if quick else 25
    )
    finish(
        "preprocess",
        {"vs_pil": ratio(rounds, "pil", "cpu_s"), "vs_hf_slow": ratio(rounds, "hf_slow", "cpu_s")},
        {"cpu": a_a(rounds, "cpu_s"), "wall": a_a(rounds, "wall_s")},
        {
            "pictures": len(pictures),
            "picture_bytes": sum(map(len, pictures)) // len(pictures),
            "seconds_a_round": per_arm(rounds),
        },
        as_json=json_,
        quick=quick,
    )


if __name__ == "__main__":
    typer.run(main)
