"""From a scene to pixels: polygons by Pillow, textures and noise by numpy, the same bytes every time."""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from pefomed_ray.data.phantom.anatomy import Layer, Scene, View

Float = NDArray[np.float32]
OVERSAMPLING = 2
# X-ray stages: sign of the attenuation, and blur as a fraction of the picture (what is thick has soft edges).
STAGES: dict[str, tuple[float, float]] = {
    "soft": (1.0, 0.008),
    "air": (-1.0, 0.009),
    "bone": (1.0, 0.005),
    "vessel": (1.0, 0.006),
    "haze": (1.0, 0.022),
    "sharp": (1.0, 0.008),
}


def draw(scene: Scene, size_px: int) -> NDArray[np.uint8]:
    """Render a scene as uint8 [size_px, size_px], 0 black to 255 white; noise comes from the scene's own seed."""
    rng = np.random.default_rng(scene.seed)
    picture = _film(scene, size_px, rng) if scene.modality == "X-Ray" else _slice(scene, size_px, rng)
    return _finish(picture, scene, rng)


def _slice(scene: Scene, size: int, rng: np.random.Generator) -> Float:
    """CT and MRI: opaque layers. Red holds the tone, green the grain and blue the folds of the brain's surface."""
    side = size * OVERSAMPLING
    canvas = Image.new("RGB", (side, side), (_byte(scene.style.background), 0, 0))
    pen = ImageDraw.Draw(canvas)
    for layer in scene.layers:
        _stroke(pen, layer, scene.view, side, (_byte(layer.tone), _byte(layer.grain), _byte(layer.folds)))
    planes = np.asarray(canvas.reduce(OVERSAMPLING), dtype=np.float32) / 255.0
    picture, grain, folds = planes[..., 0], planes[..., 1], planes[..., 2]
    picture = picture + 0.13 * grain * _clouds(rng, size, 24)
    if folds.any():
        # The zero lines of smooth noise wander like sulci.
        field = _clouds(rng, size, int(25 / scene.view.zoom))
        picture = picture + scene.style.fold_tone * folds * np.exp(-np.square(field / 0.33))
    if scene.style.bias:
        picture = picture * (1.0 + scene.style.bias * _clouds(rng, size, 3))
    return np.asarray(picture, dtype=np.float32)


def _film(scene: Scene, size: int, rng: np.random.Generator) -> Float:
    """X-ray: every stage is a map of attenuation; they add up, and the film answers with an S-shaped curve."""
    total = np.zeros((size, size), dtype=np.float32)
    for stage, (sign, blur) in STAGES.items():
        side = size * OVERSAMPLING if stage in ("bone", "vessel") else size
        canvas = Image.new("L", (side, side), 0)
        pen = ImageDraw.Draw(canvas)
        for layer in scene.layers:
            if layer.stage == stage:
                _stroke(pen, layer, scene.view, side, _byte(layer.tone))
        if side != size:
            canvas = canvas.reduce(OVERSAMPLING)
        total += sign * np.asarray(canvas.filter(ImageFilter.GaussianBlur(blur * size)), dtype=np.float32) / 255.0
    # The trunk gets thicker downwards, so the belly is the brightest part of the film.
    total += (total > 0.1) * np.linspace(-0.03, 0.12, size, dtype=np.float32)[:, None]
    total += 0.025 * _clouds(rng, size, 20) * (total > 0.1) + 0.04 * _clouds(rng, size, 3)
    return np.asarray(1.0 / (1.0 + np.exp(-5.2 * (total - 0.42))), dtype=np.float32)


def _stroke(pen: ImageDraw.ImageDraw, layer: Layer, view: View, side: int, fill: int | tuple[int, int, int]) -> None:
    path = np.asarray(layer.points)
    cos, sin = np.cos(view.angle), np.sin(view.angle)
    turned = path @ np.array([[cos, sin], [-sin, cos]])
    pixels = ((0.5 + np.array([view.shift_x, view.shift_y]) + 0.5 * view.zoom * turned) * side).ravel().tolist()
    if layer.width:
        pen.line(pixels, fill, max(1, round(0.5 * layer.width * view.zoom * side)), joint="curve")
    else:
        pen.polygon(pixels, fill)


def _finish(picture: Float, scene: Scene, rng: np.random.Generator) -> NDArray[np.uint8]:
    style, size = scene.style, picture.shape[0]
    picture = picture + rng.normal(0, style.noise, picture.shape).astype(np.float32) * (picture > 0.01)
    # A film's greys spread around the middle; a slice's background has to stay black.
    pivot = 0.5 if scene.modality == "X-Ray" else 0.0
    picture = np.clip(pivot + style.contrast * (picture - pivot) + style.brightness * (pivot > 0), 0.0, 1.0)
    picture = picture**style.gamma
    image = Image.fromarray((np.clip(picture, 0.0, 1.0) * 255.0).astype(np.uint8))
    if style.blur * size > 0.2:
        image = image.filter(ImageFilter.GaussianBlur(style.blur * size))
    _marks(image, scene, rng)
    return np.asarray(image)


def _marks(image: Image.Image, scene: Scene, rng: np.random.Generator) -> None:
    """The letter on the patient's side, and the black edges of a cassette."""
    size, pen = image.width, ImageDraw.Draw(image)
    if scene.style.border:
        edge = round(scene.style.border * size)
        pen.rectangle((0, 0, edge, size), 0)
        pen.rectangle((0, 0, size, edge // 2), 0)
    if scene.style.marker:
        x = rng.uniform(0.86, 0.92) if scene.style.marker == "L" else rng.uniform(0.04, 0.08)
        y = rng.uniform(0.03, 0.2)
        pen.text((x * size, y * size), scene.style.marker, 235, font=_font(max(8, size // 14)))


@lru_cache(maxsize=8)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _clouds(rng: np.random.Generator, size: int, cells: int) -> Float:
    """Smooth noise [size, size] of about unit spread, with `cells` bumps along a side."""
    coarse = Image.fromarray(rng.standard_normal((cells, cells), dtype=np.float32))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))


def _byte(tone: float) -> int:
    return round(min(max(tone, 0.0), 1.0) * 255.0)
