"""Down-sizing: what stays, what changes, and that nothing but pixels is carried over."""

import struct
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from pefomed_ray.data.images import check_image
from pefomed_ray.data.reasons import RowError
from pefomed_ray.data.resize import limit_side

CANARY = "Canary-Jane-Doe"
ORIENTATION = 0x0112


def encoded(image: Image.Image, container: str, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, container, **options)
    return buffer.getvalue()


def opened(data: bytes) -> Image.Image:
    image = Image.open(BytesIO(data))
    image.load()
    return image


def gradient(width: int, height: int, mode: str = "L") -> Image.Image:
    """Brighter from left to right."""
    row = np.linspace(20, 230, width).round().astype(np.uint8)
    return Image.fromarray(np.tile(row, (height, 1))).convert(mode)


@pytest.mark.parametrize("container", ["JPEG", "PNG"])
@pytest.mark.parametrize("side", [100, 101, 5000])
def test_an_image_that_fits_keeps_its_bytes(container: str, side: int) -> None:
    data = encoded(gradient(100, 60), container)
    assert limit_side(data, side) is data


@pytest.mark.parametrize(
    ("size", "side", "expected"),
    [
        ((100, 60), 50, (50, 30)),
        ((60, 100), 50, (30, 50)),
        ((100, 60), 99, (99, 59)),
        ((300, 1), 10, (10, 1)),
        ((77, 77), 1, (1, 1)),
    ],
)
@pytest.mark.parametrize("container", ["JPEG", "PNG"])
def test_the_longest_side_is_met_and_the_aspect_kept(
    container: str, size: tuple[int, int], side: int, expected: tuple[int, int]
) -> None:
    data = limit_side(encoded(gradient(*size), container), side)
    assert (opened(data).size, opened(data).format) == (expected, container)
    check_image(data)


@pytest.mark.parametrize(
    ("container", "mode", "expected"),
    [
        ("JPEG", "L", "L"),
        ("JPEG", "RGB", "RGB"),
        ("JPEG", "CMYK", "RGB"),
        ("PNG", "1", "L"),
        ("PNG", "L", "L"),
        ("PNG", "LA", "LA"),
        ("PNG", "P", "RGB"),
        ("PNG", "RGB", "RGB"),
        ("PNG", "RGBA", "RGBA"),
        ("PNG", "I;16", "I;16"),
    ],
)
def test_modes(container: str, mode: str, expected: str) -> None:
    if mode == "I;16":
        image = Image.fromarray(np.asarray(gradient(80, 40)).astype(np.uint16) * 257)
    else:
        image = gradient(80, 40, mode)
    data = encoded(image, container)
    assert opened(data).mode == mode
    assert opened(limit_side(data, 20)).mode == expected


def test_sixteen_bits_of_grey_stay_sixteen_bits() -> None:
    """Levels 4 of 65,536 apart, as in a CT stored unscaled: in 8 bits they would be one."""
    stored = np.tile(np.arange(1000, 1400, 4, dtype=np.uint16), (50, 1))
    small = np.asarray(opened(limit_side(encoded(Image.fromarray(stored), "PNG"), 50)))
    assert small.dtype == np.uint16
    assert len(np.unique(small)) == 50
    inner = slice(2, -2)  # at the border the filter has fewer pixels to go by
    assert np.abs(small[0, inner].astype(int) - stored[0].reshape(50, 2).mean(axis=1)[inner]).max() <= 1


def test_a_checkerboard_becomes_grey_not_a_pattern() -> None:
    """Without antialiasing the small image would be black, white or moiré."""
    board = np.indices((120, 120)).sum(axis=0) % 2 * np.uint8(255)
    image = Image.fromarray(board.astype(np.uint8))
    small = np.asarray(opened(limit_side(encoded(image, "PNG"), 40))).astype(int)
    assert np.abs(small[3:-3, 3:-3] - 127.5).max() < 20
    control = np.asarray(image.resize((40, 40), Image.Resampling.NEAREST)).astype(int)
    assert np.abs(control - 127.5).max() > 100


