"""Pixels are Pillow's, upright, of every kind of JPEG and PNG; what Pillow refuses is refused."""

import io
import random
import struct
import time
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image, ImageOps

from pefomed_ray.errors import DataError
from pefomed_ray.rendering.images import ImageSpec, decode_image, decode_pixels, image_pixels, normalise


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth shapes, noise and hard edges, in colour."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    waves = np.stack([np.sin(7 * x + 3 * y), np.cos(5 * y - x), np.sin(9 * x * y)], axis=-1)
    pixels = 128 + 90 * waves + generator.normal(0, 8, waves.shape)
    pixels[height // 4 : height // 3, width // 5 : width // 2] = 255
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(color_type: int, depth: int, rows: list[bytes], width: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG written by hand (W3C PNG 3rd edition), without filters, for kinds that Pillow does not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, len(rows), depth, color_type, 0, 0, 0)
    body = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(name, data) for name, data in body)


def png16(values_HWC: np.ndarray) -> bytes:
    """16 bits, grey, grey and alpha, RGB or RGBA by the number of channels."""
    color_type = {1: 0, 2: 4, 3: 2, 4: 6}[values_HWC.shape[2]]
    return png(color_type, 16, [row.astype(">u2").tobytes() for row in values_HWC], values_HWC.shape[1])


