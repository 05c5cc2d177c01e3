"""A random phantom: kind of picture, view and rendering style, then the layout that paints it."""

from dataclasses import replace

import numpy as np

from pefomed_ray.data.phantom import film, head, tones, trunk
from pefomed_ray.data.phantom.anatomy import (
    Builder,
    Finding,
    Layer,
    Marker,
    Modality,
    Organ,
    Region,
    Scene,
    Style,
    View,
    Weighting,
    arc,
)

__all__ = ["Finding", "Layer", "Organ", "Scene", "Style", "View", "make_scene", "second_view"]

# (modality, region, level, how often); head MRI and chest X-ray lead, as they do in SLAKE.
KINDS: tuple[tuple[Modality, Region, str, float], ...] = (
    ("X-Ray", "Chest", "", 0.28),
    ("MRI", "Head", "brain", 0.20),
    ("CT", "Head", "brain", 0.06),
    ("CT", "Head", "face", 0.04),
    ("CT", "Neck", "", 0.05),
    ("CT", "Chest", "", 0.10),
    ("MRI", "Chest", "", 0.02),
    ("CT", "Abdomen", "", 0.11),
    ("MRI", "Abdomen", "", 0.06),
    ("CT", "Pelvic Cavity", "", 0.05),
    ("MRI", "Pelvic Cavity", "", 0.03),
)


def make_scene(rng: np.random.Generator) -> Scene:
    """Draw one scene from the corpus's distribution; the same generator state gives the same scene."""
    while True:
        scene = _attempt(rng)
        if scene is not None:
            return scene


def _attempt(rng: np.random.Generator) -> Scene | None:
    """One scene, or None where an organ came out half hidden, so that nobody could say whether it is there."""
    weights = np.array([kind[3] for kind in KINDS])
    modality, region, level, _ = KINDS[int(rng.choice(len(KINDS), p=weights / weights.sum()))]
    weighting: Weighting = "" if modality != "MRI" else "T1" if rng.random() < 0.5 else "T2"
    lung_window = (modality, region) == ("CT", "Chest") and rng.random() < 0.6
    b = Builder(rng, _tones(rng, modality, region, weighting, lung_window), _zoom(rng, modality, region))
    _lay_out(b, modality, region, level, weighting)
    organs = b.visible_organs()
    if organs is None:
        return None
    view = _view(rng, b.zoom)
    if modality == "CT" and rng.random() < 0.75:
        _table(b, lung_window)
    style = _style(rng, modality, weighting, lung_window)
    return Scene(
        modality,
        "Coronal Plane" if modality == "X-Ray" else "Transverse Plane",
        region,
        weighting,
        organs,
        tuple(b.findings),
        tuple(b.layers),
        view,
        style,
        int(rng.integers(2**31)),
    )


def second_view(scene: Scene, rng: np.random.Generator) -> Scene:
    """The same patient taken again: another placing, another exposure, the same anatomy and findings."""
    style = _style(rng, scene.modality, scene.weighting, False)
    return replace(scene, view=_view(rng, scene.view.zoom), style=style, seed=int(rng.integers(2**31)))


def _lay_out(b: Builder, modality: str, region: str, level: str, weighting: str) -> None:
    if modality == "X-Ray":
        film.chest_film(b)
    elif region == "Head" and level == "brain":
        head.brain(b, modality, weighting)
    elif region == "Head":
        head.face(b)
    elif region == "Neck":
        head.neck(b)
    elif region == "Chest":
        trunk.chest(b, modality)
    elif region == "Abdomen":
        trunk.abdomen(b, weighting)
    else:
        trunk.pelvis(b)


def _tones(rng: np.random.Generator, modality: str, region: str, weighting: str, lung_window: bool) -> dict[str, float]:
    if modality == "MRI" and weighting == "T2":
        return tones.MRI_T2_FAT if region != "Head" and rng.random() < 0.35 else tones.MRI_T2
    if modality == "MRI":
        return tones.MRI_T1
    if lung_window:
        return tones.CT_LUNG
    return tones.CT_SOFT


def _zoom(rng: np.random.Generator, modality: str, region: str) -> float:
    """How many picture widths one body width takes."""
    low, high = {"Head": (0.6, 0.95), "Neck": (0.75, 1.05), "Pelvic Cavity": (0.65, 0.97)}.get(region, (0.74, 0.97))
    return float(rng.uniform(0.96, 1.12) if modality == "X-Ray" else rng.uniform(low, high))


def _view(rng: np.random.Generator, zoom: float) -> View:
    slack = max(0.015, 0.35 * (1.0 - zoom) * 0.5)
    return View(zoom, float(rng.normal(0, 0.04)), float(rng.uniform(-slack, slack)), float(rng.uniform(-slack, slack)))


def _table(b: Builder, lung_window: bool) -> None:
    """The couch under the patient: one or two flat arcs, and sometimes a plate."""
    rng, y = b.rng, 0.84 + b.rng.uniform(0, 0.12)
    for gap in (0.0, 0.09):
        if gap == 0.0 or rng.random() < 0.5:
            b.paint("table", arc(0, y + gap - 0.5, rng.uniform(0.9, 1.4), 0.5, 0.3, np.pi - 0.3, 14), 0.014)
    if lung_window and rng.random() < 0.4:
        b.paint("table", ((-1.2, y - 0.05), (1.2, y - 0.05)), 0.03)


def _style(rng: np.random.Generator, modality: str, weighting: str, lung_window: bool) -> Style:
    film_like = modality == "X-Ray"
    marker: Marker = "L" if rng.random() < 0.7 else "R"
    if rng.random() > (0.6 if film_like else 0.06):
        marker = ""
    return Style(
        background=float(rng.uniform(0.08, 0.16)) if lung_window else 0.0,
        contrast=float(rng.uniform(0.75, 1.2) if film_like else rng.uniform(0.85, 1.15)),
        brightness=float(rng.normal(0.02, 0.05) if film_like else rng.normal(0, 0.02)),
        gamma=float(rng.uniform(0.8, 1.3) if film_like else rng.uniform(0.88, 1.15)),
        noise=float(rng.uniform(0.004, 0.025)),
        blur=float(rng.uniform(0.0, 0.006)),
        bias=float(rng.uniform(0.05, 0.22)) if modality == "MRI" else 0.0,
        fold_tone={"T1": -0.26, "T2": 0.42}.get(weighting, -0.16),
        border=float(rng.uniform(0.01, 0.05)) if film_like and rng.random() < 0.2 else 0.0,
        marker=marker,
    )
