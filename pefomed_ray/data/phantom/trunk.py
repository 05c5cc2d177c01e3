"""Chest, abdomen and pelvis slices, CT and MRI: the liver is on the left of the picture, the spleen on the right."""

from typing import Literal

import numpy as np

from pefomed_ray.data.phantom.anatomy import SIGN, Builder, Finding, Height, Points, Side, arc, blob
from pefomed_ray.data.phantom.head import spine

SIDES: tuple[Side, Side] = ("Left", "Right")
# How likely each organ is, level by level; every organ is missing often enough to be worth asking about.
ABDOMEN_ODDS: dict[str, dict[str, float]] = {
    "high": {
        "Liver": 0.85,
        "Spleen": 0.6,
        "Stomach": 0.55,
        "Lung": 0.35,
        "Kidney": 0.1,
        "Small Bowel": 0.1,
        "Colon": 0.2,
    },
    "middle": {
        "Liver": 0.65,
        "Spleen": 0.4,
        "Stomach": 0.25,
        "Lung": 0.0,
        "Kidney": 0.85,
        "Small Bowel": 0.55,
        "Colon": 0.45,
    },
    "low": {
        "Liver": 0.15,
        "Spleen": 0.05,
        "Stomach": 0.1,
        "Lung": 0.0,
        "Kidney": 0.35,
        "Small Bowel": 0.9,
        "Colon": 0.75,
    },
}


def chest(b: Builder, modality: str) -> None:
    """Two lungs around the heart or the great vessels, sometimes the dome of the liver, sometimes a tumour."""
    rng, ry = b.rng, _torso(b, "muscle", ribs=True)
    level = rng.choice(["arch", "heart", "dome"], p=[0.3, 0.45, 0.25])
    width = rng.uniform(0.3, 0.36)
    lungs: dict[Side, Points] = {}
    for side in SIDES:
        x, tall = SIGN[side] * rng.uniform(0.41, 0.45), ry * rng.uniform(0.6, 0.7)
        lungs[side] = blob(rng, x, -0.02, width, tall, SIGN[side] * -0.08, 0.04, 2.4)
        b.organ("Lung", "lung", lungs[side], side, 0.1)
        _lung_vessels(b, x, width, tall)
    b.paint("muscle", blob(rng, 0, 0.1, 0.2, 0.5 * ry))
    if level == "arch":
        b.paint("heart", blob(rng, 0.06, -0.16, 0.14, 0.26, 0.3, 0.1), grain=0.1)
        b.paint("blood", blob(rng, -0.1, -0.2, 0.08, 0.09))
        b.organ("Trachea", "airway", blob(rng, 0, 0.03, 0.075, 0.075, wobble=0.06), grain=0.0)
    else:
        size = rng.uniform(0.3, 0.38)
        heart = blob(rng, 0.12, -0.16, size, size * 0.78, 0.4, 0.06)
        b.organ("Heart", "heart", heart, "", 0.15)
        for x, y in ((0.02, -0.22), (0.2, -0.1)):
            b.paint("blood", blob(rng, x, y, size * 0.4, size * 0.3, 0.5, 0.1), grain=0.1)
    if level == "dome":
        b.organ("Liver", "liver", blob(rng, -0.44, 0.0, width * 0.86, ry * 0.44, 0, 0.06), "", 0.25)
    b.paint("blood", blob(rng, 0.13, 0.27, 0.075, 0.075, wobble=0.03))
    spine(b, 0.42 * ry / 0.7, 0.85)
    if modality == "CT" and b.chance(0.55):
        _lung_lesion(b, "Left" if level == "dome" or b.chance(0.5) else "Right", ry, level != "arch")


def _lung_vessels(b: Builder, x: float, width: float, tall: float) -> None:
    rng = b.rng
    for _ in range(36):
        turn, reach = rng.uniform(0, 6.28), rng.uniform(0.1, 0.85) ** 0.7
        cx, cy, size = x + width * reach * np.cos(turn), -0.02 + tall * reach * np.sin(turn), rng.uniform(0.006, 0.018)
        b.paint("vessel", ((cx, cy), (cx + 0.03 * rng.normal(), cy + 0.03 * rng.normal())), size)


