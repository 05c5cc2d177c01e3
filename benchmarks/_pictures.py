"""Pictures that cost what radiographs cost: soft shapes, sensor noise and a burned-in marker, drawn from a seed.

No real picture is ever used.
"""

import io
import json
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

JPEG_QUALITY = 90
NOISE_LEVELS = 3.0
"""Standard deviation: gives about 0.15 bytes a pixel at this quality, as published radiographs have."""
COARSE_PX = 128
"""Soft shapes are drawn this small and enlarged: thousands of pictures are wanted."""


def radiograph(seed: int, side_px: int) -> bytes:
    """A square JPEG; every other one is stored in colour, as most published corpora store grey pictures."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[0:COARSE_PX, 0:COARSE_PX] / COARSE_PX
    shapes = 30 + 60 * np.exp(-((x - 0.5) ** 2 + (y - 0.5) ** 2) / 0.12)
    for _ in range(6):
        (at_x, at_y), (wide, tall) = generator.uniform(0.2, 0.8, 2), generator.uniform(0.03, 0.2, 2)
        shapes += generator.uniform(-40, 60) * np.exp(-(((x - at_x) / wide) ** 2) - ((y - at_y) / tall) ** 2)
    shapes += 12 * np.sin(2 * np.pi * (9 * y + 0.6 * np.cos(3 * x)))  # ribs
    enlarged = Image.fromarray(shapes.astype(np.float32)).resize((side_px, side_px), Image.Resampling.BICUBIC)
    shift = generator.integers(0, side_px, 2)
    pixels = np.asarray(enlarged) + np.roll(_noise(side_px), shift, axis=(0, 1))
    marker = max(side_px // 32, 1)
    pixels[marker : 2 * marker, marker : 3 * marker] = 255
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    buffer = io.BytesIO()
    (image.convert("RGB") if seed % 2 else image).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


@lru_cache(maxsize=1)
def _noise(side_px: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((side_px, side_px), dtype=np.float32) * NOISE_LEVELS


def write_corpus(folder: Path, rows: int, side_px: int, distinct: int | None = None) -> list[tuple[str, str, str]]:
    """A folder of our JSONL layout, one question a picture: its (picture, question, answer)s.

    `distinct` pictures are drawn, the other files are hard links to them: each row still names a file of its own.
    """
    folder.mkdir(parents=True)
    distinct = distinct or rows
    examples = [(f"{number:06}.jpg", f"Is finding {number} present?", "No") for number in range(rows)]
    with open(folder / "train.jsonl", "w", encoding="utf-8") as lines:
        for number, (name, question, answer) in enumerate(examples):
            if number < distinct:
                (folder / name).write_bytes(radiograph(number, side_px))
            else:
                (folder / name).hardlink_to(folder / examples[number % distinct][0])
            lines.write(json.dumps({"query": question, "response": answer, "image": name}) + "\n")
    return examples
