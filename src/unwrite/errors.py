"""Errors that speak to people.

Everything a user can mend is an ``UnwriteError``: one sentence that says what was given, why it
cannot work and what to do. The command line prints it without a traceback and ends with
``exit_code``. Anything else is a bug and keeps its traceback.
"""

from typing import Any


class UnwriteError(Exception):
    """Base of every error that a user can act on."""

    exit_code = 2


class BadEdits(UnwriteError):
    """An edits file, or one record in it, cannot be used."""


class BadTask(BadEdits):
    """A file of a task, or one record in it, cannot be used."""


class BadSetting(UnwriteError):
    """A method, field or command-line value does not exist or has the wrong type."""


class NotWritable(BadSetting):
    """Facts cannot be written into this network the way the method does."""


class ModelUnavailable(UnwriteError):
    """A model name does not lead to weights that can be read."""


class TensorMismatch(UnwriteError):
    """Two sets of tensors differ in names, shapes, dtypes or base."""


class DamagedFile(UnwriteError):
    """A file on disk is not what was written there."""


class HomeError(UnwriteError):
    """A folder is not a model home, or not in a state in which this can be done."""


class HomeBusy(HomeError):
    """Another process is writing to this home."""


class TrainingFailed(UnwriteError):
    """Training stopped by itself (not-a-number loss, out of memory); nothing was kept."""


class NotReproduced(UnwriteError):
    """An update done once more gave other bits than the first time."""


class ProcessFailed(TrainingFailed):
    """One of several processes that train together failed or was lost; the command cannot go on."""


class RequirementNotMet(UnwriteError):
    """The update was trained and measured, missed a requirement, and was not committed.

    ``update`` holds what was measured (an ``unwrite.Update`` with ``committed`` false).
    """

    exit_code = 3
    update: Any = None


class UpdateDiscarded(UnwriteError):
    """The update was trained and measured, and whoever was asked to confirm it declined."""

    exit_code = 3


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, by whatever name: Python's error, torch's for a GPU (known by its
    name, because nothing here imports torch), or the plain one of torch's allocator for the CPU."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )
