"""The `llava` command: find the subcommand, set up the process, run it.

Only the module of the requested subcommand is imported, so that `llava --help` is fast.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

from llava_simplified import __version__
from llava_simplified.options import print_text, suggest

_MAX_WINDOWS_PATH = 260  # characters, unless long paths are enabled


class Command(NamedTuple):
    """One subcommand.

    Attributes:
        main: "module:function" that runs the command; the function accepts `argv` and returns the
            exit status. Heavy imports belong inside the function, after the arguments are parsed, and not
            at the top of the module.
        summary: One-line description for `llava --help`.
        uses_torch: Whether the command computes with torch in this process.
    """

    main: str
    summary: str
    uses_torch: bool = True

    @property
    def parser(self) -> str:
        """The "module:function" that returns the parser of the command.

        Its name follows from the name of the main function: `build_parser` belongs to `main`, and
        `build_merge_parser` to `merge_main`.
        """
        module, _, function = self.main.partition(":")
        prefix = function.removesuffix("main")
        return f"{module}:build_{prefix}parser"


# In the order of `llava --help`, which is the order in which the commands are used.
COMMAND_GROUPS: dict[str, dict[str, Command]] = {
    "Prepare data": {
        "download": Command(
            "llava_simplified.prepare.download_command:main",
            "Download image URLs into shards or files",
            uses_torch=False,
        ),
        "convert": Command(
            "llava_simplified.prepare.convert_command:main",
            "Convert a caption data set to records",
            uses_torch=False,
        ),
        "clean": Command(
            "llava_simplified.prepare.clean_command:main",
            "Remove records that cannot be used for training, and report why",
            uses_torch=False,
        ),
        "reduce": Command(
            "llava_simplified.prepare.convert_command:reduce_main",
            "Draw a random sample of the records",
            uses_torch=False,
        ),
        "merge-manifests": Command(
            "llava_simplified.prepare.download_command:merge_main",
            "Merge the manifests of downloads by several machines",
            uses_torch=False,
        ),
    },
    "Train": {
        "inspect": Command(
            "llava_simplified.inspection.inspect_command:main",
            "Show samples as the model receives them: tokens, labels, images",
        ),
        "encode": Command(
            "llava_simplified.training.encode_command:main",
            "Compute the image features before training",
        ),
        "plan": Command(
            "llava_simplified.training.plan_command:main",
            "Estimate the memory, time and disk space of a training run",
        ),
        "train": Command(
            "llava_simplified.training.train_command:main",
            "Train a LLaVA model",
        ),
        "pairs": Command(
            "llava_simplified.training.pairs_command:main",
            "Make preference pairs from sampled captions, by reward",
        ),
    },
    "Caption and evaluate": {
        "caption": Command(
            "llava_simplified.captioning.caption_command:caption_main",
            "Caption an image, a folder, shards or records",
        ),
        "chat": Command(
            "llava_simplified.captioning.caption_command:chat_main",
            "Chat about an image in the terminal",
        ),
        "predict": Command(
            "llava_simplified.captioning.caption_command:predict_main",
            "Caption the records of a file for evaluation, with the options of predict.py",
        ),
        "evaluate": Command(
            "llava_simplified.evaluation.evaluate_command:main",
            "Score predictions against reference captions",
        ),
        "benchmark": Command(
            "llava_simplified.evaluation.benchmark_command:main",
            "Caption and score COCO, nocaps, Flickr30k or TextCaps",
        ),
    },
    "Export and serve": {
        "serve": Command(
            "llava_simplified.serve.serve_command:main",
            "Serve a model over HTTP with OpenAI's API and a web page",
        ),
        "export": Command(
            "llava_simplified.export.export_command:export_main",
            "Export a checkpoint to Hugging Face LLaVA, PEFT or GGUF",
        ),
        "import": Command(
            "llava_simplified.export.import_command:main",
            "Import a LLaVA checkpoint of another codebase",
        ),
        "merge": Command(
            "llava_simplified.export.export_command:merge_main",
            "Merge a checkpoint's adapter into its language model",
        ),
        "push": Command(
            "llava_simplified.export.export_command:push_main",
            "Upload a folder to the Hugging Face Hub",
            uses_torch=False,
        ),
    },
    "Other": {
        "demo": Command(
            "llava_simplified.demo.demo_command:main",
            "Train, caption and evaluate with small pretrained models",
        ),
        "doctor": Command(
            "llava_simplified.doctor_command:main",
            "Check what is installed and what this machine supports",
        ),
        "completion": Command(
            "llava_simplified.completion_command:main",
            "Print a completion script for bash or zsh",
            uses_torch=False,
        ),
    },
}
COMMANDS: dict[str, Command] = {
    name: command for group in COMMAND_GROUPS.values() for name, command in group.items()
}


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand.

    Returns:
        The exit status: 0 after success, 1 if the command ran but failed on its data, 2 after an
        error that the user can correct, 130 after Ctrl-C.
    """
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        print_text(describe_commands())
        return 0
    if arguments[0] == "--version":
        print_text(f"llava-simplified {__version__}")
        return 0
    name = arguments[0]
    if name not in COMMANDS:
        kind = "option" if name.startswith("-") else "command"
        print_text(
            f"error: unknown {kind} {name}{suggest(name, COMMANDS)}\n"
            "`llava --help` lists the commands.",
            file=sys.stderr,
        )
        return 2
    return run_command(name, arguments[1:])


