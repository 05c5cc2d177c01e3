"""What can be asked of a scene, with the true answer: one `Fact` each, before any wording."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pefomed_ray.data.phantom import knowledge
from pefomed_ray.data.phantom.anatomy import Finding, Scene

MODALITIES = ("CT", "MRI", "X-Ray")
REGIONS = ("Head", "Neck", "Chest", "Abdomen", "Pelvic Cavity")
ORGANS = (
    "Liver",
    "Spleen",
    "Kidney",
    "Heart",
    "Lung",
    "Stomach",
    "Small Bowel",
    "Colon",
    "Bladder",
    "Rectum",
    "Brain",
    "Spinal Cord",
    "Trachea",
    "Larynx",
    "Mandible",
    "Femoral Head",
)
CHEST_DISEASES = ("Mass", "Nodule", "Pneumonia", "Effusion", "Pneumothorax", "Atelectasis")
PLURAL = {
    "Kidney": "kidneys",
    "Lung": "lungs",
    "Femoral Head": "femoral heads",
    "Nodule": "nodules",
    "Liver Nodule": "liver nodules",
    "Eye": "eyes",
}
# Where an organ can be seen at all: "no" is only worth asking where "yes" would have been possible, half of the time.
NEAR: dict[str, tuple[str, ...]] = {
    "Head": ("Brain", "Mandible", "Larynx", "Spinal Cord"),
    "Neck": ("Trachea", "Larynx", "Spinal Cord", "Mandible"),
    "Chest": ("Heart", "Lung", "Liver", "Trachea", "Spinal Cord", "Spleen"),
    "Abdomen": ("Liver", "Spleen", "Kidney", "Stomach", "Small Bowel", "Colon", "Lung", "Heart"),
    "Pelvic Cavity": ("Bladder", "Rectum", "Small Bowel", "Colon", "Femoral Head", "Kidney"),
}


@dataclass(frozen=True)
class Fact:
    """A key of the wording tables, its slots, the answer, whether the question offers the answers, and SLAKE's type."""

    key: str
    a: str
    b: str
    answer: str
    closed: bool
    content_type: str


def place_of(finding: Finding) -> str:
    """Where a finding is, by the patient's side: "Upper Left Lung", "Lower Right Lobe", "Left Kidney", "Liver"."""
    noun = "Lobe" if finding.organ == "Brain" else finding.organ
    return " ".join(word for word in (finding.height, finding.side, noun) if word)


def facts(scene: Scene, rng: np.random.Generator) -> list[Fact]:
    """All facts of a scene, with fresh choices of what a yes/no question asks about; in no particular order."""
    return [
        *_about_picture(scene, rng),
        *_about_organs(scene, rng),
        *_about_findings(scene, rng),
        *_about_knowledge(scene, rng),
    ]


def _yes(truth: bool) -> str:
    return "Yes" if truth else "No"


def _either(rng: np.random.Generator, true_ones: list[str], false_ones: list[str]) -> tuple[str, bool] | None:
    """Toss a coin for the answer, then choose what to ask about among what has that answer."""
    truth = bool(rng.random() < 0.5)
    options = true_ones if truth else false_ones
    return (str(rng.choice(options)), truth) if options else None


def _about_picture(scene: Scene, rng: np.random.Generator) -> Iterator[Fact]:
    yield Fact("modality", "", "", scene.modality, False, "Modality")
    yield Fact("modality_of3", "", "", scene.modality, True, "Modality")
    if scene.plane == "Coronal Plane" or rng.random() < 0.4:
        yield Fact("plane", "", "", scene.plane, False, "Plane")
    yield Fact("region", "", "", scene.region, False, "Position")
    asked = _either(rng, [scene.modality], [m for m in MODALITIES if m != scene.modality])
    if asked:
        yield Fact("is_modality", asked[0], "", _yes(asked[1]), True, "Modality")
        plane = "coronal" if rng.random() < 0.5 else "transverse"
        yield Fact("is_plane", plane, "", _yes(scene.plane.lower().startswith(plane)), True, "Plane")
    asked = _either(rng, [scene.region], [r for r in REGIONS if r != scene.region])
    if asked:
        yield Fact("is_region", asked[0].lower(), "", _yes(asked[1]), True, "Organ")
    if scene.weighting:
        yield Fact("weighting", "", "", scene.weighting, False, "Modality")
        weighting = "T1" if rng.random() < 0.5 else "T2"
        yield Fact("is_weighting", weighting, "", _yes(scene.weighting == weighting), True, "Modality")


