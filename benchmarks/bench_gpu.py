"""Verify and measure everything on a GPU, in less than eight minutes, without a download.

    python benchmarks/bench_gpu.py [--output gpu.json] [--sections exactness training ...]
    python benchmarks/bench_gpu.py --tiny        # test the script itself: on a CPU, with tiny shapes

Requires a checkout of this repository, PyTorch with CUDA, and Transformers; sections that train also require PEFT and
Accelerate. Nothing is installed or downloaded: all models have random weights and the shapes of Mistral-7B and CLIP
ViT-B/16, and are created on the device.

Each section runs in a separate process with a time limit. If a section fails, runs out of memory or
is killed at its limit, its measurements so far are kept, and the other sections still run. `--output` is rewritten after
every section; a `.log` file beside it contains the warnings of all sections.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import types
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# Seconds of each section on a GPU like the H200, in the order in which they run. The module of a section is
# gpu_<section>.py.
SECTIONS = {
    "machine": 15,
    "exactness": 70,
    "training": 130,
    "captioning": 85,
    "serving": 110,
    "resume": 40,
}
TIME_LIMIT = 470  # seconds for all sections
START_LIMIT = 90  # seconds for the imports of a section; only the first one has to wait for them
# Packages that the measured code imports, but that the benchmarks do not use. They need not be installed.
OPTIONAL_PACKAGES = ("simplejpeg",)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="Use tiny shapes on a CPU")
    parser.add_argument("--output", type=Path, default=Path("gpu.json"), help="Result file")
    parser.add_argument(
        "--sections",
        nargs="+",
        choices=SECTIONS,
        default=list(SECTIONS),
        metavar="SECTION",
        help=f"Sections to run, of {', '.join(SECTIONS)} (default: all)",
    )
    parser.add_argument(
        "--time-limit", type=float, default=TIME_LIMIT, help="Seconds for all sections together"
    )
    parser.add_argument(
        "--fail",
        choices=SECTIONS,
        metavar="SECTION",
        help="Let a section fail, to test that the others still run",
    )
    parser.add_argument(
        "--hang",
        choices=SECTIONS,
        metavar="SECTION",
        help="Let a section hang, to test that it is killed",
    )
    parser.add_argument(
        "--in-process", action="store_true", help="Run the sections in this process, without limits"
    )
    # For child processes: the section to run, and the file for its measurements.
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the sections; return 1 if a section or one of its measurements has failed, otherwise 0."""
    args = build_parser().parse_args(argv)
    if args.run:
        section, path = args.run
        return run_child(args, section, Path(path))
    results: dict[str, Any] = {}
    args.output.with_suffix(".log").unlink(missing_ok=True)
    end = time.monotonic() + (math.inf if args.in_process else args.time_limit)
    with tempfile.TemporaryDirectory() as folder:
        children = Children(args, Path(folder))
        for section in args.sections:
            limit = min(SECTIONS[section], end - time.monotonic())
            print(f"== {section} (at most {limit:.0f} s)", flush=True)
            start = time.monotonic()
            if limit <= 0:
                state = "skipped: no time is left"
            elif args.in_process:
                state = run_section(args, section, children.result_file(section))
            else:
                state = children.run(section, limit)
            results[section] = {
                "state": state,
                "seconds": round(time.monotonic() - start, 2),
                "measurements": read_measurements(children.result_file(section)),
            }
            print(f"== {section}: {state}, {results[section]['seconds']} s\n", flush=True)
            write_results(args.output, results)
            append_log(args.output.with_suffix(".log"), section, children.log_file(section))
        children.stop()
    failures = list_failures(results)
    for failure in failures:
        print(f"FAILED: {failure}")
    print(f"Wrote {args.output}")
    return 1 if failures else 0


