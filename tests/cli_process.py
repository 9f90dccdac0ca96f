"""Run commands in separate processes that start immediately, since they are forked from one that has imported torch.

This is for tests that need a process: for its exit status, a signal or `kill -9`. `python train.py` needs several
seconds to import torch and transformers; a forked process has imported them already. Tests that use a forked process
cannot cover the import itself, or the effect of variables that libraries read while they are imported, such as
OMP_WAIT_POLICY.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import runpy
import signal
import socketserver
import sys
import tempfile
import textwrap
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from subprocess import CompletedProcess
from types import MappingProxyType

import pytest

from llava_simplified import workers


@functools.cache
def start_fork_server() -> None:
    """Start the process that others are forked from. It imports everything first (see `preloaded`)."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(["preloaded"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        forkserver.ensure_running()


def skip_without_deepspeed() -> None:
    """Skip a test if DeepSpeed is not installed. Only its processes import DeepSpeed, since this takes a second."""
    if find_spec("deepspeed") is None:
        pytest.skip("the deepspeed extra is not installed")


def fork_process(target: Callable[..., None], *args: object) -> BaseProcess:
    """Start a function in a process that is forked from one that has imported everything."""
    if sys.platform == "win32":
        pytest.skip("Windows does not fork processes")
    start_fork_server()
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=_run_function, args=(target, args))
    process.start()
    return process


def _run_function(target: Callable[..., None], args: tuple[object, ...]) -> None:
    # Reset the start method. Otherwise the fork server would also start the data-loader workers, unlike in a real command.
    multiprocessing.set_start_method(None, force=True)
    target(*args)


class ForkedProcess:
    """A running command, with the methods of `subprocess.Popen`.

    Args:
        argv: "llava" and its arguments, the path of a script and its arguments, or "-m", a module and its arguments.
        folder: Its working directory; None to use the one of the tests.
        new_session: Make the process the leader of a process group, which `os.killpg` can signal.
        environment: Environment variables in addition to those of the tests.
        open_files: Soft and hard limit of open files; None to use those of the tests.
    """

    def __init__(
        self,
        argv: Sequence[object],
        folder: Path | None = None,
        new_session: bool = False,
        environment: Mapping[str, str] = MappingProxyType({}),
        open_files: tuple[int, int] | None = None,
    ) -> None:
        # These files are deleted when this object is.
        self._stdout = tempfile.NamedTemporaryFile(prefix="stdout")  # noqa: SIM115
        self._stderr = tempfile.NamedTemporaryFile(prefix="stderr")  # noqa: SIM115
        self._process = fork_process(
            _run_argv,
            [str(argument) for argument in argv],
            str(folder or Path.cwd()),
            {**os.environ, **environment},
            (self._stdout.name, self._stderr.name),
            new_session,
            open_files,
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


def run_command(argv: Sequence[object], folder: Path) -> ForkedProcess:
    """Run a command to its end, and assert that it succeeds."""
    process = ForkedProcess(argv, folder)
    status = process.wait(300)
    assert status == 0, process.stdout[-2000:] + process.stderr[-3000:]
    return process


def run_code(
    code: str,
    *arguments: object,
    missing: Sequence[str] = (),
    site: Path | None = None,
    folder: Path | None = None,
) -> str:
    """Run code that imports the package anew, in a forked process that has imported its dependencies; it must succeed.

    Args:
        code: Python code; the arguments are in `sys.argv[1:]`.
        arguments: Command-line arguments.
        missing: Packages that cannot be imported, as if they were not installed.
        site: Folder that is searched for modules first, before this checkout.
        folder: Working directory; None to use the one of the tests.

    Returns:
        What the code has printed.
    """
    setup = _IMPORT_ANEW.format(missing=tuple(missing), site=site and str(site))
    with tempfile.NamedTemporaryFile("w", suffix=".py", encoding="utf-8") as script:
        script.write(setup + textwrap.dedent(code))
        script.flush()
        return run_command([script.name, *arguments], folder or Path.cwd()).stdout


# A package cannot be imported if `sys.modules` has None for it.
_IMPORT_ANEW = """
import sys
for name in list(sys.modules):
    if name.partition(".")[0] in ("llava_simplified", *{missing!r}):
        del sys.modules[name]
for name in {missing!r}:
    sys.modules[name] = None
if {site!r}:
    sys.path.insert(0, {site!r})
"""


def run_forked(command: Sequence[str], env: Mapping[str, str], **_: object) -> CompletedProcess:
    """Run `python -m MODULE ...` in a forked process. Tests replace `subprocess.run` by this function."""
    process = ForkedProcess(command[1:], environment=env)
    status = process.wait(300)
    return CompletedProcess(command, status, process.stdout, process.stderr)


def _run_argv(
    argv: list[str],
    folder: str,
    environment: dict[str, str],
    streams: tuple[str, str],
    new_session: bool,
    open_files: tuple[int, int] | None,
) -> None:
    """Run a command in this process: the main function of the forked process."""
    if open_files:
        import resource

        resource.setrlimit(resource.RLIMIT_NOFILE, open_files)
    if new_session:
        os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number, path in enumerate(streams, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    if "OMP_NUM_THREADS" in environment:
        # torch read this variable when the fork server imported torch, so it must be applied here.
        import torch

        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    if sys.platform == "linux":
        # Fork workers, as commands do that have not imported torch. The fork server has imported it.
        workers.start_method = lambda: "fork"
    sys.argv = argv
    if argv[0] == "llava":
        from llava_simplified.cli import main

        sys.exit(main(argv[1:]))
    if argv[0] == "-m":
        sys.argv = argv[1:]
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        return
    # Like Python, search for modules in the folder of the script first.
    sys.path.insert(0, str(Path(argv[0]).parent))
    runpy.run_path(argv[0], run_name="__main__")


# A program that sends its arguments to the test process, which runs the command and returns its output.
_CLIENT = """#!{python} -IS
import json, os, socket, sys
argv = {argv!r} + sys.argv[1:]
with socket.create_connection(("127.0.0.1", {port})) as server:
    server.sendall(json.dumps([argv, os.getcwd(), dict(os.environ)]).encode() + b"\\n")
    stdout, stderr, status = json.loads(server.makefile().readline())
sys.stdout.write(stdout)
sys.stderr.write(stderr)
sys.exit(status)
"""


@contextmanager
def command_programs(
    folder: Path,
    rewrite: Callable[[list[str]], list[str]] = lambda argv: argv,
    scripts: Sequence[Path] = (),
) -> Iterator[None]:
    """Write the programs `llava` and `python` for shell scripts. They run their arguments in forked processes.

    Args:
        folder: Folder of the programs, which the shell script has in its PATH. `python` can only run scripts and modules.
        rewrite: Receives the `argv` of a `ForkedProcess`, and returns what to run instead.
        scripts: Python scripts, each of which gets a program with the script's name that runs it.
    """

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            argv, working_folder, environment = json.loads(self.rfile.readline())
            process = ForkedProcess(rewrite(argv), Path(working_folder), environment=environment)
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
        for name, argv in programs.items():
            program = folder / name
            program.write_text(_CLIENT.format(python=sys.executable, argv=argv, port=port))
            program.chmod(0o755)
        yield
        server.shutdown()
