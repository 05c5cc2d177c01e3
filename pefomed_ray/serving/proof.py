"""Proof that an endpoint answers with a bundle: as it answers offline, and for its alias once that was moved."""

import io
import time
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from pefomed_ray.artifacts.manifests import load_bundle_manifest
from pefomed_ray.artifacts.records import Task
from pefomed_ray.errors import ConfigError, PefomedError, RefusedError
from pefomed_ray.model.generate import Prompt
from pefomed_ray.model.load import open_generator
from pefomed_ray.serving.client import Client

SIDE_PX = 64
PROBE_TOKENS = 16
"""Tokens an answer of a probe."""
QUESTIONS = ("Is it normal?", "What is shown here?", "Which organ is this, and is there anything unusual about it?")
IN_A_ROW = 3
"""Answers by the new weights one after the other: several processes may be behind one address."""
POLL_S = 0.1


def probe(client: Client, bundle: Path) -> int:
    """Ask for the bundle by its digest, whatever aliases stand for, and compare with offline generation.

    The pictures are drawn here: nobody's data. Returns how many answers were compared. Raises RefusedError where one
    differs in text or tokens, or came from other weights; ConfigError where the endpoint cannot serve the bundle.
    """
    manifest = load_bundle_manifest(bundle)
    task: Task = yaml.safe_load((bundle / "run.yaml").read_text(encoding="utf-8"))["task"]
    questions = QUESTIONS if task == "vqa" else ("",) * len(QUESTIONS)
    pictures = [_picture(seed) for seed in range(len(questions))]
    offline = open_generator(bundle)
    model = f"{client.base()}:{manifest.digest}"
    for picture, question in zip(pictures, questions, strict=True):
        (expected,) = offline.answer([Prompt(task, question, (picture,))], PROBE_TOKENS)
        said = client.ask(model, [picture], question, max_tokens=PROBE_TOKENS, temperature=0)
        if said.digest != manifest.digest:
            raise RefusedError(
                f"asked for bundle {manifest.digest[:16]}, {client.base_url} answered with {said.digest}"
            )
        if (said.text, said.usage["completion_tokens"]) != (expected.text, expected.tokens):
            raise RefusedError(
                f"{client.base_url} answers otherwise than bundle {manifest.digest[:16]} does offline "
                f"({said.usage['completion_tokens']} tokens, offline {expected.tokens}); it stays as it was"
            )
    return len(questions)


def follow(client: Client, alias: str, digest: str, timeout_s: float) -> float:
    """Tell the endpoint of a moved alias and ask it until these weights answer; seconds until the first such answer.

    Raises PefomedError where it does not follow in time, with the reason it gives.
    """
    model, picture = f"{client.base()}:{alias}", _picture(0)
    started, first, row, why = time.monotonic(), 0.0, 0, "it gives no reason"
    while time.monotonic() < started + timeout_s:
        # Several processes may be behind the address, each with its own look at the registry.
        why = client.refresh()["not_followed"].get(alias, why)
        try:
            said = client.ask(model, [picture], QUESTIONS[0], max_tokens=1, temperature=0).digest
        except ConfigError as error:  # an alias that is new, and not known there yet
            said, why = None, str(error)
        if said != digest:
            first, row = 0.0, 0
            time.sleep(POLL_S)
            continue
        first = first or time.monotonic() - started
        row += 1
        if row == IN_A_ROW:
            return first
    raise PefomedError(
        f"the registry's alias {alias!r} is moved, but {client.base_url} does not answer with its weights after "
        f"{timeout_s:g} s: {why}. `pefomed-ray rollback --alias {alias}` moves it back"
    )


def _picture(seed: int) -> bytes:
    """Noise as PNG."""
    pixels_HW = np.random.default_rng(seed).integers(0, 256, (SIDE_PX, SIDE_PX), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels_HW).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()
