"""Fetch 6,000 URLs with mixed faults from a server on this machine: three programs.

    python benchmarks/bench_download.py [--count 6000] [--only http,https,resize] [--rounds 2] [--no-tutorial]

Interleaved runs; for each the wall time, the CPU time a response, the peak memory of all its processes
(proportional set size, shared pages counted once) and, URL by URL, whether the outcome is the one the
server knows. img2dataset goes into a virtual environment of its own (`--peer-venv`, made when missing).
Both get the same timeout, no retries, shards.
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
import venv
from collections import Counter
from pathlib import Path

import loopback
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

TIMEOUT = 5


def measured(command: list[str], environment: dict[str, str]) -> tuple[float, float, float]:
    """(seconds, CPU seconds, peak MB of proportional set size) of a command and all its children."""
    start = time.perf_counter()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, env=environment, **pipes)
    output: list[str] = []
    reader = threading.Thread(target=lambda: output.extend(process.stdout or ()), daemon=True)
    reader.start()
    before, peak, root = (
        resource.getrusage(resource.RUSAGE_CHILDREN),
        0.0,
        psutil.Process(process.pid),
    )
    while process.poll() is None:
        memory = 0
        for one in [root, *_children(root)]:
            try:
                memory += one.memory_full_info().pss
            except psutil.Error:
                continue
        peak = max(peak, memory / 2**20)
        time.sleep(0.25)
    seconds = time.perf_counter() - start
    reader.join(2)
    if process.returncode:
        raise SystemExit("".join(output[-40:]))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, peak


def _children(root: psutil.Process) -> list[psutil.Process]:
    try:
        return root.children(recursive=True)
    except psutil.Error:
        return []


def check_ours(output: Path, jobs: list[tuple[str, str, int]], exact: bool) -> str:
    """Outcomes against what the server knows."""
    rows = pq.read_table(output / "manifest.parquet").to_pylist()
    wrong: Counter[str] = Counter()
    for (url, kind, number), row in zip(jobs, rows):
        outcome, digest = loopback.expected(kind, number)
        assert row["url"] == url
        if (row["error"] or "ok") != outcome or (exact and digest and digest != row["sha256"]):
            wrong[f"{kind} -> {row['error']}"] += 1
    kept = sum(row["status"] == "ok" for row in rows)
    return f"{kept} kept, {len(rows)} outcomes of {len(jobs)} rows, {sum(wrong.values())} wrong {dict(wrong) or ''}"


def check_peer(output: Path, jobs: list[tuple[str, str, int]]) -> str:
    """What img2dataset kept that is no picture, and what it lost."""
    wrong: Counter[str] = Counter()
    kept = total = 0
    for path in sorted(output.glob("*.parquet")):
        for row in pq.read_table(path).to_pylist():
            kind = jobs[row["row"]][1]
            good = loopback.EXPECTED[kind] == "ok"
            kept, total = kept + (row["status"] == "success"), total + 1
            if good != (row["status"] == "success"):
                wrong[f"{kind} {'lost' if good else 'kept'}"] += 1
    return f"{kept} kept, {total} outcomes of {len(jobs)} rows, {sum(wrong.values())} wrong {dict(wrong) or ''}"


def peer_python(folder: Path) -> Path:
    """The Python of img2dataset's own virtual environment."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "img2dataset==1.47.0"], check=True)
    return python


def main() -> None:
    """Run what was asked for, print ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llava_simplified"
    parser.add_argument("--count", type=int, default=6000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", default="http,resize,https")
    parser.add_argument(
        "--threads", default="128,256", help="img2dataset's settings to try; the best one counts"
    )
    parser.add_argument(
        "--concurrency", default="256", help="ours, for each of the two shards under way"
    )
    parser.add_argument(
        "--tutorial",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="http the tutorial's way too",
    )
    parser.add_argument("--peer-venv", type=Path, default=cache / "img2dataset")
    args = parser.parse_args()
    peer = peer_python(args.peer_venv)
    for case in args.only.split(","):
        with tempfile.TemporaryDirectory() as name:
            run_case(case, args, peer, Path(name))


def run_case(case: str, args: argparse.Namespace, peer: Path, folder: Path) -> None:
    """One of http, resize, https: every program in turn, the best round of each."""
    count = (
        args.count if case != "https" else min(args.count, 3000)
    )  # of which img2dataset does 50 a second
    environment, tls = dict(os.environ), folder if case == "https" else None
    if tls:
        environment["SSL_CERT_FILE"] = str(loopback.trust_store(folder))
    best: dict[str, tuple[float, float, float]] = {}
    notes: dict[str, str] = {}
    with loopback.running(0.1, tls) as port:
        jobs = loopback.urls(count, port, "https" if tls else "http")
        tsv, table = folder / "urls.tsv", folder / "urls.parquet"
        tsv.write_text("".join(f"caption {number}\t{url}\n" for url, _, number in jobs))
        columns = {
            "url": [url for url, _, _ in jobs],
            "caption": [f"caption {n}" for _, _, n in jobs],
        }
        pq.write_table(pa.table({**columns, "row": list(range(count))}), table)
        side = "256" if case == "resize" else "0"
        half = str(
            count // 2
        )  # one shard for each of two processes, theirs and ours: it waits for hangs once
        for turn in range(args.rounds):
            runs: dict[str, list[str]] = {}
            ours = [
                str(tsv),
                "--output",
                "OUT",
                "--timeout",
                str(TIMEOUT),
                "--retries",
                "0",
                "--allow-private",
            ]
            ours += ["--shard-size", half, "--resize", side, "--concurrency", args.concurrency]
            runs["llava download"] = [
                sys.executable,
                "-m",
                "llava_simplified.cli",
                "download",
                *ours,
            ]
            here = Path(__file__).parent
            for threads in args.threads.split(","):
                command = [str(peer), str(here / "peer_img2dataset.py"), str(table), "OUT"]
                command += [threads, side, half]
                runs[f"img2dataset, 2x{threads}"] = [*command, str(TIMEOUT)]
            if args.tutorial and case == "http" and not turn:
                command = [
                    sys.executable,
                    str(here / "peer_requests.py"),
                    str(tsv),
                    "OUT",
                    str(TIMEOUT),
                ]
                runs["process pool + requests"] = command
            for label, command in runs.items():
                output = folder / "out"
                shutil.rmtree(output, ignore_errors=True)
                result = measured(
                    [str(output) if part == "OUT" else part for part in command], environment
                )
                if label not in best or result < best[label]:
                    best[label] = result
                if label == "llava download":
                    notes[label] = check_ours(output, jobs, case != "resize")
                elif label.startswith("img2dataset"):
                    notes[label] = check_peer(output, jobs)
    print(f"\n{case}: {count} URLs, 100 ms latency, {os.cpu_count()} cores, best of {args.rounds}")
    for label, (seconds, cpu, peak) in best.items():
        rate = f"{count / seconds:7,.0f} responses/s, {cpu / count * 1000:6.2f} ms CPU each, {peak:6.0f} MB"
        print(f"  {label:24} {rate}; {notes.get(label, '')}")
    mine = best["llava download"]
    label, other = min(
        ((k, v) for k, v in best.items() if k.startswith("img2")), key=lambda item: item[1]
    )
    ratios = {"speed": other[0] / mine[0], "cpu": mine[1] / other[1], "memory": mine[2] / other[2]}
    print(
        f"  against {label}: "
        + json.dumps({key: round(value, 2) for key, value in ratios.items()}),
        flush=True,
    )


if __name__ == "__main__":
    main()
