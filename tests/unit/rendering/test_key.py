"""The key of cached features: what is in it, and that a change of the pixels cannot go unnoticed."""

import io

import numpy as np
import pytest
from PIL import Image

from pefomed_ray.artifacts.base import EMBEDDED_FOLDER
from pefomed_ray.errors import ConfigError
from pefomed_ray.rendering.images import ImageSpec, decode_image, image_pixels
from pefomed_ray.rendering.key import PIXELS_VERSION, features_key
from pefomed_ray.rendering.templates import TEMPLATES


def test_the_key_of_a_base_and_a_template() -> None:
    key = features_key(EMBEDDED_FOLDER, "short")
    assert key.image_spec == ImageSpec(size_px=96).to_json() | {
        "mean": list(ImageSpec(size_px=96).mean),
        "std": list(ImageSpec(size_px=96).std),
    }
    assert (key.template, key.template_digest) == ("short", TEMPLATES["short"].digest)
    other = features_key(EMBEDDED_FOLDER, "paper")
    assert key.model_dump(exclude={"template", "template_digest"}) == other.model_dump(
        exclude={"template", "template_digest"}
    )
    assert key != other
    with pytest.raises(ConfigError, match="shrot"):
        features_key(EMBEDDED_FOLDER, "shrot")


def encoded(picture: Image.Image, form: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    buffer = io.BytesIO()
    picture.save(buffer, form, **({"exif": exif, "quality": 90} if form == "JPEG" else {}))
    return buffer.getvalue()


EXPECTED = {
    "PNG": [25, 58, 95, 128, 50, 83, 120, 153, 79, 112, 149, 182, 104, 137, 174, 207],
    "PNG16": [27, 64, 104, 141, 55, 92, 132, 168, 87, 123, 163, 200, 114, 151, 191, 228],
    "JPEG": [104, 78, 50, 25, 137, 112, 84, 58, 174, 148, 120, 94, 207, 182, 153, 128],
}
"""Values of a picture's 4 x 4 pixels under PIXELS_VERSION 1, by how it is stored: 16 bits scaled, the JPEG turned."""


@pytest.mark.parametrize("stored", ["PNG", "PNG16", "JPEG"])
def test_pixels_are_those_of_their_version(stored: str) -> None:
    """If this fails because images are meant to come out otherwise: raise PIXELS_VERSION, put the new values here."""
    ramp = np.add.outer(np.arange(12) * 9, np.arange(20) * 7)
    picture = Image.fromarray((ramp * 100).astype(np.uint16) if stored == "PNG16" else ramp.astype(np.uint8))
    pixels = image_pixels(decode_image(encoded(picture, stored.removesuffix("16"))), ImageSpec(size_px=4))
    found = pixels[0].flatten().tolist()
    assert PIXELS_VERSION == 1
    assert found == pytest.approx(EXPECTED[stored], abs=1), found