def test_colours_survive_cmyk() -> None:
    red = limit_side(encoded(Image.new("RGB", (64, 64), (200, 30, 40)).convert("CMYK"), "JPEG"), 16)
    assert np.abs(np.asarray(opened(red)).astype(int) - (200, 30, 40)).max() <= 6


def test_jpeg_colour_is_not_subsampled() -> None:
    data = limit_side(encoded(gradient(64, 64, "RGB"), "JPEG"), 32)
    assert {layer[1:3] for layer in opened(data).layer} == {(1, 1)}


@pytest.mark.parametrize("container", ["JPEG", "PNG"])
@pytest.mark.parametrize(
    ("orientation", "expected"),
    [(1, "left to right"), (3, "right to left"), (6, "top to bottom"), (8, "bottom to top")],
)
def test_the_orientation_is_in_the_pixels(container: str, orientation: int, expected: str) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = limit_side(encoded(gradient(100, 60), container, exif=exif), 50)
    small = np.asarray(opened(data)).astype(int)
    assert ORIENTATION not in opened(data).getexif()
    assert small.shape == ((30, 50) if orientation in (1, 3) else (50, 30))
    across, down = small[0, -1] - small[0, 0], small[-1, 0] - small[0, 0]
    change = {"left to right": across, "right to left": -across, "top to bottom": down, "bottom to top": -down}
    assert change[expected] > 150


@pytest.mark.parametrize("container", ["JPEG", "PNG"])
def test_no_metadata_is_carried_over(container: str) -> None:
    exif = Image.Exif()
    exif[0x010E] = CANARY  # ImageDescription
    options: dict[str, object] = {"exif": exif, "icc_profile": CANARY.encode(), "dpi": (300, 300)}
    if container == "PNG":
        options["pnginfo"] = text = PngImagePlugin.PngInfo()
        text.add_text("PatientName", CANARY)
        text.add_itxt("XML:com.adobe.xmp", CANARY)
    else:
        options |= {"comment": CANARY, "xmp": CANARY.encode()}
    data = encoded(gradient(100, 60), container, **options)
    assert data.count(CANARY.encode()) >= 3  # ICC profiles and long texts of a PNG are compressed
    small = limit_side(data, 50)
    assert CANARY.encode() not in small
    assert CANARY not in str(opened(small).info)
    assert set(opened(small).info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}


def test_a_palette_with_transparency_loses_both() -> None:
    image = gradient(80, 40, "P")
    small = opened(limit_side(encoded(image, "PNG", transparency=0), 20))
    assert (small.mode, small.info) == ("RGB", {})


@pytest.mark.parametrize("container", ["JPEG", "PNG"])
def test_the_same_bytes_each_time(container: str) -> None:
    data = encoded(gradient(100, 60, "RGB"), container)
    assert limit_side(data, 50) == limit_side(data, 50)


@pytest.mark.parametrize("container", ["JPEG", "PNG"])
def test_a_broken_image_is_a_row_error(container: str) -> None:
    data = encoded(gradient(400, 300), container)
    with pytest.raises(RowError, match="corrupt_image"):
        limit_side(data[: len(data) // 2], 50)


def test_exif_data_that_cannot_be_written_anew_still_turn_the_image() -> None:
    entries = [(ORIENTATION, 3, 1, b"\0\6"), (0x0111, 2, 2, b"a")]  # the second should be an integer
    fields = b"".join(struct.pack(">HHI4s", *entry) for entry in entries)
    exif = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, len(entries)) + fields + bytes(4)
    data = encoded(gradient(100, 60), "JPEG", exif=exif)
    with pytest.raises(struct.error):  # the control: what Pillow alone makes of it
        ImageOps.exif_transpose(opened(data))
    assert opened(limit_side(data, 50)).size == (30, 50)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL.TiffImagePlugin")  # as data.images does for the process
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0II*\0\xff\xff\xff\xff"])
def test_broken_exif_data_is_no_orientation(exif: bytes) -> None:
    data = encoded(gradient(100, 60), "JPEG", exif=exif)
    assert opened(limit_side(data, 50)).size == (50, 30)
