"""DICOM files: what is shown, by arithmetic of the standard done here with numpy alone; what is refused; what leaks.

Letters of the shapes: H height, W width, C colour channel.
"""

import json
import logging
import struct
import sys
import time
import tracemalloc
import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pefomed_ray.artifacts.folders import open_folder
from pefomed_ray.data.check import check
from pefomed_ray.data.dicom import TAGS, dicom_to_png, is_dicom
from pefomed_ray.data.images import check_image
from pefomed_ray.data.intake import take_in
from pefomed_ray.data.options import DataOptions
from pefomed_ray.data.reasons import RowError
from pefomed_ray.data.shard_file import plan_shards, write_shard
from pefomed_ray.errors import ConfigError

pydicom = pytest.importorskip("pydicom")
openjpeg = pytest.importorskip("openjpeg")
pytest.importorskip("libjpeg")
pytest.importorskip("rle")

from pydicom.data import get_testdata_file  # noqa: E402
from pydicom.dataset import Dataset  # noqa: E402
from pydicom.encaps import encapsulate, get_frame  # noqa: E402
from pydicom.pixels import compress, get_decoder  # noqa: E402
from pydicom.uid import (  # noqa: E402
    MPEG4HP41,
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    RLELossless,
)

from tests.dicom_files import dataset, dicom, written  # noqa: E402

ULTRASOUND = "1.2.840.10008.5.1.4.1.1.6.1"
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
CANARY = "Zanzibar^Quetzal"


def encapsulated(pixels: np.ndarray, syntax: UID, frames: list[bytes], **elements: object) -> bytes:
    made = dataset(pixels, syntax, **elements)
    made.PixelData = encapsulate(frames)
    made["PixelData"].VR = "OB"
    return written(made)


def shown(data: bytes, frame: int = 0) -> np.ndarray:
    png = dicom_to_png(data, frame)
    check_image(png)
    return np.asarray(Image.open(BytesIO(png)))


def reason_of(data: bytes, **options: object) -> str | None:
    try:
        dicom_to_png(data, **options)
    except RowError as error:
        return error.reason
    return None


def window(values: np.ndarray, center: float, width: float) -> np.ndarray:
    """PS3.3 C.11.2.1.2.1, with 0 and 255 as the ends of the output."""
    levels = ((values - (center - 0.5)) / (width - 1) + 0.5) * 255
    levels = np.where(values <= center - 0.5 - (width - 1) / 2, 0, levels)
    return np.where(values > center - 0.5 + (width - 1) / 2, 255, levels)


def full_range(values: np.ndarray) -> np.ndarray:
    return (values - values.min()) / (values.max() - values.min()) * 255


