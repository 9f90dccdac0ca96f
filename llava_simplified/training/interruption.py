"""Stop a run at a signal: finish the step, save a checkpoint, and print how to continue.

    Ctrl-C (SIGINT), or SIGTERM of a batch system      what happens
    once                                               the step is finished, `checkpoint-N` is saved, the run ends
    again, after more than two seconds                 the run ends at once, and loses the steps since the last save

Both work with and without a terminal. Batch systems send SIGTERM some time before they kill a process (Slurm: 30 s),
which is enough for a step and a checkpoint.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

# A terminal sends Ctrl-C to all processes of a launcher, and the launcher sends it to them once more.
# Signals within this number of seconds count as one.
_SAME_SIGNAL_SECONDS = 2.0
_NOTICE = b"\nStopping: a checkpoint is saved after this step. Press Ctrl-C again to stop at once, without saving.\n"


def ignore_interrupts(worker: int, then: Callable[[int], None] | None = None) -> None:
    """Make a data-loader worker ignore Ctrl-C.

    A terminal sends Ctrl-C to the workers too, but the current step still needs their images. Pass this function as
    `worker_init_fn`; a handler of the training process is not sufficient, because spawned workers do not inherit it.
    SIGTERM still ends a worker.

    Args:
        worker: Number of the worker.
        then: The `worker_init_fn` that this function replaces, called afterward.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if then is not None:
        then(worker)


class TrainingInterrupted(KeyboardInterrupt):
    """A run was ended by a signal, after it had saved a checkpoint.

    Attributes:
        signal: Number of the signal.
        step: The last step.
        checkpoint: The checkpoint of that step.
    """

    def __init__(self, signal_number: int, step: int, checkpoint: Path) -> None:
        super().__init__(f"stopped at step {step}; checkpoint: {checkpoint}")
        self.signal = signal_number
        self.step = step
        self.checkpoint = checkpoint


class InterruptionCallback(TrainerCallback):
    """End training with a checkpoint after the step in which a signal arrived.

    Attributes:
        signal: Number of the signal that this process has received, or None.
        is_agreed: True if any process had received a signal when the step began. The trainer sets it:
            signals arrive at different moments, but all processes must stop after the same step.
        was_stopped: True if training was ended early.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.is_agreed = False
        self.was_stopped = False
        self._received_at = 0.0
        self._pid = os.getpid()

    @contextmanager
    def watch_signals(self) -> Iterator[None]:
        """Handle SIGINT and SIGTERM within a `with` block, as the module's docstring describes."""
        # Python allows handlers in the main thread only. In other threads, signals keep their usual effect.
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._pid = os.getpid()
        previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in previous:
            signal.signal(number, self._receive)
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: Any) -> None:
        """Handle a signal: remember the first one, and stop at once at the second one."""
        if os.getpid() != self._pid:
            # A data-loader worker has inherited this handler, and `ignore_interrupts` has not run yet. The training
            # process ends its workers with SIGTERM, so restore the default action for it.
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._received_at = number, now
            # Write to standard error (2) directly: the handler may have interrupted the logger while it writes.
            os.write(2, _NOTICE)
        elif now - self._received_at > _SAME_SIGNAL_SECONDS:
            raise KeyboardInterrupt

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        """Make the trainer save a checkpoint and stop, if a signal has arrived."""
        # The trainer sets `is_agreed` only if there are several processes.
        stops = self.is_agreed or (args.world_size == 1 and self.signal is not None)
        if stops and state.global_step < state.max_steps:
            control.should_save = True
            control.should_training_stop = True
            self.was_stopped = True

    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        """Prevent the evaluation of an epoch that a signal has ended early.

        The trainer calls this for the incomplete epoch too, after `on_step_end` has saved the checkpoint. An evaluation
        would delay the end of the run, and would count for early stopping.
        """
        if not self.was_stopped:
            return
        if state.epoch is not None and state.epoch.is_integer():
            # The signal arrived in the last step of the epoch. A resumed run starts with the next epoch and would skip
            # this evaluation, so do it now, and save its result.
            control.should_save = control.should_evaluate
            return
        control.should_evaluate = False
        control.should_save = False
