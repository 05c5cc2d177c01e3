"""The chest X-ray: layers of attenuation, seen from the front."""

from typing import Literal

import numpy as np

from pefomed_ray.data.phantom.anatomy import SIGN, Builder, Finding, Height, Points, Side, arc, blob, smooth


def chest_film(b: Builder) -> None:
    """Paint body, lungs, heart, bones and at most two kinds of finding."""
    rng = b.rng
    width, top = rng.uniform(0.7, 0.84), rng.uniform(-0.82, -0.68)
    base: dict[Side, float] = {"Right": rng.uniform(0.3, 0.52), "Left": rng.uniform(0.36, 0.58)}
    shoulder = rng.uniform(-0.68, -0.5)
    outline = [
        (0.2, -1.4),
        (0.24, top - 0.22),
        (1.0, shoulder - 0.2),
        (1.35, shoulder + 0.3),
        (width + 0.2, 0.0),
        (width + rng.uniform(0.08, 0.28), 1.4),
    ]
    outline += [(-x, y) for x, y in reversed(outline)]
    b.ray("soft", rng.uniform(0.52, 0.62), smooth(outline))
    lungs: dict[Side, Points] = {s: _lung(rng, s, width, top, base[s]) for s in ("Left", "Right")}
    for side, points in lungs.items():
        b.ray("air", rng.uniform(0.36, 0.46), points)
        b.record("Lung", points, side, 0.2)
        _vessels(b, SIGN[side], width, top, base[side])
    b.ray("air", 0.12, blob(rng, rng.normal(0, 0.02), top - 0.1, 0.055, 0.42, wobble=0.02))
    if b.chance(0.6):
        b.ray("air", rng.uniform(0.15, 0.3), blob(rng, 0.42, base["Left"] + 0.28, 0.17, 0.1, wobble=0.15))
    _bones(b, width, top, shoulder)
    if b.chance(0.35):
        for sign in (-1, 1):
            b.ray("haze", 0.1, blob(rng, sign * width * 0.6, base["Left"] - 0.02, 0.34, 0.36))
    _findings(b, width, top, base)


def _lung(rng: np.random.Generator, side: Side, width: float, top: float, base: float) -> Points:
    sign = SIGN[side]

    def r() -> float:
        return float(rng.normal(0, 0.02))

    points = [
        (0.3 + r(), top),
        (0.5 + r(), top + 0.12),
        (width - 0.08, top + 0.5),
        (width, 0.1),
        (width + 0.02, base),
        (width - 0.02, base + 0.18),
        (0.6 * width, base - 0.02),
        (0.36, base - 0.05),
        (0.14, base + 0.1),
        (0.12 + r(), 0.1),
        (0.12, -0.3),
        (0.14 + r(), top + 0.15),
    ]
    return smooth([(sign * x, y) for x, y in points])


def _vessels(b: Builder, sign: int, width: float, top: float, base: float) -> None:
    """Bright branches that leave the hilum and thin out."""
    rng = b.rng
    for _ in range(int(rng.integers(14, 24))):
        turn, reach = rng.uniform(-1.35, 1.35), rng.uniform(0.25, 0.55)
        x, y = rng.uniform(0.14, 0.22), -0.05 + rng.normal(0, 0.05)
        end = (min(x + reach * np.cos(turn), width - 0.08), float(np.clip(y + reach * np.sin(turn), top, base)))
        middle = (0.5 * (x + end[0]), 0.5 * (y + end[1]) + rng.normal(0, 0.03))
        b.ray("vessel", rng.uniform(0.08, 0.16), ((sign * x, y), (sign * middle[0], middle[1])), 0.035)
        b.ray("vessel", rng.uniform(0.06, 0.11), ((sign * middle[0], middle[1]), (sign * end[0], end[1])), 0.018)
    b.ray("haze", 0.1, blob(rng, sign * 0.2, -0.02, 0.1, 0.2))


