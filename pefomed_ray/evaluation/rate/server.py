"""The page's server, in a thread: loopback only."""

import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from pefomed_ray.errors import ConfigError, PefomedError
from pefomed_ray.evaluation.rate.app import create_app
from pefomed_ray.evaluation.rate.items import Items
from pefomed_ray.evaluation.rate.store import Store

HOST = "127.0.0.1"
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 5
TOKEN_BYTES = 24


@contextmanager
def serving(items: Items, store: Store, seed: int, port: int = 0) -> Iterator[str]:
    """Serve the page while the block runs; yields its address with the token, new each time.

    `port` 0 is any that is free. Raises ConfigError where the port is not.
    """
    listener = _listen(port)
    bound_port: int = listener.getsockname()[1]
    token = secrets.token_urlsafe(TOKEN_BYTES)
    app = create_app(items, store, seed, token, bound_port)
    # No log of requests: the first one has the token in its address.
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=STOP_TIMEOUT_S)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        _wait_for_start(server, thread)
        yield f"http://{HOST}:{bound_port}/?token={token}"
    finally:
        server.should_exit = True
        thread.join(START_TIMEOUT_S)
        listener.close()


def _listen(port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"--port: cannot listen on {HOST}:{port} ({error.strerror}); choose another, or leave it out for a free one"
        ) from None
    return listener


def _wait_for_start(server: uvicorn.Server, thread: threading.Thread) -> None:
    end = time.monotonic() + START_TIMEOUT_S
    while not server.started:
        if not thread.is_alive() or time.monotonic() > end:
            raise PefomedError("the page's server did not start; its own message stands above")
        time.sleep(0.02)
