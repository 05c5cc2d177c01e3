"""Ray Data without its chatter: every run says that progress bars are off, and prints its plan."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_ray_data() -> Iterator[None]:
    """Nothing on the terminal or in Ray's log files; what fails is raised, and said there."""
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
