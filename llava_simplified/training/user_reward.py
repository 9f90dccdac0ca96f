"""Call the user's reward function, `--reward module:function`, in worker processes.

    training process                      worker processes
    captions of a step --+-- part 0 -->   module.function(image paths, references, captions)
                         +-- part 1 -->   ...
    rewards           <--+--------------  numbers, or the error and the record that it belongs to

If the function were called in the training process, a hang or a crash would stop the run without naming the record.
"""

from __future__ import annotations

import importlib
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llava_simplified.foreign_files import error_reason
from llava_simplified.workers import LocalBackend

RewardFunction = Callable[[Sequence[str], Sequence[Sequence[str]], Sequence[str]], Sequence[float]]
"""Image paths, the references of each caption, and the captions -> one number per caption."""


class Part(NamedTuple):
    """The captions that one call of the function scores; all lists have the same length."""

    name: str
    ids: list[str]
    images: list[str]
    references: list[list[str]]
    captions: list[str]

    def rows(self, start: int, end: int) -> Part:
        """Return the captions `start` to `end - 1` as a part of their own."""
        return Part(
            self.name,
            self.ids[start:end],
            self.images[start:end],
            self.references[start:end],
            self.captions[start:end],
        )


class UserReward:
    """Call the function of `--reward module:function` for the captions of a step.

    Args:
        name: "module:function".
        workers: Number of worker processes. 0 calls the function in this process, without a timeout.
        timeout: Maximum number of seconds for the captions of a step.

    Raises:
        ValueError: The function cannot be imported.
    """

    def __init__(self, name: str, workers: int, timeout: float) -> None:
        self._name = name
        self._workers = workers
        self._timeout = timeout
        # Import the function now, so that a misspelled name is found before training begins.
        import_function(name)
        self._backend: LocalBackend | None = None

    def __call__(
        self,
        ids: Sequence[str],
        images: Sequence[str],
        references: Sequence[Sequence[str]],
        captions: Sequence[str],
    ) -> list[float]:
        """Return one number per caption.

        Args:
            ids: The name of each caption's record, for errors.
            images: Path of each caption's image.
            references: References of each caption.
            captions: The captions.

        Raises:
            ValueError: The function fails, does not return one number per caption, or takes too long.
        """
        groups = [list(group) for group in references]
        whole = Part(self._name, list(ids), list(images), groups, list(captions))
        if not self._workers:
            return call_function(whole)
        # Give each worker one part of consecutive captions.
        size = -(-len(captions) // self._workers)  # rounded up
        starts = range(0, len(captions), size)
        return self._call_in_workers([whole.rows(start, start + size) for start in starts])

    def _call_in_workers(self, parts: Sequence[Part]) -> list[float]:
        """Score the parts in worker processes, and return the numbers in the order of the captions."""
        if self._backend is None:
            self._backend = LocalBackend(call_function, self._workers, per_cpu=1)
            # End the workers when this object is deleted, or at the latest when the process ends.
            weakref.finalize(self, self._backend.close)
        running = {self._backend.submit(part): number for number, part in enumerate(parts)}
        results: list[list[float]] = [[] for _ in parts]
        deadline = time.monotonic() + self._timeout
        while running:
            finished = self._backend.wait(list(running), max(deadline - time.monotonic(), 0))
            if not finished:
                # A worker cannot be interrupted in the middle of a call, so end all of them.
                late = [parts[number] for number in running.values()]
                self._stop()
                raise ValueError(
                    f"--reward {self._name}: no result within --reward_timeout {self._timeout:g} s for "
                    f"{_list_records(late)}. Raise --reward_timeout, or make the function faster."
                )
            for handle in finished:
                number = running.pop(handle)
                values, error = self._backend.result(handle)
                if error is not None:
                    self._stop()
                    self._raise(error, parts[number])
                results[number] = values
        return [value for values in results for value in values]

    def _raise(self, error: Exception, part: Part) -> None:
        """Raise a ValueError that names the function and the records of a part."""
        # `call_function` raises ValueErrors whose messages name the function and the record already.
        if isinstance(error, ValueError):
            raise error
        records = _list_records([part])
        raise ValueError(f"--reward {self._name}: {error} (records: {records}).") from error

    def _stop(self) -> None:
        assert self._backend is not None
        self._backend.close()
        self._backend = None


def call_function(part: Part) -> list[float]:
    """Call the user's function. If it fails, find the record that causes the failure.

    Raises:
        ValueError: The function raises an exception, or does not return one number per caption.
    """
    function = import_function(part.name)
    try:
        return _call(function, part)
    except Exception as error:  # a user's function can raise anything
        if len(part.captions) == 1:
            raise _describe(part, error) from error
        # Call the function for one caption at a time. The call that fails raises an error that names its record.
        for row in range(len(part.captions)):
            call_function(part.rows(row, row + 1))
        # No single caption fails: name all records, since the function fails only for them together.
        raise _describe(part, error) from error


def _call(function: RewardFunction, part: Part) -> list[float]:
    """Call the user's function, and check that it returns one number per caption."""
    values = [float(value) for value in function(part.images, part.references, part.captions)]
    if len(values) != len(part.captions):
        raise ValueError(
            f"expected {len(part.captions)} rewards, one per caption, but got {len(values)}"
        )
    return values


def _describe(part: Part, error: Exception) -> ValueError:
    reason = f"{type(error).__name__}: {error}"
    return ValueError(f"--reward {part.name}: {reason} (records: {_list_records([part])}).")


def _list_records(parts: Sequence[Part]) -> str:
    """Return the names of the records of all captions, each once, as text."""
    ids: list[str] = []
    for part in parts:
        ids += part.ids
    return ", ".join(dict.fromkeys(ids))


def import_function(name: str) -> RewardFunction:
    """Import "module:function", also from the current folder.

    Raises:
        ValueError: There is no such module, or no such function in it.
    """
    # The user's module is usually in the current folder. Installed commands do not search that folder, so add it.
    module_name, _, function_name = name.partition(":")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        module: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"--reward {name}: cannot import {module_name}: {error_reason(error)}. Run the command in "
            f"the folder of {module_name}.py, or install the package."
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"--reward {name}: {module_name} has no function {function_name!r}.")
    result: RewardFunction = function
    return result
