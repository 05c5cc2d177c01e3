"""What a judge is asked: versioned prompts of our own wording, kept as text files, and the texts of an item as data.

The system message holds our instructions and nothing else. An item's texts stand in the user message, as one JSON
object between two lines with a code that no text of the item can hold, because it is a digest of them. What could end
the object, hide in it or break the line (`<`, `>`, control and zero-width characters) is escaped.

A prompt is never edited once used: another wording is another file with the next number.
"""

import base64
import io
import json
import unicodedata
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from string import Template
from typing import Any

from pefomed_ray.artifacts.records import Task
from pefomed_ray.artifacts.storage import digest_of, sha256_bytes
from pefomed_ray.evaluation.judgements import BEST_SCORE

PROMPTS: dict[Task, str] = {"vqa": "vqa-1", "caption": "report-1", "report": "report-1"}
"""Task -> name of the prompt, its version last."""
NONCE_CHARS = 16
BLANK_IMAGE_PX = 32

_ESCAPED_CATEGORIES = frozenset({"Cc", "Cf", "Co", "Cs", "Zl", "Zp"})
"""Unicode's control, format (zero-width, direction), private, surrogate and line-separating characters."""


@dataclass(frozen=True)
class Asked:
    """One answer to be judged, one time."""

    id: str
    """Of the row of the predictions; of a canary, of the row that it is made from."""
    repeat: int
    question: str
    references: tuple[str, ...]
    candidate: str
    canary: str | None = None
    """Its kind, where the candidate is one of ours whose score is known beforehand."""

    @property
    def texts(self) -> dict[str, Any]:
        """What the judge sees of it."""
        question = {"question": self.question} if self.question else {}
        return {**question, "references": list(self.references), "candidate": self.candidate}


@dataclass(frozen=True)
class Prompt:
    """Instructions, the form of an item, and the scale."""

    name: str
    system: str
    user: Template
    best: int
    """The highest score."""
    digest: str
    """sha256 of the file."""

    def messages(self, asked: Asked, *, blank_image: bool) -> list[dict[str, Any]]:
        """As the chat completions API takes them; the same bytes each time."""
        text = self.user.substitute(nonce=nonce(asked), item=escaped_json(asked.texts))
        content: str | list[dict[str, Any]] = text
        if blank_image:
            content = [
                {"type": "image_url", "image_url": {"url": _blank_image_url()}},
                {"type": "text", "text": text},
            ]
        return [{"role": "system", "content": self.system}, {"role": "user", "content": content}]

    @property
    def response_format(self) -> dict[str, Any]:
        """Structured outputs: an object with a score of the scale and nothing else."""
        schema = {
            "type": "object",
            "properties": {"score": {"type": "integer", "enum": list(range(self.best + 1))}},
            "required": ["score"],
            "additionalProperties": False,
        }
        return {"type": "json_schema", "json_schema": {"name": "verdict", "strict": True, "schema": schema}}


@cache
def prompt_for(task: Task) -> Prompt:
    """The prompt of a task."""
    name = PROMPTS[task]
    data = (Path(__file__).parent / "prompts" / f"{name}.txt").read_bytes()
    system, user = data.decode().split("\n---\n")
    return Prompt(name, system.strip(), Template(user.strip()), BEST_SCORE[task], sha256_bytes(data))


def nonce(asked: Asked) -> str:
    """The code of an item: to write it into a text of the item one would have to know it before writing."""
    return digest_of(asked.texts)[:NONCE_CHARS]


def escaped_json(value: Any) -> str:
    """The value as JSON on one line, without a character that is not seen or that a closing tag is made of."""
    text = json.dumps(value, ensure_ascii=False)
    return "".join(_escape(c) if c in "<>" or unicodedata.category(c) in _ESCAPED_CATEGORIES else c for c in text)


def _escape(character: str) -> str:
    return json.dumps(character)[1:-1] if ord(character) > 0x7F else f"\\u{ord(character):04x}"


@cache
def _blank_image_url() -> str:
    from PIL import Image  # needed by few, and slow to load

    buffer = io.BytesIO()
    Image.new("L", (BLANK_IMAGE_PX, BLANK_IMAGE_PX), 128).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
