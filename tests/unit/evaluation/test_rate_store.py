"""The store: nothing said is lost, everything can be undone, and files merge."""

import sqlite3
import threading
from pathlib import Path

import pytest

from pefomed_ray.errors import ConfigError, DataError
from pefomed_ray.evaluation.rate.items import Answer
from pefomed_ray.evaluation.rate.store import Conflict, Merged, Said, Store
from pefomed_ray.evaluation.ratings import Rating, read_ratings, write_ratings

EARLY, LATE = "2000-01-01T00:00:00+00:00", "2100-01-01T00:00:00+00:00"
ONE_MODEL = [Answer("m", f"row-{number}", f"item-{number}") for number in range(4)]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "ratings.sqlite", "report")
    store.add_answers(ONE_MODEL)
    return store


def scores(store: Store) -> list[tuple[str, str, int | None, bool, str]]:
    return [(row.rater, row.id, row.score, row.skipped, row.comment) for row in store.ratings()]


def test_one_row_a_rater_and_item_and_the_last_word_holds(store: Store) -> None:
    store.say("Anna", "item-0", Said(3))
    store.say("Anna", "item-0", Said(4, comment="on second thoughts"))
    store.say("Anna", "item-1", Said(skipped=True))
    store.say("Bela", "item-0", Said(0))
    assert scores(store) == [
        ("Anna", "row-0", 4, False, "on second thoughts"),
        ("Anna", "row-1", None, True, ""),
        ("Bela", "row-0", 0, False, ""),
    ]
    assert store.counts() == {"Anna": {"rated": 1, "skipped": 1}, "Bela": {"rated": 1, "skipped": 0}}
    again = Store(store.path, "report")
    assert again.said("Anna") == {"item-0": Said(4, comment="on second thoughts"), "item-1": Said(skipped=True)}


def test_undo_goes_back_step_by_step_and_keeps_what_was_undone(store: Store) -> None:
    items = {answer.item for answer in ONE_MODEL}
    store.say("Anna", "item-0", Said(3))
    store.say("Anna", "item-0", Said(4))
    store.say("Anna", "item-1", Said(skipped=True))
    store.say("Bela", "item-2", Said(1))
    store.say("Anna", "item-1", Said(skipped=True))  # the same again is nothing to undo
    assert store.undo("Anna", items) == "item-1"
    assert store.said("Anna") == {"item-0": Said(4)}
    assert store.undo("Anna", items) == "item-0"
    assert store.said("Anna") == {"item-0": Said(3)}
    assert store.undo("Anna", {"item-3"}) is None
    assert store.undo("Anna", items) == "item-0"
    assert store.undo("Anna", items) is None
    assert scores(store) == [("Bela", "row-2", 1, False, "")]
    with sqlite3.connect(store.path) as connection:
        assert connection.execute("SELECT count(*), sum(undone) FROM changes").fetchone() == (4, 3)


