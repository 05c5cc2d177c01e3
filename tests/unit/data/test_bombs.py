"""Small files that claim to be huge: what refusing them costs, in numbers, beside what decoding one costs."""

import json
import struct
import subprocess
import sys
import textwrap
import zlib
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

MEASURE = """
    import json, sys, time, warnings
    from pathlib import Path
    from PIL import Image
    from pefomed_ray.data.images import check_image
    from pefomed_ray.data.reasons import RowError

    def peak_mib():
        # Not getrusage: its peak begins with that of the process that started this one.
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024

    def refuse(data):
        try:
            check_image(data)
        except RowError as error:
            return error.reason

    bombs = {path.name: path.read_bytes() for path in sorted(Path(sys.argv[1]).iterdir())}
    small = bombs.pop("small.png")
    assert refuse(small) is None  # what is imported on first use is there
    before, found = peak_mib(), {}
    for name, data in bombs.items():
        times = []
        for _ in range(3):
            started = time.process_time()
            reason = refuse(data)
            times.append(time.process_time() - started)
        found[name] = [reason, min(times)]
    grown = peak_mib() - before
    warnings.simplefilter("ignore")
    with Image.open(Path(sys.argv[1]) / "png-1-bit-81-mp") as image:
        image.convert("RGB").load()
    print(json.dumps({"found": found, "grown_mib": grown, "grown_by_decoding_mib": peak_mib() - before}))
"""


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, bits: int, colour_type: int, row_bytes: int) -> bytes:
    """A whole PNG, white all over; its rows compress to nearly nothing."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    packer = zlib.compressobj(9)
    data = b"".join(packer.compress(b"\0" + b"\xff" * row_bytes) for _ in range(height)) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def jpeg(mode: str, exif: Image.Exif | None = None) -> bytes:
    """A small JPEG whose frame header claims 9000 x 9000."""
    buffer = BytesIO()
    Image.new(mode, (16, 16)).save(buffer, "JPEG", **({"exif": exif} if exif else {}))
    data = buffer.getvalue()
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", 9000, 9000) + data[at + 4 :]


def animation(format_name: str) -> bytes:
    """Two thousand frames."""
    buffer = BytesIO()
    frames = [Image.new("L", (4, 4), shade % 256) for shade in range(2000)]
    frames[0].save(buffer, format_name, save_all=True, append_images=frames[1:])
    return buffer.getvalue()


@pytest.fixture(scope="module")
def bombs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rotated = Image.Exif()
    rotated[0x0112] = 6
    made = {
        "small.png": png(8, 8, 8, 0, 8),
        "png-1-bit-81-mp": png(9000, 9000, 1, 0, 1125),
        "png-1-bit-169-mp": png(13000, 13000, 1, 0, 1625),
        "png-16-bit-81-mp": png(9000, 9000, 16, 0, 18000),
        "jpeg-cmyk-81-mp": jpeg("CMYK"),
        "jpeg-rotated-81-mp": jpeg("RGB", rotated),
        "gif": animation("GIF"),
        "apng": animation("PNG"),
        "webp": animation("WEBP"),
    }
    folder = tmp_path_factory.mktemp("bombs")
    for name, data in made.items():
        (folder / name).write_bytes(data)
    return folder


def test_bombs_are_refused_by_their_headers(bombs: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEASURE), str(bombs)],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    measured = json.loads(done.stdout)
    reasons = {name: reason for name, (reason, _) in measured["found"].items()}
    assert reasons == {
        "png-1-bit-81-mp": "image_too_large",
        "png-1-bit-169-mp": "image_too_large",
        "png-16-bit-81-mp": "image_too_large",
        "jpeg-cmyk-81-mp": "image_too_large",
        "jpeg-rotated-81-mp": "image_too_large",
        "gif": "image_format",
        "apng": "image_frames",
        "webp": "image_format",
    }
    assert max(cpu_s for _, cpu_s in measured["found"].values()) < 0.05
    assert measured["grown_mib"] < 50
    assert measured["grown_by_decoding_mib"] > 200  # the control: what one of them takes when it is decoded
