"""`llava doctor`: report what is installed, what this machine can do, and what optional parts would add.

The report has five parts: required packages with their versions, devices, extras, the Hugging Face hub, and
disk space. Packages and extras are read from the metadata of the installation, so that the report follows
`pyproject.toml`.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from llava_simplified.extras import install_command
from llava_simplified.options import CommandParser

PROJECT = "llava-simplified"
# The order is that of pyproject.toml. What each extra is for. One that is not listed here is reported without a purpose.
EXTRA_PURPOSES = {
    "download": "`llava download`, and records in Parquet files",
    "report": "plots of the training, and of reports",
    "gguf": "`llava export --format gguf` and `llava demo`",
    "serve": "`llava serve`: a web page, and an API for OpenAI's clients",
    "deepspeed": "ZeRO-2 and ZeRO-3 (`llava train --deepspeed CONFIG`)",
    "ray": "`--engine ray`: download and caption on a cluster",
    "quant": "`--bits 4` (QLoRA) and `--bits 8`",
    "liger": "`--use_liger_kernel`: fused layers on a GPU",
    "wandb": "`--report_to wandb`",
    "all": "all of the above that run on every machine",
    "dev": "tests, linters and `--report_to tensorboard`",
    "fuzz": "`make fuzz`",
    "docs": "the documentation as a web site",
    "bench": "TRL, for the benchmarks",
}
# Packages that are not part of an extra, because they have to be compiled for the installed torch.
OTHER_PURPOSES = {
    "flash-attn": (
        "`--attn_implementation flash_attention_2` on a CUDA GPU; install it with pip install flash-attn"
    ),
}


def build_parser() -> CommandParser:
    """Return the parser of `llava doctor`."""
    parser = CommandParser(
        "llava doctor", "Report what is installed, what this machine can do, and what is missing."
    )
    parser.add_argument(
        "--cache-dir",
        type=Path,
        default=Path.home() / ".cache",
        help="Folder whose disk space is reported (default: %(default)s)",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run `llava doctor`; the exit status is 1 if a required package is missing or too old."""
    args = build_parser().parse_args(argv)
    print(f"Python {platform.python_version()} on {platform.platform()}, {os.cpu_count()} CPUs")
    package_lines, all_required_installed = _describe_packages()
    _print_section(package_lines)
    # Each section is printed before the next one is determined: importing torch and reaching the hub take
    # seconds, and can fail in an installation that needs a doctor.
    _print_section(["devices", *_describe_devices()])
    _print_section(["extras", *_describe_extras()])
    _print_section(["hub", f"  {_describe_hub()}"])
    _print_section(["disk", f"  {_describe_disk(args.cache_dir)}"])
    return 0 if all_required_installed else 1


def _print_section(lines: Sequence[str]) -> None:
    print("\n".join(lines), flush=True)


# ---- packages ----


class Requirements:
    """The packages that this project requires, with and without extras."""

    def __init__(self) -> None:
        from packaging.requirements import Requirement

        # "gguf>=0.17; extra == 'gguf'": what stands behind the semicolon is the marker.
        lines = importlib.metadata.requires(PROJECT) or []
        self._requirements = [Requirement(line) for line in lines]
        metadata = importlib.metadata.metadata(PROJECT)
        self.extras: list[str] = list(metadata.get_all("Provides-Extra") or [])

    def required_packages(self) -> list[str]:
        """Return the names of the packages that are always required."""
        return [item.name for item in self._requirements if item.marker is None]

    def packages_of_extra(self, extra: str) -> list[str]:
        """Return the names of an extra's packages that this machine needs."""
        packages: list[str] = []
        for item in self._requirements:
            # A marker can also depend on the Python version: such a package is needed only there.
            if item.marker is None or not item.marker.evaluate({"extra": extra}):
                continue
            if item.name == PROJECT:  # "all" consists of other extras
                for other in sorted(item.extras):
                    packages += self.packages_of_extra(other)
            else:
                packages.append(item.name)
        return packages

    def problem(self, package: str) -> str | None:
        """Return what is wrong with a package: it is missing, or has the wrong version."""
        version = _version(package)
        for item in self._requirements:
            if item.name != package:
                continue
            if version is None:
                return f"MISSING: pip install '{item.name}{item.specifier}'"
            # Development versions count: torch from its nightly builds is "2.14.0.dev20261101".
            if not item.specifier.contains(version, prereleases=True):
                return f"{version}, but {item.specifier} is needed"
        return None