def as_pillow(data: bytes) -> np.ndarray:
    """What everybody does: Pillow, and no more."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


JPEGS: dict[str, Callable[[], bytes]] = {
    "colour 4:2:0": lambda: encoded(picture(301, 200), "JPEG", quality=90),
    "colour 4:2:2": lambda: encoded(picture(301, 200), "JPEG", subsampling=1),
    "colour 4:4:4": lambda: encoded(picture(301, 200), "JPEG", subsampling=0),
    "stored as RGB": lambda: encoded(picture(301, 200), "JPEG", keep_rgb=True),
    "progressive": lambda: encoded(picture(301, 200), "JPEG", progressive=True),
    "restart markers": lambda: encoded(picture(301, 200), "JPEG", restart_marker_blocks=4),
    "grey": lambda: encoded(picture(301, 200).convert("L"), "JPEG"),
    "grey progressive": lambda: encoded(picture(301, 200).convert("L"), "JPEG", progressive=True),
    "CMYK": lambda: encoded(picture(301, 200).convert("CMYK"), "JPEG"),
    "one pixel": lambda: encoded(picture(1, 1), "JPEG"),
}


@pytest.mark.parametrize("kind", sorted(JPEGS))
def test_jpegs_decode_to_pillows_pixels(kind: str) -> None:
    data = JPEGS[kind]()
    assert np.array_equal(decode_pixels(data), as_pillow(data))
    assert np.array_equal(np.asarray(decode_image(data)), as_pillow(data))


def test_a_plain_jpeg_does_not_go_through_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, cmyk = JPEGS["grey"](), JPEGS["CMYK"]()
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("Pillow decodes"))
    decode_pixels(plain)
    with pytest.raises(pytest.fail.Exception):
        decode_pixels(cmyk)


def test_damaged_jpegs_are_taken_and_refused_as_pillow_takes_and_refuses_them() -> None:
    chance = random.Random(5)
    sound = [make() for kind, make in sorted(JPEGS.items()) if kind != "one pixel"]
    seen = {"same pixels": 0, "refused": 0, "taken though damaged": 0}
    for round_number in range(300):
        data = bytearray(chance.choice(sound))
        at = chance.randrange(20, len(data))
        if round_number % 3 == 0:
            del data[at:]
        elif round_number % 3 == 1:
            data[at] ^= 1 << chance.randrange(8)
        else:
            data[at:at] = chance.randbytes(9)
        try:
            expected = as_pillow(bytes(data))
        except Exception:
            with pytest.raises(DataError, match=r"does not decode|is not one of"):
                decode_pixels(bytes(data))
            seen["refused"] += 1
            continue
        assert np.array_equal(decode_pixels(bytes(data)), expected)
        seen["same pixels"] += 1
        try:
            simplejpeg.decode_jpeg(bytes(data), "RGB")
        except ValueError:
            seen["taken though damaged"] += 1  # the control: without Pillow behind it the decoder would refuse these
    assert min(seen.values()) > 30, seen


@pytest.mark.parametrize("cut", [1, 2, 50, 5000])
@pytest.mark.parametrize("kind", ["colour 4:2:0", "progressive", "grey", "CMYK"])
def test_a_jpeg_that_is_cut_short_is_refused(kind: str, cut: int) -> None:
    data = JPEGS[kind]()
    with pytest.raises(DataError, match="does not decode: it is cut short or damaged"):
        decode_pixels(data[: -min(cut, len(data) // 2)])


def test_a_jpeg_whose_data_claims_a_larger_size_takes_no_more_memory_than_its_header_was_checked_for() -> None:
    small, large = encoded(picture(64, 64), "JPEG"), encoded(Image.new("RGB", (4000, 4000)), "JPEG")
    with pytest.raises(DataError):
        decode_pixels(small[:-2] + large[2:-2])  # two pictures' segments in one
    tracemalloc.start()
    try:
        decode_pixels(small + large)  # Pillow takes the first and leaves the rest: so do we
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


ORIENTED = {
    1: lambda image: image,
    2: ImageOps.mirror,
    3: lambda image: image.rotate(180),
    4: ImageOps.flip,
    5: lambda image: image.transpose(Image.Transpose.TRANSPOSE),
    6: lambda image: image.transpose(Image.Transpose.ROTATE_90),
    7: lambda image: image.transpose(Image.Transpose.TRANSVERSE),
    8: lambda image: image.transpose(Image.Transpose.ROTATE_270),
}
"""How a camera stores an upright scene under each EXIF orientation."""


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", sorted(ORIENTED))
def test_exif_orientation_is_turned_upright(kind: str, orientation: int) -> None:
    scene = picture(48, 32)
    exif = Image.Exif()
    exif[274] = orientation
    stored = ORIENTED[orientation](scene)
    data = encoded(stored, kind, exif=exif, **({"quality": 100, "subsampling": 0} if kind == "JPEG" else {}))
    decoded = decode_pixels(data)
    assert decoded.shape == (32, 48, 3)
    assert np.abs(decoded.astype(int) - np.asarray(scene).astype(int)).max() <= (6 if kind == "JPEG" else 0)
    assert np.array_equal(decoded, np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")))
    image_pixels(decoded, ImageSpec(8))  # torch takes no array with negative strides
    if orientation != 1:  # the control: as stored, it is another picture
        assert not np.array_equal(as_pillow(data), decoded)


def test_exif_that_cannot_be_read_leaves_the_picture_as_stored() -> None:
    for exif in (b"Exif\0\0" + b"\xff" * 40, b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\xff\0\0\0"):
        data = encoded(picture(40, 30), "JPEG", exif=exif)
        assert np.array_equal(decode_pixels(data), as_pillow(data))


def test_sixteen_bit_grey_is_scaled_not_saturated() -> None:
    ramp = np.linspace(0, 4095, 64 * 64).astype(np.uint16).reshape(64, 64, 1)  # a detector's twelve bits
    decoded = decode_pixels(png16(ramp))
    assert (decoded == decoded[..., :1]).all()
    levels = decoded[..., 0].ravel().astype(int)
    assert (np.diff(levels) >= 0).all()
    assert set(levels) == set(range(256))
    assert np.abs(levels - ramp.ravel() * (255 / 4095)).max() <= 0.5
    assert (levels == 255).mean() < 0.01
    # The controls: what Pillow makes of it is white, and a plain shift by eight bits is black.
    assert (as_pillow(png16(ramp)) == 255).mean() > 0.9
    assert (ramp >> 8).max() == 15


def test_sixteen_bits_use_all_levels_whatever_the_largest_value() -> None:
    for largest in (1, 2, 255, 4000, 32767, 65535):
        decoded = decode_pixels(png16(np.array([[[0], [largest // 2], [largest]]], dtype=np.uint16)))[0, :, 0]
        assert decoded.tolist() == [0, int(np.rint(255 * (largest // 2) / largest)), 255]
    assert decode_pixels(png16(np.zeros((2, 2, 1), dtype=np.uint16))).max() == 0


@pytest.mark.parametrize("channels", [2, 3, 4])
@pytest.mark.parametrize("largest", [4095, 65535])
def test_sixteen_bit_colour_and_alpha_keep_all_their_bits(channels: int, largest: int) -> None:
    values = np.random.default_rng(1).integers(0, largest + 1, (30, 50, channels)).astype(np.uint16)
    colours = values[..., :1].repeat(3, axis=2) if channels == 2 else values[..., :3]
    decoded = decode_pixels(png16(values))
    assert np.abs(decoded - colours * (255 / colours.max())).max() <= 0.5
    if largest == 4095:  # the control: Pillow keeps the high byte, and the picture is black
        assert as_pillow(png16(values)).max() <= 15


def test_every_other_kind_of_png_gives_the_right_colours() -> None:
    palette = (b"PLTE", bytes([255, 0, 0, 0, 255, 0, 0, 0, 255]))
    red_green_blue = [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
    assert decode_pixels(png(3, 8, [b"\0\1\2"], 3, palette))[0].tolist() == red_green_blue
    assert decode_pixels(png(3, 8, [b"\0\1\2"], 3, palette, (b"tRNS", b"\0\x80")))[0].tolist() == red_green_blue
    assert decode_pixels(png(3, 2, [b"\x18"], 3, palette))[0].tolist() == red_green_blue
    assert decode_pixels(png(0, 1, [b"\xa0"], 4))[0, :, 0].tolist() == [255, 0, 255, 0]
    assert decode_pixels(png(0, 2, [b"\x1b"], 4))[0, :, 0].tolist() == [0, 85, 170, 255]
    assert decode_pixels(png(0, 4, [b"\x0f"], 2))[0, :, 0].tolist() == [0, 255]
    assert decode_pixels(png(0, 8, [b"\0\x80"], 2, (b"tRNS", b"\0\x80")))[0, :, 0].tolist() == [0, 128]
    assert decode_pixels(png(4, 8, [b"\x40\0\x80\xff"], 2))[0, :, 0].tolist() == [64, 128]
    assert decode_pixels(png(6, 8, [b"\1\2\3\0"], 1))[0, 0].tolist() == [1, 2, 3]
    assert decode_pixels(png(0, 16, [b"\0\0\x80\0\xff\xff"], 3, (b"tRNS", b"\0\0")))[0, :, 0].tolist() == [0, 128, 255]


def test_images_that_are_none_are_refused_without_decoding() -> None:
    for data in (b"", b"<html>", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", encoded(picture(9, 9), "GIF")):
        with pytest.raises(DataError, match="not one of JPEG, PNG"):
            decode_pixels(data)
    with pytest.raises(DataError, match="does not decode"):
        decode_pixels(encoded(picture(64, 64), "PNG")[:-2000])
    frames = [picture(9, 9, seed) for seed in (1, 2)]
    with pytest.raises(DataError, match="more than one frame"):
        decode_pixels(encoded(frames[0], "PNG", save_all=True, append_images=frames[1:]))
    bomb = encoded(Image.new("1", (9000, 9000)), "PNG")
    assert len(bomb) < 20_000
    started = time.perf_counter()
    with pytest.raises(DataError, match="9000x9000"):
        decode_pixels(bomb)
    assert time.perf_counter() - started < 0.5  # decoding it takes longer


SHAPES = [(300, 200), (200, 300), (9, 7), (400, 30), (30, 400), (96, 96), (96, 200), (200, 96), (150, 205), (150, 203)]


@pytest.mark.parametrize(("width", "height"), SHAPES)
def test_resized_pixels_are_pillows(width: int, height: int) -> None:
    noise = np.random.default_rng(3).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    ours = image_pixels(noise, ImageSpec(96)).permute(1, 2, 0).numpy().astype(int)
    difference = np.abs(ours - np.asarray(image.resize((96, 96), Image.Resampling.BICUBIC)).astype(int))
    assert difference.max() <= 2
    assert (difference == 2).sum() <= 3  # of 27,648
    assert torch.equal(image_pixels(image, ImageSpec(96)), image_pixels(noise, ImageSpec(96)))
    if (width, height) != (96, 96):  # the control: another filter is told apart
        nearest = np.asarray(image.resize((96, 96), Image.Resampling.NEAREST)).astype(int)
        assert np.abs(ours - nearest).max() > 10


def test_the_passes_come_in_pillows_order() -> None:
    tall = np.random.default_rng(3).integers(0, 2, (400, 150, 3), dtype=np.uint8) * 255
    image = Image.fromarray(tall)
    ours = image_pixels(tall, ImageSpec(96)).permute(1, 2, 0).numpy().astype(int)
    width_first = image.resize((96, 400), Image.Resampling.BICUBIC).resize((96, 96), Image.Resampling.BICUBIC)
    assert np.abs(ours - np.asarray(width_first).astype(int)).max() > 10  # the control: the order can be seen


def test_real_images_are_pillows(data_dir: Path) -> None:
    """All pixels before resizing; after it all but a few in a million within 1 level, and those within 2."""
    slake = sorted(data_dir.glob("slake/imgs/*/source.jpg"))[::16]
    files = slake + sorted(data_dir.glob("rocov2/*/*.jpg"))[::13]
    assert len(files) >= 80
    values = off_by_two = 0
    for path in files:
        data = path.read_bytes()
        pixels = decode_pixels(data)
        assert np.array_equal(pixels, as_pillow(data)), path.name
        for size_px in (96, 224, 448):
            ours = image_pixels(pixels, ImageSpec(size_px)).permute(1, 2, 0).numpy().astype(int)
            pillows = np.asarray(Image.fromarray(pixels).resize((size_px, size_px), Image.Resampling.BICUBIC))
            difference = np.abs(ours - pillows)
            assert difference.max() <= 2, (path.name, size_px)
            values += difference.size
            off_by_two += int((difference == 2).sum())
    assert off_by_two / values < 5e-6


def test_normalise_is_mean_and_deviation() -> None:
    spec = ImageSpec(2, mean=(0.5, 0.5, 0.5), std=(0.25, 0.5, 1.0))
    pixels = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2).expand(1, 3, 1, 2)
    assert normalise(pixels, spec)[0, :, 0].tolist() == [[-2.0, 2.0], [-1.0, 1.0], [-0.5, 0.5]]
    assert pixels[0, 0, 0].tolist() == [0, 255]
