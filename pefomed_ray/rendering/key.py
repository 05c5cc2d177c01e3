"""What a base's cached features depend on, read without torch: a stale cache is refused before anything starts."""

from pathlib import Path

from pefomed_ray.artifacts.base import image_spec, tower_digest
from pefomed_ray.artifacts.manifests import FeaturesKey
from pefomed_ray.rendering.templates import template_named

PIXELS_VERSION = 1
"""Raise it when `rendering.images` makes other pixels of an image than before: what was cached until then is stale."""


def features_key(folder: Path, template: str) -> FeaturesKey:
    """The key of a run on the base in `folder`. Raises ConfigError where the template is not known.

    Features come before any text, yet a cache belongs to one rendering: the template is part of the key.
    """
    return FeaturesKey(
        tower_digest=tower_digest(folder),
        image_spec=image_spec(folder),
        pixels_version=PIXELS_VERSION,
        template=template,
        template_digest=template_named(template).digest,
    )
