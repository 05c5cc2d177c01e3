"""Small DICOM files."""

from io import BytesIO

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRBigEndian, ExplicitVRLittleEndian

COMPUTED_RADIOGRAPHY = "1.2.840.10008.5.1.4.1.1.1"


def dataset(pixels: np.ndarray, syntax: UID = ExplicitVRLittleEndian, **elements: object) -> Dataset:
    """A chest film of these stored values, [H, W], [frames, H, W] or [H, W, 3]; `elements` override or add."""
    made = Dataset()
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = syntax
    made.SOPClassUID = COMPUTED_RADIOGRAPHY
    made.SOPInstanceUID = "1.2.3"
    made.Modality = "CR"
    colour = pixels.shape[-1] == 3 and pixels.ndim == 3
    made.Rows, made.Columns = pixels.shape[:2] if colour else pixels.shape[-2:]
    if pixels.ndim == 3 and not colour:
        made.NumberOfFrames = len(pixels)
    made.SamplesPerPixel = 3 if colour else 1
    made.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    if colour:
        made.PlanarConfiguration = 0
    made.BitsAllocated = made.BitsStored = pixels.dtype.itemsize * 8
    made.PixelRepresentation = int(pixels.dtype.kind == "i")
    ordered = pixels.astype(pixels.dtype.newbyteorder(">")) if syntax == ExplicitVRBigEndian else pixels
    made.add_new(
        "PixelData", "OW" if pixels.dtype.itemsize == 2 else "OB", ordered.tobytes() + bytes(pixels.nbytes % 2)
    )
    for name, value in elements.items():
        setattr(made, name, value)
    made.HighBit = made.BitsStored - 1
    return made


def written(made: Dataset) -> bytes:
    """As a file's bytes."""
    buffer = BytesIO()
    made.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def dicom(pixels: np.ndarray, syntax: UID = ExplicitVRLittleEndian, **elements: object) -> bytes:
    """`dataset` as a file's bytes."""
    return written(dataset(pixels, syntax, **elements))