def test_many_raters_at_once_lose_nothing(store: Store) -> None:
    def rate(rater: str) -> None:
        own = Store(store.path, "report")
        for number in range(4):
            for score in (0, 1, 2, number):
                own.say(rater, f"item-{number}", Said(score))

    threads = [threading.Thread(target=rate, args=[f"rater-{number}"]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [(row.id, row.score) for row in store.ratings()] == 4 * [(f"row-{n}", n) for n in range(4)]


def test_a_name_is_spelt_as_it_is_known(store: Store) -> None:
    store.say(store.name_of("  Anna   Smith "), "item-0", Said(1))
    assert store.name_of("ANNA smith") == "Anna Smith"
    assert store.name_of("Anna") == "Anna"
    assert store.raters() == ["Anna Smith"]
    for bad in ("", " ", "x" * 61, "a\0b"):
        with pytest.raises(DataError, match="a rater's name"):
            store.name_of(bad)


def test_answers_of_several_models_and_a_shared_item(store: Store) -> None:
    store.say("Anna", "item-0", Said(2))
    assert [row.model for row in store.ratings()] == [""]
    store.add_answers([Answer("n", "row-0", "item-0"), Answer("n", "row-1", "other")])
    store.say("Anna", "other", Said(1))
    assert [(row.id, row.model, row.score) for row in store.ratings()] == [
        ("row-0", "m", 2),
        ("row-0", "n", 2),
        ("row-1", "n", 1),
    ]


def test_a_model_with_other_answers_is_refused_and_nothing_is_noted(store: Store) -> None:
    with pytest.raises(ConfigError, match="another answer of 'm' to 'row-1'"):
        store.add_answers([Answer("m", "row-9", "item-9"), Answer("m", "row-1", "changed")])
    store.say("Anna", "item-9", Said(1))
    assert store.ratings() == []
    store.add_answers(ONE_MODEL)


def test_ratings_come_back_from_a_file(store: Store, tmp_path: Path) -> None:
    store.say("Anna", "item-0", Said(3, comment="a, b"))
    store.say("Anna", "item-1", Said(skipped=True))
    store.say("Bela", "item-0", Said(comment="later"))
    write_ratings(tmp_path / "r.csv", store.ratings())
    other = Store(tmp_path / "other.sqlite", "report")
    other.add_answers(ONE_MODEL)
    found = read_ratings(tmp_path / "r.csv")
    assert other.merge(found) == Merged(3, 0, ())
    assert other.merge(found) == Merged(0, 3, ())
    assert other.ratings() == store.ratings()
    assert other.undo("Anna", {"item-0", "item-1"}) is None  # of the page, not of a file


def test_where_a_file_says_otherwise_the_later_holds_and_it_is_said(store: Store) -> None:
    for number in range(3):
        store.say("Anna", f"item-{number}", Said(2))
    merged = store.merge(
        [
            Rating("anna", "row-0", 4, False, "", LATE),
            Rating("Anna", "row-1", None, True, "", EARLY),
            Rating("Anna", "row-2", 0, False, "", ""),
            Rating("Anna", "row-3", 1, False, "", EARLY),
        ]
    )
    assert (merged.new, merged.same) == (1, 0)
    assert merged.conflicts == (
        Conflict("Anna", "row-0", "", 2, 4, "file"),
        Conflict("Anna", "row-1", "", 2, None, "store"),
        Conflict("Anna", "row-2", "", 2, 0, "store"),
    )
    assert [row.score for row in store.ratings()] == [4, 2, 2, 1]


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (Rating("Anna", "row-7", 1, False, "", ""), "nothing is known of an answer by 'm' to 'row-7'"),
        (Rating("Anna", "row-1", 1, False, "", "", "x"), "nothing is known of an answer by 'x' to 'row-1'"),
        (Rating("a" * 61, "row-1", 1, False, "", ""), "a rater's name"),
    ],
)
def test_a_wrong_row_keeps_the_whole_file_out(store: Store, wrong: Rating, named: str) -> None:
    with pytest.raises(DataError, match=named):
        store.merge([Rating("Anna", "row-0", 1, False, "", ""), wrong])
    assert store.ratings() == []


def test_scores_and_models_that_do_not_fit_are_refused(tmp_path: Path, store: Store) -> None:
    vqa = Store(tmp_path / "vqa.sqlite", "vqa")
    vqa.add_answers(ONE_MODEL)
    with pytest.raises(DataError, match="score 3 of 'row-0' is none of task 'vqa'"):
        vqa.merge([Rating("Anna", "row-0", 3, False, "", "")])
    store.add_answers([Answer("n", "row-0", "x")])
    with pytest.raises(DataError, match="does not say of which model, and there are 2"):
        store.merge([Rating("Anna", "row-0", 3, False, "", "")])


def test_a_file_that_is_no_store_of_this_task_is_refused_and_left_alone(tmp_path: Path, store: Store) -> None:
    with pytest.raises(ConfigError, match="holds ratings of task 'report', not 'vqa'"):
        Store(store.path, "vqa")
    with pytest.raises(ConfigError, match="does not exist; make it first"):
        Store(tmp_path / "none" / "r.sqlite", "vqa")
    text = tmp_path / "text.sqlite"
    text.write_text("not a database, but long enough to be taken for one" * 10)
    with pytest.raises(ConfigError, match="cannot be used"):
        Store(text, "vqa")
    foreign = tmp_path / "foreign.sqlite"
    with sqlite3.connect(foreign) as connection:
        connection.execute("CREATE TABLE theirs (x)")
    before = foreign.read_bytes()
    with pytest.raises(ConfigError, match="is a database, but not of ratings"):
        Store(foreign, "vqa")
    assert foreign.read_bytes() == before