def _bones(b: Builder, width: float, top: float, shoulder: float) -> None:
    rng = b.rng
    b.ray("haze", rng.uniform(0.08, 0.16), blob(rng, 0, 0.2, 0.11, 1.6, wobble=0.01, power=4))
    tone, step, tilt = rng.uniform(0.06, 0.13), rng.uniform(0.145, 0.175), rng.uniform(0.08, 0.2)
    for sign in (-1, 1):
        for rib in range(9):
            y, reach = top + 0.08 + rib * step, width * min(1.0, 0.62 + 0.14 * rib)
            path = [
                (sign * 0.08, y - 0.02),
                (sign * reach * 0.45, y - 0.05),
                (sign * reach * 0.85, y + tilt * 0.6),
                (sign * (reach + 0.03), y + tilt + 0.1),
            ]
            b.ray("bone", tone, tuple(path), 0.045)
            front = [(sign * (reach + 0.02), y + tilt + 0.1), (sign * reach * 0.6, y + tilt + 0.28)]
            b.ray("bone", tone * 0.6, tuple(front), 0.05)
        b.ray("bone", tone + 0.1, ((sign * 0.07, top + 0.2), (sign * 0.35, top + 0.1), (sign * 0.95, top)), 0.06)
        b.ray("bone", 0.18, blob(rng, sign * (width + 0.26), shoulder + 0.02, 0.14, 0.14))
        b.ray("bone", 0.18, ((sign * (width + 0.3), shoulder + 0.1), (sign * (width + 0.45), 0.5)), 0.14)
        b.ray("bone", 0.1, arc(sign * (width + 0.02), -0.35, 0.1, 0.35, -1.0, 1.6), 0.04)


def _findings(b: Builder, width: float, top: float, base: dict[Side, float]) -> None:
    rng = b.rng
    big_heart = b.chance(0.24)
    reach = rng.uniform(0.54, 0.64) * width if big_heart else rng.uniform(0.33, 0.42) * width
    heart = blob(rng, 0.12 + 0.2 * reach, 0.5 * (base["Left"] + 0.08), reach, reach * 0.82, 0.45, 0.03)
    mediastinum = [(-0.1, -1.0), (0.1, -1.0), (0.13, -0.3), (0.2, 0.2), (-0.17, 0.2), (-0.15, -0.3)]
    b.ray("soft", rng.uniform(0.68, 0.76), smooth(mediastinum))
    b.ray("soft", rng.uniform(0.72, 0.8), heart)
    b.ray("soft", 0.76, blob(rng, 0.13, -0.34, 0.11, 0.12))
    # The lungs were taken out of the beam over the heart too; put the heart back in front of them.
    b.ray("sharp", rng.uniform(0.26, 0.34), heart)
    b.record("Heart", heart, "", 0.8)
    if big_heart:
        b.findings.append(Finding("Cardiomegaly", "Heart", x=0.1, y=0.3, color="White"))
    if not b.chance(0.62 if not big_heart else 0.2):
        return
    side: Side = "Left" if b.chance(0.5) else "Right"
    kind = str(rng.choice(["Mass", "Nodule", "Pneumonia", "Effusion", "Pneumothorax", "Atelectasis"]))
    if kind == "Effusion":
        _effusion(b, side, width, base[side])
    elif kind == "Pneumothorax":
        _pneumothorax(b, side, width, top)
    else:
        _opacity(b, kind, side, width, top, base[side])


def _effusion(b: Builder, side: Side, width: float, base: float) -> None:
    level, sign = b.rng.uniform(-0.05, 0.2), SIGN[side]
    points = [
        (0.1, level + 0.22),
        (0.35, level + 0.16),
        (width - 0.1, level),
        (width + 0.03, level - 0.25),
        (width + 0.02, base + 0.18),
        (0.6 * width, base),
        (0.14, base + 0.1),
    ]
    b.ray("sharp", 0.42, tuple((sign * x, y) for x, y in points))
    b.ray("vessel", 0.0, tuple((sign * x, y) for x, y in points))
    b.findings.append(Finding("Effusion", "Lung", side, "Lower", sign * width * 0.6, level + 0.25, color="White"))


