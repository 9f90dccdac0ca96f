"""Run benchmarks, and write what they print to RESULTS.md, with the command that repeats it.

    python benchmarks/all.py [metrics train ...]

The results of the named benchmarks are replaced; those of others stay.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "RESULTS.md"
# Name of each section -> the script in this folder that measures it, and its options.
BENCHMARKS = {
    "train": "bench_train.py",
    "train_peers": "bench_train.py --peer llama-factory ms-swift",
    "rewards": "bench_rewards.py",
    "caption": "bench_caption.py",
    "serve": "bench_serve.py",
    "scale": "bench_scale.py",
    "download": "bench_download.py",
    "clean": "bench_clean.py",
    "convert": "bench_convert.py",
    "metrics": "bench_metrics.py",
}
HEAD = """# Results

Both sides of each comparison are measured in one run, so only their ratio is meaningful. `make bench` repeats all of
them, and the command above a table repeats that table.
"""


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
    machine = (
        f"{os.cpu_count()} cores, torch {version('torch')}, transformers {version('transformers')}"
    )
    sections = read_sections()
    for name in names:
        print(f"== {name}", flush=True)
        output = run_benchmark(name)
        command = f"    python benchmarks/{BENCHMARKS[name]}"
        sections[name] = f"\n{command}\n\n{machine}\n\n```\n{output}\n```\n\n"
        write_sections(sections)  # after each, so that a failure keeps what was measured


if __name__ == "__main__":
    main()
