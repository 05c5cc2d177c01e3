"""The subset of OpenAI's chat completions that the endpoint speaks, and what it makes of a request.

What reaches the model: the text of the last user message and the images of all user messages, in order. The template
the adapter was trained with has no place for anything else, so the text of system, assistant and earlier user messages
is not used. Decoding is greedy: a temperature other than 0, `stream` and `n` other than 1 are refused; `seed` and
`user` are accepted without effect (the same request always has the same answer) and are not logged. Any other key is
refused, by name. Images are `data:` URLs of JPEG or PNG, nothing is ever fetched.
"""

import base64
import binascii
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from pefomed_ray.artifacts.records import Task
from pefomed_ray.config import ServeConfig
from pefomed_ray.serving.api_error import ApiError

MAX_MESSAGES = 64
MAX_QUESTION_CHARS = 4000
"""Bounds the tokenizer's work; whether the prompt fits the model's context is checked in tokens."""

_DATA_URL = re.compile(r"data:image/(?:jpeg|jpg|png);base64,")
_KEY_NAME = re.compile(r"[a-z_]{1,40}")


class _Body(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ImageUrl(_Body):
    """`detail` is accepted without effect: the base sees every image at one size."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class Part(_Body):
    """A piece of a message: text or one image."""

    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: ImageUrl | None = None

    @model_validator(mode="after")
    def _holds_what_its_type_says(self) -> "Part":
        if (self.text is not None, self.image_url is not None) != (self.type == "text", self.type == "image_url"):
            raise ValueError("a part holds exactly what its type names")
        return self


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class Message(_Body):
    """One turn; plain string content is read as one text part."""

    role: Literal["system", "user", "assistant"]
    content: Annotated[list[Part], BeforeValidator(_as_parts), Field(max_length=MAX_MESSAGES)]


class ChatRequest(_Body):
    """Body of POST /v1/chat/completions."""

    model: Annotated[str, Field(min_length=1, max_length=200)]
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: Annotated[int, Field(gt=0)] | None = None
    max_completion_tokens: Annotated[int, Field(gt=0)] | None = None
    """OpenAI's newer name for max_tokens; wins where both are given."""
    temperature: Annotated[float, Field(ge=0, le=0)] | None = None
    n: Literal[1] | None = None
    stream: Literal[False] | None = None
    seed: int | None = None
    user: str | None = None


class Usage(_Body):
    """Tokens of a reply; images count as the visual tokens they become."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ReplyMessage(_Body):
    """The answer."""

    role: Literal["assistant"] = "assistant"
    content: str


class Choice(_Body):
    """`length` where max_tokens cut the answer off."""

    index: int = 0
    message: ReplyMessage
    finish_reason: Literal["stop", "length"]


class ChatCompletion(_Body):
    """Reply of POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    """Seconds since 1970."""
    model: str
    choices: list[Choice]
    usage: Usage
    system_fingerprint: str
    """Digest of the adapter that answered."""


@dataclass(frozen=True)
class Ask:
    """What a request asks the model."""

    question: str
    images: tuple[bytes, ...]
    max_tokens: int | None
    """None: as many as the limit and the model's context allow."""


@dataclass(frozen=True)
class Completion:
    """What a replica answered, and the digest of the adapter it holds."""

    text: str
    digest: str
    prompt_tokens: int
    tokens: int
    finished: bool


def parse_request(body: bytes) -> ChatRequest:
    """The request in a body. Raises ApiError 400 naming the parameter, never showing its value."""
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        # The messages are pydantic's fixed sentences about the schema; the input is left out here.
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
    if first["type"] == "json_invalid" or not first["loc"]:
        raise ApiError(400, "the body is not a JSON object in UTF-8", code="invalid_json")
    top, last = str(first["loc"][0]), str(first["loc"][-1])
    param = top if top in ChatRequest.model_fields else None
    if first["type"] == "extra_forbidden":
        name = last if _KEY_NAME.fullmatch(last) else None
        what = f"parameter {name!r}" if name else "a parameter of this request"
        raise ApiError(400, f"{what} is not supported", param=param or name, code="unsupported_parameter")
    raise ApiError(400, f"{top}: {first['msg'].removeprefix('Value error, ')}", param=param, code="invalid_value")


def to_ask(request: ChatRequest, task: Task, config: ServeConfig) -> Ask:
    """Question and image bytes of a request.

    Raises ApiError 400 where there is no user message, no image, no question for a `vqa` adapter, or a limit of the
    config is passed. Whether the images decode is for the replica to find out.
    """
    for message in request.messages:
        if message.role != "user" and any(part.image_url for part in message.content):
            raise ApiError(400, "messages: images are allowed in user messages only", param="messages")
    users = [message for message in request.messages if message.role == "user"]
    if not users:
        raise ApiError(400, "messages: there is no message of role user", param="messages")
    question = "\n".join(part.text for part in users[-1].content if part.text is not None).strip()
    if len(question) > MAX_QUESTION_CHARS:
        raise ApiError(400, f"messages: the question is over {MAX_QUESTION_CHARS} characters", param="messages")
    if task == "vqa" and not question:
        raise ApiError(
            400, "messages: the last user message has no text, and this model answers questions", param="messages"
        )
    urls = [part.image_url.url for message in users for part in message.content if part.image_url]
    if not 0 < len(urls) <= config.max_images:
        raise ApiError(
            400, f"messages: {len(urls)} images; this endpoint takes 1 to {config.max_images}", param="messages"
        )
    return Ask(question, tuple(_image_bytes(url) for url in urls), _max_tokens(request, config))


def _max_tokens(request: ChatRequest, config: ServeConfig) -> int | None:
    for name in ("max_completion_tokens", "max_tokens"):
        value: int | None = getattr(request, name)
        if value is not None:
            if value > config.max_new_tokens:
                raise ApiError(400, f"{name}: at most {config.max_new_tokens}", param=name, code="invalid_value")
            return value
    return None


def _image_bytes(url: str) -> bytes:
    head = _DATA_URL.match(url)
    if head is None:
        raise ApiError(
            400,
            "messages: an image_url must be a data: URL, data:image/jpeg;base64,... or data:image/png;base64,...",
            param="messages",
            code="unsupported_image_url",
        )
    try:
        return base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise ApiError(
            400, "messages: the base64 data of an image is not valid", param="messages", code="invalid_image"
        ) from None
