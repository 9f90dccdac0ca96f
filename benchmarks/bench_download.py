"""Download 6,000 URLs with mixed faults from a server on this machine, with three programs.

    python benchmarks/bench_download.py [--count 6000] [--only http,https,resize] [--rounds 2] [--no-tutorial]

The programs run alternately. For each program, prints the responses per second, the CPU time per response, the peak
memory of all its processes (proportional set size: shared pages count once), and the number of URLs whose outcome
is not the one that the server has caused. img2dataset is installed into a separate virtual environment
(`--peer-venv`, created if it is missing). All programs have the same timeout and no retries; `llava download` and
img2dataset write shards.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import loopback
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from peer_environment import create_peer_python, peer_cache

HERE = Path(__file__).parent
TIMEOUT = 5  # seconds for each URL, for all programs
LATENCY = 0.1  # seconds between a request and the response of the server
OURS, IMG2DATASET, TUTORIAL = "llava download", "img2dataset", "process pool + requests"
OUTPUT = "OUT"  # stands for the output folder in a command
Job = tuple[str, str, int]  # URL, kind of response (see `loopback.EXPECTED`), number of the image


class Cost(NamedTuple):
    """Wall-clock seconds of a command, and CPU seconds and peak memory (MB) of all its processes."""

    seconds: float
    cpu: float
    megabytes: float


# ---- measuring ----


def measure(command: Sequence[str], environment: dict[str, str]) -> Cost:
    """Run a command, and return its cost. An error of the command ends the benchmark."""
    # The CPU time of child processes is only available as a sum over all of them, so subtract the sum from before this command.
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    # A thread reads the output, so that a full pipe does not block the command.
    output: list[str] = []
    reader = threading.Thread(target=lambda: output.extend(process.stdout or ()), daemon=True)
    reader.start()
    root = psutil.Process(process.pid)
    peak = 0
    while process.poll() is None:
        # Measuring the memory takes CPU time itself, so do it only four times a second.
        peak = max(peak, proportional_set_size(root))
        time.sleep(0.25)
    seconds = time.perf_counter() - start
    reader.join(2)
    if process.returncode:
        raise SystemExit("".join(output[-40:]))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(seconds, cpu, peak / 2**20)


def proportional_set_size(root: psutil.Process) -> int:
    """Return the memory of a process and its descendants in bytes. Pages that they share are counted once."""
    try:
        processes = [root, *root.children(recursive=True)]
    except psutil.Error:  # the process has just ended
        return 0
    memory = 0
    for process in processes:
        try:
            memory += process.memory_full_info().pss
        except psutil.Error:  # this child has just ended
            continue
    return memory


# ---- outcomes ----


def check_ours(output: Path, jobs: Sequence[Job], *, exact: bool) -> str:
    """Compare our manifest with the outcomes that the server has caused, and return the counts as text.

    Args:
        output: Output folder of `llava download`.
        jobs: The requested URLs.
        exact: Also compare the bytes of the images, which are unchanged if they were not resized.
    """
    rows = pq.read_table(output / "manifest.parquet").to_pylist()
    wrong: Counter[str] = Counter()
    for (url, kind, number), row in zip(jobs, rows):
        assert row["url"] == url
        outcome, digest = loopback.expected(kind, number)
        other_bytes = exact and bool(digest) and digest != row["sha256"]
        if (row["error"] or "ok") != outcome or other_bytes:
            wrong[f"{kind} -> {row['error']}"] += 1
    kept = sum(row["status"] == "ok" for row in rows)
    return describe_outcomes(kept, len(rows), len(jobs), wrong)


def check_img2dataset(output: Path, jobs: Sequence[Job]) -> str:
    """Count the images that img2dataset has lost, and the bad responses that it has kept; return the counts as text.

    Its reasons for failures are not compared, because it has other names for them.
    """
    wrong: Counter[str] = Counter()
    kept = total = 0
    for path in sorted(output.glob("*.parquet")):
        for row in pq.read_table(path).to_pylist():
            _, kind, _ = jobs[row["row"]]
            is_good = loopback.EXPECTED[kind] == "ok"
            is_kept = row["status"] == "success"
            total += 1
            kept += is_kept
            if is_good != is_kept:
                wrong[f"{kind} {'lost' if is_good else 'kept'}"] += 1
    return describe_outcomes(kept, total, len(jobs), wrong)


def describe_outcomes(kept: int, outcomes: int, rows: int, wrong: Counter[str]) -> str:
    """Return the counts of outcomes as text."""
    details = f" {dict(wrong)}" if wrong else ""
    return f"{kept} kept, {outcomes} outcomes of {rows} rows, {sum(wrong.values())} wrong{details}"


# ---- commands ----


def make_commands(
    args: argparse.Namespace, case: str, peer: Path, tsv: Path, table: Path, count: int
) -> dict[str, list[str]]:
    """Return the command of each program, with `OUTPUT` for its output folder."""
    side = "256" if case == "resize" else "0"  # length of a side in pixels; 0 does not resize
    # Both programs download two shards at a time, so write two. A shard is finished only when its hanging URLs have
    # timed out, so with more shards, the programs would wait for several timeouts.
    shard_size = str(count // 2)
    ours = [sys.executable, "-m", "llava_simplified.cli", "download", str(tsv)]
    ours += ["--output", OUTPUT, "--timeout", str(TIMEOUT), "--retries", "0", "--allow-private"]
    ours += ["--shard-size", shard_size, "--resize", side, "--concurrency", args.concurrency]
    commands = {OURS: ours}
    for threads in args.threads.split(","):
        command = [str(peer), str(HERE / "peer_img2dataset.py"), str(table), OUTPUT]
        command += [threads, side, shard_size, str(TIMEOUT)]
        commands[f"{IMG2DATASET}, 2x{threads}"] = command
    if args.tutorial and case == "http":
        command = [sys.executable, str(HERE / "peer_requests.py"), str(tsv), OUTPUT, str(TIMEOUT)]
        commands[TUTORIAL] = command
    return commands


def write_urls(jobs: Sequence[Job], tsv: Path, table: Path) -> None:
    """Write the URLs as each program reads them: TSV, and Parquet for img2dataset."""
    lines = []
    columns: dict[str, list[object]] = {"url": [], "caption": [], "row": []}
    for url, _, number in jobs:
        caption = f"caption {number}"
        lines.append(f"{caption}\t{url}\n")
        columns["url"].append(url)
        columns["caption"].append(caption)
        columns["row"].append(len(columns["row"]))
    tsv.write_text("".join(lines))
    pq.write_table(pa.table(columns), table)


def run_case(case: str, args: argparse.Namespace, peer: Path, folder: Path) -> None:
    """Run every program in one case ("http", "resize" or "https"), and print the fastest run of each."""
    count = args.count
    environment = dict(os.environ)
    certificates = None
    if case == "https":
        count = min(count, 3000)  # img2dataset downloads only 50 https URLs per second
        certificates = folder
        environment["SSL_CERT_FILE"] = str(loopback.trust_store(folder))
    scheme = "https" if certificates else "http"
    best: dict[str, Cost] = {}
    outcomes: dict[str, str] = {}
    with loopback.running(LATENCY, certificates) as port:
        jobs = loopback.urls(count, port, scheme)
        tsv, table = folder / "urls.tsv", folder / "urls.parquet"
        write_urls(jobs, tsv, table)
        commands = make_commands(args, case, peer, tsv, table, count)
        output = folder / "out"
        for round_number in range(args.rounds):
            for name, command in commands.items():
                if name == TUTORIAL and round_number > 0:
                    continue  # a run takes minutes, and one is enough to see the difference
                shutil.rmtree(output, ignore_errors=True)
                arguments = [str(output) if part == OUTPUT else part for part in command]
                cost = measure(arguments, environment)
                best[name] = min(best.get(name, cost), cost)
                if name == OURS:
                    outcomes[name] = check_ours(output, jobs, exact=case != "resize")
                elif name.startswith(IMG2DATASET):
                    outcomes[name] = check_img2dataset(output, jobs)
    print(f"\n{case}: {count} URLs, 100 ms latency, {os.cpu_count()} cores, best of {args.rounds}")
    print_table(best, outcomes, count)


def print_table(best: dict[str, Cost], outcomes: dict[str, str], count: int) -> None:
    """Print the cost of each program, and compare ours with the fastest setting of img2dataset."""
    for name, cost in best.items():
        print(
            f"  {name:24} {count / cost.seconds:7,.0f} responses/s, "
            f"{cost.cpu / count * 1000:6.2f} ms CPU each, {cost.megabytes:6.0f} MB; "
            f"{outcomes.get(name, '')}"
        )
    ours = best[OURS]
    peers = [name for name in best if name.startswith(IMG2DATASET)]
    fastest = min(peers, key=best.__getitem__)
    peer = best[fastest]
    ratios = {
        "speed": round(peer.seconds / ours.seconds, 2),
        "cpu": round(ours.cpu / peer.cpu, 2),
        "memory": round(ours.megabytes / peer.megabytes, 2),
    }
    print(f"  against {fastest}: {json.dumps(ratios)}", flush=True)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=6000, help="Number of URLs")
    parser.add_argument(
        "--rounds", type=int, default=2, help="Runs of each program; the fastest is reported"
    )
    parser.add_argument(
        "--only",
        default="http,resize,https",
        help="Cases to run, separated by commas (default: %(default)s)",
    )
    parser.add_argument(
        "--threads",
        default="128,256",
        help="Numbers of threads of img2dataset to try, separated by commas; the fastest is compared with ours "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--concurrency",
        default="256",
        help="--concurrency of `llava download`, which applies to each of its two shards in flight "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--tutorial",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Also run the tutorial's downloader (only in the case http)",
    )
    parser.add_argument(
        "--peer-venv",
        type=Path,
        default=peer_cache() / "img2dataset",
        help="Virtual environment of img2dataset, created if it is missing",
    )
    args = parser.parse_args()
    peer = create_peer_python(args.peer_venv, ["img2dataset==1.47.0"])
    for case in args.only.split(","):
        with tempfile.TemporaryDirectory() as folder:
            run_case(case, args, peer, Path(folder))


if __name__ == "__main__":
    main()
