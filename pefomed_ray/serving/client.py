"""Asking an endpoint one question about one picture, with the `openai` client anybody would use."""

import base64
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import openai

from pefomed_ray.config.address import is_loopback
from pefomed_ray.errors import ConfigError, DataError, PefomedError

MAX_RETRIES = 2

_SIGNATURES = {"image/png": b"\x89PNG\r\n\x1a\n", "image/jpeg": b"\xff\xd8\xff"}
_OTHER_FORMATS = {
    "GIF": (0, b"GIF8"),
    "BMP": (0, b"BM"),
    "TIFF": (0, b"II*\x00"),
    "big-endian TIFF": (0, b"MM\x00*"),
    "WebP": (8, b"WEBP"),
    "DICOM": (128, b"DICM"),
    "PDF": (0, b"%PDF"),
}
"""Name -> offset and bytes: what people have at hand and this cannot send as it is."""


@dataclass(frozen=True)
class Reply:
    """An answer and which adapter gave it."""

    text: str
    digest: str | None
    """sha256 digest of the adapter; None from an endpoint that does not say."""
    model: str
    usage: dict[str, int]
    """prompt_tokens, completion_tokens, total_tokens."""


def ask(base_url: str, key: str, model: str, image_path: Path, question: str, timeout_s: float) -> Reply:
    """One question about one JPEG or PNG file; retried twice at most where the endpoint is busy or lost.

    Raises ConfigError for a missing file, a refused key or an unknown model, DataError for another image format or a
    request the endpoint cannot take, PefomedError where it does not answer.
    """
    image = {"type": "image_url", "image_url": {"url": data_url(image_path)}}
    content = [image, {"type": "text", "text": question}]
    # A proxy of the environment is not for this machine: the picture would leave it.
    http_client = openai.DefaultHttpxClient(trust_env=not is_loopback(urlsplit(base_url).hostname or ""))
    with openai.OpenAI(
        base_url=base_url, api_key=key, timeout=timeout_s, max_retries=MAX_RETRIES, http_client=http_client
    ) as client:
        try:
            completion = client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": content}],  # type: ignore[list-item, misc]
            )
        except openai.OpenAIError as error:
            raise _explain(error, base_url, timeout_s) from None
        except ValueError:
            raise PefomedError(
                f"{base_url} answered something that is not JSON; is it an OpenAI-compatible endpoint?"
            ) from None
    choices = getattr(completion, "choices", None)
    # An HTML page with status 200 comes back as a plain string.
    if not choices or completion.usage is None:
        raise PefomedError(f"{base_url} answered, but not with a chat completion; is it an OpenAI-compatible endpoint?")
    usage = completion.usage
    counts = {name: getattr(usage, name) for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
    return Reply(choices[0].message.content or "", completion.system_fingerprint, completion.model, counts)


def data_url(path: Path) -> str:
    """A JPEG or PNG file as a data: URL, its bytes unchanged. Raises ConfigError or DataError as `ask` does."""
    if not path.is_file():
        raise ConfigError(f"image {str(path)!r} does not exist")
    data = path.read_bytes()
    for media_type, signature in _SIGNATURES.items():
        if data.startswith(signature):
            return f"data:{media_type};base64,{base64.b64encode(data).decode()}"
    found = [name for name, (at, mark) in _OTHER_FORMATS.items() if data[at : at + len(mark)] == mark]
    what = f"a {found[0]} file" if found else "of an unknown format"
    raise DataError(f"image {str(path)!r} is {what}; convert it to PNG or JPEG first")


def _explain(error: openai.OpenAIError, base_url: str, timeout_s: float) -> PefomedError:
    if isinstance(error, openai.APITimeoutError):
        return PefomedError(f"{base_url} did not answer within {timeout_s:g} s, asked {MAX_RETRIES + 1} times")
    if isinstance(error, openai.APIConnectionError):
        return PefomedError(
            f"no endpoint answers at {base_url}; check the URL, or start one with "
            "`pefomed-ray serve --alias NAME --port P`"
        )
    if isinstance(error, openai.APIStatusError):
        body = error.body if isinstance(error.body, dict) else {}
        message = f"{base_url} answered {error.status_code}: {body.get('message', 'no message')}"
        if isinstance(error, openai.AuthenticationError | openai.NotFoundError):
            return ConfigError(message)
        if isinstance(error, openai.BadRequestError) or error.status_code == 413:
            return DataError(message)
        return PefomedError(message)
    return PefomedError(f"{base_url}: {type(error).__name__}")
