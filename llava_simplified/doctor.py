"""`llava doctor`: what is installed, what this machine can do, and what a missing part would give."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import urllib.request
from pathlib import Path

NEEDED = (
    "llava-simplified",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "tokenizers",
    "safetensors",
    "simplejpeg",
    "pyarrow",
)
EXTRAS = {
    "deepspeed": ("deepspeed", "ZeRO-2 and ZeRO-3: `deepspeed train.py --deepspeed ds_configs/...`"),
    "ray": ("ray", "`--engine ray`: downloads and captions on a cluster"),
    "wandb": ("wandb", "`--report_to wandb`"),
    "tensorboard": ("tensorboard", "`--report_to tensorboard`"),
}


def main(argv: list[str] | None = None) -> int:
    """Print it; the exit status is 1 where a needed package is missing."""
    parser = argparse.ArgumentParser("llava doctor", description=main.__doc__)
    parser.add_argument("--cache-dir", type=Path, default=Path.home() / ".cache", help="where to look at the disk")
    args = parser.parse_args(argv)
    import torch

    print(f"Python {platform.python_version()} on {platform.platform()}, {os.cpu_count()} CPUs")
    missing = 0
    for name in NEEDED:
        version = _version(name)
        missing += version is None
        print(f"  {name:<18}{version or 'MISSING: pip install ' + name}")
    print("devices")
    if torch.accelerator.is_available():
        for index in range(torch.accelerator.device_count()):
            device = torch.device(f"{torch.accelerator.current_accelerator()}:{index}")
            print(f"  {device}: {_device(device)}")
    else:
        print("  no accelerator: everything runs on the CPU")
    compiler = os.environ.get("CXX") or "g++"
    print(f"  bfloat16 on this CPU: {'fast' if _fast_bf16() else 'slow, use --bf16 False'}")
    print(f"  --compile_layers: {'ready' if shutil.which(compiler) else f'needs the C++ compiler {compiler}'}")
    print("extras (pip install 'llava-simplified[name]')")
    for extra, (package, gives) in EXTRAS.items():
        version = _version(package)
        print(f"  {extra:<18}{version or 'not installed'}; gives {gives}")
    print(f"hub\n  {_hub()}")
    usage = shutil.disk_usage(args.cache_dir if args.cache_dir.exists() else Path.home())
    print(f"disk\n  {args.cache_dir}: {usage.free / 1e9:.0f} GB free of {usage.total / 1e9:.0f}")
    return 1 if missing else 0


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


def _fast_bf16() -> bool:
    """Is a bfloat16 matrix product at least as fast as a float32 one?"""
    import time

    import torch

    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(768, 768, dtype=dtype)
        best = 1.0
        for _ in range(5):
            start = time.perf_counter()
            a @ a
            best = min(best, time.perf_counter() - start)
        seconds[dtype] = best
    return seconds[torch.bfloat16] <= seconds[torch.float32]


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
        "logged in" if get_token() else "not logged in: gated models (Llama, Mistral) need `hf auth login`"
    )
