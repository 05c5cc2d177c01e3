"""What people write first: FastAPI, a lock, and `generate`. `python -m benchmarks._naive_server PORT BUNDLE...`

It is given every advantage: each adapter has a model of its own in memory, so none is ever exchanged; rendering and
`generate` are those of this project's offline generation; torch has all cores.
"""

import asyncio
import base64
import os
import sys
import threading
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI

from pefomed_ray.model.generate import Prompt
from pefomed_ray.model.load import open_generator


def make_app(bundles: list[Path]) -> FastAPI:
    """The part of OpenAI's protocol that the load uses; a model's name is `adapter-<number>`."""
    generators = {f"adapter-{number}": open_generator(bundle) for number, bundle in enumerate(bundles)}
    one_at_a_time = threading.Lock()
    app = FastAPI()

    def answer(body: dict[str, Any]) -> dict[str, Any]:
        image, text = body["messages"][0]["content"]
        data = base64.b64decode(image["image_url"]["url"].partition(",")[2])
        with one_at_a_time:
            (said,) = generators[body["model"]].answer([Prompt("vqa", text["text"], (data,))], body["max_tokens"])
        return {"choices": [{"message": {"content": said.text}}], "usage": {"completion_tokens": said.tokens}}

    @app.post("/v1/chat/completions")
    async def chat(body: dict[str, Any]) -> dict[str, Any]:
        return await asyncio.to_thread(answer, body)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    return app


if __name__ == "__main__":
    torch.set_num_threads(os.cpu_count() or 1)
    uvicorn.run(make_app([Path(word) for word in sys.argv[2:]]), port=int(sys.argv[1]), log_level="error")
