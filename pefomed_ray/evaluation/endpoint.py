"""Which endpoint a person named, and whether pictures may go there."""

import os
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit

from pefomed_ray.errors import ConfigError, RefusedError

KEY_ENV = "OPENAI_API_KEY"


@dataclass(frozen=True)
class Endpoint:
    """Whom to ask."""

    url: str
    """Up to and with `/v1`."""
    model: str
    key: str = field(default="", repr=False)
    local: bool = False
    """Declared by a person: what is sent there stays in the house. No proxy is used then."""
    concurrency: int = 8
    timeout_s: float = 120.0


def open_endpoint(url: str, model: str | None, key_env: str, *, local: bool, concurrency: int) -> Endpoint:
    """The endpoint that command-line words name, its key from the environment variable `key_env`.

    Raises ConfigError for a URL that is none, one without encryption that is not declared local, no model, or no key.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"--endpoint {url!r} is not an http(s) URL, such as https://api.example.org/v1")
    if parts.username or parts.password or parts.query:
        raise ConfigError("--endpoint: the URL holds a user name, password or query; the key comes from --key-env")
    if parts.scheme == "http" and not local:
        raise ConfigError(
            f"--endpoint {url!r} would send pictures without encryption; give https://, or --local where it is on this "
            "machine or in a network that they may cross so"
        )
    if not model:
        raise ConfigError("--endpoint needs --model NAME: the model to ask for there")
    key = os.environ.get(key_env, "")
    if not key and not local:
        raise ConfigError(
            f"the environment variable {key_env} holds no key for {url}; set it, or name another by --key-env"
        )
    return Endpoint(url, model, key or "none", local=local, concurrency=concurrency)


def check_may_send(endpoint: Endpoint, licence: Literal["open", "restricted"], source: str) -> None:
    """Raise RefusedError where a restricted corpus would leave the house; nothing has been sent then."""
    if licence == "restricted" and not endpoint.local:
        raise RefusedError(
            f"{source} is a restricted corpus: its licence lets no picture and no text go to a service of others, "
            f"whatever that one promises, and {endpoint.url} is not declared local. Where it runs on machines that "
            "the licence covers, say so by --local; nothing was sent"
        )
