"""Staying up until somebody says stop."""

import signal
import threading


def wait_for_signal() -> None:
    """Return at the first SIGINT or SIGTERM."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    stop.wait()
