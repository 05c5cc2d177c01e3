"""Aliases: `promote`, `rollback`, `history`. The gate, the registry and the endpoint in their order."""

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from pefomed_ray.artifacts.folders import open_folder
from pefomed_ray.artifacts.registry import DEFAULT_REGISTRY, AliasEntry, Decision, Proof
from pefomed_ray.cli.console import exits_with_code, finish, say, table

FOLLOW_TIMEOUT_S = 60.0

Json = Annotated[bool, typer.Option("--json", help="End stdout with one JSON object.")]
Registry = Annotated[str, typer.Option(help="Folder or s3:// URL of aliases and promoted bundles.")]
EndpointUrl = Annotated[
    str | None,
    typer.Option("--endpoint", help="URL up to /v1 of an endpoint that follows this registry: it is told, and asked."),
]


@dataclass(frozen=True)
class Promoted:
    """A move of an alias, what the gate said, and what an endpoint answered."""

    entry: AliasEntry
    decision: Decision | None
    proof: Proof | None


def promote_bundle(
    registry: str | Path,
    alias: str,
    bundle: Path,
    metrics_file: Path | None = None,
    margin: float = 0.0,
    endpoint: str | None = None,
) -> Promoted:
    """Gate, copy, probe, move, proof. What fails before the move leaves the alias, and the endpoint, as they were.

    Raises RefusedError where the gate refuses or the endpoint does not answer as the bundle does offline, and what
    the registry and the client raise.
    """
    from pefomed_ray.artifacts.registry import promote as move
    from pefomed_ray.artifacts.registry import store
    from pefomed_ray.evaluation.gate import ask_gate

    decision = ask_gate(registry, alias, bundle, metrics_file, margin) if metrics_file else None
    store(registry, bundle)
    probed = 0
    if endpoint is not None:
        from pefomed_ray.serving.proof import probe

        with _client(endpoint, registry) as client:
            probed = probe(client, bundle)
    entry = move(registry, alias, bundle, decision)
    proof = None if endpoint is None else _prove(registry, alias, entry, endpoint, probed)
    return Promoted(entry, decision, proof)


def _prove(registry: str | Path, alias: str, entry: AliasEntry, endpoint: str, probed: int = 0) -> Proof:
    from pefomed_ray.artifacts.registry import keep_proof
    from pefomed_ray.serving.proof import follow

    with _client(endpoint, registry) as client:
        followed_after_s = follow(client, alias, entry.digest, FOLLOW_TIMEOUT_S)
    asked_at = datetime.now(UTC).isoformat(timespec="seconds")
    proof = Proof(
        endpoint=endpoint,
        asked_at=asked_at,
        digest=entry.digest,
        probed=probed,
        followed_after_s=round(followed_after_s, 3),
    )
    keep_proof(registry, alias, entry.counter, proof)
    return proof


def _client(endpoint: str, registry: str | Path) -> Any:
    from pefomed_ray.serving.client import Client
    from pefomed_ray.serving.keys import client_key

    return Client(endpoint, client_key(registry), FOLLOW_TIMEOUT_S)


@exits_with_code
def promote(
    bundle: str,
    alias: Annotated[str, typer.Option(help="Name the endpoint will know it by.")],
    metrics: Annotated[
        str | None,
        typer.Option(help="metrics.json of an evaluation of this bundle: promote only if it passes the gate."),
    ] = None,
    margin: Annotated[
        float, typer.Option(help="How much worse than the champion it may be: 0.01 is one point of a hundred.")
    ] = 0.0,
    endpoint: EndpointUrl = None,
    registry: Registry = DEFAULT_REGISTRY,
    json: Json = False,
) -> None:
    """Verify a bundle, hold it against the gate, copy it into the registry and move the alias to it.

    With --endpoint: before the move, that endpoint must answer by the bundle as it answers offline; after it, by the
    alias.
    """
    from pefomed_ray.artifacts.storage import local_path
    from pefomed_ray.evaluation.gate import GATE_FILE

    file = local_path(metrics) if metrics else None
    done = promote_bundle(registry, alias, local_path(bundle), file, margin, endpoint)
    if done.decision is None or file is None:
        say(f"the gate was NOT ASKED: {alias} stands for a bundle of which nothing shows that it is any good")
        asked = {"gate": "not asked: no --metrics given"}
    else:
        for ruling in done.decision.rules:
            say(f"{ruling['rule']}: passed" + "".join(f"; {why}" for why in ruling["why"]))
        asked = {"gate": "passed", "decision": str(file.parent / GATE_FILE)}
    # The entry's own `gate` is of when the alias was moved, which may have been before.
    finish(_result(registry, alias, done.entry, done.proof) | asked, as_json=json)


@exits_with_code
def rollback(
    alias: Annotated[str, typer.Option(help="Alias to move back.")],
    to: Annotated[str | None, typer.Option(help="Digest, or its first 12 characters: any it ever stood for.")] = None,
    endpoint: EndpointUrl = None,
    registry: Registry = DEFAULT_REGISTRY,
    json: Json = False,
) -> None:
    """Move an alias back to what it stood for before its last promotion. Twice changes nothing; --to goes further."""
    from pefomed_ray.artifacts.registry import rollback as move_back

    entry = move_back(registry, alias, to)
    proof = None if endpoint is None else _prove(registry, alias, entry, endpoint)
    finish(_result(registry, alias, entry, proof), as_json=json)


@exits_with_code
def history(
    alias: Annotated[str, typer.Option(help="Alias whose moves to list.")],
    registry: Registry = DEFAULT_REGISTRY,
    json: Json = False,
) -> None:
    """Every move of an alias, oldest first, and what an endpoint answered after it."""
    from pefomed_ray.artifacts.registry import history as moves_of
    from pefomed_ray.artifacts.registry import proof_of

    moves = [(entry, proof_of(registry, alias, entry.counter)) for entry in moves_of(registry, alias)]
    rows = [
        (e.counter, e.promoted_at, e.action, e.digest[:16], e.gate or "", f"{p.followed_after_s:.1f} s" if p else "")
        for e, p in moves
    ]
    table(alias, ("", "moved (UTC)", "how", "bundle", "gate", "endpoint followed after"), rows)
    entries = [e.model_dump(mode="json") | {"proof": p.model_dump(mode="json") if p else None} for e, p in moves]
    finish({"alias": alias, "registry": open_folder(registry).url, "moves": entries}, as_json=json)


def _result(registry: str | Path, alias: str, entry: AliasEntry, proof: Proof | None) -> dict[str, Any]:
    words = {"alias": alias, "registry": open_folder(registry).url, **entry.model_dump(mode="json")}
    return words | ({"proof": proof.model_dump(mode="json")} if proof else {})
