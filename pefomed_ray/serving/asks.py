"""A request's body -> what the model is asked.

What reaches the model: the text of the last user message and the images of all user messages, in order, in the
template that the adapter was trained with. That template has no place for anything else, so the text of system,
assistant and earlier user messages is not used; the reply's header `x-not-used` says so.
"""

import secrets

from pefomed_ray.artifacts.records import Task
from pefomed_ray.config import ServeConfig
from pefomed_ray.serving.api_error import ApiError
from pefomed_ray.serving.contract import Ask, Found, Sampling
from pefomed_ray.serving.pictures import from_data_url
from pefomed_ray.serving.schemas import ChatRequest

MAX_QUESTION_CHARS = 4000
"""Bounds the tokenizer's work; whether the prompt fits the model's context is checked in tokens."""
SEED_BITS = 63


def to_ask(request: ChatRequest, found: Found, config: ServeConfig) -> Ask:
    """Question, pictures and sampling of a chat request, for what its `model` stands for.

    Raises ApiError 400 where there is no user message, no question for an adapter that answers questions, or a limit
    of the config is passed; 415 for a DICOM file that cannot be shown. Whether images decode is the engine's to find.
    """
    for message in request.messages:
        if message.role != "user" and any(part.image_url for part in message.content):
            raise _refusal("images are allowed in user messages only")
    users = [message for message in request.messages if message.role == "user"]
    if not users:
        raise _refusal("there is no message of role user")
    question = "\n".join(part.text for part in users[-1].content if part.text is not None).strip()
    urls = [part.image_url.url for message in users for part in message.content if part.image_url]
    if len(urls) > config.max_images:
        raise _refusal(f"{len(urls)} images; this endpoint takes {config.max_images} at most")
    task = found.adapter.task if found.adapter else "vqa"
    images = tuple(map(from_data_url, urls))
    return ask_of(task, question, images, found, sampling_of(request, config))


def ask_of(task: Task, question: str, images: tuple[bytes, ...], found: Found, sampling: Sampling) -> Ask:
    """Raises ApiError 400 where the question is too long, or missing though the task is to answer one."""
    if len(question) > MAX_QUESTION_CHARS:
        raise _refusal(f"the question is over {MAX_QUESTION_CHARS} characters")
    if task == "vqa" and not question:
        raise _refusal("the last user message has no text, and this model answers questions")
    return Ask(task, question, images, found.adapter.ref if found.adapter else None, sampling)


def sampling_of(request: ChatRequest, config: ServeConfig) -> Sampling:
    """Raises ApiError 400 where more tokens are asked for than the endpoint gives."""
    stop = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
    temperature = request.temperature or 0.0
    # Drawn here and not by the engine, so that another replica can take an answer up where one was lost.
    seed = secrets.randbits(SEED_BITS) if temperature and request.seed is None else request.seed
    return Sampling(_max_tokens(request, config), temperature, request.top_p or 1.0, seed, stop)


def not_used(request: ChatRequest) -> str:
    """Whose text the model does not see, for the header: `system, assistant, user` or fewer."""
    users = [message for message in request.messages if message.role == "user"]
    unseen = [
        message.role
        for message in request.messages
        if message is not users[-1] and any(part.text is not None for part in message.content)
    ]
    return ", ".join(dict.fromkeys(unseen))


def _max_tokens(request: ChatRequest, config: ServeConfig) -> int | None:
    for name in ("max_completion_tokens", "max_tokens"):
        value: int | None = getattr(request, name)
        if value is not None:
            return checked_tokens(value, name, config)
    return None


def checked_tokens(value: int, name: str, config: ServeConfig) -> int:
    """Raises ApiError 400 above the endpoint's limit."""
    if not 0 < value <= config.max_new_tokens:
        raise ApiError(400, f"{name}: from 1 to {config.max_new_tokens}", param=name, code="invalid_value")
    return value


def _refusal(why: str) -> ApiError:
    return ApiError(400, f"messages: {why}", param="messages", code="invalid_value")
