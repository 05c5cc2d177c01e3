"""Head and neck slices, CT and MRI, seen from the feet with the face at the top of the picture."""

from typing import Literal

import numpy as np

from pefomed_ray.data.phantom.anatomy import SIGN, Builder, Finding, Height, Points, Side, arc, blob, smooth


def brain(b: Builder, modality: str, weighting: str) -> None:
    """A transverse brain slice: stripped of its skull as most public tumour sets are, or inside it (always for CT)."""
    rng = b.rng
    rx, ry = rng.uniform(0.62, 0.78), rng.uniform(0.84, 0.96)
    if modality == "CT" or b.chance(0.25):
        b.paint("scalp", blob(rng, 0, 0, rx + 0.16, ry + 0.14, wobble=0.015))
        b.paint("bone", blob(rng, 0, 0, rx + 0.1, ry + 0.1, wobble=0.012))
        b.paint("csf", blob(rng, 0, 0, rx + 0.02, ry + 0.02, wobble=0.012))
    outline = blob(rng, 0, 0.0, rx, ry, wobble=0.025, power=rng.uniform(2.0, 2.3))
    b.organ("Brain", "gray", outline, grain=0.12)
    b.paint("gray", outline, grain=0.12, folds=1.0)
    for sign in (-1, 1):
        for y in (-0.4, 0.0, 0.4):
            core = blob(rng, sign * rx * 0.46, y * ry, rx * 0.36, ry * 0.36, wobble=0.15)
            b.paint("white", core, grain=0.1, folds=0.35)
    b.paint("csf", ((0, -ry), (rng.normal(0, 0.01), -0.35)), 0.022)
    b.paint("csf", ((0, ry), (rng.normal(0, 0.01), 0.4)), 0.022)
    level = rng.choice(["high", "middle", "low"], p=[0.25, 0.55, 0.2])
    if level == "middle":
        _ventricles(b)
    elif level == "low":
        b.paint("ventricle", blob(rng, 0, 0.0, 0.14, 0.1, wobble=0.3))
        b.paint("white", blob(rng, 0, 0.22, 0.17, 0.14))
        b.paint("gray", blob(rng, 0, 0.6, 0.42, 0.22, wobble=0.05), folds=0.6)
    else:
        b.paint("csf", ((0, -0.4), (0, 0.45)), 0.025)
    eyes = modality == "CT" and b.chance(0.25)
    if not eyes and b.chance(0.62):
        _lesions(b, modality, weighting, rx, ry)
    if eyes:
        for side in ("Left", "Right"):
            x = SIGN[side] * 0.32
            b.paint("bone", blob(rng, x, -0.74, 0.25, 0.25, wobble=0.03))
            b.paint("fat", blob(rng, x, -0.75, 0.21, 0.22, wobble=0.03))
            b.organ("Eye", "eye", blob(rng, x, -0.78, 0.14, 0.14, wobble=0.02), side, 0.0)


def _ventricles(b: Builder) -> None:
    rng, wide = b.rng, b.rng.uniform(0.7, 1.4)
    for sign in (-1, 1):
        front = [(0.02, -0.02), (0.05 * wide, -0.22), (0.17 * wide, -0.36), (0.14 * wide, -0.16), (0.06, 0.04)]
        back = [(0.05, 0.08), (0.16 * wide, 0.18), (0.24 * wide, 0.45), (0.17 * wide, 0.5), (0.1, 0.25)]
        for horn in (front, back):
            b.paint("ventricle", smooth([(sign * x, y + 0.02 * rng.normal()) for x, y in horn], 2))
        b.paint("gray", blob(rng, sign * 0.17 * wide, -0.03, 0.07, 0.13), grain=0.1)
    b.paint("ventricle", blob(rng, 0, 0.06, 0.02, 0.1, wobble=0.0))


