"""What was answered -> what is sent: a JSON body, or the events of a stream."""

import json
import time
from collections.abc import AsyncIterator

from pydantic import BaseModel

from pefomed_ray.serving.api_error import ApiError
from pefomed_ray.serving.contract import Completion, Piece
from pefomed_ray.serving.schemas import ChatChunk, ChatCompletion, Choice, ChunkChoice, Delta, ReplyMessage, Usage

DONE = "data: [DONE]\n\n"


def usage_of(completion: Completion) -> Usage:
    """Its tokens."""
    total = completion.prompt_tokens + completion.tokens
    return Usage(prompt_tokens=completion.prompt_tokens, completion_tokens=completion.tokens, total_tokens=total)


def chat_completion(reply_id: str, model: str, completion: Completion) -> ChatCompletion:
    """A whole reply."""
    choice = Choice(message=ReplyMessage(content=completion.text), finish_reason=completion.ended)
    return ChatCompletion(
        id=reply_id,
        created=int(time.time()),
        model=model,
        choices=[choice],
        usage=usage_of(completion),
        system_fingerprint=completion.digest,
    )


async def chat_events(
    reply_id: str, model: str, digest: str | None, pieces: AsyncIterator[Piece], *, with_usage: bool
) -> AsyncIterator[str]:
    """Server-sent events of a streamed reply. What fails after the first one ends it with an event that says so."""
    created = int(time.time())

    def event(choices: list[ChunkChoice], usage: Usage | None = None) -> str:
        chunk = ChatChunk(
            id=reply_id, created=created, model=model, choices=choices, usage=usage, system_fingerprint=digest
        )
        return _event(chunk)

    yield event([ChunkChoice(delta=Delta(role="assistant", content=""))])
    try:
        async for piece in pieces:
            if piece.text:
                yield event([ChunkChoice(delta=Delta(content=piece.text))])
            if piece.completion is not None:
                yield event([ChunkChoice(delta=Delta(), finish_reason=piece.completion.ended)])
                if with_usage:
                    yield event([], usage_of(piece.completion))
    except ApiError as error:
        yield f"data: {json.dumps(error.body())}\n\n"
        return
    yield DONE


def _event(value: BaseModel) -> str:
    return f"data: {value.model_dump_json()}\n\n"
