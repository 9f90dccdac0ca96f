"""Run our code as on Windows, on any system: without the modules and functions of POSIX, and with spawned workers.

Only the imports in the modules of our package are changed: libraries have their own code for Windows, which cannot run
here. Importing this module changes nothing; running it does. Spawned processes import the main module again (as
`__mp_main__`), so they run our code as on Windows too.

    python windows_like.py ARGUMENTS [-- ARGUMENTS]...   run `llava ARGUMENTS`, and so on
"""

from __future__ import annotations

import builtins
import importlib
import multiprocessing
import os
import pkgutil
import signal
import sys
from multiprocessing import forkserver
from types import ModuleType

PACKAGE = "llava_simplified"
MISSING_MODULES = frozenset(
    [
        "crypt",
        "curses",
        "fcntl",
        "grp",
        "posix",
        "pty",
        "pwd",
        "readline",
        "resource",
        "spwd",
        "syslog",
        "termios",
        "tty",
    ]
)
MISSING_ATTRIBUTES = {
    "os": frozenset(
        [
            "WNOHANG",
            "O_CLOEXEC",
            "O_DIRECTORY",
            "O_DSYNC",
            "O_NOCTTY",
            "O_NOFOLLOW",
            "O_NONBLOCK",
            "O_SYNC",
            "chown",
            "chroot",
            "copy_file_range",
            "ctermid",
            "eventfd",
            "fchdir",
            "fchmod",
            "fchown",
            "fdatasync",
            "fork",
            "forkpty",
            "fstatvfs",
            "getegid",
            "geteuid",
            "getgid",
            "getgroups",
            "getloadavg",
            "getpgid",
            "getpgrp",
            "getpriority",
            "getrandom",
            "getresuid",
            "getsid",
            "getuid",
            "getxattr",
            "initgroups",
            "killpg",
            "lchown",
            "lockf",
            "major",
            "makedev",
            "memfd_create",
            "minor",
            "mkfifo",
            "mknod",
            "nice",
            "openpty",
            "posix_fadvise",
            "posix_fallocate",
            "posix_spawn",
            "pread",
            "preadv",
            "pwrite",
            "pwritev",
            "register_at_fork",
            "sched_getaffinity",
            "sched_setaffinity",
            "sched_yield",
            "sendfile",
            "setegid",
            "seteuid",
            "setgid",
            "setgroups",
            "setpgid",
            "setpriority",
            "setsid",
            "setuid",
            "setxattr",
            "splice",
            "statvfs",
            "sync",
            "sysconf",
            "tcgetpgrp",
            "ttyname",
            "uname",
            "wait",
            "wait3",
            "wait4",
            "waitid",
        ]
    ),
    "signal": frozenset(
        [
            "SIGALRM",
            "SIGBUS",
            "SIGCHLD",
            "SIGCONT",
            "SIGHUP",
            "SIGKILL",
            "SIGPIPE",
            "SIGQUIT",
            "SIGSTOP",
            "SIGTSTP",
            "SIGTTIN",
            "SIGTTOU",
            "SIGUSR1",
            "SIGUSR2",
            "SIGWINCH",
            "alarm",
            "pause",
            "pthread_kill",
            "pthread_sigmask",
            "setitimer",
            "siginterrupt",
            "sigpending",
            "sigwait",
        ]
    ),
    "sys": frozenset(["getdlopenflags", "setdlopenflags"]),
}


class WindowsModule(ModuleType):
    """A module of the standard library as it is on Windows.

    Args:
        module: The module of this system.
        missing: Names that Windows does not have.
        values: Names that have other values there.
    """

    def __init__(self, module: ModuleType, missing: frozenset[str], **values: object) -> None:
        super().__init__(module.__name__)
        self.__dict__.update(_module=module, _missing=missing, _values=values)
        # These attributes exist in every module, and would hide those of the original module.
        for name in ("__doc__", "__loader__", "__package__", "__spec__"):
            self.__dict__.pop(name, None)

    def __getattr__(self, name: str) -> object:
        if name in self._missing:
            raise AttributeError(f"module {self._module.__name__!r} has no {name!r} on Windows")
        if name in self._values:
            return self._values[name]
        return getattr(self._module, name)


MODULES = {
    "os": WindowsModule(os, MISSING_ATTRIBUTES["os"]),
    "signal": WindowsModule(signal, MISSING_ATTRIBUTES["signal"]),
    "sys": WindowsModule(sys, MISSING_ATTRIBUTES["sys"], platform="win32"),
}
_import = builtins.__import__


def import_as_on_windows(
    name: str,
    globals: dict[str, object] | None = None,
    locals: dict[str, object] | None = None,
    fromlist: tuple[str, ...] = (),
    level: int = 0,
) -> ModuleType:
    """Import a module: as on Windows if our code imports it, and unchanged for all other code."""
    importer = str((globals or {}).get("__name__", ""))
    if importer.split(".")[0] == PACKAGE and level == 0:
        if name.split(".")[0] in MISSING_MODULES:
            raise ModuleNotFoundError(f"No module named {name!r} (on Windows)", name=name)
        if name in MODULES:
            return MODULES[name]
    return _import(name, globals, locals, fromlist, level)


def import_again() -> None:
    """Make the package import all of its modules again, as on Windows. Call it in a separate process."""
    for name in list(sys.modules):
        if name.split(".")[0] == PACKAGE:
            del sys.modules[name]
    builtins.__import__ = import_as_on_windows


def import_everything() -> None:
    """Import every module of the package anew, and exit with an error if that fails. Call it in a separate process."""
    import_again()
    package = importlib.import_module(PACKAGE)
    names = [
        module.name
        for module in pkgutil.walk_packages(package.__path__, f"{PACKAGE}.")
        if not module.name.endswith("__main__")
    ]
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            # This module is a plugin, which only lmms-eval itself imports.
            assert error.name == "lmms_eval", error
    # Check that the replacement works: our code must have imported the Windows version of `sys`.
    assert sys.modules[f"{PACKAGE}.workers"].sys.platform == "win32"
    assert len(names) > 100


def call(argv: list[str]) -> None:
    """Run several commands, separated by `--`; exit with an error if one fails."""
    from llava_simplified import cli

    while argv:
        end = argv.index("--") if "--" in argv else len(argv)
        status = cli.main(argv[:end])
        if status:
            sys.exit(f"llava {' '.join(argv[:end])}: exit status {status}")
        argv = argv[end + 1 :]


# "__mp_main__" is this module in a process that was spawned.
if __name__ in ("__main__", "__mp_main__"):
    import_again()

if __name__ == "__main__":
    # This process may be a fork of one that was started with other settings.
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding=os.environ.get("PYTHONIOENCODING"))
    # The package spawns its own workers here (`workers.start_method`). Those of torch's data loaders are forked from the
    # server that this process is forked from: like spawned workers, they inherit nothing from this process.
    multiprocessing.set_start_method("forkserver", force=True)
    # Python would start another server, which would import torch and Transformers again.
    forkserver._forkserver.ensure_running = lambda: None  # type: ignore[method-assign]
    call(sys.argv[1:])