def _lesions(b: Builder, modality: str, weighting: str, rx: float, ry: float) -> None:
    """One lobe holds an oedema, a tumour, or a tumour with oedema around it."""
    rng = b.rng
    side: Side = "Left" if b.chance(0.5) else "Right"
    height: Height = "Upper" if b.chance(0.5) else "Lower"
    x = SIGN[side] * rng.uniform(0.42, 0.56) * rx
    y = (-1 if height == "Upper" else 1) * rng.uniform(0.36, 0.54) * ry
    with_edema, with_tumor = [(True, False), (False, True), (True, True)][int(rng.choice(3, p=[0.28, 0.32, 0.4]))]
    if with_edema:
        radius = max(rng.uniform(0.24, 0.33), 0.16 / b.zoom)
        b.paint("edema", _within(blob(rng, x, y, radius, radius * 1.1, wobble=0.22), rx, ry), grain=0.25)
        color: Literal["White", "Gray"] = "White" if weighting == "T2" else "Gray"
        b.findings.append(Finding("Brain Edema", "Brain", side, height, x, y, color=color))
    if not with_tumor:
        return
    size: Literal["Small", "Large"] = "Small" if with_edema or b.chance(0.5) else "Large"
    radius = b.spot(size)
    oval = b.chance(0.4)
    points = blob(rng, x, y, radius * (1.35 if oval else 1.0), radius * (0.8 if oval else 1.0), rng.uniform(0, 3), 0.06)
    points = _within(points, rx, ry)
    shape: Literal["Oval", "Circular"] = "Oval" if oval else "Circular"
    if weighting == "T1" and b.chance(0.6):
        b.paint("ring", points, grain=0.2)
        if size == "Large":
            b.paint("core", blob(rng, x, y, radius * 0.55, radius * 0.5, wobble=0.15), grain=0.2)
        b.findings.append(Finding("Brain Enhancing Tumor", "Brain", side, height, x, y, size, shape, "White"))
    elif weighting == "T1":
        b.paint("core", points, grain=0.2)
        b.findings.append(Finding("Brain Non-enhancing Tumor", "Brain", side, height, x, y, size, shape, "Black"))
    else:
        b.paint("ring", points, grain=0.1)
        b.paint("ring" if modality == "CT" else "core", blob(rng, x, y, radius * 0.6, radius * 0.6, wobble=0.1))
        b.findings.append(Finding("Brain Tumor", "Brain", side, height, x, y, size, shape, "White"))


def _within(points: Points, rx: float, ry: float) -> Points:
    """Pull what sticks out of the brain back to its rim."""
    path = np.asarray(points)
    reach = np.hypot(path[:, 0] / rx, path[:, 1] / ry)
    return tuple(map(tuple, (path * np.minimum(1.0, 0.96 / reach)[:, None]).tolist()))


def face(b: Builder) -> None:
    """A CT slice through the jaw: the U of the mandible with teeth, the throat and the spine behind it."""
    rng = b.rng
    b.paint("skin", blob(rng, 0, 0, 0.7, 0.95, wobble=0.03))
    b.paint("fat", blob(rng, 0, 0.02, 0.64, 0.88, wobble=0.03))
    b.paint("muscle", blob(rng, 0, 0.12, 0.56, 0.72, wobble=0.05), grain=0.3)
    jaw = arc(0, -0.18, 0.42, 0.52, -np.pi - 0.45, 0.45, 18)
    if b.chance(0.75):
        b.paint("bone", jaw, rng.uniform(0.1, 0.14))
        b.record("Mandible", jaw, "", 0.97)
        if b.chance(0.6):
            for x, y in arc(0, -0.2, 0.33, 0.4, -np.pi, 0, 9):
                b.paint("contrast", blob(rng, x, y, 0.05, 0.05, wobble=0.1))
            b.record("Tooth", arc(0, -0.2, 0.33, 0.4, -np.pi, 0, 9), "", 0.98)
        tongue = blob(rng, 0, -0.22, 0.24, 0.28)
        b.organ("Tongue", "muscle", tongue, grain=0.3)
    else:
        b.paint("bone", blob(rng, 0, -0.42, 0.34, 0.3, wobble=0.2))
        for sign in (-1, 1):
            b.paint("air", blob(rng, sign * 0.24, -0.35, 0.15, 0.19, wobble=0.2))
        b.paint("air", blob(rng, 0, -0.5, 0.06, 0.25, wobble=0.1))
    b.organ("Larynx", "airway", blob(rng, 0, 0.12, rng.uniform(0.09, 0.13), 0.08, wobble=0.15), grain=0.0)
    spine(b, 0.42, 0.8)


