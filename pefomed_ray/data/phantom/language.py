"""What is said about a phantom: captions, reports, and questions with answers, all true because the scene says so.

A picture's wording never gives its answer away by itself: questions from `questions` are balanced by coin tosses, and
`Balancer` picks among them so that over a corpus every question string keeps its answers even.
"""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pefomed_ray.data.phantom.anatomy import Finding, Scene
from pefomed_ray.data.phantom.facts import PLURAL, facts, place_of
from pefomed_ray.data.phantom.lexicon import LEXICON
from pefomed_ray.data.phantom.wording import GENERAL, SLAKE

__all__ = ["LEXICON", "Balancer", "Phrasing", "Question", "caption", "questions", "report"]

Phrasing = Literal["general", "slake"]
REGION_NOUN = {"Head": "head", "Neck": "neck", "Chest": "chest", "Abdomen": "abdomen", "Pelvic Cavity": "pelvis"}
# About SLAKE's own mix of questions.
MIX = {
    "Organ": 0.2,
    "Position": 0.17,
    "Abnormality": 0.17,
    "KG": 0.13,
    "Modality": 0.1,
    "Size": 0.06,
    "Plane": 0.05,
    "Quantity": 0.06,
    "Color": 0.03,
    "Shape": 0.03,
}
CLOSED_SHARE = 0.4
NUMBER = {1: "one", 2: "two", 3: "three"}


@dataclass(frozen=True)
class Question:
    """One question and its answer; `content_type` is one of SLAKE's ten."""

    question: str
    answer: str
    answer_type: Literal["OPEN", "CLOSED"]
    content_type: str


def questions(scene: Scene, rng: np.random.Generator, phrasing: Phrasing) -> list[Question]:
    """Everything worth asking of a scene, once each, in random order; about 25 questions."""
    table = SLAKE if phrasing == "slake" else GENERAL
    asked: dict[str, Question] = {}
    for fact in facts(scene, rng):
        text = str(rng.choice(table[fact.key])).format(a=fact.a, b=fact.b)
        asked.setdefault(text, Question(text, fact.answer, "CLOSED" if fact.closed else "OPEN", fact.content_type))
    found = list(asked.values())
    return [found[i] for i in rng.permutation(len(found))]


class Balancer:
    """Picks questions picture after picture so that no question string has a favourite answer for long."""

    def __init__(self) -> None:
        self._answers: Counter[tuple[str, str]] = Counter()
        self._asked: Counter[str] = Counter()
        self._types: Counter[str] = Counter()
        self._forms: Counter[str] = Counter()

    def pick(self, candidates: list[Question], count: int) -> list[Question]:
        """Up to `count` of the candidates, those that even out the answers and the mix of questions the most."""
        left, chosen = list(candidates), list[Question]()
        while left and len(chosen) < count:
            types = {q.content_type for q in chosen}
            best = min(left, key=lambda q: self._excess(q) + 0.6 * (q.content_type in types))
            left.remove(best)
            chosen.append(best)
            self._count(best)
        return chosen

    def _excess(self, q: Question) -> float:
        """Low for an answer rarely given to this question, for a rare question, and for a type that is behind."""
        text, total = q.question.lower(), 1 + sum(self._types.values())
        share = (self._answers[text, q.answer] + 1) / (self._asked[text] + 2)
        behind = self._types[q.content_type] / (total * MIX[q.content_type])
        form = self._forms[q.answer_type] / (total * (CLOSED_SHARE if q.answer_type == "CLOSED" else 1 - CLOSED_SHARE))
        return 2.0 * share + 0.5 * behind + 0.7 * form + 0.07 * math.log2(1 + self._asked[text])

    def _count(self, q: Question) -> None:
        text = q.question.lower()
        self._answers[text, q.answer] += 1
        self._asked[text] += 1
        self._types[q.content_type] += 1
        self._forms[q.answer_type] += 1


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One sentence: what kind of picture of what, and what is abnormal or that nothing is."""
    view = "Coronal" if scene.plane == "Coronal Plane" else str(rng.choice(["Axial", "Transverse"]))
    modality = {"CT": "CT", "MRI": f"{scene.weighting} weighted MRI", "X-Ray": "X-Ray"}[scene.modality]
    region = REGION_NOUN[scene.region]
    heads = [
        f"{view} {modality} of the {region}",
        f"{modality} of the {region} in the {scene.plane.lower()}",
        f"{region.capitalize()} {modality}, {view.lower()} view",
    ]
    head = str(rng.choice(heads))
    if scene.findings:
        verb = str(rng.choice(["showing", "with", "demonstrating", "revealing"]))
        return f"{head} {verb} {' and '.join(_phrase(f, rng) for f in scene.findings)}."
    organs = sorted({o.name.lower() for o in scene.organs})
    normal = str(rng.choice(["without abnormality", "with normal findings", f"showing a normal {rng.choice(organs)}"]))
    return f"{head} {normal}."


def report(scene: Scene, rng: np.random.Generator) -> str:
    """Two to four short sentences: organs, findings, and what is normal."""
    names = sorted({o.name.lower() for o in scene.organs})
    shown = [str(name) for name in rng.choice(names, min(3, len(names)), replace=False)]
    listed = " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)
    openings = [f"The {listed} can be seen.", f"There is a view of the {listed}.", f"The picture shows the {listed}."]
    opening = str(rng.choice(openings))
    abnormal = [f"We see {_phrase(f, rng)}." for f in scene.findings]
    normal = _normal_lines(scene)
    kept = [normal[i] for i in sorted(rng.permutation(len(normal))[: 3 - min(2, len(abnormal))])]
    lines = [opening] if scene.modality != "X-Ray" or rng.random() < 0.3 else []
    lines += abnormal + kept
    return " ".join(lines[:4] if len(lines) > 1 else [*lines, "The study is complete."])


def _normal_lines(scene: Scene) -> list[str]:
    sick = {f.organ for f in scene.findings}
    names = {f.name for f in scene.findings}
    lines = []
    if scene.has("Heart") and "Heart" not in sick:
        lines.append("The heart size is normal.")
    if scene.modality == "X-Ray":
        lines += [f"There is no {n.lower()}." for n in ("Effusion", "Pneumothorax", "Pneumonia") if n not in names]
    if scene.has("Lung") and "Lung" not in sick:
        lines.append("The lungs are clear.")
    lines += [
        f"The {n.lower()} is normal."
        for n in ("Liver", "Spleen", "Brain", "Bladder", "Trachea")
        if scene.has(n) and n not in sick
    ]
    if not scene.findings:
        lines.append("There is no abnormality.")
    return lines


def _phrase(finding: Finding, rng: np.random.Generator) -> str:
    """A finding as a noun phrase: "a large mass in the upper left lung"."""
    name, where = finding.name.lower(), place_of(finding).lower()
    if name == "cardiomegaly":
        return str(rng.choice(["cardiomegaly", "an enlarged heart"]))
    if finding.organ == "Brain":
        where = f"{where} of the brain"
    size = f"{finding.size.lower()} " if finding.size else ""
    if finding.count > 1:
        return f"{NUMBER[finding.count]} {size}{PLURAL[finding.name]} in the {where}"
    if name in ("pneumonia", "atelectasis", "brain edema"):
        return f"{name} in the {where}"
    article = "an" if (size or name)[0] in "aeiou" else "a"
    return f"{article} {size}{name} {rng.choice(['in', 'within'])} the {where}"