def _lung_lesion(b: Builder, side: Side, ry: float, heart: bool) -> None:
    rng = b.rng
    height: Height = "Upper" if b.chance(0.5) else "Lower"
    x = SIGN[side] * (rng.uniform(0.52, 0.58) if heart and side == "Left" else rng.uniform(0.42, 0.54))
    y = (-1 if height == "Upper" else 1) * rng.uniform(0.32, 0.42) * ry - 0.02
    if b.chance(0.5):
        radius = b.spot("Large") * 0.9
        b.paint("tumor", blob(rng, x, y, radius, radius, wobble=0.3), grain=0.2)
        b.findings.append(Finding("Lung Cancer", "Lung", side, height, x, y, "Large", "Irregular", "White"))
    else:
        radius = b.spot("Small")
        b.paint("tumor", blob(rng, x, y, radius, radius, wobble=0.02))
        b.findings.append(Finding("Nodule", "Lung", side, height, x, y, "Small", "Circular", "White"))


def _torso(b: Builder, inside: str, ribs: bool) -> float:
    """Skin, fat, the wall with its ribs, and the cavity; returns the half height of the body."""
    rng = b.rng
    ry, fat = rng.uniform(0.6, 0.76), rng.uniform(0.03, 0.14)
    for tissue, inset in (("skin", 0.0), ("fat", 0.02), ("muscle", fat), (inside, fat + 0.08)):
        grain = 0.15 if tissue == "fat" else 0.4
        b.paint(tissue, blob(rng, 0, 0, 1 - inset, ry - inset, wobble=0.012, power=2.25), grain=grain)
    for sign in (-1, 1):
        b.paint("muscle", blob(rng, sign * 0.2, 0.62 * ry, 0.19, 0.16), grain=0.5)
    if ribs:
        for turn in np.arange(-0.9, 4.0, rng.uniform(0.42, 0.55)) + rng.uniform(0, 0.3):
            radius = 1 - fat - 0.05
            b.paint("bone", arc(0, 0, radius, ry - fat - 0.05, turn, turn + rng.uniform(0.1, 0.22), 4), 0.05)
    return float(ry)


def abdomen(b: Builder, weighting: str) -> None:
    """One of three levels, each with its own odds for every organ, so that only the picture tells what is there."""
    level = str(b.rng.choice(["high", "middle", "low"], p=[0.42, 0.4, 0.18]))
    here = {name for name, chance in ABDOMEN_ODDS[level].items() if b.chance(chance)}
    if not here & {"Liver", "Spleen", "Kidney", "Small Bowel"}:
        here.add("Liver")
    ry = _torso(b, "fat", level != "low")
    rng = b.rng
    if "Lung" in here:
        for side in SIDES:
            b.organ("Lung", "lung", blob(rng, SIGN[side] * 0.44, 0.1, 0.4, 0.44 * ry / 0.68, 0, 0.03), side, 0.1)
    b.paint("blood", blob(rng, 0.1, 0.17, 0.075, 0.075, wobble=0.03))
    b.paint("blood", blob(rng, -0.12, 0.14, 0.08, 0.06, wobble=0.05))
    if level != "high":
        for sign in (-1, 1):
            b.paint("muscle", blob(rng, sign * 0.22, 0.36, 0.09, 0.12), grain=0.3)
    if "Colon" in here:
        _colon(b, ry)
    if "Small Bowel" in here:
        _small_bowel(b, -0.02 if "Liver" not in here else 0.2, -0.18)
    if "Liver" in here:
        _liver(b, level, ry)
    if "Stomach" in here:
        _stomach(b)
    if "Spleen" in here:
        spleen = blob(rng, rng.uniform(0.6, 0.66), 0.14, 0.15, rng.uniform(0.24, 0.32), -0.25, 0.06)
        b.organ("Spleen", "spleen", spleen, "", 0.15)
    if "Kidney" in here:
        _kidneys(b, weighting)
    spine(b, 0.4 * ry / 0.7, 0.85)


