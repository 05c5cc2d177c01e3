"""What the page may ask, who may ask it, and what it is never told."""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from starlette.testclient import TestClient

from pefomed_ray.errors import DataError
from pefomed_ray.evaluation.predictions import Prediction, write_predictions
from pefomed_ray.evaluation.rate.app import create_app
from pefomed_ray.evaluation.rate.items import Items, open_items
from pefomed_ray.evaluation.rate.pictures import for_browser
from pefomed_ray.evaluation.rate.store import Said, Store

TOKEN = "the-token"
PORT = 4711
URL = f"http://127.0.0.1:{PORT}"


def pixels(data: bytes) -> bytes:
    return Image.open(io.BytesIO(data)).convert("RGB").tobytes()


@pytest.fixture
def shards(make_shards: Callable[..., Path]) -> Path:
    return make_shards(licence="restricted")


@pytest.fixture
def items(shards: Path, tmp_path: Path) -> Items:
    rows = pq.read_table(shards / "test").to_pylist()
    files = []
    for model in ("secret-one", "secret-two"):
        own = [
            Prediction(row["id"], row["question"], row["answer"], f"answer {row['id'][-1]}{model[-1]}") for row in rows
        ]
        files.append(tmp_path / f"{model}.jsonl")
        write_predictions(files[-1], own, {})
    return open_items(files, shards, "test")


@pytest.fixture
def store(items: Items, tmp_path: Path) -> Store:
    store = Store(tmp_path / "ratings.sqlite", items.task)
    store.add_answers(items.answers)
    return store


@pytest.fixture
def stranger(items: Items, store: Store) -> Iterator[TestClient]:
    with TestClient(create_app(items, store, 0, TOKEN, PORT), base_url=URL, follow_redirects=False) as client:
        yield client


@pytest.fixture
def client(stranger: TestClient) -> TestClient:
    assert stranger.get("/", params={"token": TOKEN}).status_code == 303
    return stranger


def test_nothing_without_the_token_and_everything_with_it(stranger: TestClient, items: Items) -> None:
    key = next(iter(items.by_key))
    paths = [
        "/",
        "/page/rate.js",
        "/api/raters",
        "/api/plan?rater=A",
        f"/api/items/{key}",
        f"/api/items/{key}/images/0",
    ]
    for path in [*paths, "/?token=wrong", "/?token=", "/?token=%C3%A4", "/docs", "/openapi.json"]:
        answer = stranger.get(path)
        assert (answer.status_code, answer.headers["cache-control"]) == (403, "no-store"), path
    entry = stranger.get("/", params={"token": TOKEN})
    assert (entry.status_code, entry.headers["location"]) == (303, "/")
    cookie = entry.headers["set-cookie"].lower()
    assert f"pefomed_rate_{PORT}={TOKEN}" in cookie
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    for path in paths:
        answer = stranger.get(path)
        assert answer.status_code == 200, path
        assert answer.headers["content-security-policy"].startswith("default-src 'self';")
        assert answer.headers["cache-control"] == "no-store"
        assert "access-control-allow-origin" not in answer.headers
    for path in ("/docs", "/openapi.json", "/page/../app.py", "/page/%2e%2e/app.py"):
        assert stranger.get(path).status_code == 404, path


def test_another_sites_page_gets_nothing(client: TestClient) -> None:
    assert client.get("/api/raters", headers={"host": "localhost:1"}).status_code == 200
    for host in ("evil.example", "127.0.0.1.evil.example", "evil.example:4711", "192.168.0.1"):
        assert client.get("/api/raters", headers={"host": host}).status_code == 400, host
    assert client.post("/api/undo", json={"rater": "A"}, headers={"origin": URL}).status_code == 200
    for origin in ("http://evil.example", "http://127.0.0.1:9", "null"):
        refused = client.post("/api/undo", json={"rater": "A"}, headers={"origin": origin})
        assert refused.status_code == 403, origin


