"""Work on names in a known order, done in threads a little ahead of its use: what waits for S3 waits together."""

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")
AHEAD_PER_THREAD = 2


class Ahead(Generic[T]):
    """`work(name)` for names that are asked for in about the order of `upcoming`; use it as a context."""

    def __init__(self, work: Callable[[str], T], upcoming: Iterable[str], threads: int) -> None:
        self._work = work
        self._upcoming = iter(dict.fromkeys(upcoming))
        self._limit = AHEAD_PER_THREAD * threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="ahead")
        self._started: dict[str, Future[T]] = {}
        """In order."""

    def __enter__(self) -> "Ahead[T]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def get(self, name: str) -> T:
        """What `work` returns or raises. Names that come earlier in the order are taken for not wanted."""
        while len(self._started) < self._limit and (upcoming := next(self._upcoming, None)) is not None:
            self._started[upcoming] = self._pool.submit(self._work, upcoming)
        if name not in self._started:
            return self._work(name)
        while (first := next(iter(self._started))) != name:
            self._started.pop(first).cancel()
        return self._started.pop(name).result()