def _liver(b: Builder, level: str, ry: float) -> None:
    rng, big = b.rng, level == "high"
    x, rx, tall = (-0.42, 0.42, 0.46) if big else (-0.54, rng.uniform(0.24, 0.3), 0.36)
    tall *= ry / 0.7
    y = rng.uniform(-0.06, 0.0)
    b.organ("Liver", "liver", blob(rng, x, y, rx, tall, 0.0, 0.05), "", 0.3)
    if big and b.chance(0.75):
        lobe = blob(rng, -0.05, -0.26, rng.uniform(0.3, 0.45), 0.17, 0.1, 0.06)
        b.paint("liver", lobe, grain=0.3)
        b.record("Liver", lobe, "", b.layers[-1].tone)
    for _ in range(6 if big else 3):
        cx, cy = x + rng.uniform(-0.6, 0.6) * rx, rng.uniform(-0.6, 0.5) * tall
        b.paint("spleen", ((cx, cy), (cx + 0.07 * rng.normal(), cy + 0.05)), 0.02)
    if not b.chance(0.42):
        return
    # A cancer needs the wide liver of the high level; kidneys hide the lower end of the narrow one.
    if big and b.chance(0.6):
        radius, round_one = b.spot("Large") * 0.95, b.chance(0.5)
        cx, cy = x + rng.uniform(-0.05, 0.06), y + rng.uniform(-0.06, 0.06)
        points = blob(rng, cx, cy, radius, radius, wobble=0.03 if round_one else 0.25)
        b.paint("lesion", points, grain=0.5)
        shape: Literal["Circular", "Irregular"] = "Circular" if round_one else "Irregular"
        b.findings.append(Finding("Liver Cancer", "Liver", x=cx, y=cy, size="Large", shape=shape))
        return
    count = int(rng.integers(1, 4))
    for place in range(count):
        cy = y + (place - (count - 1) / 2) * 0.24 - (0.0 if big else 0.1)
        radius = b.spot("Small")
        b.paint("core", blob(rng, x + rng.uniform(-0.06, 0.06), cy, radius, radius, wobble=0.03))
    b.findings.append(Finding("Liver Nodule", "Liver", x=x, y=y, size="Small", shape="Circular", count=count))


def _stomach(b: Builder) -> None:
    rng = b.rng
    x, y, rx, ry = rng.uniform(0.3, 0.4), rng.uniform(-0.3, -0.2), rng.uniform(0.2, 0.27), rng.uniform(0.16, 0.22)
    b.organ("Stomach", "bowel", blob(rng, x, y, rx, ry, 0.3, 0.08), "", 0.1)
    b.paint("stomach", blob(rng, x, y, rx * 0.86, ry * 0.84, 0.3, 0.08), grain=0.4)
    b.paint("air", blob(rng, x, y - ry * 0.38, rx * 0.66, ry * 0.4, 0.1, 0.08))


def _kidneys(b: Builder, weighting: str) -> None:
    rng = b.rng
    sides = SIDES if b.chance(0.72) else ((SIDES[0],) if b.chance(0.5) else (SIDES[1],))
    for side in sides:
        sign = SIGN[side]
        x, y, rx = sign * rng.uniform(0.38, 0.44), rng.uniform(0.22, 0.3), rng.uniform(0.13, 0.16)
        b.organ("Kidney", "kidney", blob(rng, x, y, rx, rx * 1.3, sign * -0.3, 0.04), side, 0.15)
        b.paint("sinus", blob(rng, x - sign * 0.05, y, rx * 0.45, rx * 0.55, 0, 0.2))
    if b.chance(0.3):
        side = sides[int(rng.integers(len(sides)))]
        radius = b.spot("Small")
        x, y = SIGN[side] * 0.5, 0.3
        b.paint("cyst", blob(rng, x, y, radius, radius, wobble=0.02))
        b.findings.append(
            Finding(
                "Kidney Cyst", "Kidney", side, "", x, y, "Small", "Circular", "White" if weighting == "T2" else "Black"
            )
        )


def _small_bowel(b: Builder, x: float, y: float) -> None:
    """A heap of short bent tubes."""
    rng, contents = b.rng, "contrast" if b.chance(0.35) else "fluid"
    for _ in range(int(rng.integers(9, 15))):
        cx, cy = x + rng.uniform(-0.36, 0.36), y + rng.uniform(-0.2, 0.2)
        rx, ry, angle = rng.uniform(0.08, 0.13), rng.uniform(0.055, 0.075), rng.uniform(0, 3)
        b.organ("Small Bowel", "bowel", blob(rng, cx, cy, rx, ry, angle, 0.1), grain=0.0)
        b.paint(contents if b.chance(0.6) else "bowel", blob(rng, cx, cy, rx * 0.65, ry * 0.6, angle, 0.1), grain=0.5)