def _pneumothorax(b: Builder, side: Side, width: float, top: float) -> None:
    """Air without vessels outside a lung that has shrunk towards the hilum, with the pleural line between them."""
    sign, depth = SIGN[side], b.rng.uniform(0.34, 0.46)
    edge = [(0.2, top + 0.22), (width - depth, top + 0.4), (width - depth, 0.0), (width - 0.1, 0.35)]
    outer = [(width + 0.01, 0.3), (width - 0.01, 0.0), (width - 0.1, top + 0.5), (0.52, top + 0.12), (0.28, top + 0.02)]
    gap = tuple((sign * x, y) for x, y in edge + outer)
    b.ray("vessel", 0.0, gap)
    b.ray("bone", 0.02, gap)
    b.ray("air", 0.64, gap)
    b.ray("vessel", 0.3, tuple((sign * x, y) for x, y in edge), 0.03)
    b.ray("haze", 0.16, blob(b.rng, sign * 0.27, -0.05, 0.17, 0.4))
    b.findings.append(Finding("Pneumothorax", "Lung", side, "Upper", sign * 0.55, -0.4, color="Black"))


def _opacity(b: Builder, kind: str, side: Side, width: float, top: float, base: float) -> None:
    rng, sign = b.rng, SIGN[side]
    height: Height = "Upper" if b.chance(0.5) else "Lower"
    # The left lower lung has the heart in front of its inner half.
    x = sign * (rng.uniform(0.36, 0.5) if height == "Upper" or side == "Right" else rng.uniform(0.52, 0.6))
    y = rng.uniform(top + 0.27, top + 0.36) if height == "Upper" else rng.uniform(base - 0.24, base - 0.14)
    if kind == "Pneumonia":
        for _ in range(7):
            spread = rng.normal(0, 0.1, 2)
            b.ray("haze", rng.uniform(0.3, 0.42), blob(rng, x + spread[0], y + spread[1], 0.11, 0.1, wobble=0.25))
        b.findings.append(Finding(kind, "Lung", side, height, x, y, color="White"))
    elif kind == "Atelectasis":
        # A collapsed lobe: a dense wedge that points at the hilum and fills the apex or the base.
        far = (top - 0.02, top + 0.42) if height == "Upper" else (base - 0.32, base + 0.1)
        wedge = (
            (sign * 0.16, 0.5 * sum(far) + 0.08),
            (sign * 0.3, far[0]),
            (sign * (width - 0.06), far[0] + 0.1),
            (sign * (width - 0.02), far[1]),
            (sign * 0.4, far[1] - 0.05),
        )
        b.ray("sharp", rng.uniform(0.28, 0.36), wedge)
        b.findings.append(Finding(kind, "Lung", side, height, x, y, color="White"))
    else:
        _nodules(b, kind, side, height, x, y)


def _nodules(b: Builder, kind: str, side: Side, height: Height, x: float, y: float) -> None:
    rng = b.rng
    if kind == "Mass":
        radius, irregular = b.spot("Large"), b.chance(0.5)
        b.ray("sharp", 0.4, blob(rng, x, y, radius, radius, wobble=0.28 if irregular else 0.02))
        shape: Literal["Irregular", "Circular"] = "Irregular" if irregular else "Circular"
        b.findings.append(Finding(kind, "Lung", side, height, x, y, "Large", shape, "White"))
        return
    count = int(rng.integers(1, 4))
    for place in range(count):
        radius, turn = b.spot("Small"), 2.1 * place + rng.uniform(0, 0.3)
        away = 0.0 if count == 1 else 0.17
        b.ray("sharp", 0.42, blob(rng, x + away * np.cos(turn), y + away * np.sin(turn), radius, radius, wobble=0.02))
    b.findings.append(Finding("Nodule", "Lung", side, height, x, y, "Small", "Circular", "White", count))
