"""Bytes that nobody meant, at the doors where strangers' files come in: `make fuzz`, or

    python tests/fuzz/fuzz.py TARGET [-max_total_time=600] [a folder for what it learns, or a crash's file]

Coverage-guided (atheris), from the known inputs of `targets.py` as seeds. What is found is fixed, and its file kept in
`corpus/TARGET/`. Options are libFuzzer's.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import aiohttp  # noqa: F401
import atheris
import peft  # noqa: F401
import transformers  # noqa: F401

# Not the libraries above: they are large, and instrumenting them takes minutes.
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
