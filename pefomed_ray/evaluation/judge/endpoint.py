"""The judge's endpoint: whether the texts may go there, its key, its client. All decided before a socket is opened."""

import json
import os
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import openai

from pefomed_ray.config.address import is_loopback
from pefomed_ray.config.schema import JudgeConfig
from pefomed_ray.errors import ConfigError, RefusedError

Licence = Literal["open", "restricted"]


def licence_in(path: Path) -> Licence | None:
    """What the rows of a predictions file say of their data's licence: `produced_by.licence`.

    restricted where any row does, open where every row does, else None. Lines that are no JSON object say nothing;
    `read_predictions` is what refuses them.
    """
    said = set()
    with open(path, "rb") as file:
        for line in filter(bytes.strip, file):
            try:
                produced_by = json.loads(line).get("produced_by")
            except (ValueError, AttributeError, RecursionError):
                produced_by = None
            said.add(produced_by.get("licence") if isinstance(produced_by, dict) else None)
    if "restricted" in said:
        return "restricted"
    return "open" if said == {"open"} else None


def check_may_send(config: JudgeConfig, licence: Licence | None) -> None:
    """Raise RefusedError where texts that are not declared open would leave the house.

    `licence` is what the data say of themselves; where they say nothing, what `config.licence` declares.
    """
    if config.local or (licence or config.licence) == "open":
        return
    if "restricted" in (licence, config.licence):
        why = "the data are of a restricted corpus: its licence lets no text go to a service of others"
    else:
        why = "nobody says that the data are open: the rows do not (produced_by.licence), nor does licence=open"
    raise RefusedError(
        f"{why}, and {config.base_url} is not declared local. Where it runs on machines that the licence covers, say "
        "so by local=true; an address alone, even this machine's own, does not show that. Nothing was sent"
    )


def open_client(config: JudgeConfig) -> openai.AsyncOpenAI:
    """The client of the endpoint; it connects when it is first asked, and retries nothing by itself.

    Raises ConfigError for an address that is none, one without encryption beyond this machine that is not declared
    local, one with a key or password in it, and where there is no key.
    """
    parts = urlsplit(config.base_url)
    if parts.username or parts.password or parts.query:
        raise ConfigError("base_url holds a user name, a password or a query; the key comes from key_env or key_file")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"base_url {config.base_url!r} is not an http(s) URL, such as https://api.example.org/v1")
    here = is_loopback(parts.hostname)
    if parts.scheme == "http" and not (here or config.local):
        raise ConfigError(
            f"base_url {config.base_url!r} would send texts without encryption; give https://, or local=true where "
            "it is in a network that they may cross so"
        )
    # A proxy of the environment would carry the texts elsewhere; so would a redirect.
    http_client = openai.DefaultAsyncHttpxClient(trust_env=not (here or config.local), follow_redirects=False)
    return openai.AsyncOpenAI(
        base_url=config.base_url,
        api_key=_key(config, needed=not (here or config.local)),
        timeout=config.timeout_s,
        max_retries=0,
        http_client=http_client,
    )


def _key(config: JudgeConfig, *, needed: bool) -> str:
    if config.key_file is not None:
        file = Path(config.key_file).expanduser()
        if not file.is_file():
            raise ConfigError(f"key_file {config.key_file!r} does not exist")
        key = file.read_text(encoding="utf-8").strip()
        if not key or not key.isascii() or len(key.split()) > 1:
            raise ConfigError(f"key_file {config.key_file!r} must hold one key and nothing else")
        return key
    key = os.environ.get(config.key_env, "").strip()
    if not key and needed:
        raise ConfigError(
            f"the environment variable {config.key_env} holds no key for {config.base_url}; set it, or name another "
            "by key_env=NAME, or a file by key_file=PATH"
        )
    return key or "none"