def _about_organs(scene: Scene, rng: np.random.Generator) -> Iterator[Fact]:
    present = sorted({o.name for o in scene.organs} & set(ORGANS))
    absent = [name for name in ORGANS if not scene.has(name)]
    near = [name for name in NEAR[scene.region] if not scene.has(name)]
    for _ in range(2):
        asked = _either(rng, present, near if near and rng.random() < 0.6 else absent)
        if asked:
            yield Fact("contains", asked[0].lower(), "", _yes(asked[1]), True, "Organ")
    areas: dict[str, float] = {}
    for organ in scene.organs:
        areas[organ.name] = areas.get(organ.name, 0.0) + organ.area
    areas.pop("Spinal Cord", None)
    ranked = sorted(areas, key=lambda name: -areas[name])
    if len(ranked) == 1 or (len(ranked) > 1 and areas[ranked[0]] > 1.35 * areas[ranked[1]]):
        yield Fact("largest", "", "", ranked[0], False, "Size")
        yield Fact("main", "", "", ranked[0], False, "Organ")
    if len(ranked) > 1:
        pair = sorted(rng.choice(len(ranked), 2, replace=False).tolist())
        big, small = ranked[pair[0]], ranked[pair[1]]
        if areas[big] > 1.6 * areas[small]:
            first, second = (big, small) if rng.random() < 0.5 else (small, big)
            yield Fact("bigger", first.lower(), second.lower(), big, True, "Size")
    for name in present:
        # A pair has no place of its own, and the spinal cord is always at the bottom.
        parts = [o for o in scene.organs if o.name == name]
        if name != "Spinal Cord" and not any(o.side for o in parts):
            weights = [o.area for o in parts]
            x, y = (float(np.average([getattr(o, axis) for o in parts], weights=weights)) for axis in ("x", "y"))
            yield from _about_organ(scene, name, x, y, parts[0].tone)
    for name in ("Kidney", "Lung", "Femoral Head"):
        count = sum(o.name == name for o in scene.organs)
        if count or rng.random() < 0.3:
            yield Fact("count_organ", PLURAL[name], "", str(count), False, "Quantity")


def _about_organ(scene: Scene, name: str, x: float, y: float, tone: float) -> Iterator[Fact]:
    if abs(x) < 0.15 or abs(x) > 0.25:
        across = "" if abs(x) < 0.15 else ("Left" if x < 0 else "Right")
        down = "" if abs(y) < 0.12 else ("Upper" if y < 0 else "Lower")
        if (abs(y) < 0.12 or abs(y) > 0.18) and (across or down):
            alone = {"Upper": "Top", "Lower": "Bottom"}.get(down, across)
            place = f"{down} {across}" if down and across else alone
            yield Fact("where_organ", name.lower(), "", place, False, "Position")
    if scene.modality != "X-Ray" and name in ("Liver", "Spleen", "Bladder"):
        shade = "Black" if tone < 0.2 else "White" if tone > 0.85 else "Gray" if 0.4 < tone < 0.7 else ""
        if shade:
            yield Fact("color", name.lower(), "", shade, False, "Color")


def _about_findings(scene: Scene, rng: np.random.Generator) -> Iterator[Fact]:
    found = scene.findings
    sick = {f.organ for f in found}
    yield Fact("any_abnormal", "", "", _yes(bool(found)), True, "Abnormality")
    yield Fact("all_normal", "", "", _yes(not found), True, "Abnormality")
    yield Fact("diseases", "", "", ", ".join(sorted(f.name for f in found)) or "None", False, "Abnormality")
    yield Fact("count_kinds", "", "", str(len(found)), False, "Quantity")
    for name in ("Lung", "Brain", "Liver", "Heart", "Kidney"):
        if scene.has(name):
            key = "healthy" if rng.random() < 0.5 else "abnormal"
            yield Fact(key, name.lower(), "", _yes((name in sick) == (key == "abnormal")), True, "Abnormality")
    if sick in ({"Heart"}, {"Lung"}) and scene.has("Heart"):
        yield Fact("heart_or_lung", "", "", next(iter(sick)), True, "Abnormality")
    for noun, organ in (("lung", "Lung"), ("brain lobe", "Brain")):
        if scene.has(organ):
            side = "Left" if rng.random() < 0.5 else "Right"
            truth = any(f.organ == organ and f.side == side for f in found)
            if organ not in sick and rng.random() < 0.7:
                continue
            yield Fact("side_abnormal", f"{side.lower()} {noun}", "", _yes(truth), True, "Abnormality")
    if scene.modality == "X-Ray":
        yield from _observed(scene, rng)
    if len({place_of(f) for f in found}) == 1:
        yield Fact("where_abnormal", "", "", place_of(found[0]), False, "Position")
    for finding in found:
        yield from _about_finding(finding, alone=len(found) == 1)


