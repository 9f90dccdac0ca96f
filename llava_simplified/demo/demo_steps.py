"""Run the steps of the demo one after the other, and show their progress.

The steps are ordinary `llava` commands, which contain no code for the demo. A thread reads the files that the running
command writes, and updates a line in the terminal and `report.html`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llava_simplified import __version__, cli
from llava_simplified.demo.assets import DemoAssets, fetch
from llava_simplified.demo.progress import (
    NOT_STARTED,
    Progress,
    ReadProgress,
    captioning_progress,
    read_eval_captions,
)
from llava_simplified.demo.terminal import Terminal
from llava_simplified.jobs import atomic_file, format_duration
from llava_simplified.options import quote_arguments
from llava_simplified.recipes import resolve_recipe

NUM_STEPS = 6
EXPECTED_SECONDS = 480  # expected duration of all steps after the download
LOG_TAIL = 15  # number of lines of the log that are shown after a failure
PRINTED_CAPTIONS = 8


class Step(NamedTuple):
    """One step of the demo.

    Attributes:
        title: What the step does.
        argv: Arguments of `llava`. The first step, the download, has none.
        seconds: Expected duration on 2 CPU cores, for the estimate of the remaining time.
        read_progress: Function that returns the progress of the running command.
        run_folder: Output folder of a training run; None for other commands.
        outputs: Files that the command writes. If one is missing, the step has not finished.
    """

    title: str
    argv: list[str]
    seconds: float
    read_progress: ReadProgress = lambda: NOT_STARTED
    run_folder: Path | None = None
    outputs: tuple[Path, ...] = ()

    def settings(self) -> dict[str, Any]:
        """Return what determines the result of the command: arguments, contents of the recipe, version of the package."""
        digest = None
        if "--config" in self.argv:
            recipe = self.argv[self.argv.index("--config") + 1]
            digest = hashlib.sha256(resolve_recipe(recipe).read_bytes()).hexdigest()
        return {"argv": self.argv, "recipe": digest, "version": __version__}


DOWNLOAD = Step("Download the models and drawings", [], seconds=30)


def caption_step(
    argv: list[str],
    predictions: Path,
    num_captions: int,
    title: str = "Caption images that the model was not trained on",
    seconds: float = 25,
) -> Step:
    """Return the step that captions the held-out drawings.

    Args:
        argv: Arguments of `llava`.
        predictions: File of the captions.
        num_captions: Number of captions to generate.
        title: What the step does.
        seconds: Expected duration on 2 CPU cores.
    """
    return Step(
        title,
        argv,
        seconds=seconds,
        read_progress=lambda: captioning_progress(predictions, num_captions),
        outputs=(predictions,),
    )


def evaluate_step(argv: list[str], folder: Path, title: str) -> Step:
    """Return a step that scores captions, and writes `scores.json` and `report.html`.

    Args:
        argv: Arguments of `llava`.
        folder: Output folder.
        title: What the step does.
    """
    outputs = (folder / "scores.json", folder / "report.html")
    return Step(title, argv, seconds=10, outputs=outputs)


class Demo:
    """Runs the steps, and shows their progress in the terminal and in `report.html`.

    Args:
        output: Output folder.
        terminal: Where progress is shown.
        num_steps: Number of steps, including the download.
        expected_seconds: Expected duration of all steps after the download.
    """

    def __init__(
        self,
        output: Path,
        terminal: Terminal,
        num_steps: int = NUM_STEPS,
        expected_seconds: float = EXPECTED_SECONDS,
    ) -> None:
        self.output = output
        self.terminal = terminal
        self.num_steps = num_steps
        self.expected_seconds = expected_seconds
        self.durations: list[float] = []  # duration of each finished step in seconds

    def download(self, cache_dir: Path | None) -> DemoAssets:
        """Run the first step, and return the models and images."""
        self.terminal.print(f"The output of all commands is written to {self.output / 'log.txt'}.")
        self._announce(0, DOWNLOAD, self.num_steps)
        watcher = Watcher(self, steps=[DOWNLOAD], index=0, images=None)
        with watcher:
            assets = fetch(cache_dir)
        self._finish(watcher)
        return assets

    def run(self, assets: DemoAssets, commands: Sequence[Step]) -> int:
        """Run the commands in order, except those that an earlier demo has finished.

        Returns:
            The exit status of the first command that failed, or 0.
        """
        # The download is step 0, and has already finished.
        steps = [DOWNLOAD, *commands]
        history = FinishedSteps(self.output / "finished_steps.json")
        for index, step in enumerate(commands, 1):
            if history.contains(index, step):
                self._announce(index, step, len(steps))
                self.terminal.print("  already done")
                # A skipped step needs a duration too, because `_write_report` looks durations up by step number.
                self.durations.append(0.0)
                continue
            argv = [*step.argv, *self._prepare_run(step, history.was_started(step))]
            # Record the command before it runs: if it is interrupted, the next demo with the same settings resumes it.
            history.start(index, step)
            self._announce(index, step, len(steps))
            self.terminal.print(f"$ llava {_shell_command(argv)}")
            watcher = Watcher(self, steps, index, assets.images)
            with watcher:
                status = cli.main(argv)
            if status:
                self._describe_failure(step, status)
                return status
            history.add(index, step)
            self._delete_checkpoints(step)
            self._finish(watcher)
        return 0

    def _prepare_run(self, step: Step, was_interrupted: bool) -> list[str]:
        """Prepare the output folder for a command, and return the options that resume an interrupted training run.

        If another command was interrupted, or this one with other settings, its files are deleted instead, and there are
        no such options.

        Args:
            step: A command that has not finished.
            was_interrupted: True if the command that was started last is this one, with the same settings.
        """
        if not was_interrupted:
            # Delete the journal of unfinished captions: `llava predict` refuses to continue it with other settings, and a
            # training run replaces the model that generated them.
            for part in self.output.glob("*.json.part*"):
                part.unlink()
        if step.run_folder is None:
            return []
        if was_interrupted and any(step.run_folder.glob("checkpoint-*")):
            return ["--resume_from_checkpoint", "true"]
        shutil.rmtree(step.run_folder, ignore_errors=True)
        return []

    def _delete_checkpoints(self, step: Step) -> None:
        """Delete the checkpoints of a finished run. They were needed only to continue it after an interruption."""
        if step.run_folder is not None:
            for checkpoint in step.run_folder.glob("checkpoint-*"):
                shutil.rmtree(checkpoint)

    def _announce(self, index: int, step: Step, total: int) -> None:
        """Print the number and the title of a step."""
        self.terminal.print(f"\n[{index + 1}/{total}] {step.title}")

    def _finish(self, watcher: Watcher) -> None:
        """Record and print the duration of a step."""
        self.durations.append(watcher.seconds)
        self.terminal.print(f"  done in {format_duration(watcher.seconds)}")

    def _describe_failure(self, step: Step, status: int) -> None:
        """Print which command failed, and the end of its log."""
        # The output of commands is written to the log only, so the user has not seen the error message.
        log = self.output / "log.txt"
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_TAIL:]
        self.terminal.print(
            f"{step.title}: `llava {step.argv[0]}` ended with exit status {status}. "
            f"The last lines of {log}:"
        )
        for line in lines:
            self.terminal.print(f"  {line}")


class FinishedSteps:
    """Records which commands have finished, so that a second demo skips them.

    A command counts as finished only if its settings, and the settings of all commands before it, are the same (see
    `Step.settings`), and if its outputs exist.

    Args:
        path: JSON file with the settings of the commands.

    Attributes:
        finished: Settings of the finished commands, in order.
        started: Settings of the command that was started last; None if there is none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.finished: list[dict[str, Any]] = []
        self.started: dict[str, Any] | None = None
        if path.is_file():
            state = json.loads(path.read_text(encoding="utf-8"))
            self.finished = state["finished"]
            self.started = state["started"]

    def contains(self, index: int, step: Step) -> bool:
        """Return whether command `index`, counted from 1, has finished with these settings, and its outputs exist."""
        # `start` removes all later commands, so the commands before this one have finished with the same settings too.
        if len(self.finished) < index or self.finished[index - 1] != step.settings():
            return False
        return all(path.is_file() for path in step.outputs)

    def was_started(self, step: Step) -> bool:
        """Return whether this command was started last, with the same settings, by this demo or an earlier one."""
        return self.started == step.settings()

    def start(self, index: int, step: Step) -> None:
        """Record the start of command `index`. It and all later commands, which depend on its output, become unfinished."""
        self.finished = self.finished[: index - 1]
        self.started = step.settings()
        self._save()

    def add(self, index: int, step: Step) -> None:
        """Record that command `index` has finished."""
        self.finished = [*self.finished[: index - 1], step.settings()]
        self._save()

    def _save(self) -> None:
        state = {"finished": self.finished, "started": self.started}
        with atomic_file(self.path) as part:
            part.write_text(json.dumps(state, indent=1), encoding="utf-8")