def test_the_page_is_never_told_whose_answer_it_is(client: TestClient, items: Items) -> None:
    plan = client.get("/api/plan", params={"rater": "Anna"})
    texts = [plan.text, *(client.get(f"/api/items/{key}").text for key in plan.json()["order"])]
    assert len(plan.json()["order"]) == len(items.by_key) == 14
    assert not any(word in text for text in texts for word in ("secret", "test-", "model", ".jsonl"))
    assert "answer 0e" in "".join(texts)  # control: the texts themselves are there


def test_an_item_has_texts_and_pictures(client: TestClient, items: Items) -> None:
    for key, item in items.by_key.items():
        found = client.get(f"/api/items/{key}").json()
        assert found == {
            "key": key,
            "images": [f"/api/items/{key}/images/0"],
            "question": item.question,
            "reference": item.reference,
            "answer": item.answer,
        }
        picture = client.get(found["images"][0])
        assert picture.headers["content-type"] == "image/png"
        assert pixels(picture.content) == pixels(items.image(key, 0))
    for path in ("/api/items/nothing", f"/api/items/{key}/images/1", f"/api/items/{key}/images/-1"):
        assert client.get(path).status_code == 404, path


def test_pictures_are_shown_as_the_model_is_given_them() -> None:
    levels_HW = np.arange(0, 4096, dtype=np.uint16).reshape(64, 64)  # 12 bits in 16: black in a browser
    file = io.BytesIO()
    Image.fromarray(levels_HW).save(file, format="PNG")
    data, media_type = for_browser(file.getvalue())
    assert (media_type, pixels(data)[:1], pixels(data)[-1:]) == ("image/png", b"\0", b"\xff")
    file = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(file, format="JPEG")
    assert for_browser(file.getvalue()) == (file.getvalue(), "image/jpeg")
    with pytest.raises(DataError, match="does not decode"):
        for_browser(data[:-40])


def test_what_is_said_is_in_the_store_and_in_the_next_plan(client: TestClient, store: Store) -> None:
    plan = client.get("/api/plan", params={"rater": " Anna "}).json()
    assert (plan["rater"], plan["said"]) == ("Anna", {})
    assert [step["score"] for step in plan["scale"]] == [1, 0]
    first, second = plan["order"][:2]
    said = {"score": 1, "skipped": False, "comment": "<b>ok</b>"}
    assert client.put(f"/api/items/{first}/rating", json={"rater": "Anna"} | said).json() == said
    skipped = {"score": None, "skipped": True, "comment": ""}
    client.put(f"/api/items/{second}/rating", json={"rater": "anna"} | skipped)
    assert client.get("/api/plan", params={"rater": "ANNA"}).json() == plan | {"said": {first: said, second: skipped}}
    assert store.said("Anna") == {first: Said(1, comment="<b>ok</b>"), second: Said(skipped=True)}
    assert client.post("/api/undo", json={"rater": "Anna"}).json() == {
        "key": second,
        "said": {"score": None, "skipped": False, "comment": ""},
    }
    assert client.post("/api/undo", json={"rater": "Anna"}).json()["key"] == first
    assert client.post("/api/undo", json={"rater": "Anna"}).json() == {"key": None, "said": None}


def test_what_makes_no_sense_is_refused_and_not_stored(client: TestClient, store: Store, items: Items) -> None:
    key = next(iter(items.by_key))
    good = {"rater": "Anna", "score": 1, "skipped": False, "comment": ""}
    for wrong in (
        {"score": 2},
        {"score": -1},
        {"score": 0.5},
        {"score": "one"},
        {"skipped": True},
        {"rater": ""},
        {"rater": "a" * 61},
        {"comment": "x" * 4001},
        {"model": "secret-one"},
    ):
        assert client.put(f"/api/items/{key}/rating", json=good | wrong).status_code == 422, wrong
    assert client.put("/api/items/nothing/rating", json=good).status_code == 404
    text = json.dumps(good)
    plain = client.put(f"/api/items/{key}/rating", content=text, headers={"content-type": "text/plain"})
    assert plain.status_code == 422
    assert store.raters() == []
    assert client.put(f"/api/items/{key}/rating", json=good).status_code == 200
    assert store.raters() == ["Anna"]
