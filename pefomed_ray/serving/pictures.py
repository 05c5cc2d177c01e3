"""Pictures as they come: a `data:` URL or a file, JPEG, PNG or DICOM. The model's side sees JPEG and PNG alone.

A DICOM file becomes the PNG a viewer would show at first, without the patient's data (`data.dicom`); one whose pixels
carry them, or may, is refused. Nothing is ever fetched.
"""

import base64
import binascii
import re

from pefomed_ray.data.dicom import dicom_to_png, is_dicom
from pefomed_ray.data.reasons import RowError
from pefomed_ray.errors import ConfigError
from pefomed_ray.serving.api_error import ApiError

MEDIA_TYPES = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg"}
"""First bytes -> what it is."""
DICOM_TYPE = "application/dicom"

_DATA_URL = re.compile(r"data:(?:image/(?:jpeg|jpg|png)|application/dicom);base64,")
_WHY = {
    "burned_in_annotation": "its pixels show the patient's data, or may (ultrasound, secondary capture); "
    "convert it to PNG once you have seen that they do not",
    "image_too_large": "it is too large",
    "dicom_encoding": "its transfer syntax or colours are not supported",
    "dicom_no_pixels": "it holds no picture",
    "missing_frame": "it has no such frame",
}


def from_data_url(url: str) -> bytes:
    """A JPEG or PNG out of a `data:` URL. Raises ApiError 400 for any other URL, 415 as `shown` does."""
    head = _DATA_URL.match(url)
    if head is None:
        raise ApiError(
            400,
            "messages: an image_url must be a data: URL, data:image/jpeg;base64,... or data:image/png;base64,... "
            f"or data:{DICOM_TYPE};base64,...",
            param="messages",
            code="unsupported_image_url",
        )
    try:
        data = base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise ApiError(
            400, "messages: the base64 data of an image is not valid", param="messages", code="invalid_image"
        ) from None
    return shown(data) if is_dicom(data) else data


def from_file(data: bytes) -> bytes:
    """A JPEG or PNG out of a file's bytes. Raises ApiError 415 for any other format, and as `shown` does."""
    if is_dicom(data):
        return shown(data)
    if media_type(data) is None:
        raise ApiError(415, "the body is neither a JPEG, a PNG nor a DICOM file", code="unsupported_image")
    return data


def media_type(data: bytes) -> str | None:
    """Of a JPEG or PNG, by its first bytes; None for anything else."""
    return next((kind for mark, kind in MEDIA_TYPES.items() if data.startswith(mark)), None)


def shown(dicom: bytes) -> bytes:
    """The picture of a DICOM file as PNG.

    Raises ApiError 415 saying why there is none, or that this endpoint has not the packages for it.
    """
    try:
        return dicom_to_png(dicom)
    except RowError as error:
        why = _WHY.get(error.reason, "it is damaged")
        raise ApiError(415, f"the DICOM file cannot be shown: {why}", code=error.reason) from None
    except ConfigError:
        raise ApiError(
            415, "DICOM files need the extra `dicom` where the endpoint runs", code="unsupported_image"
        ) from None
