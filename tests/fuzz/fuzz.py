"""Fuzz the functions that read untrusted files and responses: `make fuzz`, or

    python tests/fuzz/fuzz.py TARGET [-max_total_time=600] [FOLDER | FILE]

FOLDER stores interesting inputs for later runs; FILE is the input of a crash to repeat. Fuzzing is guided by coverage
(atheris), and starts from the known inputs of `targets.py`. After a crash is fixed, its input is kept in
`corpus/TARGET/`. The other options are those of libFuzzer.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import aiohttp  # noqa: F401
import atheris
import peft  # noqa: F401
import transformers  # noqa: F401

# The libraries above are not instrumented: they are large, so it would take minutes.
with atheris.instrument_imports(include=["PIL", "tarfile", "llava_simplified"]):
    import targets

if __name__ == "__main__":
    name, *options = sys.argv[1:]
    corpus = Path(tempfile.mkdtemp(prefix=f"corpus-{name}-"))
    for number, seed in enumerate(targets.seeds(name)):
        (corpus / f"seed{number}").write_bytes(seed)
    repeats_crash = any(Path(option).is_file() for option in options)
    limits = ["-rss_limit_mb=3000", "-timeout=20", "-max_len=8192", "-print_final_stats=1"]
    folders = [] if repeats_crash else [str(corpus)]
    atheris.Setup([sys.argv[0], *limits, *options, *folders], targets.TARGETS[name])
    atheris.Fuzz()
