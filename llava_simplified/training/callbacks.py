"""Reports during a run: progress, throughput, unusual gradients, problematic samples."""

from __future__ import annotations

import logging
import statistics
import sys
import time
from collections import Counter, deque
from contextlib import ExitStack
from typing import Any

import torch
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llava_simplified.data.collate import Batch
from llava_simplified.jobs import format_duration

logger = logging.getLogger(__name__)


# ---- progress ----


class ProgressLine(TrainerCallback):
    """One line on a terminal: steps, time left, and the values of the last log."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        is_main_process = state.is_world_process_zero
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            disable=not is_main_process,
            dynamic_ncols=True,
        )
        # Print log messages above the progress line, so that they do not break it.
        self._redirection = ExitStack()
        if is_main_process:
            package_logger = logging.getLogger("llava_simplified")
            self._redirection.enter_context(logging_redirect_tqdm([package_logger]))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        logs = logs or {}
        if "loss" in logs:
            self.bar.set_postfix_str(describe_training_log(logs))
        elif "eval_loss" in logs and state.is_world_process_zero:
            logger.info("step %d: %s", state.global_step, describe_evaluation_log(logs))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.bar.close()
        self._redirection.close()


class ProgressLog(TrainerCallback):
    """One log message every `--logging_steps` steps, if there is no terminal or with `--disable_tqdm True`."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        # Measure the speed from this time and step on.
        self._start = time.monotonic()
        self._start_step = state.global_step
        self._skipped_first_steps = False

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if not state.is_world_process_zero:
            return
        logs = logs or {}
        step = f"step {state.global_step:,} of {state.max_steps:,}"
        if "loss" in logs:
            logger.info("%s: %s%s", step, describe_training_log(logs), self._time_left(state))
        elif "eval_loss" in logs:
            logger.info("%s: %s", step, describe_evaluation_log(logs))

    def _time_left(self, state: TrainerState) -> str:
        """Return the estimated time left, as the end of a message; empty before the first step."""
        done = state.global_step - self._start_step
        if done <= 0:
            return ""
        now = time.monotonic()
        seconds_per_step = (now - self._start) / done
        remaining = seconds_per_step * (state.max_steps - state.global_step)
        # The first steps take longer than the others, for example because layers are compiled. From the second log on, leave
        # them out.
        if not self._skipped_first_steps:
            self._skipped_first_steps = True
            self._start, self._start_step = now, state.global_step
        return f", {format_duration(remaining)} left"


def progress_callback(disable_tqdm: bool) -> TrainerCallback:
    """Return the progress callback for this process: a line on a terminal, else log messages."""
    if disable_tqdm or not sys.stderr.isatty():
        return ProgressLog()
    return ProgressLine()


def describe_training_log(logs: dict[str, float]) -> str:
    """Return the values that are logged every `--logging_steps`, as text."""
    # Training with rewards logs "reward"; training on preference pairs logs the other two.
    objective_values = [
        f"{name} {logs[name]:.3f}, " for name in ("reward", "margin", "accuracy") if name in logs
    ]
    return (
        f"loss {logs['loss']:.3f}, {''.join(objective_values)}lr {logs['learning_rate']:.1e}, {logs['samples_per_second']:.1f} samples/s, "
        f"{logs['tokens_per_second']:,.0f} tokens/s, {logs['padding']:.0%} padding"
    )


def describe_evaluation_log(logs: dict[str, float]) -> str:
    """Return the values of an evaluation, as text."""
    text = f"validation loss {logs['eval_loss']:.4f}"
    if "eval_cider" in logs:
        text += f", CIDEr {logs['eval_cider']:.3f}"
    return text


# ---- throughput ----


class ThroughputMeter(TrainerCallback):
    """Measure the throughput of the steps since the last log.

    The time includes waiting for data, but not evaluating and saving. The trainer calls `start_step`
    before it fetches the batches of a step, and `add` with the number of samples and tokens in them.

    Attributes:
        last_step: Seconds of the last step.
    """

    def __init__(self) -> None:
        self.last_step = 0.0
        self._step_start = 0.0
        self._seconds = 0.0
        self._counts = torch.zeros(3, dtype=torch.long)

    def start_step(self) -> None:
        """Start the clock of a step, before its batches are fetched."""
        self._step_start = time.perf_counter()

    def add(self, counts: torch.Tensor) -> None:
        """Add the number of samples and tokens in the batches of a step.

        Args:
            counts: (3,) samples, tokens, and positions including padding, summed over all
                processes. The tensor stays on its device until the next log: reading it earlier
                would wait for the device.
        """
        self._counts = self._counts.to(counts.device) + counts

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.last_step = time.perf_counter() - self._step_start
        self._seconds += self.last_step

    def read(self) -> dict[str, float]:
        """Return the throughput since the last call, and reset the counts.

        Returns:
            `samples_per_second`, `tokens_per_second`, and `padding` as a fraction of all positions.
        """
        # Reading the counts waits for the device. Read them only here, once per log entry and not in
        # every step.
        samples, tokens, positions = self._counts.tolist()
        seconds = max(self._seconds, 1e-9)
        self._seconds = 0.0
        self._counts = torch.zeros(3, dtype=torch.long)
        return {
            "samples_per_second": samples / seconds,
            "tokens_per_second": tokens / seconds,
            "padding": 1 - tokens / max(positions, 1),
        }