def assert_levels(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == np.uint8
    assert np.abs(found - expected).max() <= 0.5 + 1e-6


RAMP_12 = np.arange(4096, dtype=np.uint16).reshape(64, 64)
SIGNED = np.arange(-2048, 2048, dtype=np.int16).reshape(64, 64)
RGB = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
SMOOTH = np.add.outer(np.arange(64), np.arange(64)).astype(np.uint8) * 2


# What is shown


@pytest.mark.parametrize("pixels", [RAMP_12, SIGNED, RAMP_12.astype(np.uint8), RAMP_12 + np.uint16(61000)])
def test_without_a_window_the_frames_range_is_shown(pixels: np.ndarray) -> None:
    assert_levels(shown(dicom(pixels)), full_range(pixels.astype(float)))


@pytest.mark.parametrize(("center", "width"), [(2048, 4096), (600, 300), (100, 1000), (40.5, 80.25), (700, 1)])
def test_a_window(center: float, width: float) -> None:
    with np.errstate(all="ignore"):
        expected = window(RAMP_12.astype(float), center, width)
    assert_levels(shown(dicom(RAMP_12, BitsStored=12, WindowCenter=center, WindowWidth=width)), expected)


def test_a_window_lies_on_rescaled_values() -> None:
    """A CT as the scanner stores it: signed, Hounsfield units by slope and intercept."""
    data = dicom(SIGNED, RescaleSlope=2, RescaleIntercept=-1024, WindowCenter=40, WindowWidth=400)
    assert_levels(shown(data), window(SIGNED * 2.0 - 1024, 40, 400))


def test_a_negative_slope_turns_dark_and_bright() -> None:
    data = dicom(SIGNED, RescaleSlope=-1, RescaleIntercept=0, WindowCenter=0, WindowWidth=2000)
    assert_levels(shown(data), window(-SIGNED.astype(float), 0, 2000))


def test_the_first_of_several_windows() -> None:
    data = dicom(RAMP_12, WindowCenter=[600, 2000], WindowWidth=[300, 4000])
    assert_levels(shown(data), window(RAMP_12.astype(float), 600, 300))


def test_window_functions_of_the_standard() -> None:
    exact = dicom(RAMP_12, WindowCenter=1000, WindowWidth=500, VOILUTFunction="LINEAR_EXACT")
    assert_levels(shown(exact), np.clip((RAMP_12 - 1000.0) / 500 + 0.5, 0, 1) * 255)
    sigmoid = dicom(RAMP_12, WindowCenter=1000, WindowWidth=500, VOILUTFunction="SIGMOID")
    assert_levels(shown(sigmoid), 255 / (1 + np.exp(-4 * (RAMP_12 - 1000.0) / 500)))


@pytest.mark.parametrize("width", [0, -5, "", None])
def test_a_width_that_is_none_shows_the_full_range(width: object) -> None:
    data = dicom(RAMP_12, WindowCenter=100, WindowWidth=width)
    assert_levels(shown(data), full_range(RAMP_12.astype(float)))


@pytest.mark.parametrize("elements", [{}, {"WindowCenter": 600, "WindowWidth": 300}])
def test_monochrome1_is_the_inverse_of_monochrome2(elements: dict[str, object]) -> None:
    normal = shown(dicom(RAMP_12, **elements))
    inverse = shown(dicom(RAMP_12, PhotometricInterpretation="MONOCHROME1", PresentationLUTShape="INVERSE", **elements))
    assert np.array_equal(inverse, 255 - normal)
    assert normal[0, 0] == 0
    assert inverse[0, 0] == 255


def test_bits_above_those_stored_do_not_count() -> None:
    """Real files keep overlays or rubbish there (PS3.5 8.1.1)."""
    overlaid = RAMP_12.copy()
    overlaid[10:20] |= 0xF000
    assert np.array_equal(shown(dicom(overlaid, BitsStored=12)), shown(dicom(RAMP_12, BitsStored=12)))
    assert not np.array_equal(shown(dicom(overlaid, BitsStored=16)), shown(dicom(RAMP_12, BitsStored=16)))


def test_one_level_is_black() -> None:
    assert not shown(dicom(np.full((8, 8), 77, np.uint16))).any()


def lut(entries: list[int], first: int, bits: int) -> Dataset:
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [len(entries), first, bits])
    item.add_new("LUTData", "US", entries)
    return item


@pytest.mark.parametrize(("bits", "highest"), [(8, 255), (12, 4095), (16, 65535)])
def test_a_voi_lut_goes_before_a_window(bits: int, highest: int) -> None:
    entries = (np.linspace(0, 1, 1000) ** 2 * highest).astype(int)
    data = dicom(RAMP_12, VOILUTSequence=[lut(entries.tolist(), 500, bits)], WindowCenter=50, WindowWidth=60)
    expected = entries[np.clip(RAMP_12.astype(int) - 500, 0, 999)] / highest * 255
    assert_levels(shown(data), expected)


def test_a_modality_lut() -> None:
    entries = (np.linspace(1, 0, 4096) ** 2 * 60000).astype(int)
    data = dicom(RAMP_12, ModalityLUTSequence=[lut(entries.tolist(), 0, 16)], WindowCenter=20000, WindowWidth=30000)
    assert_levels(shown(data), window(entries[RAMP_12].astype(float), 20000, 30000))


def test_rgb_is_shown_as_it_is() -> None:
    assert np.array_equal(shown(dicom(RGB)), RGB)
    planar = np.ascontiguousarray(RGB.transpose(2, 0, 1)).reshape(RGB.shape)
    assert np.array_equal(shown(dicom(planar, PlanarConfiguration=1)), RGB)


def test_ybr_becomes_rgb() -> None:
    ybr = np.asarray(Image.fromarray(RGB).convert("YCbCr"))
    found = shown(dicom(ybr, PhotometricInterpretation="YBR_FULL"))
    assert np.abs(found.astype(int) - RGB).max() <= 3