def neck(b: Builder) -> None:
    """A CT slice through the neck, alone or with the shoulders beside it."""
    rng, shoulders = b.rng, b.chance(0.5)
    rx, ry = (0.98, 0.34) if shoulders else (rng.uniform(0.5, 0.64), rng.uniform(0.46, 0.6))
    b.paint("skin", blob(rng, 0, 0.04, rx, ry, wobble=0.04))
    b.paint("fat", blob(rng, 0, 0.04, rx * 0.94, ry * 0.9, wobble=0.04))
    if shoulders:
        b.paint("skin", blob(rng, 0, -0.1, 0.4, 0.4))
        for sign in (-1, 1):
            b.paint("muscle", blob(rng, sign * 0.62, 0.06, 0.3, 0.2), grain=0.5)
            b.paint("bone", blob(rng, sign * 0.84, 0.02, 0.11, 0.1))
            b.paint("bone", ((sign * 0.4, 0.12), (sign * 0.8, 0.08)), 0.045)
    b.paint("muscle", blob(rng, 0, 0.14, 0.42, 0.3, wobble=0.05), grain=0.5)
    for sign in (-1, 1):
        b.paint("fat", blob(rng, sign * 0.24, -0.02, 0.14, 0.14))
        b.paint("muscle", blob(rng, sign * 0.32, -0.06, 0.08, 0.16, sign * 0.5))
        b.paint("blood", blob(rng, sign * 0.2, -0.03, 0.055, 0.055))
    if b.chance(0.6):
        for sign in (-1, 1):
            b.paint("gland", blob(rng, sign * 0.14, -0.16, 0.07, 0.11, wobble=0.1))
        b.organ("Trachea", "airway", blob(rng, 0, -0.17, rng.uniform(0.08, 0.11), 0.09, wobble=0.05), grain=0.0)
    else:
        b.paint("bone", arc(0, -0.14, 0.14, 0.17, -np.pi, 0, 9), 0.05)
        b.organ("Larynx", "airway", blob(rng, 0, -0.14, 0.06, rng.uniform(0.1, 0.13), wobble=0.08), grain=0.0)
    spine(b, 0.16, 0.75)


def spine(b: Builder, y: float, scale: float = 1.0, cord: bool = True) -> None:
    """A vertebra with its centre at height `y`, the canal behind it and the processes around it."""
    rng = b.rng
    body = blob(rng, 0, y, 0.16 * scale, 0.12 * scale, wobble=0.04)
    back = y + 0.19 * scale
    b.paint("bone", ((0, back), (0, back + 0.2 * scale)), 0.06 * scale)
    for sign in (-1, 1):
        b.paint("bone", ((sign * 0.08 * scale, back), (sign * 0.24 * scale, back + 0.03)), 0.06 * scale)
    b.paint("bone", blob(rng, 0, back, 0.13 * scale, 0.09 * scale, wobble=0.05))
    b.paint("bone", body)
    b.paint("marrow", _shrunk(body, 0.82), grain=0.3)
    canal = blob(rng, 0, back - 0.01, 0.075 * scale, 0.06 * scale, wobble=0.03)
    b.paint("csf", canal)
    b.paint("cord", _shrunk(canal, 0.55))
    if cord:
        b.record("Spinal Cord", canal, "", 0.5)


def _shrunk(points: Points, factor: float) -> Points:
    path = np.asarray(points)
    middle = path.mean(axis=0)
    return tuple(map(tuple, (middle + factor * (path - middle)).tolist()))
