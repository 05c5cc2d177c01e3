"""Work done ahead gives what it would give when asked for, in any order, errors included."""

import threading

import pytest

from pefomed_ray.data.ahead import AHEAD_PER_THREAD, Ahead

NAMES = [f"n{number}" for number in range(20)]


def test_everything_comes_as_asked_for_and_once() -> None:
    done: list[str] = []

    def work(name: str) -> str:
        done.append(name)
        return name.upper()

    with Ahead(work, NAMES + NAMES, threads=2) as ahead:
        assert [ahead.get(name) for name in NAMES] == [name.upper() for name in NAMES]
    assert sorted(done) == sorted(NAMES)


def test_names_that_are_left_out_or_asked_for_again() -> None:
    with Ahead(str.upper, NAMES, threads=2) as ahead:
        assert ahead.get("n5") == "N5"
        assert ahead.get("n2") == "N2"  # passed over, or never in the order: done when asked for
        assert ahead.get("other") == "OTHER"
        assert [ahead.get(name) for name in ("n6", "n9", "n19")] == ["N6", "N9", "N19"]


def test_an_error_comes_where_its_name_is_asked_for() -> None:
    def work(name: str) -> str:
        if name == "n3":
            raise ValueError(name)
        return name

    with Ahead(work, NAMES, threads=2) as ahead:
        assert ahead.get("n2") == "n2"
        for _ in range(2):
            with pytest.raises(ValueError, match="n3"):
                ahead.get("n3")
        assert ahead.get("n4") == "n4"


def test_it_works_ahead_and_no_further() -> None:
    started: list[str] = []
    go_on = threading.Event()

    def work(name: str) -> str:
        started.append(name)
        assert go_on.wait(10)
        return name

    with Ahead(work, NAMES, threads=2) as ahead:
        first = threading.Thread(target=ahead.get, args=("n0",))
        first.start()
        while len(started) < 2:  # two at once, before the first is done
            pass
        go_on.set()
        first.join(10)
    assert 2 <= len(started) <= 2 * AHEAD_PER_THREAD
