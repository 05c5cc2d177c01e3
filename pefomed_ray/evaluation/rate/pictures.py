"""Pictures for a browser, with the values that the model was given. Imports torch, so only once the page is served."""

import io

from pefomed_ray.rendering.images import decode_image

JPEG_MAGIC = b"\xff\xd8\xff"


def for_browser(data: bytes) -> tuple[bytes, str]:
    """Bytes and media type of a JPEG or PNG out of shards, whole and in its own size.

    A JPEG stays as it is. A PNG is decoded as for the model: a browser shows 12-bit data in 16 bits as black, and what
    is transparent in the page's colour. Raises DataError where a PNG does not decode.
    """
    if data.startswith(JPEG_MAGIC):
        return data, "image/jpeg"
    file = io.BytesIO()
    decode_image(data).save(file, format="PNG", compress_level=1)
    return file.getvalue(), "image/png"
