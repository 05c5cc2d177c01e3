"""The process environment Ray reads when it is first imported, and every process it starts inherits."""

import os
import secrets

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}
INTERRUPTED = {
    # Tune would take Ctrl-C for the end of a search, and a winner would be chosen of what is there.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
}
FAST = {
    # Ray Data waits a tenth of a second twice before it gives a worker its next task, once without this thread.
    "RAY_DATA_METADATA_PREFETCH_ON_THREAD": "0",
    # Before workers start again, Ray Train waits half a minute for one that hangs to leave its group politely.
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",
}


def own_cluster() -> bool:
    """Whether Ray is to be started on this machine; a job or a person names another cluster by RAY_ADDRESS."""
    return "RAY_ADDRESS" not in os.environ


def set_defaults() -> None:
    """Set what is not set; before Ray is imported, since it reads these once.

    A cluster of our own authenticates by a token: Ray's ports are open to this machine's other users without it. The
    token lives in the environment of our processes and in no file.
    """
    for name, value in (QUIET | INTERRUPTED | FAST).items():
        os.environ.setdefault(name, value)
    if own_cluster():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        # Ray starts workers at niceness 15; on a machine of our own they are the work.
        os.environ.setdefault("RAY_worker_niceness", "0")
