"""Convert a synthetic Conceptual Captions TSV, and open the result as the trainer does.

    python benchmarks/bench_convert.py [--rows 3300000]

Prints seconds, rows per second and peak memory of `llava convert` (.json, .jsonl, .parquet), the time and
memory of `open_records` on each result, and of the way most people do it: `csv`/`json` with everything in
memory.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TEXT = """a the on in of with and at to man woman person dog cat street beach city night sunset kitchen
red white football player actor attends premiere illustration vector background close up portrait family ’ é 中文"""
WORDS = TEXT.split()

PEER = """
import csv, json, sys
rows = []
with open(sys.argv[1], encoding="utf-8") as file:
    for caption, *_ in csv.reader(file, delimiter="\\t", quoting=csv.QUOTE_NONE):
        image, instruction = f"{len(rows)}.jpg", "Generate a caption of this image:"
        rows.append({"image": image, "instruction": instruction, "response": caption})
json.dump(rows, open(sys.argv[2], "w"))
"""
TIMED = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""
OPEN = """
import pickle, resource, sys, time
start = time.perf_counter()
from llava_simplified.data.records import open_records
import random
imported = time.perf_counter()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
records = open_records(sys.argv[1])
opened = time.perf_counter()
def private():
    return sum(int(line.split()[1]) for line in open("/proc/self/smaps_rollup") if line.startswith("Private"))
for _ in range(20000):
    records[random.randrange(len(records))]
read = time.perf_counter()
print(f"  open {opened - imported:5.1f} s, {(read - opened) / 20000 * 1e6:5.1f} us a random record, "
      f"{private() / 1024:4.0f} MB private memory, pickled {len(pickle.dumps(records)) / 2**20:.0f} MB")
"""


def write_tsv(path: Path, rows: int) -> None:
    """CC3M's form: `caption<TAB>url`, ten words on average, one row in 20,000 strange."""
    rng = random.Random(0)
    captions = [" ".join(rng.choices(WORDS, k=rng.randint(4, 18))) for _ in range(50_000)]
    with path.open("w", encoding="utf-8") as file:
        for index in range(rows):
            odd = ' a "quoted\t word' if index % 20_000 == 7 else ""
            url = f"https://i{index % 977}.example.com/photos/{index:07d}/{index * 2654435761 % 2**32:08x}.jpg"
            file.write(f"{captions[index % 50_000]}{odd}\t{url}\n")


def measured(command: list[str]) -> tuple[float, float]:
    """(seconds, peak resident MB) of a command."""
    start = time.perf_counter()
    out = subprocess.run(
        [sys.executable, "-c", TIMED, *command], check=True, capture_output=True, text=True
    ).stdout
    return time.perf_counter() - start, int(out) / 1024


def main() -> None:
    """Run all of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=3_300_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "train.tsv")
        write_tsv(source, args.rows)
        print(f"{args.rows:,} rows, {source.stat().st_size / 1e6:.0f} MB of TSV")
        convert = [
            sys.executable,
            "-c",
            "from llava_simplified.prepare.convert_command import main; main()",
        ]
        for suffix in (".json", ".jsonl", ".parquet"):
            output = Path(folder, f"records{suffix}")
            seconds, memory = measured(
                [*convert, str(source), "--output", str(output), "--split", "val=0.01"]
            )
            rate = args.rows / seconds
            print(
                f"llava convert -> {suffix:8} {seconds:5.1f} s, {rate:9,.0f} rows/s, {memory:5.0f} MB peak"
            )
            train = output.with_name(f"records_train{suffix}")
            print(
                subprocess.check_output([sys.executable, "-c", OPEN, str(train)], text=True),
                end="",
                flush=True,
            )
        plain = Path(folder, "plain.json")
        seconds, memory = measured([sys.executable, "-c", PEER, str(source), str(plain)])
        rate = args.rows / seconds
        print(
            f"csv + json.dump in memory  {seconds:5.1f} s, {rate:9,.0f} rows/s, {memory:5.0f} MB peak"
        )
        start = time.perf_counter()
        rows = json.loads(plain.read_bytes())
        print(f"  json.load {time.perf_counter() - start:5.1f} s for {len(rows):,} rows")


if __name__ == "__main__":
    main()