# ---- warnings ----


class GradientNormMonitor:
    """Detect a gradient norm far above recent norms, which is often the first sign that a run diverges.

    Args:
        factor: Report norms above this multiple of the median.
        min_history: Number of steps before the first report, since a run starts with unusual gradients.
    """

    MAX_REPORTS = 10
    HISTORY = 100

    def __init__(self, factor: float = 10, min_history: int = 20) -> None:
        self.factor = factor
        self.min_history = min_history
        self.reports = 0
        self._recent: deque[float] = deque(maxlen=self.HISTORY)

    def check(self, norm: float) -> str | None:
        """Return a warning if `norm` is unusual, else None. Warns at most `MAX_REPORTS` times."""
        # Compare with the median and not the mean, so that earlier outliers do not hide the next one.
        has_history = len(self._recent) >= self.min_history
        median = float("inf")
        if has_history:
            median = statistics.median(self._recent)
        # Add unusual norms to the history too, so that the warnings stop if the level stays high.
        self._recent.append(norm)
        # The norm is 0 if all rewards of a step are equal (see `objectives`). If most norms are 0, the warning's
        # ratio to the median does not exist.
        if median == 0:
            return None
        if norm <= self.factor * median or self.reports == self.MAX_REPORTS:
            return None
        self.reports += 1
        warning = f"gradient norm {norm:.3g}, {norm / median:.0f} times the median {median:.3g}"
        if self.reports == self.MAX_REPORTS:
            warning += " (last warning of this kind)"
        return warning


class SampleWarnings:
    """Log and count the warnings of samples; stop a run with too many unreadable images.

    The dataset attaches warnings to samples, such as "bad image, train.json row 5: ...". The part before the
    first comma is the kind of the warning. A bad image is one that cannot be read: the dataset returns the
    next sample in its place.

    Args:
        max_bad_images: `--max_bad_images`, a fraction of all images.
        log: Log the warnings of this process; one process per machine is sufficient.

    Attributes:
        counts: Number of readable images, as "images", and of warnings by kind.
    """

    # Maximum number of logged warnings of each kind.
    MAX_LOGGED = 10
    # Minimum denominator of the fraction of bad images, so that a few bad ones among the first images do
    # not stop the run.
    MIN_IMAGES = 100

    def __init__(self, max_bad_images: float, log: bool) -> None:
        self.max_bad_images = max_bad_images
        self.counts = Counter[str]()
        self._log = log

    def add(self, batch: Batch) -> None:
        """Add one batch.

        Raises:
            ValueError: More than `--max_bad_images` of the images could not be read.
        """
        warnings = batch["metadata"]["warnings"]
        self.counts["images"] += batch["metadata"]["images"]
        for warning in warnings:
            kind = warning.partition(",")[0]
            self.counts[kind] += 1
            if self._log and self.counts[kind] <= self.MAX_LOGGED:
                is_last = self.counts[kind] == self.MAX_LOGGED
                suffix = " (later warnings of this kind are only counted)" if is_last else ""
                logger.warning("%s%s", warning, suffix)
        bad, good = self.counts["bad image"], self.counts["images"]
        if bad > self.max_bad_images * max(good, self.MIN_IMAGES):
            last = warnings[-1] if warnings else "none in this batch"
            raise ValueError(
                f"--max_bad_images {self.max_bad_images:g}: {bad} of the first {good + bad} images could not be read. "
                f"The last warning: {last}. Remove unreadable images with `llava clean`, or raise --max_bad_images."
            )

    def summary(self) -> str:
        """Return the counts as text."""
        if not self.counts:
            return "none"
        return ", ".join(f"{kind}: {count:,}" for kind, count in sorted(self.counts.items()))
