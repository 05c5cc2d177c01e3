"""What is refused, for which reason, and that a bomb is refused by its header."""

import random
import struct
import zlib
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pefomed_ray.artifacts.folders import open_folder
from pefomed_ray.data.images import check_image, read_image
from pefomed_ray.data.reasons import RowError


def encoded(format_name: str, mode: str = "RGB", size: tuple[int, int] = (64, 48), **options: object) -> bytes:
    buffer = BytesIO()
    noise = Image.frombytes("L", size, random.Random(0).randbytes(size[0] * size[1]))
    noise.convert(mode).save(buffer, format_name, **options)
    return buffer.getvalue()


def png_header_of(width: int, height: int) -> bytes:
    """A small 1-bit PNG of that size: all rows zero, compressed to nearly nothing."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    row = b"\0" * (1 + (width + 7) // 8)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    data = zlib.compress(row * height, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def animated_png() -> bytes:
    buffer = BytesIO()
    frames = [Image.new("L", (8, 8), shade) for shade in (0, 100, 200)]
    frames[0].save(buffer, "PNG", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def reason_of(data: bytes) -> str | None:
    try:
        check_image(data)
    except RowError as error:
        return error.reason
    return None


JPEG = encoded("JPEG")
PNG = encoded("PNG")


@pytest.mark.parametrize(
    "data",
    [
        JPEG,
        PNG,
        JPEG + b"\0\0",
        encoded("JPEG", "L"),
        encoded("JPEG", "CMYK"),
        encoded("JPEG", progressive=True),
        encoded("PNG", "I;16"),
        encoded("PNG", "P"),
        encoded("PNG", "RGBA"),
        encoded("PNG", size=(1, 1)),
    ],
)
def test_whole_jpeg_and_png_pass(data: bytes) -> None:
    assert reason_of(data) is None


@pytest.mark.parametrize(
    ("reason", "data"),
    [
        ("corrupt_image", b""),
        ("corrupt_image", JPEG[:10]),
        ("corrupt_image", JPEG[: len(JPEG) // 2]),
        ("corrupt_image", encoded("JPEG", progressive=True)[:-200]),
        ("corrupt_image", PNG[: len(PNG) // 2]),
        ("corrupt_image", PNG[:200] + bytes([PNG[200] ^ 1]) + PNG[201:]),
        ("image_format", b"<html>not found</html>"),
        ("image_format", encoded("GIF", "P")),
        ("image_format", encoded("WEBP")),
        ("image_format", encoded("TIFF")),
        ("image_format", b"\x00" * 1000),
        ("image_frames", animated_png()),
        ("trailing_bytes", JPEG + b"PK\x05\x06" + b"\0" * 18 + b"x"),
        ("trailing_bytes", PNG + b"PK\x05\x06zip"),
    ],
)
def test_reasons(reason: str, data: bytes) -> None:
    assert reason_of(data) == reason


@pytest.mark.parametrize("size", [(9000, 9000), (13000, 13000), (20000, 20000), (8193, 10), (5001, 5000)])
def test_a_bomb_is_refused_before_it_is_decoded(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    data = png_header_of(*size)
    assert len(data) < 70_000

    def never(self: Image.Image) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(Image.Image, "load", never)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", never)
    assert reason_of(data) == "image_too_large"


def test_the_bomb_itself_is_whole() -> None:
    """The control of the test above: the same drawing, small enough, is fine."""
    assert reason_of(png_header_of(5000, 5000)) is None


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    root = tmp_path / "corpus"
    (root / "imgs").mkdir(parents=True)
    (root / "imgs/a.jpg").write_bytes(JPEG)
    (tmp_path / "secret.jpg").write_bytes(JPEG)
    (root / "imgs/out.jpg").symlink_to(tmp_path / "secret.jpg")
    (root / "imgs/in.jpg").symlink_to("a.jpg")
    return root


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("imgs/none.jpg", "missing_image"),
        ("imgs", "missing_image"),
        ("imgs/" + "x" * 5000, "missing_image"),
        ("", "path_escape"),
        ("../secret.jpg", "path_escape"),
        ("imgs/../../secret.jpg", "path_escape"),
        ("/etc/passwd", "path_escape"),
        ("imgs/a.jpg\0.png", "path_escape"),
        ("imgs/out.jpg", "symlink_escape"),
        ("data/none.parquet#0", "missing_image"),
        ("../data.parquet#0", "path_escape"),
    ],
)
def test_paths_stay_inside_the_corpus(corpus: Path, path: str, reason: str) -> None:
    with pytest.raises(RowError) as error:
        read_image(open_folder(corpus), path)
    assert error.value.reason == reason


@pytest.mark.parametrize("path", ["imgs/a.jpg", "imgs/in.jpg", "./imgs//a.jpg"])
def test_paths_inside_are_read(corpus: Path, path: str) -> None:
    assert read_image(open_folder(corpus), path) == JPEG


def test_a_root_behind_a_link_is_fine(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(corpus)
    assert read_image(open_folder(tmp_path / "link"), "imgs/a.jpg") == JPEG


def test_a_row_of_a_parquet_file(corpus: Path) -> None:
    table = pa.table({"image": [{"bytes": b"one", "path": "1"}, {"bytes": None, "path": "2"}]})
    pq.write_table(table, corpus / "x.parquet")
    assert read_image(open_folder(corpus), "x.parquet#0") == b"one"
    for row in (1, 2):
        with pytest.raises(RowError, match="missing_image"):
            read_image(open_folder(corpus), f"x.parquet#{row}")
