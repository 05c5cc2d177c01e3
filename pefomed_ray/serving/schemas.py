"""The subset of OpenAI's chat completions that the endpoint speaks: bodies of requests and of replies.

Keys that other servers know and this one has no use for are taken where their value says "nothing special"
(`presence_penalty` 0, `n` 1, `logprobs` false, ...), because clients such as LangChain's send them unasked. Any other
key or value is refused, by name.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from pefomed_ray.serving.api_error import ApiError

MAX_MESSAGES = 64
MAX_STOPS = 4
"""OpenAI's limit."""
MAX_STOP_CHARS = 64

_KEY_NAMES = "abcdefghijklmnopqrstuvwxyz_"


class _Body(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ImageUrl(_Body):
    """`detail` is taken without effect: the base sees every image at one size."""

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


Parts = Annotated[
    list[Part],
    BeforeValidator(_as_parts, json_schema_input_type=str | list[Part]),
    Field(max_length=MAX_MESSAGES),
]


class Message(_Body):
    """One turn; plain string content is read as one text part."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Parts
    name: Annotated[str, Field(max_length=64)] | None = None
    """Taken without effect."""


class StreamOptions(_Body):
    """What a streamed answer ends with."""

    include_usage: bool = False


class TextFormat(_Body):
    """The only one there is."""

    type: Literal["text"]


Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]


class ChatRequest(_Body):
    """Body of POST /v1/chat/completions."""

    model: Annotated[str, Field(min_length=1, max_length=200)]
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: Annotated[int, Field(gt=0)] | None = None
    max_completion_tokens: Annotated[int, Field(gt=0)] | None = None
    """OpenAI's newer name for max_tokens; wins where both are given."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """Default: 0, greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    n: Literal[1] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    response_format: TextFormat | None = None
    store: Literal[False] | None = None
    user: str | None = None
    """Taken without effect, and not logged."""


class Usage(_Body):
    """Tokens of a reply; images count as the visual tokens they become."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ReplyMessage(_Body):
    """The answer."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


Finish = Literal["stop", "length"]
"""`length` where max_tokens or the model's context cut the answer off."""


class Choice(_Body):
    """There is always one."""

    index: int = 0
    message: ReplyMessage
    finish_reason: Finish
    logprobs: None = None


class ChatCompletion(_Body):
    """Reply of POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    """Seconds since 1970."""
    model: str
    choices: list[Choice]
    usage: Usage
    system_fingerprint: str | None
    """Digest of the adapter that answered; none for the base as it is."""


class Delta(_Body):
    """What is new; the first one says the role."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(_Body):
    """There is one, and none in the chunk that holds the usage."""

    index: int = 0
    delta: Delta
    finish_reason: Finish | None = None
    logprobs: None = None


class ChatChunk(_Body):
    """One event of a streamed reply."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    system_fingerprint: str | None


class Answer(_Body):
    """Reply of POST /v1/vqa and /v1/report."""

    answer: str
    finish_reason: Finish
    model: str
    digest: str | None
    """Of the adapter that answered; none for the base as it is."""
    usage: Usage


class ModelCard(_Body):
    """What there is to know of a model: the base, an alias, or a bundle without one."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["pefomed-ray"] = "pefomed-ray"
    parent: str | None
    """The base, of an adapter; none, of the base."""
    aliases: list[str] = []
    lineage: dict[str, Any] | None = None
    """Data, split, template, trial, metrics and digest it came from."""
    not_followed: str | None = None
    """Why the alias still stands for this bundle, where the registry has moved it to one that cannot be served."""


class ModelList(_Body):
    """Reply of GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Standing(_Body):
    """Reply of POST /v1/refresh: what aliases stand for now, and why others are not followed."""

    aliases: dict[str, str]
    not_followed: dict[str, str]


class Status(_Body):
    """Reply of /healthz and /readyz."""

    status: Literal["ok", "ready"]


class ErrorDetail(_Body):
    """OpenAI's form."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(_Body):
    """Body of every refusal."""

    error: ErrorDetail


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
        name = last if 0 < len(last) <= 40 and set(last) <= set(_KEY_NAMES) else None
        what = f"parameter {name!r}" if name else "a parameter of this request"
        raise ApiError(400, f"{what} is not supported", param=param or name, code="unsupported_parameter")
    raise ApiError(
        400, f"{param or 'the body'}: {first['msg'].removeprefix('Value error, ')}", param=param, code="invalid_value"
    )
