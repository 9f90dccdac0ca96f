"""Convert a synthetic Conceptual Captions TSV, and open the result as the trainer does.

    python benchmarks/bench_convert.py [--rows 3300000]

Prints seconds, rows per second and peak memory of `llava convert` (.json, .jsonl, .parquet), and the time and the
memory of `open_records` on each result. For comparison, prints the cost of the usual way (`csv` and `json.dump`, with
all rows in memory) and the time of `json.load`.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

VOCABULARY = """a the on in of with and at to man woman person dog cat street beach city night sunset kitchen
red white football player actor attends premiere illustration vector background close up portrait family ’ é 中文"""
WORDS = VOCABULARY.split()

USUAL_WAY = """
import csv, json, sys

rows = []
with open(sys.argv[1], encoding="utf-8") as file:
    for caption, *_ in csv.reader(file, delimiter="\\t", quoting=csv.QUOTE_NONE):
        image, instruction = f"{len(rows)}.jpg", "Generate a caption of this image:"
        rows.append({"image": image, "instruction": instruction, "response": caption})
json.dump(rows, open(sys.argv[2], "w"))
"""
# Prints the peak memory of a command, in kB.
MEASURE_MEMORY = """
import resource, subprocess, sys

code = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""
# Opens a file of records, and reads 20,000 random ones. The pickled size is what a data loader worker receives if it is
# spawned instead of forked.
OPEN_RECORDS = """
import pickle, random, sys, time
from llava_simplified.data.records import open_records

start = time.perf_counter()
records = open_records(sys.argv[1])
opened = time.perf_counter()
for _ in range(20000):
    records[random.randrange(len(records))]
read = time.perf_counter()
private = 0
for line in open("/proc/self/smaps_rollup"):
    if line.startswith("Private"):
        private += int(line.split()[1])
print(f"  open {opened - start:5.1f} s, {(read - opened) / 20000 * 1e6:5.1f} us per random record, "
      f"{private / 1024:4.0f} MB private memory, pickled {len(pickle.dumps(records)) / 2**20:.0f} MB")
"""


class Cost(NamedTuple):
    """Seconds and peak memory (MB) of a command."""

    seconds: float
    megabytes: float


def write_tsv(path: Path, rows: int) -> None:
    """Write `caption<TAB>url` lines as in CC3M: eleven words on average, one row in 20,000 malformed."""
    draw = random.Random(0)
    captions = []
    for _ in range(50_000):
        captions.append(" ".join(draw.choices(WORDS, k=draw.randint(4, 18))))
    with path.open("w", encoding="utf-8") as file:
        for index in range(rows):
            malformed = ' a "quoted\t word' if index % 20_000 == 7 else ""
            host = f"i{index % 977}.example.com"
            # A multiplicative hash, so that the names look random, and URLs do not compress too well.
            name = f"{index * 2654435761 % 2**32:08x}.jpg"
            url = f"https://{host}/photos/{index:07d}/{name}"
            file.write(f"{captions[index % len(captions)]}{malformed}\t{url}\n")


def measure(command: Sequence[object]) -> Cost:
    """Run a command, and return its cost. An error of the command ends the benchmark."""
    measured_command = [sys.executable, "-c", MEASURE_MEMORY, *map(str, command)]
    start = time.perf_counter()
    done = subprocess.run(measured_command, check=True, capture_output=True, text=True)
    return Cost(time.perf_counter() - start, int(done.stdout) / 1024)


def describe(cost: Cost, rows: int) -> str:
    """Return a cost as text."""
    rate = rows / cost.seconds
    return f"{cost.seconds:5.1f} s, {rate:9,.0f} rows/s, {cost.megabytes:5.0f} MB peak"


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--rows",
        type=int,
        default=3_300_000,
        help="Number of rows (default: %(default)s, as in CC3M)",
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source = folder / "train.tsv"
        write_tsv(source, args.rows)
        print(f"{args.rows:,} rows, {source.stat().st_size / 1e6:.0f} MB of TSV")
        for suffix in (".json", ".jsonl", ".parquet"):
            output = folder / f"records{suffix}"
            convert = [sys.executable, "-m", "llava_simplified.cli", "convert", source]
            cost = measure([*convert, "--output", output, "--split", "val=0.01"])
            print(f"llava convert -> {suffix:8} {describe(cost, args.rows)}")
            train = folder / f"records_train{suffix}"
            open_command = [sys.executable, "-c", OPEN_RECORDS, str(train)]
            print(subprocess.check_output(open_command, text=True), end="", flush=True)

        plain = folder / "plain.json"
        cost = measure([sys.executable, "-c", USUAL_WAY, source, plain])
        print(f"csv + json.dump in memory  {describe(cost, args.rows)}")
        start = time.perf_counter()
        rows = json.loads(plain.read_bytes())
        print(f"  json.load {time.perf_counter() - start:5.1f} s for {len(rows):,} rows")


if __name__ == "__main__":
    main()
