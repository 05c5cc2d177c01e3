"""`pefomed-ray demo`: the whole system on phantoms, in one process tree, with nothing downloaded."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pefomed_ray.artifacts.storage import check_output_is_free, local_path, read_json
from pefomed_ray.cli.cluster import cluster
from pefomed_ray.cli.console import say
from pefomed_ray.cli.doctor import check_embedded_base
from pefomed_ray.cli.options import serve_config
from pefomed_ray.cli.progress import bar, metrics_table
from pefomed_ray.cli.promotion import promote_bundle
from pefomed_ray.cli.training import LINES
from pefomed_ray.cli.trials import TrialLines, leaderboard
from pefomed_ray.cli.waiting import wait_for_signal
from pefomed_ray.config import SearchConfig, TrainConfig, load_config
from pefomed_ray.config.load import set_key
from pefomed_ray.data.options import DataOptions
from pefomed_ray.data.phantom import write_slake
from pefomed_ray.data.shards import prepare
from pefomed_ray.errors import ConfigError
from pefomed_ray.evaluation.evaluate import evaluate
from pefomed_ray.evaluation.predict import GenerationSettings
from pefomed_ray.search.space import preset_values
from pefomed_ray.search.study import SearchResult, run_search
from pefomed_ray.serving.client import Client
from pefomed_ray.serving.deploy import Endpoint, start, stop
from pefomed_ray.serving.keys import CLIENT_KEY_FILE, client_key
from pefomed_ray.serving.preflight import check_port
from pefomed_ray.training.trainer import TrainResult, train

CHECKOUT = Path(__file__).parent.parent.parent
SPACE = CHECKOUT / "search_spaces" / "phantom.yaml"
ALIAS = "champion"
SPLITS = (160, 24, 60)
"""Pictures for training, validation and test."""
QUESTIONS_PER_IMAGE = 5
SEED = 7
"""Not the seed the embedded base was trained with: these phantoms are new to it."""
QUERY_TIMEOUT_S = 60.0
MAX_NEW_TOKENS = 16
"""The longest answer of this corpus has 9."""


def run_demo(output: str, *, keep: bool, port: int) -> dict[str, Any]:
    """Corpus, shards, search, training, evaluation, promotion, endpoint, one question; everything under `output`.

    Raises ConfigError where the folder is taken or this is not a checkout; RefusedError where the model does not beat
    its controls.
    """
    folder = local_path(output)
    check_output_is_free(folder)
    if not SPACE.is_file():
        raise ConfigError(f"the demo reads {str(SPACE)!r}, which is not there; run it from a checkout of the project")
    check_port(serve_config([f"port={port}"]))
    check_embedded_base()
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with _stage("corpus: phantoms drawn in SLAKE's layout"):
        write_slake(
            folder / "corpus", images=sum(SPLITS), questions_per_image=QUESTIONS_PER_IMAGE, seed=SEED, splits=SPLITS
        )
    say("starting Ray on this machine")
    with cluster():
        result = _on_cluster(folder, keep=keep, port=port)
    return result | {"seconds": round(time.monotonic() - started)}


def _on_cluster(folder: Path, *, keep: bool, port: int) -> dict[str, Any]:
    with _stage("shards: Ray Data reads, checks and writes"), bar("shards", "rows") as on_progress:
        manifest = prepare(folder / "corpus", folder / "shards", DataOptions(source="phantoms"), on_progress)
        say(f"rows {manifest.rows}, quarantined {manifest.quarantined}")
    with _stage("search: Ray Tune, Optuna and ASHA over rank, alpha and learning rate"):
        found = _search(folder)
    with _stage("training: Ray Train, FSDP2 on two workers, the best trial's hyperparameters"):
        trained = _train(folder, found)
    with _stage("evaluation: test split, beside controls"), bar("answers", "answers") as on_progress:
        settings = GenerationSettings(max_new_tokens=MAX_NEW_TOKENS)
        evaluated = evaluate(
            trained.bundle, folder / "shards", "test", folder / "evaluation", settings=settings, on_progress=on_progress
        )
    with _stage("promotion: gate, verification, alias"):
        metrics_file = Path(evaluated["metrics"])
        promoted = promote_bundle(folder / "registry", ALIAS, trained.bundle, metrics_file)
        say(f"{ALIAS} -> {promoted.entry.digest[:16]}")
    registry = folder / "registry"
    with _stage("serving: Ray Serve behind an OpenAI-compatible endpoint"):
        endpoint = start(serve_config([f"port={port}"]), registry, ALIAS)
    try:
        with _stage("query: the openai client asks about a test picture"):
            answered = _ask(folder, endpoint)
        leaderboard(found.rows, "exact_match")
        metrics_table(Path(evaluated["metrics"]))
        say(f"report: {evaluated['report']}")
        say(f"{answered['picture']}: {answered['question']}")
        say(f"  answer: {answered['answer']}\n  truth:  {answered['truth']}")
        if keep:
            say(f"{endpoint.url} stays up; the key is in {registry / CLIENT_KEY_FILE}; Ctrl-C ends it")
            wait_for_signal()
    finally:
        stop()
    metrics = read_json(Path(evaluated["metrics"]))
    return {
        "leaderboard": str(found.leaderboard),
        "bundle": str(trained.bundle),
        "metrics": evaluated["metrics"],
        "report": evaluated["report"],
        "exact_match": metrics["exact_match"]["value"],
        "controls": {name: values["exact_match"]["value"] for name, values in metrics["controls"].items()},
        **answered,
    }


def _ask(folder: Path, endpoint: Endpoint) -> dict[str, Any]:
    row = read_json(folder / "corpus" / "test.json")[0]
    picture = folder / "corpus" / "imgs" / row["img_name"]
    key = client_key(folder / "registry")
    with Client(endpoint.url, key, QUERY_TIMEOUT_S) as client:
        reply = client.ask(endpoint.model, [picture.read_bytes()], row["question"])
    return {
        "picture": str(picture),
        "question": row["question"],
        "answer": reply.text,
        "truth": row["answer"],
        "adapter": reply.digest,
    }


def _search(folder: Path) -> SearchResult:
    search = load_config(SearchConfig, SPACE, [f"output_dir={folder / 'search'}"])
    values = preset_values(search, SPACE)
    set_key(values, "data.shards", str(folder / "shards"))
    lines = TrialLines(search.metric)
    return run_search(search, values, lines)


def _train(folder: Path, found: SearchResult) -> TrainResult:
    preset = SPACE.parent / load_config(SearchConfig, SPACE).preset
    words = [f"{key}={value}" for key, value in found.best.params.items()]
    words += [f"data.shards={folder / 'shards'}", f"output_dir={folder / 'train'}"]
    return train(load_config(TrainConfig, preset, words), LINES)


@contextmanager
def _stage(title: str) -> Iterator[None]:
    """Announce a stage and say how long it took."""
    say(f"\n== {title}")
    started = time.monotonic()
    yield
    say(f"   {time.monotonic() - started:.0f} s")
