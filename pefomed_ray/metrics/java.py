"""The two programs of `pycocoevalcap` that need Java: the Penn Treebank tokeniser and METEOR 1.5.

Its own wrappers write the texts to a file in the package's folder, wait without limit, and hang when Java dies; here
texts go through pipes alone, every wait ends, and no process stays. Commands, arguments and arithmetic are theirs.
"""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from threading import Timer
from time import monotonic
from types import TracebackType
from typing import Self

import numpy as np
from pycocoevalcap.meteor import meteor as meteor_module
from pycocoevalcap.tokenizer import ptbtokenizer

PTB_START_S, PTB_TEXT_S = 120.0, 0.05
METEOR_START_S, METEOR_ITEM_S = 600.0, 2.0
"""The longest waits: to start, and for each text besides. METEOR reads 60 MB of paraphrases first: 8 s where a core is
free, two minutes seen where none was."""

METEOR_NUMBERS = 23
"""Of an item: lengths, function words, matches by module, chunks, words matched (class MeteorStats)."""
ALPHA, BETA, GAMMA, DELTA = 0.85, 0.2, 0.6, 0.75
MODULE_WEIGHTS = np.array([1.0, 0.6, 0.8, 0.6])
"""Exact, stem, synonym, paraphrase; all five as METEOR 1.5 has them for English (Denkowski and Lavie 2014)."""


class JavaError(Exception):
    """Java is not there, did not start, died, or did not answer in time; the message says which, and no text."""


def ptb_tokens(texts: Sequence[str]) -> list[str]:
    """Lower-cased Penn Treebank tokens of each text, joined by blanks, punctuation left out: COCO's tokenisation.

    Line breaks of any kind count as blanks; pycocoevalcap's own wrapper knows `\\n` alone and gives every text after
    another kind the tokens of its neighbour. Raises JavaError.
    """
    jar = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    command = ["-cp", jar.name, "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    lines = "".join(" ".join(text.splitlines()) + "\n" for text in texts)
    limit_s = PTB_START_S + PTB_TEXT_S * len(texts)
    with _java(command, jar.parent) as process:
        try:
            written, _ = process.communicate(lines, timeout=limit_s)
        except subprocess.TimeoutExpired:
            raise JavaError(f"the PTB tokeniser did not answer within {limit_s:.0f} s") from None
    if process.returncode != 0:
        raise JavaError(f"the PTB tokeniser ended with code {process.returncode}")
    tokens = written.split("\n")[:-1]
    if len(tokens) != len(texts):
        raise JavaError(f"the PTB tokeniser gave {len(tokens)} lines for {len(texts)} texts")
    return [_without_punctuation(line) for line in tokens]


def _without_punctuation(line: str) -> str:
    return " ".join(word for word in line.rstrip().split(" ") if word not in ptbtokenizer.PUNCTUATIONS)


class Meteor:
    """METEOR 1.5 for English, running; a context manager, as it takes seconds to start.

    Entering raises JavaError where Java is not there.
    """

    def __enter__(self) -> Self:
        jar = Path(meteor_module.__file__).with_name(meteor_module.METEOR_JAR)
        # In another language's locale METEOR cannot read its own decimal points.
        options = ["-Xmx2G", "-Duser.language=en", "-Dfile.encoding=UTF-8"]
        self._stack = ExitStack()
        self._process = self._stack.enter_context(
            _java([*options, "-jar", jar.name, "-", "-", "-stdio", "-l", "en", "-norm"], jar.parent)
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def score(
        self, references: Sequence[Sequence[str]], predictions: Sequence[str]
    ) -> tuple[float, list[float], np.ndarray]:
        """Of all items together, of each, and what each adds to the sums of `meteor_of_sums` (N x 23). Tokens in.

        Raises JavaError where Java dies, does not answer in time or answers with anything but numbers.
        """
        limit_s = METEOR_START_S + METEOR_ITEM_S * len(predictions)
        deadline = monotonic() + limit_s
        watchdog = Timer(limit_s, _kill, [self._process])
        watchdog.daemon = True
        watchdog.start()
        try:
            answers = [self._statistics(texts, text) for texts, text in zip(references, predictions, strict=True)]
            self._write("EVAL ||| " + " ||| ".join(answers))
            items = [float(self._read()) for _ in predictions]
            corpus = float(self._read())
            numbers_NK = np.array([[float(number) for number in answer.split()] for answer in answers])
        except (OSError, ValueError) as error:
            late = f"did not answer within {limit_s:.0f} s"
            odd = f"died or answered oddly ({type(error).__name__})"
            raise JavaError(f"METEOR {late if monotonic() >= deadline else odd}") from None
        finally:
            watchdog.cancel()
        return corpus, items, _summands(numbers_NK)

    def _statistics(self, references: Sequence[str], prediction: str) -> str:
        fields = [text.replace("|||", "").replace("  ", " ") for text in (*references, prediction)]
        self._write("SCORE ||| " + " ||| ".join(fields))
        answer = self._read()
        if len(answer.split()) != METEOR_NUMBERS:
            raise ValueError
        return answer

    def _write(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


def meteor_of_sums(sums: np.ndarray) -> np.ndarray:
    """METEOR of summed statistics, [..., 23] -> [...], as the program itself takes a corpus together."""
    matches = sums[..., 4:20].reshape(*sums.shape[:-1], 4, 4)
    precision, recall = (_weighted_share(sums, matches, side) for side in (0, 1))
    f_mean = _over(precision * recall, ALPHA * precision + (1 - ALPHA) * recall)
    fragmentation = _over(sums[..., 20], (sums[..., 21] + sums[..., 22]) / 2)
    return np.asarray((1 - GAMMA * fragmentation**BETA) * f_mean)


def _weighted_share(sums: np.ndarray, matches: np.ndarray, side: int) -> np.ndarray:
    """Words matched by words there are, function words counting less. Side 0 is the prediction, 1 the reference."""
    content, function = matches[..., side], matches[..., 2 + side]
    function_words = sums[..., 2 + side]
    matched = ((DELTA * content + (1 - DELTA) * function) * MODULE_WEIGHTS).sum(axis=-1)
    return _over(matched, DELTA * (sums[..., side] - function_words) + (1 - DELTA) * function_words)


def _over(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0)


def _summands(numbers_NK: np.ndarray) -> np.ndarray:
    """The program counts no chunk for an item that is matched whole, alone or in a corpus."""
    found_NK = numbers_NK.copy()
    whole_N = (numbers_NK[:, 20] == 1) & (numbers_NK[:, 21:] == numbers_NK[:, :2]).all(axis=1)
    found_NK[whole_N, 20] = 0
    return found_NK


@contextmanager
def _java(arguments: Sequence[str], folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A Java program that runs in `folder` and is gone afterwards. Raises JavaError where there is no Java to start."""
    java = shutil.which("java")
    if java is None:
        raise JavaError("there is no `java` on the PATH")
    try:
        process = subprocess.Popen(
            [java, *arguments],
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # It repeats characters that it does not know: text of a patient.
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        raise JavaError(f"`java` does not start ({type(error).__name__})") from None
    try:
        yield process
    finally:
        _kill(process)
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):
                if pipe is not None:
                    pipe.close()
        process.wait()


def _kill(process: subprocess.Popen[str]) -> None:
    """With what it started: `java` may be a script that starts the real one."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
