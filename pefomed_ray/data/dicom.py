"""DICOM files as 8-bit PNG: the picture a viewer shows at first, and none of the patient's data.

Only the elements named in TAGS are parsed, so names, numbers and dates are skipped, not removed. Patient data drawn
into the pixels cannot be seen from here: files that say they carry some, and the kinds that usually do (ultrasound,
secondary capture), are refused unless the caller allows them.

What is shown depends on a stored value alone, so pydicom's display functions run once on every value between the
frame's lowest and highest (at most 65,536), not on every pixel.

Not supported: the deflated transfer syntax (it inflates without limit), video, more than 16 bits a sample and float
pixels. Not drawn: overlays (group 60xx). Not applied: colour profiles, and Presentation LUT Shape, which in an image
only repeats what MONOCHROME1 says.

PS3.3 and PS3.5 are parts of the DICOM standard, https://www.dicomstandard.org/current. Letters of the shapes: H height,
W width, C colour channel, V one entry for each stored value.
"""

import logging
import threading
import warnings
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from pefomed_ray.data.images import MAX_FILE_BYTES, MAX_PIXELS, MAX_SIDE
from pefomed_ray.data.reasons import RowError
from pefomed_ray.errors import ConfigError

if TYPE_CHECKING:
    from pydicom import Dataset
    from pydicom.uid import UID

PREAMBLE_BYTES = 128
MAGIC = b"DICM"
MAX_BITS = 16  # a sample; it also bounds the display table
END_OF_IMAGE = b"\xff\xd9"  # of JPEG, JPEG-LS and JPEG 2000 alike
FRAME_PADDING = b"\0\xff"  # what real files carry behind it
PNG_COMPRESS_LEVEL = 2  # of a chest film: a seventh of the time that 6 takes, a sixth more bytes

BURNED_IN_MODALITIES = ("US", "SC")
# Storage classes, PS3.4 B.5: multi-frame ultrasound, ultrasound, secondary capture. A screenshot's Modality is often
# that of the examination, or OT.
BURNED_IN_CLASSES = tuple(f"1.2.840.10008.5.1.4.1.1.{arc}." for arc in (3, 6, 7))