def test_sixteen_bits_of_colour_become_eight() -> None:
    pixels = RGB.astype(np.uint16) * 256 + RGB[::-1]
    assert np.array_equal(shown(dicom(pixels)), RGB)


@pytest.mark.parametrize(("bits", "factor"), [(8, 1), (16, 256)])
def test_a_palette_becomes_rgb(bits: int, factor: int) -> None:
    colours = np.random.default_rng(1).integers(0, 256, (256, 3))
    stored = np.arange(256, dtype=np.uint8).reshape(16, 16)
    made = dataset(stored, PhotometricInterpretation="PALETTE COLOR")
    for channel, name in enumerate(("Red", "Green", "Blue")):
        made.add_new(f"{name}PaletteColorLookupTableDescriptor", "US", [256, 0, bits])
        entries = (colours[:, channel] * factor).astype("<u2" if bits == 16 else "u1")
        made.add_new(f"{name}PaletteColorLookupTableData", "OW", entries.tobytes())
    assert np.array_equal(shown(written(made)), colours[stored])


FRAMES = np.stack([RAMP_12, RAMP_12[::-1], RAMP_12.T])


def test_the_frame_that_is_asked_for() -> None:
    data = dicom(FRAMES)
    assert dicom_to_png(data) == dicom_to_png(data, 0)
    for frame, pixels in enumerate(FRAMES):
        assert_levels(shown(data, frame), full_range(pixels.astype(float)))
    for frame in (-1, 3, 10**9):
        assert reason_of(data, frame=frame) == "missing_frame"
    assert reason_of(dicom(RAMP_12), frame=1) == "missing_frame"


def test_an_enhanced_object_keeps_its_windows_per_frame() -> None:
    """PS3.3 C.7.6.16: rescale shared by all frames, a window for each."""
    rescale, shared = Dataset(), Dataset()
    rescale.RescaleSlope, rescale.RescaleIntercept = 1, -1000
    shared.PixelValueTransformationSequence = [rescale]
    groups = []
    for center in (0, 500, 1000):
        voi, group = Dataset(), Dataset()
        voi.WindowCenter, voi.WindowWidth = center, 800
        group.FrameVOILUTSequence = [voi]
        groups.append(group)
    made = dataset(FRAMES, SharedFunctionalGroupsSequence=[shared], PerFrameFunctionalGroupsSequence=groups)
    for frame, center in enumerate((0, 500, 1000)):
        assert_levels(shown(written(made), frame), window(FRAMES[frame] - 1000.0, center, 800))


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian])
def test_uncompressed_transfer_syntaxes(syntax: UID) -> None:
    assert dicom_to_png(dicom(RAMP_12, syntax)) == dicom_to_png(dicom(RAMP_12))


def test_rle() -> None:
    for pixels in (RAMP_12, FRAMES, RGB):
        made = dataset(pixels)
        compress(made, RLELossless)
        assert dicom_to_png(written(made)) == dicom_to_png(dicom(pixels))


def test_jpeg_baseline() -> None:
    buffer = BytesIO()
    Image.fromarray(SMOOTH).save(buffer, "JPEG", quality=100)
    found = shown(encapsulated(SMOOTH, JPEGBaseline8Bit, [buffer.getvalue()]))
    assert np.abs(found - full_range(SMOOTH.astype(float))).max() < 3


def test_jpeg_baseline_in_colour() -> None:
    colour = np.stack([SMOOTH, SMOOTH[::-1], np.full_like(SMOOTH, 90)], axis=2)
    buffer = BytesIO()
    Image.fromarray(colour).save(buffer, "JPEG", quality=100, subsampling=0)
    found = shown(encapsulated(colour, JPEGBaseline8Bit, [buffer.getvalue()], PhotometricInterpretation="YBR_FULL"))
    assert np.abs(found.astype(int) - colour).max() < 6


@pytest.mark.parametrize(("pixels", "photometric"), [(RAMP_12, "MONOCHROME2"), (np.tile(RGB, (4, 3, 1)), "YBR_RCT")])
def test_jpeg_2000(pixels: np.ndarray, photometric: str) -> None:
    code = openjpeg.encode(pixels, photometric_interpretation=2 if pixels.ndim == 2 else 1, use_mct=pixels.ndim == 3)
    data = encapsulated(pixels, JPEG2000Lossless, [bytes(code)], PhotometricInterpretation=photometric)
    assert dicom_to_png(data) == dicom_to_png(dicom(pixels))


