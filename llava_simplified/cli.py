"""The `llava` command. One subcommand, one module; nothing heavy is imported before it is known which."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import warnings

COMMANDS = {
    "download": (
        "llava_simplified.prepare.download_command:main",
        "image URLs -> shards or files, politely and safely",
    ),
    "convert": ("llava_simplified.prepare.convert_command:main", "any caption source -> records"),
    "clean": (
        "llava_simplified.prepare.clean_command:main",
        "set aside what training can't use, and say why",
    ),
    "reduce": (
        "llava_simplified.prepare.convert_command:reduce_main",
        "a random sample of the records",
    ),
    "merge-manifests": (
        "llava_simplified.prepare.download_command:merge_main",
        "join what several machines downloaded",
    ),
    "inspect": (
        "llava_simplified.inspection:main",
        "samples as the model sees them: tokens, labels, images",
    ),
    "encode": (
        "llava_simplified.training.feature_cache:encode_main",
        "run the vision tower ahead of training, once",
    ),
    "plan": (
        "llava_simplified.training.plan:main",
        "memory, time and disk of a run, before it is begun",
    ),
    "train": ("llava_simplified.training.train_command:main", "fine-tune a language model to see"),
    "caption": (
        "llava_simplified.captioning.caption_command:caption_main",
        "a picture, folder, shard, records -> captions, resumable",
    ),
    "chat": (
        "llava_simplified.captioning.caption_command:chat_main",
        "talk about a picture on the terminal",
    ),
    "predict": (
        "llava_simplified.captioning.caption_command:main",
        "caption the pictures of a data file, or one picture",
    ),
    "evaluate": (
        "llava_simplified.evaluation.evaluate_command:main",
        "score predictions against references",
    ),
    "serve": (
        "llava_simplified.serve.serve_command:main",
        "answer over HTTP, as OpenAI's API does, and on a page",
    ),
    "export": (
        "llava_simplified.export.export_command:export_main",
        "a checkpoint -> stock LLaVA, PEFT, GGUF, and compared",
    ),
    "import": (
        "llava_simplified.export.importing:import_main",
        "LLaVA checkpoints of other codebases -> ours",
    ),
    "merge": (
        "llava_simplified.export.export_command:merge_main",
        "put a checkpoint's adapter into its weights",
    ),
    "push": ("llava_simplified.export.export_command:push_main", "upload a folder to the hub"),
    "doctor": ("llava_simplified.doctor:main", "what is installed, and what this machine can do"),
    "demo": (
        "llava_simplified.demo.demo_command:main",
        "the whole recipe on small real weights and pictures",
    ),
}


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; returns the exit status. A user's error is one line, a fault of ours a traceback."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: llava COMMAND [options]\n\ncommands:")
        for name, (_, help_text) in COMMANDS.items():
            print(f"  {name:<17}{help_text}")
        print("\n`llava COMMAND --help` lists the options of a command.")
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        print(f"llava: no command {name!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    return run_command(COMMANDS[name][0], rest)


def run_command(target: str, argv: list[str] | None) -> int:
    """Call "module:function" with `argv`; what our code raises for what a user can mend becomes one line."""
    # Without torchvision, transformers warns of each of its hundred image processors: ours need none of them.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault(
        "ARROW_DEFAULT_MEMORY_POOL", "system"
    )  # Arrow's own allocator keeps 10 MB in every worker
    # it looks for a fifth of a second, which only what computes with torch needs
    if "OMP_WAIT_POLICY" not in os.environ and ".data." not in target and _shares_its_cores():
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft|torch")
    # where it is installed, it tells at every import of a kernel for CPUs that is not
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # where DeepSpeed is installed, it tells whoever saves a model that there is no GPU
    logging.getLogger("DeepSpeed").addFilter(
        lambda record: "Setting accelerator to CPU" not in record.getMessage()
    )
    try:
        module, _, function = target.partition(":")
        return getattr(importlib.import_module(module), function)(argv)
    except (
        ValueError,
        FloatingPointError,
        OSError,
    ) as error:  # OSError: a model that is not there, a full disk
        if os.environ.get("LLAVA_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _shares_its_cores() -> bool:
    """Are other processes computing here, or is this one of several?

    OpenMP threads spin at a barrier: a third faster where the cores are ours, several times slower where they are not.
    """
    import psutil

    return (
        int(os.environ.get("WORLD_SIZE", "1")) > 1
        or psutil.cpu_percent(0.2) > 100 / (os.cpu_count() or 1) / 2
    )


if __name__ == "__main__":
    sys.exit(main())
