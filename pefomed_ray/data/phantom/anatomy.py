"""What a phantom is made of: organs, findings, and the layers that draw them.

Two frames are used. The body frame has its origin in the middle of the body, x to the right of the picture and y down,
and the body reaches about -1..1 in x. Radiology shows the patient from the front or from the feet, so the patient's
left is at positive x. `View` carries the body frame into the picture.

Sides are the patient's wherever they qualify an anatomical noun ("Left Lung", "Upper Right Lobe"). A bare place
("Left", "Upper Left") is a place in the picture. SLAKE uses both, in the same way.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Points = tuple[tuple[float, float], ...]
Side = Literal["", "Left", "Right"]
Height = Literal["", "Upper", "Lower"]
Modality = Literal["CT", "MRI", "X-Ray"]
Region = Literal["Head", "Neck", "Chest", "Abdomen", "Pelvic Cavity"]
Weighting = Literal["", "T1", "T2"]
Marker = Literal["", "L", "R"]
Stage = Literal["paint", "air", "soft", "bone", "vessel", "haze", "sharp"]
SIGN: dict[Side, int] = {"Left": 1, "Right": -1}


@dataclass(frozen=True)
class Layer:
    """One polygon (or, when `width` > 0, a line of that width in body units) of a tone in 0..1.

    In a CT or MRI slice layers cover each other in order ("paint"). In an X-ray the tone is attenuation that each
    `stage` adds to, or for "air" takes from, the beam. `grain` and `folds` (0..1) are amounts of texture.
    """

    points: Points
    tone: float
    stage: Stage = "paint"
    width: float = 0.0
    grain: float = 0.0
    folds: float = 0.0


@dataclass(frozen=True)
class Organ:
    """An organ that is plainly visible: centre and visible area in body units, tone in 0..1 as drawn.

    A gut is several organs of one name, a loop each.
    """

    name: str
    side: Side
    x: float
    y: float
    area: float
    tone: float


@dataclass(frozen=True)
class Finding:
    """An abnormality: the organ it sits in, the patient's side and height there, and how it looks.

    `count` lesions of one kind share one finding. `size` and `shape` are "" where they would be a matter of taste.
    """

    name: str
    organ: str
    side: Side = ""
    height: Height = ""
    x: float = 0.0
    y: float = 0.0
    size: Literal["", "Small", "Large"] = ""
    shape: Literal["", "Circular", "Oval", "Irregular"] = ""
    color: Literal["", "White", "Gray", "Black"] = ""
    count: int = 1


@dataclass(frozen=True)
class View:
    """Body frame to picture: picture = 0.5 + shift + zoom / 2 * rotated body point, in fractions of the picture."""

    zoom: float
    angle: float
    shift_x: float
    shift_y: float


@dataclass(frozen=True)
class Style:
    """How the machine and the screen rendered it: everything that no question may depend on."""

    background: float
    contrast: float
    brightness: float
    gamma: float
    noise: float
    blur: float
    bias: float
    fold_tone: float
    border: float
    marker: Marker


@dataclass(frozen=True)
class Scene:
    """One phantom: what is true of it (first fields) and how it is drawn (last four)."""

    modality: Modality
    plane: Literal["Transverse Plane", "Coronal Plane"]
    region: Region
    weighting: Weighting
    organs: tuple[Organ, ...]
    findings: tuple[Finding, ...]
    layers: tuple[Layer, ...]
    view: View
    style: Style
    seed: int

    def has(self, organ: str) -> bool:
        """Whether an organ of that name, on any side, is in the picture."""
        return any(o.name == organ for o in self.organs)


def blob(
    rng: np.random.Generator,
    x: float,
    y: float,
    rx: float,
    ry: float,
    angle: float = 0.0,
    wobble: float = 0.06,
    power: float = 2.0,
) -> Points:
    """A wobbling superellipse: centre, radii (body units), angle in radians; 28 points."""
    turn = np.linspace(0.0, 2.0 * np.pi, 28, endpoint=False)
    cos, sin = np.cos(turn), np.sin(turn)
    radius = np.ones_like(turn)
    for order in (2, 3, 5):
        radius += wobble * rng.normal() * np.cos(order * turn + rng.uniform(0, 6.28)) / np.sqrt(order)
    radius = np.clip(radius, 0.6, 1.5)
    px = rx * radius * np.sign(cos) * np.abs(cos) ** (2.0 / power)
    py = ry * radius * np.sign(sin) * np.abs(sin) ** (2.0 / power)
    return _tuples(x + px * np.cos(angle) - py * np.sin(angle), y + px * np.sin(angle) + py * np.cos(angle))


def arc(x: float, y: float, rx: float, ry: float, start: float, stop: float, count: int = 10) -> Points:
    """Points along an ellipse from angle `start` to `stop` (radians, 0 at the right of the picture, down positive)."""
    turn = np.linspace(start, stop, count)
    return _tuples(x + rx * np.cos(turn), y + ry * np.sin(turn))


def smooth(points: list[tuple[float, float]], rounds: int = 3) -> Points:
    """Chaikin's corner cutting of a closed polygon: every round doubles the points."""
    path = np.asarray(points)
    for _ in range(rounds):
        after = np.roll(path, -1, axis=0)
        path = np.stack([0.75 * path + 0.25 * after, 0.25 * path + 0.75 * after], axis=1).reshape(-1, 2)
    return _tuples(path[:, 0], path[:, 1])