def _version(package: str) -> str | None:
    """Return the installed version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _describe_packages() -> tuple[list[str], bool]:
    """Return a line for each required package, and whether all of them are installed."""
    requirements = Requirements()
    packages = requirements.required_packages()
    lines = []
    for package in [PROJECT, *packages]:
        lines.append(_row(package, requirements.problem(package) or str(_version(package))))
    return lines, not any(requirements.problem(package) for package in packages)


def _describe_extras() -> list[str]:
    """Return a line for each extra, and for the packages that are part of none."""
    requirements = Requirements()
    lines = []
    for extra in requirements.extras:
        packages = requirements.packages_of_extra(extra)
        missing = [package for package in packages if requirements.problem(package)]
        state = "installed"
        if missing:
            state = f"missing: {', '.join(missing)}, run {install_command(extra)}"
        lines.append(_row(extra, _with_purpose(state, EXTRA_PURPOSES.get(extra))))
    for package, purpose in OTHER_PURPOSES.items():
        state = _version(package) or "not installed"
        lines.append(_row(package, _with_purpose(state, purpose)))
    return lines


def _with_purpose(state: str, purpose: str | None) -> str:
    return f"{state}; for {purpose}" if purpose else state


def _row(name: str, text: str) -> str:
    return f"  {name:<18}{text}"


# ---- machine ----


def _describe_devices() -> Sequence[str]:
    """Return a line for each accelerator, and what training can use on the CPU."""
    import torch

    lines = []
    if torch.accelerator.is_available():
        for index in range(torch.accelerator.device_count()):
            device = torch.device(f"{torch.accelerator.current_accelerator()}:{index}")
            lines.append(f"  {device}: {_describe_device(index)}")
    else:
        lines.append("  no accelerator: everything runs on the CPU")
    bfloat16 = "fast" if has_fast_bfloat16() else "slow; train with --bf16 False"
    lines.append(f"  bfloat16 on this CPU: {bfloat16}")
    # torch.compile calls this compiler for code that runs on the CPU.
    compiler = os.environ.get("CXX") or "g++"
    compile_layers = "possible"
    if shutil.which(compiler) is None:
        compile_layers = f"needs the C++ compiler {compiler}"
    lines.append(f"  --compile_layers: {compile_layers}")
    return lines


def _describe_device(index: int) -> str:
    """Return name, memory and bfloat16 support of an accelerator."""
    import torch

    if not torch.cuda.is_available():
        return str(torch.accelerator.current_accelerator())
    properties = torch.cuda.get_device_properties(index)
    bfloat16 = "bfloat16" if torch.cuda.is_bf16_supported() else "no bfloat16: train with --fp16"
    return f"{properties.name}, {properties.total_memory / 1e9:.0f} GB, {bfloat16}"


def has_fast_bfloat16() -> bool:
    """Return whether bfloat16 matrix products on this CPU are at least as fast as float32 ones.

    Without AVX-512 instructions for bfloat16 they take eight times as long, so it is measured.
    """
    import torch
    from torch.utils.benchmark import Timer

    # The size of a layer of a small model: large enough that the product takes longer than the call.
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.ones(768, 768, dtype=dtype)
        timer = Timer("matrix @ matrix", globals={"matrix": matrix})
        seconds[dtype] = timer.blocked_autorange(min_run_time=0.05).median
    return seconds[torch.bfloat16] <= seconds[torch.float32]


# ---- surroundings ----


def _describe_hub() -> str:
    """Return whether models can be downloaded from the Hugging Face hub, gated ones included."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set: models are loaded from local folders and the cache only"
    # Three seconds are enough for a reachable server, and bearable behind a firewall that drops packets.
    try:
        urllib.request.urlopen(constants.ENDPOINT, timeout=3).close()
    except OSError as error:
        return (
            f"{constants.ENDPOINT} cannot be reached ({error}). Pass each model as a local folder with "
            "config.json, *.safetensors, and the files of the tokenizer or preprocessor, and set "
            "HF_HUB_OFFLINE=1."
        )
    if get_token():
        return "reachable, logged in. For a gated model (Llama, Mistral), accept its terms on its page."
    return (
        "reachable, not logged in. For a gated model (Llama, Mistral), accept its terms on its page, "
        "and run `hf auth login`."
    )


def _describe_disk(folder: Path) -> str:
    """Return the disk space where a folder is, or will be."""
    usage = shutil.disk_usage(folder if folder.exists() else Path.home())
    return f"{folder}: {usage.free / 1e9:.0f} GB free of {usage.total / 1e9:.0f} GB"
