"""Commands in processes of their own that start at once: they are forked from one that has imported torch.

For tests that need a process: its exit status, a signal, `kill -9`. `python train.py` imports torch and
transformers first, for several seconds; a forked process has them. What a fork cannot show is the import itself,
and variables that libraries read while they are imported, such as OMP_WAIT_POLICY.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import runpy
import signal
import socketserver
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from multiprocessing.process import BaseProcess
from pathlib import Path
from subprocess import CompletedProcess
from types import MappingProxyType

import pytest

from llava_simplified import workers

# A module that is not installed is left out.
PRELOADED = [
    "deepspeed",
    "llava_simplified.captioning.caption_command",
    "llava_simplified.captioning.runner",
    "llava_simplified.model.checkpoint",
    "llava_simplified.serve.api",
    "llava_simplified.training.build_trainer",
    "llava_simplified.training.train_command",
    "matplotlib.backends.backend_agg",
    "transformers.models.clip.modeling_clip",
    "transformers.models.mistral.modeling_mistral",
]


def fork_process(target: Callable[..., None], *args: object) -> BaseProcess:
    """Start a function in a process that is forked from one that has imported everything."""
    if sys.platform == "win32":
        pytest.skip("Windows does not fork processes")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_run_function, args=(target, args))
    process.start()
    return process


def _run_function(target: Callable[..., None], args: tuple[object, ...]) -> None:
    # The end of a training collects garbage several times; what the server has imported is none.
    gc.freeze()
    # Otherwise the workers of data loaders would be started by a server, too, unlike those of a command.
    multiprocessing.set_start_method(None, force=True)
    target(*args)


class ForkedProcess:
    """A running command, with the methods of `subprocess.Popen`.

    Args:
        words: "llava" and its arguments, or the path of a script and its arguments.
        folder: Its working directory; None is that of the tests.
        new_session: Make it the leader of a process group, which `os.killpg` can signal.
        environment: Environment variables in addition to those of the tests.
    """

    def __init__(
        self,
        words: Sequence[object],
        folder: Path | None = None,
        new_session: bool = False,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        # Deleted with this object.
        self._stdout = tempfile.NamedTemporaryFile(prefix="stdout")  # noqa: SIM115
        self._stderr = tempfile.NamedTemporaryFile(prefix="stderr")  # noqa: SIM115
        self._process = fork_process(
            _run_words,
            [str(word) for word in words],
            str(folder or Path.cwd()),
            {**os.environ, **environment},
            (self._stdout.name, self._stderr.name),
            new_session,
        )
        self.pid: int = self._process.pid or 0

    @property
    def stdout(self) -> str:
        """What the command has printed so far."""
        return Path(self._stdout.name).read_text(encoding="utf-8", errors="replace")

    @property
    def stderr(self) -> str:
        return Path(self._stderr.name).read_text(encoding="utf-8", errors="replace")

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        """Return the exit status, negative after a signal; None while the command runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        assert self._process.exitcode is not None, f"still running after {timeout} s"
        return self._process.exitcode

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def run_command(words: Sequence[object], folder: Path) -> ForkedProcess:
    """Run a command that must succeed to its end."""
    process = ForkedProcess(words, folder)
    status = process.wait(300)
    assert status == 0, process.stdout[-2000:] + process.stderr[-3000:]
    return process


def run_forked(command: Sequence[str], env: Mapping[str, str], **_: object) -> CompletedProcess:
    """Run `python -m MODULE ...` of this package in a forked process. It takes the place of `subprocess.run`."""
    _, option, module, *words = command
    assert option == "-m"
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None
    process = ForkedProcess([spec.origin, *words], environment=env)
    status = process.wait(300)
    return CompletedProcess(command, status, process.stdout, process.stderr)


def _run_words(
    words: list[str],
    folder: str,
    environment: dict[str, str],
    streams: tuple[str, str],
    new_session: bool,
) -> None:
    """Become the command. This is the main function of the forked process."""
    if new_session:
        os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number, path in enumerate(streams, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    if "OMP_NUM_THREADS" in environment:  # read when torch was imported, for the server
        import torch

        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    if sys.platform == "linux":
        # Like a command that has not imported torch, unlike the server that this process is a fork of.
        workers.start_method = lambda: "fork"
    sys.argv = words
    if words[0] == "llava":
        from llava_simplified.cli import main

        sys.exit(main(words[1:]))
    # As Python does for a script.
    sys.path.insert(0, str(Path(words[0]).parent))
    runpy.run_path(words[0], run_name="__main__")


# A program that asks the process of the tests to run it.
_CLIENT = """#!{python} -IS
import json, os, socket, sys
words = {words!r} + sys.argv[1:]
with socket.create_connection(("127.0.0.1", {port})) as server:
    server.sendall(json.dumps([words, os.getcwd(), dict(os.environ)]).encode() + b"\\n")
    stdout, stderr, status = json.loads(server.makefile().readline())
sys.stdout.write(stdout)
sys.stderr.write(stderr)
sys.exit(status)
"""


@contextmanager
def command_programs(
    folder: Path,
    rewrite: Callable[[list[str]], list[str]] = lambda words: words,
    scripts: Sequence[Path] = (),
) -> Iterator[None]:
    """Write the programs `llava` and `python` for shell scripts; they run their words in forked processes.

    Args:
        folder: Where the programs are written; the script has it in its PATH. `python` runs scripts only.
        rewrite: Returns the words that are run: "llava" or the path of a script, and the arguments.
        scripts: Python scripts, each of which gets a program with the script's name that runs it.
    """

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            words, working_folder, environment = json.loads(self.rfile.readline())
            process = ForkedProcess(rewrite(words), Path(working_folder), environment=environment)
            status = process.wait()
            answer = [process.stdout, process.stderr, status]
            self.wfile.write(json.dumps(answer).encode() + b"\n")

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.server_address[1]
        folder.mkdir(exist_ok=True)
        programs = {"llava": ["llava"], "python": []}
        for script in scripts:
            programs[script.name] = [str(script)]
        for name, words in programs.items():
            program = folder / name
            program.write_text(_CLIENT.format(python=sys.executable, words=words, port=port))
            program.chmod(0o755)
        yield
        server.shutdown()