def _observed(scene: Scene, rng: np.random.Generator) -> Iterator[Fact]:
    """The same disease elsewhere, or another disease there, makes the "no"."""
    lung = [f for f in scene.findings if f.organ == "Lung"]
    for finding in lung:
        truth = rng.random() < 0.5
        other = str(rng.choice([d for d in CHEST_DISEASES if d != finding.name]))
        name, place = finding.name, place_of(finding)
        if not truth and rng.random() < 0.5:
            name = other
        elif not truth:
            swap = {"Left": "Right", "Right": "Left"}[finding.side]
            place = f"{finding.height} {swap} Lung"
        yield Fact("observed", name.lower(), place.lower(), _yes(bool(truth)), True, "Abnormality")


def _about_finding(f: Finding, alone: bool) -> Iterator[Fact]:
    name = f.name.lower()
    if f.side:
        yield Fact("where_disease", name, "", place_of(f), False, "Position")
        if alone:
            noun = "brain" if f.organ == "Brain" else f.organ.lower()
            yield Fact("which_side", noun, "", f.side, True, "Position")
    if f.name in ("Nodule", "Liver Nodule"):
        yield Fact("count_lesion", PLURAL[f.name], "", str(f.count), False, "Quantity")
    if f.size and f.name.endswith("Tumor"):
        yield Fact("lesion_size", name, "", f.size, True, "Size")
    if f.shape and (f.name in ("Mass", "Liver Cancer") or f.name.endswith("Tumor")):
        yield Fact("lesion_shape", name, "", f.shape, False, "Shape")
    if f.color and alone:
        yield Fact("lesion_color", "", "", f.color, False, "Color")


def _about_knowledge(scene: Scene, rng: np.random.Generator) -> Iterator[Fact]:
    main = max(scene.organs, key=lambda o: sum(p.area for p in scene.organs if p.name == o.name))
    if main.name in knowledge.FUNCTIONS:
        yield Fact("function_main", "", "", knowledge.FUNCTIONS[main.name], False, "KG")
    able = [i for i, row in enumerate(knowledge.ABILITIES) if any(map(scene.has, row[2]))]
    unable = [i for i in range(len(knowledge.ABILITIES)) if i not in able]
    truth = rng.random() < 0.5
    if able if truth else unable:
        row = knowledge.ABILITIES[int(rng.choice(able if truth else unable))]
        yield Fact("ability", row[0], row[1], _yes(bool(truth)), True, "KG")
    belonging = {s: [n for n in names if scene.has(n)] for s, names in knowledge.SYSTEMS.items()}
    asked = _either(rng, [s for s in belonging if belonging[s]], [s for s in belonging if not belonging[s]])
    if asked:
        yield Fact("system_any", asked[0], "", _yes(asked[1]), True, "KG")
    # A system with one drawable organ would always have the same answer.
    few = [s for s, names in knowledge.SYSTEMS.items() if len(names) > 1 and 1 <= len(belonging[s]) <= 2]
    if few:
        system = str(rng.choice(few))
        yield Fact("system_which", system, "", ", ".join(belonging[system]), False, "KG")
    if len(scene.findings) == 1:
        disease, organ = knowledge.family(scene.findings[0].name), scene.findings[0].organ.lower()
        for key, table in (
            ("treatment", knowledge.TREATMENT),
            ("symptom", knowledge.SYMPTOM),
            ("cause", knowledge.CAUSE),
            ("prevention", knowledge.PREVENTION),
        ):
            yield Fact(key, organ, "", table[disease], False, "KG")
