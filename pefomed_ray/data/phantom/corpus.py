"""Phantom corpora on disk in the publishers' own layouts, so that the real readers read them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pefomed_ray.data.phantom.anatomy import Scene
from pefomed_ray.data.phantom.draw import draw
from pefomed_ray.data.phantom.language import Balancer, Phrasing, caption, questions, report
from pefomed_ray.data.phantom.scene import make_scene, second_view

Splits = tuple[int, int, int]


def split_sizes(images: int, splits: Splits | None = None) -> Splits:
    """Numbers of training, validation and test images: `splits` if given, else about 80/10/10."""
    if splits is not None:
        if sum(splits) != images or min(splits) < 0:
            raise ValueError(f"splits {splits} do not add up to {images} images")
        return splits
    held_out = max(1, images // 10) if images >= 3 else 0
    return images - 2 * held_out, held_out, held_out


def write_slake(
    root: Path,
    images: int,
    questions_per_image: int,
    seed: int,
    size_px: int = 160,
    *,
    splits: Splits | None = None,
    phrasing: Phrasing = "slake",
) -> None:
    """Write SLAKE 1.0's tree: train.json, validate.json, test.json, imgs/xmlabN/source.jpg; English rows only.

    Every image belongs to one split. The same arguments give the same bytes.
    """
    balancer, number, qid = Balancer(), 0, 0
    for name, size in zip(("train", "validate", "test"), split_sizes(images, splits), strict=True):
        rows: list[dict[str, Any]] = []
        for _ in range(size):
            rng = _generator(seed, number)
            scene = make_scene(rng)
            image_name = f"xmlab{number}/source.jpg"
            _save(scene, root / "imgs" / image_name, size_px)
            for q in balancer.pick(questions(scene, rng, phrasing), questions_per_image):
                knowledge = q.content_type == "KG"
                rows.append(
                    {
                        "img_id": number,
                        "img_name": image_name,
                        "question": q.question,
                        "answer": q.answer,
                        "q_lang": "en",
                        "location": _location(scene),
                        "modality": scene.modality,
                        "answer_type": q.answer_type,
                        "base_type": "kvqa" if knowledge else "vqa",
                        "content_type": q.content_type,
                        "triple": ["vhead", "effect", "ktail"] if knowledge else ["vhead", "_", "_"],
                        "qid": qid,
                    }
                )
                qid += 1
            number += 1
        _write_json(root / f"{name}.json", rows)


def write_r2gen(root: Path, images: int, seed: int, size_px: int = 160, *, splits: Splits | None = None) -> None:
    """Write R2Gen's IU X-ray tree: annotation.json and images/<id>/{0,1}.png, `images` studies of two views each.

    Studies are chest X-rays; the second view shows the same scene placed and exposed anew.
    """
    annotation: dict[str, list[dict[str, Any]]] = {}
    number = 0
    for name, size in zip(("train", "val", "test"), split_sizes(images, splits), strict=True):
        rows = annotation.setdefault(name, [])
        for _ in range(size):
            rng = _generator(seed, number)
            number += 1
            scene = _chest_film(rng)
            study = f"CXR{number}_IM-{1000 + number:04d}"
            _save(scene, root / "images" / study / "0.png", size_px)
            _save(second_view(scene, rng), root / "images" / study / "1.png", size_px)
            rows.append(
                {
                    "id": study,
                    "report": report(scene, rng),
                    "image_path": [f"{study}/0.png", f"{study}/1.png"],
                    "split": name,
                }
            )
    _write_json(root / "annotation.json", annotation)


def write_roco(root: Path, images: int, seed: int, size_px: int = 160, *, splits: Splits | None = None) -> None:
    """Write ROCO v1's tree: data/{train,validation,test}/radiology/captions.txt and images/ROCO_00001.jpg beside it.

    A line of captions.txt is the id, one tab, one space and the caption; ids run through all splits. ROCO's keyword,
    licence and link files are not written.
    """
    number = 0
    for name, size in zip(("train", "validation", "test"), split_sizes(images, splits), strict=True):
        folder = root / "data" / name / "radiology"
        (folder / "images").mkdir(parents=True, exist_ok=True)
        lines = []
        for _ in range(size):
            rng = _generator(seed, number)
            number += 1
            scene = make_scene(rng)
            _save(scene, folder / "images" / f"ROCO_{number:05d}.jpg", size_px)
            lines.append(f"ROCO_{number:05d}\t {caption(scene, rng)}\n")
        (folder / "captions.txt").write_text("".join(lines), encoding="utf-8", newline="\n")


def _generator(seed: int, number: int) -> np.random.Generator:
    """A generator of its own for every image, so that an image does not depend on how many came before."""
    return np.random.default_rng([seed, number])


def _chest_film(rng: np.random.Generator) -> Scene:
    while True:
        scene = make_scene(rng)
        if scene.modality == "X-Ray":
            return scene


def _location(scene: Scene) -> str:
    """The body part under SLAKE's own name for it."""
    if scene.region == "Head":
        return "Brain" if scene.has("Brain") else "Brain_Face"
    return "Lung" if scene.region == "Chest" else scene.region


def _save(scene: Scene, path: Path, size_px: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(draw(scene, size_px))
    if path.suffix == ".jpg":
        image.convert("RGB").save(path, quality=92)
    else:
        image.save(path)


def _write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8", newline="\n")