def read_measurements(path: Path) -> list[dict[str, Any]]:
    """Return the measurements that a section has written: some of them if it was stopped or has failed, [] if none."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write the result file atomically, so that it is valid even if the process is killed."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(results, indent=1), encoding="utf-8")
    temporary.replace(path)


def append_log(path: Path, section: str, log: Path) -> None:
    """Append the standard error of a section, where warnings name the fast paths that were not used."""
    if log.exists():
        with path.open("a", encoding="utf-8") as stream:
            stream.write(f"== {section}\n{log.read_text(encoding='utf-8', errors='replace')}\n")


def list_failures(results: dict[str, Any]) -> list[str]:
    """Return a line for each section and measurement that has failed."""
    failures = []
    for section, result in results.items():
        if result["state"] != "done":
            failures.append(f"{section}: {result['state']}")
        for measurement in result["measurements"]:
            if "failed" in measurement:
                failures.append(f"{section}, {measurement['name']}: {measurement['failed']}")
    return failures


# ---- processes ----


class Children:
    """The child processes, each of which runs one section.

    The next process is started while the current section runs. It imports everything, which takes ten seconds, and
    then waits. Otherwise, the GPU would be idle during the imports of every section.

    Args:
        args: The parsed command line.
        folder: Folder for the measurements and the log of each section.
    """

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self._args = args
        self._folder = folder
        self._waiting: dict[str, subprocess.Popen[str]] = {}

    def result_file(self, section: str) -> Path:
        """Return the file of a section's measurements."""
        return self._folder / f"{section}.jsonl"

    def log_file(self, section: str) -> Path:
        """Return the file that receives the standard error of a section."""
        return self._folder / f"{section}.log"

    def run(self, section: str, limit: float) -> str:
        """Run a section; return "done", or the reason why it ended early."""
        process = self._take(section)
        if not self._wait_until_ready(section, process):
            kill(process)
            return f"killed: its imports took more than {START_LIMIT} s"
        assert process.stdin is not None
        try:
            process.stdin.write(f"{limit}\n")
            process.stdin.close()
        except BrokenPipeError:
            pass  # The process has ended already. The log, which is returned below, has the reason.
        following = self._next(section)
        if following:
            self._waiting[following] = self._start(following)
        try:
            # `Report` skips measurements that would exceed the limit, so this fails only if one of them takes
            # much longer than expected.
            process.wait(limit)
        except subprocess.TimeoutExpired:
            kill(process)
            return f"killed after {limit:.0f} s"
        if process.returncode == 0:
            return "done"
        log = self.log_file(section).read_text(encoding="utf-8", errors="replace")
        return f"failed: {log.strip()[-1500:]}"

    def stop(self) -> None:
        """End the process that was started in advance, if its section has not run."""
        for process in self._waiting.values():
            kill(process)

    def _wait_until_ready(self, section: str, process: subprocess.Popen[str]) -> bool:
        """Return whether a process has imported everything, or has ended, within the limit."""
        end = time.monotonic() + START_LIMIT
        while time.monotonic() < end:
            if ready_file(self.result_file(section)).exists() or process.poll() is not None:
                return True
            time.sleep(0.02)
        return False

    def _next(self, section: str) -> str | None:
        """Return the section that follows another one, or None."""
        sections = self._args.sections
        index = sections.index(section) + 1
        return sections[index] if index < len(sections) else None

    def _take(self, section: str) -> subprocess.Popen[str]:
        """Return the process of a section, which is started unless it was started in advance."""
        return self._waiting.pop(section, None) or self._start(section)

    def _start(self, section: str) -> subprocess.Popen[str]:
        """Start the process of a section. It waits for its time limit on standard input before it measures."""
        command = [sys.executable, __file__, "--run", section, str(self.result_file(section))]
        for option in ("fail", "hang"):
            if getattr(self._args, option):
                command += [f"--{option}", getattr(self._args, option)]
        if self._args.tiny:
            command.append("--tiny")
        with self.log_file(section).open("w") as log:
            # In a session of its own, the child can be killed together with the processes that it starts.
            return subprocess.Popen(
                command, stdin=subprocess.PIPE, stderr=log, text=True, start_new_session=True
            )


def ready_file(path: Path) -> Path:
    """Return the file that a child creates when it has imported everything."""
    return path.with_suffix(".ready")


def kill(process: subprocess.Popen[str]) -> None:
    """Kill a child, if it is running, and the processes that it has started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_child(args: argparse.Namespace, section: str, path: Path) -> int:
    """Import everything, wait until the parent writes the time limit, and run the section."""
    module = import_section(section)
    ready_file(path).touch()
    limit = sys.stdin.readline()
    if not limit:  # standard input was closed, because the parent has ended
        return 1
    measure(args, section, module, path, float(limit))
    return 0


def run_section(args: argparse.Namespace, section: str, path: Path) -> str:
    """Run a section in this process; return "done", or the reason why it failed."""
    try:
        measure(args, section, import_section(section), path, math.inf)
    except Exception as error:  # noqa: BLE001 - a failure must not end the other sections
        traceback.print_exc()
        return f"failed: {type(error).__name__}: {error}"
    return "done"


def import_section(section: str) -> Any:
    """Return the module of a section."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for folder in (str(ROOT), str(Path(__file__).parent)):
        if folder not in sys.path:
            sys.path.insert(0, folder)
    # Replace a missing package by an empty module, so that `import PACKAGE` works in the measured code.
    for package in OPTIONAL_PACKAGES:
        if package not in sys.modules and importlib.util.find_spec(package) is None:
            sys.modules[package] = types.ModuleType(package)
    # Imports create a million objects and hardly any garbage, so do not search them for any.
    gc.disable()
    module = importlib.import_module(f"gpu_{section}")
    gc.enable()
    # Each measurement ends with a garbage collection. Exclude the million objects that the imports have created, which
    # it would search every time.
    gc.freeze()
    return module


def measure(args: argparse.Namespace, section: str, module: Any, path: Path, limit: float) -> None:
    """Make the measurements of a section.

    Raises:
        RuntimeError: The machine has no GPU.
    """
    import torch
    from gpu_report import Report
    from gpu_workload import Workload

    if args.fail == section:
        raise RuntimeError("failed on purpose (--fail)")
    if args.hang == section:
        time.sleep(3600)
    if not args.tiny and not torch.cuda.is_available():
        raise RuntimeError("no CUDA GPU was found; pass --tiny to test the script on a CPU")
    workload = Workload(torch.device("cpu" if args.tiny else "cuda"), args.tiny)
    # Leave some time for ending the process.
    module.run(workload, Report(path, 0.95 * limit))


if __name__ == "__main__":
    sys.exit(main())
