"""Run every benchmark and write what it prints to RESULTS.md, beside the command that repeats it.

    python benchmarks/all.py [metrics train ...]

Those that are named anew replace what the file said of them; the others stay.
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
ALL = ("train", "caption", "serve", "scale", "download", "clean", "convert", "metrics")
HEAD = """# Results

Each figure has both sides measured in one run; what counts is the ratio. `make bench` repeats all, the command over a
table that table alone.
"""


def main() -> None:
    names = sys.argv[1:] or list(ALL)
    if unknown := set(names) - set(ALL):
        sys.exit(f"no benchmark {', '.join(sorted(unknown))}: there are {', '.join(ALL)}")
    text = RESULTS.read_text(encoding="utf-8") if RESULTS.exists() else ""
    tables = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", text, flags=re.M | re.S))
    where = (
        f"{os.cpu_count()} cores, torch {version('torch')}, transformers {version('transformers')}"
    )
    for name in names:
        print(f"== {name}", flush=True)
        command = [sys.executable, str(HERE / f"bench_{name}.py")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8") as run:
            lines = []
            for line in run.stdout or ():
                print(line, end="", flush=True)
                if (
                    "real_accelerator.py" not in line
                ):  # deepspeed says on import that there is no GPU
                    lines.append(line)
        if run.returncode:
            sys.exit(f"bench_{name}.py failed; {RESULTS.name} keeps what was measured before it")
        shown = "".join(lines).strip("\n")
        tables[name] = (
            f"\n    python benchmarks/bench_{name}.py\n\n{where}\n\n```\n{shown}\n```\n\n"
        )
        RESULTS.write_text(
            HEAD + "\n" + "".join(f"## {n}\n{tables[n]}" for n in ALL if n in tables),
            encoding="utf-8",
        )


if __name__ == "__main__":
    main()
