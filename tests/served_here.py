"""A real endpoint on this machine's Ray, over a tiny base with several adapters, and the same models offline."""

import base64
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai

from pefomed_ray.artifacts.registry import promote
from pefomed_ray.config import ServeConfig
from pefomed_ray.model.generate import Generator, Prompt
from pefomed_ray.model.load import open_generator
from pefomed_ray.serving import deploy
from pefomed_ray.serving.contract import AdapterRef
from pefomed_ray.serving.keys import client_key
from tests.tiny_served import make_base, make_bundle

MAX_TOKENS = 12
QUESTION = "Is it normal?"
ADAPTERS: tuple[dict[str, Any], ...] = (
    {"rank": 4, "alpha": 8},
    {"rank": 8, "alpha": 8, "template": "paper"},
    {"rank": 2, "alpha": 16, "train_projector": False},
    {"rank": 16, "alpha": 4},
)


@dataclass
class Served:
    """A running endpoint, its key, and its bundles."""

    endpoint: deploy.Endpoint
    folder: Path
    registry: Path
    key: str
    bundles: tuple[AdapterRef, ...]
    _offline: dict[str, Generator] = field(default_factory=dict)

    def client(self, **more: Any) -> openai.OpenAI:
        """Of the `openai` package."""
        return openai.OpenAI(base_url=self.endpoint.url, api_key=self.key, **{"max_retries": 0, "timeout": 60.0} | more)

    def ask(self, image: bytes, question: str = QUESTION, model: str = "champion", **more: Any) -> str:
        """An answer."""
        with self.client() as client:
            said = client.chat.completions.create(
                model=model, messages=messages(image, question), **{"max_tokens": MAX_TOKENS} | more
            )
        return said.choices[0].message.content or ""

    def offline(self, image: bytes, question: str = QUESTION, digest: str | None = None, tokens: int = 12) -> str:
        """What a bundle answers offline; the champion's when none is named."""
        digest = digest or self.endpoint.digest
        if digest not in self._offline:
            (ref,) = [ref for ref in self.bundles if ref.digest == digest]
            self._offline[digest] = open_generator(Path(ref.bundle))
        return self._offline[digest].answer([Prompt("vqa", question, (image,))], tokens)[0].text


def messages(image: bytes, question: str) -> Any:
    """Of a chat request."""
    url = "data:image/png;base64," + base64.b64encode(image).decode()
    return [
        {
            "role": "user",
            "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}],
        }
    ]


@contextmanager
def serving(adapters: int = 4, **config: Any) -> Iterator[Served]:
    """`champion` is the first adapter; the others are in the registry as `second`, `third` and `fourth`."""
    folder = Path(tempfile.mkdtemp(prefix="pfs-", dir="/tmp"))  # short: Ray's sockets allow 107 characters
    registry = folder / "registry"
    try:
        make_base(folder / "base")
        refs = tuple(
            make_bundle(folder / f"bundle{number}", folder / "base", seed=number + 1, **adapter)
            for number, adapter in enumerate(ADAPTERS[:adapters])
        )
        for alias, ref in zip(("champion", "second", "third", "fourth"), refs, strict=False):
            promote(registry, alias, Path(ref.bundle))
        endpoint = deploy.start(ServeConfig.model_validate({"port": free_port()} | config), registry, "champion")
        yield Served(endpoint, folder, registry, client_key(registry), refs)
    finally:
        deploy.stop()
        shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    """One that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
