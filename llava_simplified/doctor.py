"""`llava doctor`: what is installed, what this machine can do, and what a missing part would give."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import urllib.request
from pathlib import Path

from packaging.requirements import Requirement

# What each extra of pyproject.toml gives; the packages in it are read from the installation.
EXTRAS = {
    "deepspeed": "ZeRO-2 and ZeRO-3: `deepspeed train.py --deepspeed ds_configs/...`",
    "ray": "`--engine ray`: downloads and captions on a cluster",
    "serve": "`llava serve`: the web page, and an API that OpenAI's clients speak",
    "quant": "`--bits 4` (QLoRA) and `--bits 8`",
    "liger": "`--use_liger_kernel`: fused layers on a GPU",
    "wandb": "`--report_to wandb`",
    "dev": "tests, linters and `--report_to tensorboard`",
    "fuzz": "`make fuzz`",
    "docs": "the documentation as a web site",
    "bench": "TRL, to measure against",
}
ALONE = {
    "flash-attn": "`--attn_implementation flash_attention_2` on a CUDA GPU: pip install flash-attn"
}


def main(argv: list[str] | None = None) -> int:
    """Print it; the exit status is 1 where a needed package is missing."""
    parser = argparse.ArgumentParser("llava doctor", description=main.__doc__)
    parser.add_argument(
        "--cache-dir", type=Path, default=Path.home() / ".cache", help="where to look at the disk"
    )
    args = parser.parse_args(argv)
    import torch

    print(f"Python {platform.python_version()} on {platform.platform()}, {os.cpu_count()} CPUs")
    needs = [Requirement(need) for need in importlib.metadata.requires("llava-simplified") or ()]
    faults = {need.name: _fault(need) for need in needs}
    plain = [need for need in needs if need.marker is None]
    for name in ("llava-simplified", *(need.name for need in plain)):
        print(f"  {name:<18}{faults.get(name) or _version(name)}")
    print("devices")
    if torch.accelerator.is_available():
        for index in range(torch.accelerator.device_count()):
            device = torch.device(f"{torch.accelerator.current_accelerator()}:{index}")
            print(f"  {device}: {_device(device)}")
    else:
        print("  no accelerator: everything runs on the CPU")
    compiler = os.environ.get("CXX") or "g++"
    print(f"  bfloat16 on this CPU: {'fast' if fast_bf16() else 'slow, use --bf16 False'}")
    print(
        f"  --compile_layers: {'ready' if shutil.which(compiler) else f'needs the C++ compiler {compiler}'}"
    )
    print("extras (pip install 'llava-simplified[name]')")
    for extra, gives in EXTRAS.items():
        parts = [
            need.name for need in needs if need.marker and need.marker.evaluate({"extra": extra})
        ]
        lacking = ", ".join(name for name in parts if faults[name])
        print(f"  {extra:<18}{'lacks ' + lacking if lacking else 'installed'}; gives {gives}")
    for name, gives in ALONE.items():
        print(f"  {name:<18}{_version(name) or 'not installed'}; gives {gives}")
    print(f"hub\n  {_hub()}")
    usage = shutil.disk_usage(args.cache_dir if args.cache_dir.exists() else Path.home())
    print(f"disk\n  {args.cache_dir}: {usage.free / 1e9:.0f} GB free of {usage.total / 1e9:.0f}")
    return 1 if any(faults[need.name] for need in plain) else 0


def _fault(need: Requirement) -> str | None:
    """What is wrong with a package that is asked for; None: nothing."""
    version = _version(need.name)
    if version is None:
        return f"MISSING: pip install '{need.name}{need.specifier}'"
    fits = need.specifier.contains(version, prereleases=True)
    return None if fits else f"{version}, but {need.specifier} is needed"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device(device: object) -> str:
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(device)  # type: ignore[arg-type]
        bf16 = "bfloat16" if torch.cuda.is_bf16_supported() else "no bfloat16: use --fp16"
        return f"{properties.name}, {properties.total_memory / 1e9:.0f} GB, {bf16}"
    return str(device)


def fast_bf16() -> bool:
    """Is a bfloat16 matrix product on this CPU at least as fast as a float32 one? Without AVX512 it takes eight times as long."""
    import torch
    from torch.utils.benchmark import Timer

    matrices = [torch.ones(768, 768, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    single, half = (
        Timer("a @ a", globals={"a": a}).blocked_autorange(min_run_time=0.05).median
        for a in matrices
    )
    return half <= single


def _hub() -> str:
    """Can a model be fetched from the hub, and would a gated one be given?"""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set: models come from local folders and the cache alone"
    try:
        urllib.request.urlopen(constants.ENDPOINT, timeout=3).close()
    except OSError as error:
        return (
            f"{constants.ENDPOINT} can't be reached ({error}): name every model by a local folder with config.json, "
            "*.safetensors and tokenizer or preprocessor files, and set HF_HUB_OFFLINE=1"
        )
    return "reachable; " + (
        "logged in; a gated model (Llama, Mistral) is given once its terms are accepted on its page"
        if get_token()
        else "not logged in: gated models (Llama, Mistral) need their terms accepted on their page and `hf auth login`"
    )
