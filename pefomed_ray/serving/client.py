"""Asking an endpoint about pictures, with the `openai` client anybody would use."""

import base64
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai

from pefomed_ray.config.address import is_loopback
from pefomed_ray.data.dicom import is_dicom
from pefomed_ray.errors import ConfigError, DataError, PefomedError
from pefomed_ray.serving.pictures import DICOM_TYPE, media_type

MAX_RETRIES = 2

_OTHER_FORMATS = {
    "GIF": (0, b"GIF8"),
    "BMP": (0, b"BM"),
    "TIFF": (0, b"II*\x00"),
    "big-endian TIFF": (0, b"MM\x00*"),
    "WebP": (8, b"WEBP"),
    "PDF": (0, b"%PDF"),
}
"""Name -> offset and bytes: what people have at hand and this cannot send as it is."""


@dataclass(frozen=True)
class Reply:
    """An answer and which adapter gave it."""

    text: str
    digest: str | None
    """sha256 digest of the adapter; None from an endpoint that does not say, and from a base as it is."""
    model: str
    usage: dict[str, int]
    """prompt_tokens, completion_tokens, total_tokens."""


class Client:
    """An endpoint; what it refuses, and what is wrong with it, comes as an error of ours that says what to do."""

    def __init__(self, base_url: str, key: str, timeout_s: float, max_retries: int = MAX_RETRIES) -> None:
        self.base_url = base_url
        self._timeout_s = timeout_s
        # A proxy of the environment is not for this machine: the picture would leave it.
        http_client = openai.DefaultHttpxClient(trust_env=not is_loopback(urlsplit(base_url).hostname or ""))
        self._openai = openai.OpenAI(
            base_url=base_url, api_key=key, timeout=timeout_s, max_retries=max_retries, http_client=http_client
        )

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self._openai.close()

    def ask(self, model: str, images: Sequence[bytes], question: str, **more: Any) -> Reply:
        """One question about JPEG, PNG or DICOM files' bytes; `more` is what `chat.completions.create` takes.

        Raises ConfigError for a refused key or an unknown model, DataError for another image format or a request the
        endpoint cannot take, PefomedError where it does not answer.
        """
        with self._explained():
            said: Any = self._openai.chat.completions.create(model=model, messages=_messages(images, question), **more)
        # An HTML page with status 200 comes back as a plain string.
        if not getattr(said, "choices", None) or said.usage is None:
            raise self._not_ours()
        return Reply(said.choices[0].message.content or "", said.system_fingerprint, said.model, _counts(said.usage))

    def ask_aloud(self, model: str, images: Sequence[bytes], question: str, say: Callable[[str], None]) -> Reply:
        """The same, each piece of the answer said as it comes."""
        text, last, usage = "", None, None
        with self._explained():
            chunks: Any = self._openai.chat.completions.create(
                model=model,
                messages=_messages(images, question),
                stream=True,
                stream_options={"include_usage": True},
            )
            for chunk in chunks:
                last, usage = chunk, chunk.usage or usage
                piece = (chunk.choices[0].delta.content if chunk.choices else None) or ""
                text += piece
                say(piece)
        if last is None or usage is None:
            raise self._not_ours()
        return Reply(text, last.system_fingerprint, last.model, _counts(usage))

    def refresh(self) -> dict[str, Any]:
        """Tell it to look at the registry; what its aliases stand for then, and why others are not followed."""
        with self._explained():
            said = self._openai.post("/refresh", cast_to=object)
        if not isinstance(said, dict) or "aliases" not in said:
            raise self._not_ours()
        return said

    def base(self) -> str:
        """Short name of the base it serves."""
        with self._explained():
            models = [model for model in self._openai.models.list() if model.owned_by == "pefomed-ray"]
        bases = [model.id for model in models if not getattr(model, "parent", "")]
        if not bases:
            raise self._not_ours()
        return bases[0]

    def _not_ours(self) -> PefomedError:
        return PefomedError(f"{self.base_url} answered, but not as an endpoint of `pefomed-ray serve` does")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except openai.OpenAIError as error:
            raise self._explain(error) from None
        except (ValueError, AttributeError):
            raise PefomedError(
                f"{self.base_url} answered something that is not JSON; is it an OpenAI-compatible endpoint?"
            ) from None

    def _explain(self, error: openai.OpenAIError) -> PefomedError:
        url = self.base_url
        if isinstance(error, openai.APITimeoutError):
            return PefomedError(f"{url} did not answer within {self._timeout_s:g} s, asked {MAX_RETRIES + 1} times")
        if isinstance(error, openai.APIConnectionError):
            return PefomedError(
                f"no endpoint answers at {url}; check the URL, or start one with "
                "`pefomed-ray serve --alias NAME --port P`"
            )
        if isinstance(error, openai.APIStatusError):
            body = error.body if isinstance(error.body, dict) else {}
            message = f"{url} answered {error.status_code}: {body.get('message', 'no message')}"
            if isinstance(error, openai.AuthenticationError | openai.NotFoundError):
                return ConfigError(message)
            if isinstance(error, openai.BadRequestError) or error.status_code in (413, 415):
                return DataError(message)
            return PefomedError(message)
        # An error event in a stream.
        event = getattr(error, "body", None)
        said = event.get("message") if isinstance(event, dict) else None
        return PefomedError(f"{url}: {said or type(error).__name__}")


def read_picture(path: Path) -> bytes:
    """A JPEG, PNG or DICOM file. Raises ConfigError where it is missing, DataError where it is something else."""
    if not path.is_file():
        raise ConfigError(f"image {str(path)!r} does not exist")
    data = path.read_bytes()
    if media_type(data) or is_dicom(data):
        return data
    found = [name for name, (at, mark) in _OTHER_FORMATS.items() if data[at : at + len(mark)] == mark]
    what = f"a {found[0]} file" if found else "of an unknown format"
    raise DataError(f"image {str(path)!r} is {what}; convert it to PNG or JPEG first")


def _messages(images: Sequence[bytes], question: str) -> Any:
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": _data_url(image)}} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def _data_url(data: bytes) -> str:
    return f"data:{media_type(data) or DICOM_TYPE};base64,{base64.b64encode(data).decode()}"


def _counts(usage: Any) -> dict[str, int]:
    return {name: getattr(usage, name) for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
