"""Phantoms: radiology-like pictures drawn by this project, with captions, reports and questions that are true of them.

scene -> draw gives the picture, scene -> language its words, corpus writes both to disk. No score on them is a medical
claim.
"""

from pefomed_ray.data.phantom.corpus import split_sizes, write_r2gen, write_roco, write_slake
from pefomed_ray.data.phantom.draw import draw
from pefomed_ray.data.phantom.language import LEXICON, Balancer, Phrasing, Question, caption, questions, report
from pefomed_ray.data.phantom.scene import Finding, Organ, Scene, make_scene, second_view

__all__ = [
    "LEXICON",
    "Balancer",
    "Finding",
    "Organ",
    "Phrasing",
    "Question",
    "Scene",
    "caption",
    "draw",
    "make_scene",
    "questions",
    "report",
    "second_view",
    "split_sizes",
    "write_r2gen",
    "write_roco",
    "write_slake",
]
