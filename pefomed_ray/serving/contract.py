"""What passes between the HTTP side and the engine: plain values that pickle. No torch, no Ray, no FastAPI."""

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from pefomed_ray.artifacts.records import Task
from pefomed_ray.errors import DataError

Ended = Literal["stop", "length"]
"""Why an answer ended: by itself or at a stop text, or where max_tokens or the model's context cut it off."""


@dataclass(frozen=True)
class AdapterRef:
    """Weights to answer with: content and place. Two bundles never share a digest, so an answer is never by another."""

    digest: str
    bundle: str
    """Folder or `s3://` URL of the registry's copy."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, in OpenAI's terms."""

    max_tokens: int | None = None
    """None: as many as the endpoint's limit and the model's context allow."""
    temperature: float = 0.0
    """0: greedy, and the fields below but `stop` have no effect."""
    top_p: float = 1.0
    seed: int | None = None
    """None: another one each time."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer; they are not part of it."""


class CannotServeError(DataError):
    """An adapter cannot be served here: changed, of another base, of too high a rank."""


@dataclass(frozen=True)
class Ask:
    """What a request asks the model."""

    task: Task
    question: str
    images: tuple[bytes, ...]
    """Encoded, JPEG or PNG."""
    adapter: AdapterRef | None = None
    """None: the base as it is."""
    sampling: Sampling = Sampling()


@dataclass(frozen=True)
class Completion:
    """A whole answer."""

    text: str
    ended: Ended
    prompt_tokens: int
    """Images count as the visual tokens they become."""
    tokens: int
    """With the end token."""
    digest: str | None
    """Of the weights that made it; None: the base's own."""


@dataclass(frozen=True)
class Piece:
    """A part of an answer as it comes. All texts together are the completion's text, unless it holds bytes that are no
    characters."""

    text: str
    completion: Completion | None = None
    """With the last piece only."""


Follows = Callable[[], Awaitable[None]]
"""Look at the registry and the keys, and follow what has changed."""


@dataclass(frozen=True)
class Stats:
    """How a replica is doing."""

    running: int
    """Requests that are being answered."""
    waiting: int
    """Requests that wait for room beside those."""
    adapters: int
    """In memory."""
    steps: int
    """Forward passes since the start."""
    tokens: int
    """Said since the start."""
    image_hits: int
    """Images that the vision tower had seen."""
    image_misses: int


class Backend(Protocol):
    """Whatever answers. Refusals come as ApiError."""

    async def answer(self, ask: Ask) -> Completion:
        """Answer one request."""

    def stream(self, ask: Ask) -> AsyncGenerator[Piece, None]:
        """Answer one request piece by piece. To close it early ends the work on it."""

    async def load(self, ref: AdapterRef) -> None:
        """Have every replica read an adapter, so that who asks for it first does not wait.

        Raises CannotServeError.
        """

    async def ready(self) -> None:
        """Return once a replica answers."""

    async def stats(self) -> Sequence[Mapping[str, float]]:
        """`Stats` of each replica, by name."""


@dataclass(frozen=True)
class ServedAdapter:
    """What the endpoint says about a bundle of the registry."""

    ref: AdapterRef
    aliases: tuple[str, ...]
    """What stands for it now, sorted; none: it can be asked for by its digest alone."""
    task: Task
    created: int
    """When it was promoted, seconds since 1970."""
    lineage: dict[str, Any] = field(default_factory=dict)
    """Data, split, template, trial and metrics it came from."""


@dataclass(frozen=True)
class Found:
    """What a model name stands for at this moment."""

    name: str
    """In full: `<base>`, `<base>:<alias>` or `<base>:<digest>`."""
    adapter: ServedAdapter | None
    """None: the base as it is."""

    @property
    def digest(self) -> str | None:
        """Of the weights that answer; None for the base's own."""
        return self.adapter.ref.digest if self.adapter else None


@dataclass(frozen=True)
class Standing:
    """What aliases stand for now."""

    aliases: Mapping[str, str]
    """Alias -> digest."""
    not_followed: Mapping[str, str]
    """Alias -> why it still stands for what it did, though the registry has moved it."""


class Catalogue(Protocol):
    """What can be asked for: the base and the registry's bundles over it, as the registry is now."""

    base: str
    """Short name of the base, never its path."""

    @property
    def adapters(self) -> Sequence[ServedAdapter]:
        """What aliases stand for, and then what else was asked for or stood for since the start. Every bundle of the
        registry can be asked for by its digest."""

    @property
    def standing(self) -> Standing:
        """What aliases stand for here."""

    async def find(self, model: str) -> Found:
        """By `<base>`, `<base>:<alias>`, `<alias>`, or `<base>:<digest>` with at least 12 of the digest's characters.

        Raises ApiError 404 for any other name.
        """

    async def refresh(self) -> None:
        """Read the registry now, rather than at the next look."""