TAGS = [
    *("SOPClassUID", "Modality", "BurnedInAnnotation", "NumberOfFrames", "Rows", "Columns", "SamplesPerPixel"),
    *("PhotometricInterpretation", "PlanarConfiguration", "BitsAllocated", "BitsStored", "PixelRepresentation"),
    *("ModalityLUTSequence", "RescaleSlope", "RescaleIntercept"),
    *("VOILUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
    *(f"{colour}PaletteColorLookupTableDescriptor" for colour in ("Red", "Green", "Blue")),
    *(f"{colour}PaletteColorLookupTableData" for colour in ("Red", "Green", "Blue")),
    *(f"Segmented{colour}PaletteColorLookupTableData" for colour in ("Red", "Green", "Blue")),
    "PixelData",
]


_ONE_AT_A_TIME = threading.Lock()
"""Held while a file is read: its warnings are silenced by filters that all threads share."""


def is_dicom(data: bytes) -> bool:
    """Whether the bytes begin as a DICOM file does (PS3.10 7.1); files without the preamble do not count."""
    return data[PREAMBLE_BYTES : PREAMBLE_BYTES + len(MAGIC)] == MAGIC


def dicom_to_png(data: bytes, frame: int = 0, *, allow_burned_in: bool = False) -> bytes:
    """One frame of a DICOM file, as an 8-bit grey or RGB PNG without metadata; same bytes in, same bytes out.

    Grey values go through the modality LUT or rescale, then the first VOI LUT, else the first window, else the full
    range of the frame's values; MONOCHROME1 is inverted. `frame` counts from 0. `allow_burned_in` takes files whose
    pixels may show the patient's name.

    Raises RowError, and ConfigError where the packages of the extra `dicom` are not installed. Sizes are checked by
    the header before a pixel is decoded, and by the compressed frame's own header before its decoder allocates.
    """
    require_packages()
    try:
        with _ONE_AT_A_TIME, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom's warnings quote what they complain about
            return _png(_frame_pixels(data, frame, allow_burned_in))
    except (RowError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # hostile bytes raise almost anything; a panic of the RLE decoder (Rust) is no Exception
        raise RowError("corrupt_image") from None


def require_packages() -> None:
    """Raise ConfigError where the packages of the extra `dicom` are not installed; quiet them where they are."""
    try:
        import libjpeg  # noqa: F401
        import openjpeg  # noqa: F401
        import pydicom  # noqa: F401
        import rle  # noqa: F401
    except ImportError:
        raise ConfigError("DICOM files need more packages: pip install 'pefomed-ray[dicom]'") from None
    logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)  # its messages quote values, as its warnings do


def _frame_pixels(data: bytes, frame: int, allow_burned_in: bool) -> np.ndarray:
    """uint8 [H, W] or [H, W, 3], as shown."""
    from pydicom import dcmread

    if len(data) > MAX_FILE_BYTES:
        raise RowError("image_too_large")
    syntax = _transfer_syntax(data)
    dataset = dcmread(BytesIO(data), specific_tags=TAGS)
    if "PixelData" not in dataset:
        # With rows but no pixels it is an image cut short.
        raise RowError("corrupt_image" if "Rows" in dataset else "dicom_no_pixels")
    if not allow_burned_in:
        _check_burned_in(dataset)
    _check_header(dataset, frame)
    stored, photometric = _decode(dataset, frame, syntax)
    if photometric == "RGB" and stored.ndim == 3:
        return (stored >> max(dataset.BitsStored - 8, 0)).astype(np.uint8)
    if stored.ndim == 2:
        return _shown(stored, photometric, _with_frame_groups(dataset, frame))
    raise RowError("dicom_encoding")


def _transfer_syntax(data: bytes) -> "UID":
    """How the data set is encoded, read before the data set itself. Raises RowError where that is not supported."""
    from pydicom.filereader import read_dataset
    from pydicom.pixels import get_decoder
    from pydicom.uid import UID, DeflatedExplicitVRLittleEndian

    start = BytesIO(data)
    start.seek(PREAMBLE_BYTES + len(MAGIC))
    # PS3.10 7.1: group 0002 is always explicit VR, little endian.
    meta = read_dataset(start, False, True, stop_when=lambda tag, vr, length: tag.group != 2)
    syntax = UID(meta.get("TransferSyntaxUID", ""))
    try:
        available = get_decoder(syntax).is_available
    except NotImplementedError:
        available = False
    if not available or syntax == DeflatedExplicitVRLittleEndian:
        raise RowError("dicom_encoding")
    return syntax


def _check_burned_in(dataset: "Dataset") -> None:
    """Raise RowError unless the pixels are clean by the file's own word, or silent and of a kind that usually is."""
    burned_in = dataset.get("BurnedInAnnotation")
    storage_class = f"{dataset.get('SOPClassUID')}."
    suspect = dataset.get("Modality") in BURNED_IN_MODALITIES or storage_class.startswith(BURNED_IN_CLASSES)
    if burned_in != "NO" and (burned_in or suspect):
        raise RowError("burned_in_annotation")


def _check_header(dataset: "Dataset", frame: int) -> None:
    rows, columns, frames = dataset.Rows, dataset.Columns, int(dataset.get("NumberOfFrames") or 1)
    if max(rows, columns) > MAX_SIDE or rows * columns > MAX_PIXELS:
        raise RowError("image_too_large")
    if dataset.BitsAllocated not in (1, 8, MAX_BITS):
        raise RowError("dicom_encoding")
    if not 0 <= frame < frames:
        raise RowError("missing_frame")


def _decode(dataset: "Dataset", frame: int, syntax: "UID") -> tuple[np.ndarray, str]:
    """Stored values [H, W] or [H, W, 3] of one frame, and what they mean: YBR is RGB by now."""
    from pydicom.pixels import get_decoder
    from pydicom.uid import RLELossless

    if syntax.is_encapsulated:
        _check_codestream(dataset, frame, syntax)
    # Not with pydicom's own RLE decoder to fall back on, which expands without limit: 64 MB can become 4 GB.
    plugin = "pylibjpeg" if syntax == RLELossless else ""
    stored, properties = get_decoder(syntax).as_array(dataset, index=frame, decoding_plugin=plugin)
    return stored, str(properties["photometric_interpretation"])


def _check_codestream(dataset: "Dataset", frame: int, syntax: "UID") -> None:
    """Raise RowError where a compressed frame is cut short, or not of the size the DICOM header gives.

    The decoders allocate by the frame's own header, which can claim more than the DICOM header does.
    """
    import libjpeg
    import openjpeg
    from pydicom.encaps import get_frame
    from pydicom.uid import JPEG2000TransferSyntaxes, RLELossless

    if syntax == RLELossless:
        return  # it has no size of its own
    code = get_frame(dataset.PixelData, frame, number_of_frames=int(dataset.get("NumberOfFrames") or 1))
    if not code.rstrip(FRAME_PADDING).endswith(END_OF_IMAGE):
        raise RowError("corrupt_image")
    if syntax in JPEG2000TransferSyntaxes:
        j2k = openjpeg.get_parameters(code)
        size = (j2k["rows"], j2k["columns"], j2k["samples_per_pixel"])
    else:
        jpeg = libjpeg.get_parameters(code)
        size = (jpeg["rows"], jpeg["columns"], jpeg["nr_components"])
    if size != (dataset.Rows, dataset.Columns, dataset.SamplesPerPixel):
        raise RowError("corrupt_image")


def _with_frame_groups(dataset: "Dataset", frame: int) -> "Dataset":
    """The data set with the display elements that enhanced multi-frame objects keep per frame (PS3.3 C.7.6.16)."""
    shared = (dataset.get("SharedFunctionalGroupsSequence") or [])[:1]
    own = (dataset.get("PerFrameFunctionalGroupsSequence") or [])[frame : frame + 1]
    for group in (*shared, *own):
        for name in ("PixelValueTransformationSequence", "FrameVOILUTSequence"):
            for item in group.get(name) or []:
                dataset.update(item)
    return dataset


def _shown(stored_HW: np.ndarray, photometric: str, dataset: "Dataset") -> np.ndarray:
    """uint8 [H, W], or [H, W, 3] for a palette."""
    from pydicom.pixels import apply_color_lut

    lowest = int(stored_HW.min())
    values_V = np.arange(lowest, int(stored_HW.max()) + 1, dtype=np.int32)
    if photometric == "PALETTE COLOR":
        table_VC = apply_color_lut(values_V, dataset)
        # PS3.3 C.7.6.3.1.6: 16-bit entries use the full range; 8-bit ones may be stored in 16 bits.
        table_V = table_VC >> 8 if table_VC.max() > 255 else table_VC
    elif photometric in ("MONOCHROME1", "MONOCHROME2"):
        table_V = _grey_levels(values_V, dataset)
        if photometric == "MONOCHROME1":
            table_V = 255 - table_V
    else:
        raise RowError("dicom_encoding")
    return table_V.astype(np.uint8)[np.subtract(stored_HW, lowest, dtype=np.int32)]


def _grey_levels(stored_V: np.ndarray, dataset: "Dataset") -> np.ndarray:
    """The grey level, 0 to 255, that each stored value is shown as."""
    from pydicom.pixels import apply_modality_lut, apply_voi, apply_windowing

    values_V = apply_modality_lut(stored_V, dataset)
    low, high = values_V.min(), values_V.max()
    if dataset.get("VOILUTSequence"):
        descriptor = dataset.VOILUTSequence[0].LUTDescriptor
        low, high = 0, 2 ** descriptor[2] - 1
        descriptor[2] = MAX_BITS  # pydicom indexes a table of 8-bit entries by 8 bits, however many there are
        values_V = apply_voi(values_V, dataset)
    elif dataset.get("WindowCenter") is not None and dataset.get("WindowWidth") is not None:
        try:
            # What lies below and above every window is shown as its ends, however pydicom scales them.
            low, high = apply_windowing(np.array([-np.inf, np.inf]), dataset)
            values_V = apply_windowing(values_V, dataset)
        except ValueError:
            pass  # a width of 0, which some devices write for none: the full range, as without a window
    if not np.isfinite(values_V).all():
        raise RowError("corrupt_image")
    if low == high:
        return np.zeros(len(values_V), np.uint8)
    return np.rint(np.clip((values_V - float(low)) / (float(high) - float(low)), 0, 1) * 255).astype(np.uint8)


def _png(pixels: np.ndarray) -> bytes:
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=PNG_COMPRESS_LEVEL)
    return buffer.getvalue()