@pytest.mark.parametrize(
    ("compressed", "plain"),
    [
        ("MR_small_jpeg_ls_lossless.dcm", "MR_small.dcm"),  # JPEG-LS
        ("MR_small_jp2klossless.dcm", "MR_small.dcm"),
        ("MR_small_RLE.dcm", "MR_small.dcm"),
        ("MR_small_bigendian.dcm", "MR_small.dcm"),
        ("SC_rgb_rle_16bit.dcm", "SC_rgb_rle.dcm"),
        ("SC_rgb_jpeg_gdcm.dcm", "SC_rgb_rle.dcm"),  # JPEG lossless
    ],
)
def test_files_of_other_makers(compressed: str, plain: str) -> None:
    """pydicom's own test files: the same picture encoded twice."""
    pair = [Path(get_testdata_file(name, download=False)).read_bytes() for name in (compressed, plain)]
    assert pair[0] != pair[1]
    assert dicom_to_png(pair[0], allow_burned_in=True) == dicom_to_png(pair[1], allow_burned_in=True)


def test_twelve_bit_jpeg() -> None:
    data = Path(get_testdata_file("JPGExtended.dcm", download=False)).read_bytes()
    png = dicom_to_png(data, allow_burned_in=True)  # it says nothing of itself but that it is a secondary capture
    assert len(np.unique(np.asarray(Image.open(BytesIO(png))))) > 100


# What is refused


def test_is_dicom() -> None:
    data = dicom(RAMP_12)
    assert is_dicom(data)
    assert not is_dicom(data[132:])
    assert not is_dicom(b"")
    assert not is_dicom(dicom_to_png(data))