def describe_commands() -> str:
    """Return the text of `llava --help`."""
    width = max(len(name) for name in COMMANDS) + 2
    lines = ["usage: llava COMMAND [options]"]
    for group, commands in COMMAND_GROUPS.items():
        lines += ["", f"{group}:"]
        for name, command in commands.items():
            lines.append(f"  {name:<{width}}{command.summary}")
    lines += [
        "",
        "`llava COMMAND --help` lists the options of a command.",
        "`llava --version` prints the version.",
    ]
    return "\n".join(lines)


def run_command(name: str, argv: list[str]) -> int:
    """Run a subcommand by its name; see `main` for the exit status.

    Errors that the user can correct are printed without a traceback; set LLAVA_TRACEBACK=1 to get
    it. Bugs of this package always give a traceback.
    """
    command = COMMANDS[name]
    # Measuring the load of the CPUs takes time. Skip it if only the help text is printed.
    shows_help = "-h" in argv or "--help" in argv
    configure_process(uses_torch=command.uses_torch and not shows_help)
    try:
        return resolve(command.main)(argv)
    # Print errors that the user can correct without a traceback. OSError is raised, for example, for a model that
    # does not exist or a full disk, and FloatingPointError for a loss that is not finite.
    except (ValueError, FloatingPointError, OSError) as error:
        if os.environ.get("LLAVA_TRACEBACK"):
            raise
        print_text(f"error: {error}{describe_long_path(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print_text("interrupted", file=sys.stderr)
        return 130


def describe_long_path(error: Exception) -> str:
    """Return advice if Windows may have failed to open a file because its path is too long; otherwise "".

    The advice is appended to the error message.
    """
    name = getattr(error, "filename", None)
    if sys.platform != "win32" or not isinstance(name, str):
        return ""
    # Do not use Path.resolve, which follows links: Windows limits the path that was passed to it.
    if len(os.path.abspath(name)) < _MAX_WINDOWS_PATH:  # noqa: PTH100
        return ""
    return (
        f" (Windows limits paths to {_MAX_WINDOWS_PATH} characters: use a folder with a shorter path, or enable long "
        "paths, as docs/troubleshooting.md describes.)"
    )


def resolve(target: str) -> Callable[..., Any]:
    """Return the function that "module:function" names."""
    module, _, function = target.partition(":")
    # The import happens here, so that only the module of the requested command is loaded.
    resolved: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return resolved


def configure_process(*, uses_torch: bool) -> None:
    """Set environment variables and log filters. Call this before importing the libraries that use them.

    Args:
        uses_torch: Whether to configure OpenMP, the thread library of torch.
    """
    # Hide the warnings of transformers about a hundred image processors that require torchvision. None of
    # them is used here.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Hide the progress bars of libraries in a log file, where they would write a line for each step.
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # Use the system's memory allocator: Arrow's own allocator keeps 10 MB in every worker process.
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    # Measure the load of the CPUs (0.2 s) only for commands that compute with torch. "PASSIVE" makes waiting threads
    # sleep instead of spin; see `cpus_are_shared`.
    if uses_torch and "OMP_WAIT_POLICY" not in os.environ and cpus_are_shared():
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft|torch")
    # Hide the log message about a missing GPU that DeepSpeed writes whenever a model is saved.
    logging.getLogger("DeepSpeed").addFilter(
        lambda record: "Setting accelerator to CPU" not in record.getMessage()
    )


def cpus_are_shared() -> bool:
    """Return whether this process shares the CPUs with other programs, or with other ranks of the same run.

    By default, OpenMP threads spin (wait in a busy loop) for each other. This makes a training step a third
    faster on idle CPUs, but several times slower on busy ones.
    """
    # torchrun and other launchers set WORLD_SIZE.
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return True
    import psutil

    one_half_cpu = 50 / (os.cpu_count() or 1)  # percent of all CPUs
    return psutil.cpu_percent(0.2) > one_half_cpu


if __name__ == "__main__":
    sys.exit(main())