class Watcher:
    """Shows the progress of one step while its `with` block runs: in the terminal, and in `report.html`.

    Args:
        demo: The demo.
        steps: All steps known so far.
        index: Number of this step in `steps`.
        images: Image folder; None before it is downloaded.

    Attributes:
        seconds: Duration of the step; 0 until the `with` block has ended.
    """

    REDRAW_SECONDS = 0.5  # interval between updates of the terminal
    REPORT_SECONDS = 5.0  # interval between updates of `report.html`
    MIN_FRACTION = 0.02  # progress that is needed to estimate the duration of a step

    def __init__(self, demo: Demo, steps: Sequence[Step], index: int, images: Path | None) -> None:
        self.demo = demo
        self.steps = steps
        self.index = index
        self.images = images
        self.step = steps[index]
        self.seconds = 0.0
        self._stop = threading.Event()
        # A daemon thread, so that it does not keep the process alive after Ctrl-C.
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._printed_captions = False
        # The progress at the last estimate, and the estimated duration of the step in seconds.
        self._fraction = 0.0
        self._expected = self.step.seconds
        # The seconds and the progress at the first estimate.
        self._first_estimate: tuple[float, float] | None = None

    def __enter__(self) -> None:
        self._start = time.monotonic()
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        # Wait for the thread, so that it does not redraw the progress line after the step has ended.
        self._stop.set()
        self._thread.join()
        self.seconds = time.monotonic() - self._start

    def _follow(self) -> None:
        """Update the terminal and the report until the `with` block ends. Runs in the thread."""
        next_report = 0.0
        # `wait` returns False after each interval, and True when the block has ended.
        while not self._stop.wait(self.REDRAW_SECONDS):
            elapsed = time.monotonic() - self._start
            progress = self.step.read_progress()
            left = self._time_left(elapsed, progress.fraction)
            self.demo.terminal.show_progress(f"  {progress.text}; {left}")
            self._print_first_captions()
            # The last command writes the final report to the same file, so do not overwrite it.
            is_last = self.index == len(self.steps) - 1
            if self.images is not None and elapsed >= next_report and not is_last:
                next_report = elapsed + self.REPORT_SECONDS
                self._write_report(progress, left)

    def _time_left(self, elapsed: float, fraction: float) -> str:
        """Return the time until the end of the demo in words.

        Args:
            elapsed: Seconds since the start of this step.
            fraction: Completed part of this step, 0 to 1.
        """
        # Estimate the duration of this step only when the fraction changes. Otherwise, the estimate would grow until the
        # next change.
        if fraction > max(self._fraction, self.MIN_FRACTION):
            self._expected = self._estimate(elapsed, fraction)
            self._fraction = fraction
        expected = self._expected
        # Measured divided by planned duration says how many times slower this machine is than planned. Leave out the
        # download (step 0), which depends on the network; during it, the ratio is 1.
        measured = sum(self.demo.durations[1:]) + expected
        planned = sum(step.seconds for step in self.steps[1 : self.index + 1]) or expected
        later = sum(step.seconds for step in self.steps[self.index + 1 :])
        seconds = max(expected - elapsed, 0.0) + later * measured / planned
        # During the download, the other steps are not known yet, so add the expected duration of all of them.
        if len(self.steps) < self.demo.num_steps:
            seconds += self.demo.expected_seconds
        if seconds < 60:
            return "less than a minute left"
        minutes = round(seconds / 60)
        unit = "minute" if minutes == 1 else "minutes"
        return f"about {minutes} {unit} left"

    def _estimate(self, elapsed: float, fraction: float) -> float:
        """Return the estimated duration of this step in seconds; for the arguments, see `_time_left`."""
        if self._first_estimate is None:
            self._first_estimate = (elapsed, fraction)
            return elapsed / fraction
        # A step begins slowly: models are loaded, and layers are compiled. So measure the speed from the first estimate on.
        first_elapsed, first_fraction = self._first_estimate
        seconds_per_fraction = (elapsed - first_elapsed) / (fraction - first_fraction)
        return elapsed + (1 - fraction) * seconds_per_fraction

    def _print_first_captions(self) -> None:
        """Print the captions of the first evaluation as a table, once."""
        if self._printed_captions or self.step.run_folder is None:
            return
        captions = read_eval_captions(self.step.run_folder)
        if not captions:
            return
        self._printed_captions = True
        first_step, rows = next(iter(captions.items()))
        print_line = self.demo.terminal.print
        print_line(
            f"  Captions of drawings that are not in the training data, after {first_step} training steps:"
        )
        for row in rows[:PRINTED_CAPTIONS]:
            print_line(f"    {row.caption[:44]:<46}(correct: {row.reference[:40]})")
        print_line(f"  More are in {self.demo.output / 'report.html'}, which reloads itself.")

    def _write_report(self, progress: Progress, left: str) -> None:
        """Write `report.html` with the states of all steps."""
        # Import this here, because `llava demo --help` imports this module and must be fast.
        from llava_simplified.demo.live_report import StepRow, write_live_report

        assert self.images is not None
        rows = []
        runs = {}
        for number, step in enumerate(self.steps):
            state, detail = "waiting", f"about {format_duration(step.seconds)}"
            if number < self.index:
                state, detail = "done", format_duration(self.demo.durations[number])
            elif number == self.index:
                state, detail = "running", progress.text
            rows.append(StepRow(step.title, state, detail))
            if number <= self.index and step.run_folder is not None:
                runs[step.title] = step.run_folder
        # The share of a step in the progress bar is its share of the expected duration.
        planned = sum(step.seconds for step in self.steps)
        done = sum(step.seconds for step in self.steps[: self.index])
        write_live_report(
            self.demo.output / "report.html",
            title="LLaVA Simplified: the demo is running",
            status=f"Step {self.index + 1} of {len(self.steps)}: {self.step.title}. {left.capitalize()}.",
            fraction=(done + progress.fraction * self.step.seconds) / planned,
            steps=rows,
            runs=runs,
            images=self.images,
        )


def _shell_command(argv: Sequence[str]) -> str:
    """Return arguments as they can be pasted into a shell, with `~` for the home folder."""
    home = f"{Path.home()}{os.sep}"
    quoted_arguments = []
    for argument in argv:
        quoted = quote_arguments([argument])
        # Abbreviate only paths that need no quotes, because a shell does not expand a quoted `~`.
        if quoted == argument and argument.startswith(home):
            quoted = f"~/{argument.removeprefix(home)}"
        quoted_arguments.append(quoted)
    return " ".join(quoted_arguments)