@pytest.mark.parametrize(
    ("reason", "elements"),
    [
        (None, {}),
        (None, {"BurnedInAnnotation": "NO"}),
        (None, {"Modality": "US", "BurnedInAnnotation": "NO"}),
        (None, {"SOPClassUID": SECONDARY_CAPTURE, "BurnedInAnnotation": "NO"}),
        (None, {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.77.1.1"}),
        ("burned_in_annotation", {"BurnedInAnnotation": "YES"}),
        ("burned_in_annotation", {"BurnedInAnnotation": "UNKNOWN"}),
        ("burned_in_annotation", {"BurnedInAnnotation": ["NO", "YES"]}),
        ("burned_in_annotation", {"Modality": "US"}),
        ("burned_in_annotation", {"Modality": "US", "BurnedInAnnotation": ""}),
        ("burned_in_annotation", {"Modality": "SC"}),
        ("burned_in_annotation", {"SOPClassUID": SECONDARY_CAPTURE, "Modality": "OT"}),
        ("burned_in_annotation", {"SOPClassUID": SECONDARY_CAPTURE + ".4", "Modality": "CT"}),
        ("burned_in_annotation", {"SOPClassUID": ULTRASOUND, "Modality": "CR"}),
    ],
)
def test_burned_in_annotation(reason: str | None, elements: dict[str, object]) -> None:
    data = dicom(RAMP_12, **elements)
    assert reason_of(data) == reason
    assert reason_of(data, allow_burned_in=True) is None


@pytest.mark.parametrize(
    ("reason", "data"),
    [
        ("dicom_encoding", dicom(RAMP_12, DeflatedExplicitVRLittleEndian)),
        ("dicom_encoding", encapsulated(SMOOTH, MPEG4HP41, [b"video"])),
        ("dicom_encoding", dicom(RAMP_12).replace(b"1.2.840.10008.1.2.1", b"1.2.3.4.5.6.7.8.9.1")),
        ("dicom_encoding", dicom(RAMP_12.astype(np.uint32))),
        ("dicom_encoding", dicom(RAMP_12, PhotometricInterpretation="RGB")),
        ("corrupt_image", dicom(RAMP_12, PhotometricInterpretation="PURPLE")),
        ("corrupt_image", dicom(RAMP_12, RescaleSlope=float("nan"), RescaleIntercept=0)),
        ("corrupt_image", dicom(RAMP_12, Rows=65)),
        ("corrupt_image", dicom(RAMP_12, Rows=0)),
        ("corrupt_image", dicom(RAMP_12, NumberOfFrames=2)),
        ("corrupt_image", encapsulated(SMOOTH, JPEGLSLossless, [b"\xff\xd8rubbish\xff\xd9"])),
        ("corrupt_image", encapsulated(SMOOTH, RLELossless, [bytes([2]) + bytes(63)])),
    ],
)
def test_reasons(reason: str, data: bytes) -> None:
    assert reason_of(data) == reason


def test_a_file_without_pixels() -> None:
    report = dataset(SMOOTH)
    for name in ("PixelData", "Rows", "Columns"):
        delattr(report, name)
    assert reason_of(written(report)) == "dicom_no_pixels"


def test_truncated_anywhere() -> None:
    buffer = BytesIO()
    Image.fromarray(SMOOTH).save(buffer, "JPEG")
    for data in (dicom(RAMP_12), encapsulated(SMOOTH, JPEGBaseline8Bit, [buffer.getvalue()])):
        assert reason_of(data) is None
        for keep in np.linspace(0, len(data) - 50, 40).astype(int):
            assert reason_of(data[:keep]) in ("corrupt_image", "dicom_no_pixels", "dicom_encoding")


@pytest.mark.parametrize(
    "name", ["MR_small_jp2klossless.dcm", "MR_small_jpeg_ls_lossless.dcm", "SC_rgb_jpeg_gdcm.dcm", "JPGExtended.dcm"]
)
def test_a_compressed_frame_that_is_cut_short(name: str) -> None:
    """Most decoders make a picture of what there is."""
    made = pydicom.dcmread(get_testdata_file(name, download=False))
    code = get_frame(made.PixelData, 0, number_of_frames=1)
    assert reason_of(written(made), allow_burned_in=True) is None
    for keep in (20, len(code) // 2, len(code) - 10):
        made.PixelData = encapsulate([code[:keep]])
        assert reason_of(written(made), allow_burned_in=True) == "corrupt_image"


def test_flipped_bits_raise_nothing_else() -> None:
    random = np.random.default_rng(0)
    made = dataset(FRAMES)
    compress(made, RLELossless)
    outcomes = set()
    for data in (dicom(RAMP_12, WindowCenter=600, WindowWidth=300), written(made)):
        for _ in range(150):
            bad = bytearray(data)
            for position in random.integers(132, 700, 3):
                bad[position] ^= 1 << random.integers(8)
            outcomes.add(reason_of(bytes(bad)))  # anything but a RowError ends the test
    assert {None, "corrupt_image"} <= outcomes  # some bits matter, some do not


BOMBS = {
    "native": dicom(RAMP_12, Rows=9000, Columns=9000),
    "frames": dicom(RAMP_12, Rows=60000, Columns=60000, NumberOfFrames=2**31 - 1),
    "compressed": encapsulated(RAMP_12, JPEG2000Lossless, [b"\xff\x4f\xff\xd9"], Rows=9000, Columns=9000),
    "side": dicom(RAMP_12, Rows=8193, Columns=1),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_by_its_header(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = BOMBS[name]
    assert len(data) < 10_000
    dicom_to_png(dicom(RAMP_12))  # imports

    def never(*args: object, **options: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("pydicom.pixels.decoders.base.Decoder.as_array", never)
    tracemalloc.start()
    start = time.process_time()
    reason = reason_of(data)
    seconds, (_, peak_bytes) = time.process_time() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert reason == "image_too_large"
    assert seconds < 0.05
    assert peak_bytes < 5_000_000


def test_a_frame_that_claims_more_than_the_file_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    code = bytearray(openjpeg.encode(RAMP_12, photometric_interpretation=2))
    honest = encapsulated(RAMP_12, JPEG2000Lossless, [bytes(code)])
    code[8:16] = (30_000).to_bytes(4, "big") * 2  # Xsiz and Ysiz of the SIZ segment
    code[24:32] = code[8:16]  # and one tile of it all
    decoded = []
    from pydicom.pixels.decoders.base import Decoder

    as_array = Decoder.as_array
    monkeypatch.setattr(Decoder, "as_array", lambda self, *args, **kw: decoded.append(1) or as_array(self, *args, **kw))
    assert reason_of(encapsulated(RAMP_12, JPEG2000Lossless, [bytes(code)])) == "corrupt_image"
    assert not decoded
    assert reason_of(honest) is None
    assert decoded


@pytest.mark.filterwarnings("ignore")  # by the control
def test_rle_does_not_expand_without_limit() -> None:
    """Two bytes of a run give 128: 0.1 MB for a picture of 12 kB would fill 6 MB."""
    made = dataset(np.zeros((64, 64, 3), np.uint8), RLELossless)
    bomb, whole, short = b"\x81\0" * 50_000, b"\x81\0" * 32, b"\x81\0"
    offsets = [64, 64 + len(bomb), 64 + len(bomb + whole)]
    made.PixelData = encapsulate([struct.pack("<16L", 3, *offsets, *[0] * 12) + bomb + whole + short])
    made["PixelData"].VR = "OB"
    data = written(made)
    tracemalloc.start()
    assert reason_of(data) == "corrupt_image"
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    with pytest.raises(RuntimeError):
        get_decoder(RLELossless).as_array(made, index=0, decoding_plugin="pydicom")  # the control
    control_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 1_000_000
    assert control_bytes > 6_000_000


def test_a_panic_of_the_rle_decoder_is_a_row_error() -> None:
    """It writes behind its buffer, is stopped by Rust, and raises what is no Exception."""
    run = b"\x81\0" * 40  # 5,120 bytes for 4,096 pixels
    header = struct.pack("<16L", 2, 64, 64 + len(run), *[0] * 13)
    assert reason_of(encapsulated(RAMP_12, RLELossless, [header + run + run])) == "corrupt_image"


def test_more_frames_than_the_pixel_data_can_hold() -> None:
    data = encapsulated(RAMP_12, JPEG2000Lossless, [b"\xff\x4f\xff\xd9"], NumberOfFrames=10**9)
    assert reason_of(data) == "corrupt_image"


def test_without_the_extra_the_user_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("pydicom", "libjpeg", "openjpeg", "rle"):
        data = dicom(RAMP_12)
        with monkeypatch.context() as patched:
            patched.setitem(sys.modules, package, None)
            with pytest.raises(ConfigError, match=r"pip install 'pefomed-ray\[dicom\]'"):
                dicom_to_png(data)


# What leaks


def of_a_patient(**elements: object) -> Dataset:
    """Canaries in elements of the basic confidentiality profile (PS3.15 E.1), private ones, and ones that are read."""
    made = dataset(RAMP_12, **elements)
    made.PatientName = made.InstitutionName = made.ReferringPhysicianName = made.OperatorsName = CANARY
    made.PatientID = made.AccessionNumber = made.StudyID = made.StationName = CANARY
    made.StudyDescription = made.PatientComments = made.ImageComments = made.PatientAddress = CANARY
    private = made.private_block(0x0009, CANARY, create=True)
    private.add_new(0x01, "LO", CANARY)
    person = Dataset()
    person.PatientName = CANARY
    made.SharedFunctionalGroupsSequence = [person]
    made.add_new("WindowCenterWidthExplanation", "LO", CANARY)
    made.add_new(0x60000022, "LO", CANARY)  # an overlay's description
    return made


FAULTS: dict[str, dict[str, object]] = {
    "none": {},
    "burned in": {"BurnedInAnnotation": CANARY[:16]},
    "photometric": {"PhotometricInterpretation": CANARY[:16]},
    "window function": {"WindowCenter": 5, "WindowWidth": 6, "VOILUTFunction": CANARY[:16]},
    "storage class": {"SOPClassUID": CANARY},
    "padded": {"PixelData": RAMP_12.tobytes() + CANARY.encode()},
    "too large": {"Rows": 9999},
    "too short": {"Rows": 99},
}


@pytest.mark.filterwarnings("ignore")  # by the making of the files
@pytest.mark.parametrize("fault", FAULTS)
def test_no_value_of_a_tag_comes_out(
    fault: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = written(of_a_patient(**FAULTS[fault]))
        control = pydicom.dcmread(BytesIO(data))
    assert data.count(CANARY.encode()) >= 15
    assert str(control).count(CANARY) >= 13  # the control: a plain reader does hand them out
    caplog.set_level(logging.DEBUG)
    out = b""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            out = dicom_to_png(data)
        except RowError as error:
            out = repr(error).encode()
    said = [out.decode("latin-1"), caplog.text, *(str(warning.message) for warning in caught), *capfd.readouterr()]
    for text in said:
        assert "Zanzibar" not in text
        assert "Quetzal" not in text
    assert not caught


@pytest.mark.filterwarnings("ignore")
def test_what_would_have_been_said(caplog: pytest.LogCaptureFixture) -> None:
    """The control of the test above: pydicom left to itself quotes values."""
    data = written(of_a_patient(PhotometricInterpretation=CANARY[:16]))
    with pytest.raises(ValueError, match="Zanzibar"):
        _ = pydicom.dcmread(BytesIO(data)).pixel_array


def test_the_png_holds_pixels_only() -> None:
    data = dicom_to_png(written(of_a_patient()))
    chunks, position = [], 8
    while position < len(data):
        chunks.append(data[position + 4 : position + 8])
        position += 12 + int.from_bytes(data[position : position + 4], "big")
    assert set(chunks) == {b"IHDR", b"IDAT", b"IEND"}


def test_no_patient_element_is_even_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {pydicom.datadict.tag_for_keyword(name) >> 16 for name in TAGS} <= {0x0008, 0x0028, 0x5200, 0x7FE0}
    read, parsed = pydicom.dcmread, []
    monkeypatch.setattr(pydicom, "dcmread", lambda *args, **options: parsed.append(read(*args, **options)) or parsed[0])
    dicom_to_png(written(of_a_patient()))
    assert {element.keyword for element in parsed[0]} <= {*TAGS, "SpecificCharacterSet"}


def test_the_same_bytes_each_time() -> None:
    data = dicom(FRAMES, WindowCenter=600, WindowWidth=300)
    assert dicom_to_png(data, 1) == dicom_to_png(data, 1)
    assert dicom_to_png(data, 1) != dicom_to_png(data, 0)


def dicom_corpus(root: Path) -> Path:
    """Two frames of one file, a screenshot, and a file that lacks the frame asked for."""
    root.mkdir()
    frames = np.stack([np.full((16, 16), 10, np.uint8), np.arange(256, dtype=np.uint8).reshape(16, 16)])
    (root / "scan.dcm").write_bytes(dicom(frames, PatientName=CANARY))
    (root / "shot.dcm").write_bytes(dicom(frames[0], SOPClassUID=SECONDARY_CAPTURE, Modality="OT"))
    images = ["scan.dcm", "scan.dcm#1", "shot.dcm", "scan.dcm#7"]
    rows = [{"id": f"q{n}", "response": "A chest film.", "image": image} for n, image in enumerate(images)]
    (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def test_a_corpus_of_dicom_files_becomes_png(tmp_path: Path) -> None:
    root = open_folder(dicom_corpus(tmp_path / "c"))
    options = DataOptions(max_bad_fraction=0.5, validation_fraction=0)
    (spec,) = plan_shards(take_in(root, options).references, root, 0, options.shard_bytes)
    result = write_shard(spec.to_json(), root, open_folder(tmp_path / "out"), "jsonl", options)
    assert sorted((row.id, row.reason) for row in result.quarantined) == [
        ("q2", "burned_in_annotation"),
        ("q3", "missing_frame"),
    ]
    shard = (tmp_path / "out" / spec.path).read_bytes()
    assert CANARY.encode() not in shard
    assert CANARY.encode() in (tmp_path / "c/scan.dcm").read_bytes()  # the control
    records = {record["id"]: record for record in pq.read_table(tmp_path / "out" / spec.path).to_pylist()}
    pixels = {name: np.asarray(Image.open(BytesIO(record["images"][0]["bytes"]))) for name, record in records.items()}
    assert len(np.unique(pixels["q0"])) == 1
    assert_levels(pixels["q1"], np.arange(256).reshape(16, 16))
    allowed = check(tmp_path / "c", DataOptions(max_bad_fraction=0.5, validation_fraction=0, allow_burned_in=True))
    assert allowed["quarantined"] == {"missing_frame": 1}


def test_without_the_extra_a_corpus_with_dicom_files_is_refused_before_anything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = open_folder(dicom_corpus(tmp_path / "c"))
    take_in(root, DataOptions())
    monkeypatch.setitem(sys.modules, "openjpeg", None)
    with pytest.raises(ConfigError, match="dicom"):
        take_in(root, DataOptions())