def _colon(b: Builder, ry: float) -> None:
    """Wide loops with gas along the front and the flanks."""
    rng = b.rng
    places = [(-0.66, 0.05), (0.66, 0.0), (-0.34, -0.42 * ry / 0.7), (0.05, -0.46 * ry / 0.7), (0.4, -0.4 * ry / 0.7)]
    keep = [place for place in places if b.chance(0.75)] or places[:2]
    for x, y in keep:
        size = rng.uniform(0.1, 0.14)
        b.organ("Colon", "bowel", blob(rng, x, y, size, size * 0.9, 0, 0.1), grain=0.0)
        b.paint("air", blob(rng, x, y, size * 0.74, size * 0.64, 0, 0.12))
        b.paint("stomach", blob(rng, x, y + size * 0.4, size * 0.55, size * 0.25, 0, 0.2), grain=0.5)


def pelvis(b: Builder) -> None:
    """Between the iliac wings (high) or between the hip joints (low)."""
    rng, low = b.rng, b.chance(0.58)
    odds = (
        {"Bladder": 0.7, "Rectum": 0.65, "Small Bowel": 0.15, "Colon": 0.1}
        if low
        else {"Bladder": 0.15, "Rectum": 0.2, "Small Bowel": 0.75, "Colon": 0.6}
    )
    here = {name for name, chance in odds.items() if b.chance(chance)} or {"Rectum"}
    ry = _torso(b, "fat", False)
    for sign in (-1, 1):
        b.paint("muscle", blob(rng, sign * 0.52, 0.36 * ry / 0.7, 0.3, 0.18, sign * -0.5), grain=0.5)
    if low:
        _hips(b)
    else:
        for sign in (-1, 1):
            b.paint("muscle", blob(rng, sign * 0.42, -0.02, 0.13, 0.26, sign * 0.5), grain=0.4)
            b.paint("muscle", blob(rng, sign * 0.66, 0.05, 0.1, 0.3, sign * 0.5), grain=0.4)
            b.paint("bone", ((sign * 0.66, -0.24), (sign * 0.55, 0.0), (sign * 0.26, 0.34)), rng.uniform(0.06, 0.09))
        spine(b, 0.32, 1.1)
        b.paint("bone", blob(rng, 0, 0.36, 0.24, 0.1, 0, 0.1))
        b.paint("marrow", blob(rng, 0, 0.36, 0.2, 0.07, 0, 0.1), grain=0.4)
    if "Small Bowel" in here:
        _small_bowel(b, 0.0, -0.2)
    if "Colon" in here:
        _colon(b, ry * 0.75)
    if "Rectum" in here:
        size = rng.uniform(0.11, 0.14)
        b.organ("Rectum", "bowel", blob(rng, 0, 0.27, size, size * 0.85, 0, 0.06), "", 0.2)
        b.paint("air" if b.chance(0.6) else "stomach", blob(rng, 0, 0.27, size * 0.55, size * 0.45, 0, 0.15))
    if "Bladder" in here:
        y, size = (-0.12 if low else -0.05), rng.uniform(0.2, 0.28)
        b.organ("Bladder", "bladder", blob(rng, 0, y, size, size * rng.uniform(0.7, 0.95), 0, 0.03), "", 0.05)


def _hips(b: Builder) -> None:
    rng = b.rng
    both = b.chance(0.75)
    b.paint("bone", blob(rng, 0, 0.48, 0.1, 0.06))
    for side in SIDES:
        sign = SIGN[side]
        b.paint("muscle", blob(rng, sign * 0.36, 0.05, 0.12, 0.24), grain=0.4)
        b.paint("muscle", blob(rng, sign * 0.6, -0.26, 0.2, 0.13, sign * 0.4), grain=0.4)
        b.paint("bone", ((sign * 0.42, -0.2), (sign * 0.42, 0.12), (sign * 0.5, 0.28)), 0.09)
        if both:
            head = blob(rng, sign * 0.6, 0.0, 0.15, 0.15, wobble=0.02)
            b.paint("bone", head)
            inner = tuple((sign * 0.6 + 0.86 * (x - sign * 0.6), 0.86 * y) for x, y in head)
            b.organ("Femoral Head", "marrow", inner, side, 0.3)
            b.paint("bone", ((sign * 0.68, 0.05), (sign * 0.84, 0.12)), 0.1)
