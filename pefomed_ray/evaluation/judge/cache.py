"""Replies kept as they come, filed by what was asked: whatever is killed, nothing that was answered is paid for twice.

An SQLite file. It holds digests of questions, never their texts, and what the judge replied.
"""

import json
import sqlite3
from dataclasses import asdict
from pathlib import Path

from pefomed_ray.artifacts.storage import digest_of
from pefomed_ray.config.schema import JudgeConfig
from pefomed_ray.errors import ConfigError
from pefomed_ray.evaluation.judge.prompts import Asked, Prompt
from pefomed_ray.evaluation.judge.reply import Reply

BUSY_S = 30.0
"""How long to wait for another process that writes."""
_READ = "read "
"""Before the id of a job, in the place of its requests' digest."""


def reply_key(asked: Asked, prompt: Prompt, config: JudgeConfig) -> str:
    """What a reply is filed under: all that it depends on, and not the row's id."""
    settings = config.model_dump(include={"base_url", "model", "temperature", "seed", "max_tokens", "blank_image"})
    return digest_of([settings, prompt.digest, asked.texts, asked.repeat])


class ReplyCache:
    """Replies by key, and which batch jobs are under way."""

    def __init__(self, path: Path) -> None:
        """Open the file, made where it is not there. Raises ConfigError where it is none of ours."""
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None)  # every statement is durable
            self._file.execute("CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply TEXT NOT NULL)")
            self._file.execute("CREATE TABLE IF NOT EXISTS batches (requests TEXT PRIMARY KEY, id TEXT NOT NULL)")
        except (sqlite3.Error, OSError) as error:
            raise ConfigError(f"cache {str(path)!r} cannot be used ({error}); name another by cache=FILE") from None

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def get(self, key: str) -> Reply | None:
        """The reply, if it was given."""
        found = self._file.execute("SELECT reply FROM replies WHERE key = ?", (key,)).fetchone()
        return Reply(**json.loads(found[0])) if found else None

    def put(self, key: str, reply: Reply) -> None:
        """Keep a reply; once this returns it outlives the process."""
        self._file.execute("INSERT OR REPLACE INTO replies VALUES (?, ?)", (key, json.dumps(asdict(reply))))

    def batch_of(self, requests: str) -> str | None:
        """The id of the batch job that was started for the requests with this digest."""
        found = self._file.execute("SELECT id FROM batches WHERE requests = ?", (requests,)).fetchone()
        return found[0] if found else None

    def put_batch(self, requests: str, batch_id: str) -> None:
        """Remember which job answers the requests with this digest."""
        self._file.execute("INSERT OR REPLACE INTO batches VALUES (?, ?)", (requests, batch_id))

    def end_batch(self, requests: str, batch_id: str) -> None:
        """Remember that the results of a job were read: what they lack is for another job."""
        self._file.execute("DELETE FROM batches WHERE requests = ?", (requests,))
        self._file.execute("INSERT OR REPLACE INTO batches VALUES (?, ?)", (_READ + batch_id, batch_id))

    def was_read(self, batch_id: str) -> bool:
        """Whether a job's results were read."""
        return self.batch_of(_READ + batch_id) is not None