def area_of(points: Points) -> float:
    """Area of a polygon, by the shoelace formula, in squared body units."""
    path = np.asarray(points)
    after = np.roll(path, -1, axis=0)
    return float(abs(np.sum(path[:, 0] * after[:, 1] - path[:, 1] * after[:, 0])) / 2.0)


def _tuples(x: NDArray[np.float64], y: NDArray[np.float64]) -> Points:
    return tuple(zip(x.tolist(), y.tolist(), strict=True))


class Builder:
    """Collects the layers, organs and findings of one scene while a layout function paints it."""

    def __init__(self, rng: np.random.Generator, tones: dict[str, float], zoom: float) -> None:
        self.rng = rng
        self.tones = tones
        self.zoom = zoom
        self.layers: list[Layer] = []
        self.organs: list[Organ] = []
        self.outlines: list[Points] = []
        self.findings: list[Finding] = []

    def chance(self, probability: float) -> bool:
        """True with that probability."""
        return bool(self.rng.random() < probability)

    def tone(self, tissue: str) -> float:
        """The tissue's tone in this modality, a little different each time."""
        return float(np.clip(self.tones[tissue] + self.rng.normal(0, 0.015), 0.0, 1.0))

    def paint(self, tissue: str, points: Points, width: float = 0.0, grain: float = 0.0, folds: float = 0.0) -> None:
        """Cover what is below with a tissue (CT and MRI)."""
        self.layers.append(Layer(points, self.tone(tissue), "paint", width, grain, folds))

    def ray(self, stage: Stage, tone: float, points: Points, width: float = 0.0) -> None:
        """Add attenuation to a stage (X-ray)."""
        self.layers.append(Layer(points, tone, stage, width))

    def organ(self, name: str, tissue: str, points: Points, side: Side = "", grain: float = 0.2) -> None:
        """Paint an organ and put it on record."""
        self.paint(tissue, points, grain=grain)
        self.record(name, points, side, self.layers[-1].tone)

    def record(self, name: str, points: Points, side: Side = "", tone: float = 0.5) -> None:
        """Put an organ on record; what is recorded later hides it where they overlap."""
        x, y = np.mean(np.asarray(points), axis=0)
        self.organs.append(Organ(name, side, float(x), float(y), area_of(points), tone))
        self.outlines.append(points)

    def visible_organs(self) -> tuple[Organ, ...] | None:
        """The organs with the areas that later ones leave of them; None if one is neither seen nor quite hidden."""
        scale, side = 48.0, 128
        owner = Image.new("L", (side, side), 0)
        pen = ImageDraw.Draw(owner)
        for index, outline in enumerate(self.outlines):
            pen.polygon((np.asarray(outline) * scale + side / 2).ravel().tolist(), index + 1)
        pixels = np.bincount(np.asarray(owner).ravel(), minlength=len(self.organs) + 1)[1:]
        seen = [replace(o, area=float(n) / scale**2) for o, n in zip(self.organs, pixels, strict=True)]
        kept = tuple(o for o, whole in zip(seen, self.organs, strict=True) if o.area > 0.3 * whole.area)
        names = {(o.name, o.side) for o in kept}
        return kept if all((o.name, o.side) in names for o in seen) else None

    def spot(self, size: Literal["Small", "Large"]) -> float:
        """A lesion's radius in body units: 6.5-8.5 % of the picture's width across if small, 15-21 % if large."""
        low, high = (0.066, 0.085) if size == "Small" else (0.15, 0.21)
        return float(self.rng.uniform(low, high) / self.zoom)
