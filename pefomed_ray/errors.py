"""Every error a person can cause, and the exit code it ends the command with.

    PefomedError          1  our failure, or the machine's
    |-- DiskFullError     1  no space left on a device
    |-- ConfigError       2  bad configuration or usage, found before Ray starts
    |-- DataError         3  bad data
    |-- DivergedError     4  training diverged (NaN, infinity)
    `-- RefusedError      5  refused by the gate or by a policy

A message says what was seen, what is allowed and what to do next. It never holds a patient's text: name rows by id.
To add one: derive from the class with the right exit code and keep the single string argument, so that the error
survives pickling between Ray processes.
"""

from typing import Any


class PefomedError(Exception):
    """Base of all; carries one message string, nothing else, so that it pickles."""

    exit_code = 1


class DiskFullError(PefomedError):
    """A disk has no space for what is to be written; the message says where, and how much is needed."""


class ConfigError(PefomedError, ValueError):
    """The configuration, a command line argument, or a path in one of them is wrong."""

    exit_code = 2


class DataError(PefomedError, ValueError):
    """A corpus, a shard directory or a bundle on disk is not what it should be."""

    exit_code = 3


class DivergedError(PefomedError, ArithmeticError):
    """The loss or a gradient was not finite; no optimizer step was taken with it."""

    exit_code = 4


class RefusedError(PefomedError, PermissionError):
    """A gate or a policy said no; the message says which and on what evidence."""

    exit_code = 5


def original_error(error: BaseException) -> BaseException:
    """The PefomedError inside what Ray wrapped around it on its way between processes, else the error itself."""
    seen: list[BaseException] = []
    queue: list[Any] = [error]
    while queue:
        current = queue.pop(0)
        if not isinstance(current, BaseException) or any(current is other for other in seen):
            continue
        seen.append(current)
        if type(current).__module__ == PefomedError.__module__:
            return current
        queue += [getattr(current, "cause", None), current.__cause__]
        queue += list(getattr(current, "worker_failures", {}).values())
    return error
