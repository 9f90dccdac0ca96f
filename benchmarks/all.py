"""Run benchmarks, and write what they print to RESULTS.md, with the command that repeats it.

    python benchmarks/all.py [metrics train ...]

The results of the named benchmarks are replaced; those of others stay.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch

HERE = Path(__file__).parent
RESULTS = HERE / "RESULTS.md"
# Name of each section -> the script in this folder that measures it, and its options.
BENCHMARKS = {
    "train": "bench_train.py",
    "train_peers": "bench_train.py --peer llama-factory ms-swift",
    "rewards": "bench_rewards.py",
    "caption": "bench_caption.py",
    "caption_llama_cpp": "bench_caption.py --peer llama.cpp",
    "caption_llama_cpp_large": "bench_caption.py --peer llama.cpp --size 1.7b --images 8 --rounds 1 --requests 8",
    "serve": "bench_serve.py",
    "serve_llama_cpp": "bench_serve.py --peer llama.cpp --sequences 8",
    "scale": "bench_scale.py",
    "download": "bench_download.py",
    "clean": "bench_clean.py",
    "convert": "bench_convert.py",
    "metrics": "bench_metrics.py",
}
# Instructions of x86 CPUs for matrix products, the fastest first, as PyTorch names them.
MATRIX_INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "avx512_f", "avx2")
HEAD = """# Results

Both sides of each comparison are measured in one run, so only their ratio is meaningful. `make bench` repeats all of
them, and the command above a table repeats that table.
"""


def describe_machine() -> str:
    """Return the CPU of this machine, and the versions that affect all benchmarks.

    The instructions for matrix products are named, because they decide how fast bfloat16 is.
    """
    capabilities = torch.cpu.get_capabilities()
    name = capabilities.get("cpu_name") or platform.machine()
    fastest = next((flag for flag in MATRIX_INSTRUCTIONS if capabilities.get(flag)), "")
    return ", ".join(
        [
            f"{os.cpu_count()} cores of {name}{f' ({fastest})' if fastest else ''}",
            f"torch {version('torch')}",
            f"transformers {version('transformers')}",
        ]
    )


def run_benchmark(name: str) -> str:
    """Run one benchmark, print its output as it appears, and return it."""
    script, *options = BENCHMARKS[name].split()
    command = [sys.executable, str(HERE / script), *options]
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8") as run:
        for line in run.stdout or ():
            print(line, end="", flush=True)
            # Leave out the line that DeepSpeed prints when it is imported on a machine without a GPU.
            if "real_accelerator.py" not in line:
                lines.append(line)
    if run.returncode:
        sys.exit(
            f"{script} failed (see above); the results of the benchmarks before it are in {RESULTS.name}"
        )
    return "".join(lines).strip("\n")


def read_sections() -> dict[str, str]:
    """Return the sections of RESULTS.md by benchmark name."""
    if not RESULTS.exists():
        return {}
    text = RESULTS.read_text(encoding="utf-8")
    return dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", text, flags=re.M | re.S))


def write_sections(sections: dict[str, str]) -> None:
    """Write RESULTS.md, in the order of `BENCHMARKS`."""
    text = HEAD + "\n"
    for name in BENCHMARKS:
        if name in sections:
            text += f"## {name}\n{sections[name]}"
    RESULTS.write_text(text, encoding="utf-8")


def main() -> None:
    """Run the benchmarks that the command line names."""
    names = sys.argv[1:] or list(BENCHMARKS)
    unknown = sorted(set(names) - set(BENCHMARKS))
    if unknown:
        sys.exit(f"unknown benchmark {', '.join(unknown)}; known are {', '.join(BENCHMARKS)}")
    machine = describe_machine()
    sections = read_sections()
    for name in names:
        print(f"== {name}", flush=True)
        output = run_benchmark(name)
        command = f"    python benchmarks/{BENCHMARKS[name]}"
        sections[name] = f"\n{command}\n\n{machine}\n\n```\n{output}\n```\n\n"
        write_sections(sections)  # after each, so that a failure keeps what was measured


if __name__ == "__main__":
    main()
