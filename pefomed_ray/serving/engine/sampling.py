"""From logits to tokens, and from tokens to the text that may be sent already.

Letters: B rows, V vocabulary.
"""

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from pefomed_ray.rendering.opening import AnyRenderer
from pefomed_ray.serving.contract import Sampling

BROKEN = "\ufffd"
"""What a decoder gives for bytes that are no whole character yet."""


class Sampler:
    """Draws the tokens of one answer."""

    def __init__(self, sampling: Sampling) -> None:
        self.greedy = sampling.temperature == 0
        if self.greedy:
            return
        self._warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
        if sampling.top_p < 1:
            self._warpers.append(TopPLogitsWarper(sampling.top_p))
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed % (1 << 63))

    def draw(self, logits_V: Tensor) -> int:
        """The next token."""
        empty = torch.empty(1, 0, dtype=torch.long)  # what the warpers take and do not look at
        warped_1V = self._warpers(empty, logits_V[None].float().cpu())
        return int(torch.multinomial(warped_1V.softmax(-1), 1, generator=self._generator))


def next_tokens(logits_BV: Tensor, samplers: list[Sampler]) -> list[int]:
    """One token a row."""
    best = logits_BV.argmax(-1).tolist()
    return [best[row] if sampler.greedy else sampler.draw(logits_BV[row]) for row, sampler in enumerate(samplers)]


class Text:
    """An answer's text as it grows. What was sent is never taken back.

    Decoders do take back, where tokens are bytes and together no character; the whole text is then what an offline
    answer would be, and not the sum of what was sent.
    """

    def __init__(self, renderer: AnyRenderer, stop: tuple[str, ...]) -> None:
        self._renderer = renderer
        self._stop = stop
        self._sent = ""
        self.ids: list[int] = []
        self.stopped = False
        """Whether a stop text was met; the text ends before it."""

    def add(self, token: int) -> str:
        """One token more; what may be sent now: no part of a character, nothing that may become a stop text."""
        self.ids.append(token)
        text = self._text()
        if self.stopped:
            return self._send(text)
        text = text.rstrip(BROKEN).rstrip()
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        return self._send(text[: len(text) - held])

    def end(self) -> str:
        """What is left to send."""
        return self._send(self._text())

    @property
    def whole(self) -> str:
        """The text of all tokens, up to a stop text."""
        return self._text()

    def _text(self) -> str:
        text = self._renderer.decode(self.ids)
        places = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        self.stopped = bool(places)
        return text[: min(places)] if places else text

    def _send(self, text: str) -> str:
        if not text.startswith(self._sent):
            return ""
        piece = text[len(self._sent) :]
        self._sent = text
        return piece


def _overlap(text: str, stop: str) -> int:
    """How much of a stop text the text ends with."""
    return max((size for size in range(1, len(stop)) if text.endswith(stop[:size])), default=0)
