"""Follow the journals of a download, for the progress line and to stop early if all rows fail in the same way.

The shards are fetched by other processes, possibly on other machines. Their journals grow in the shared work folder, so
no other communication is needed: about once a second the new lines of each journal are read.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from llava_simplified.jobs import Progress
from llava_simplified.prepare.download_shard import matches_kind

# Stop the run if this many rows have failed in the same way, and none has succeeded.
FAIL_FAST_AFTER = 500
# Kind of failure -> advice for a run in which most rows failed in this way.
FAILURE_ADVICE = {
    "dns": "No host name could be resolved. Check the network and its DNS server.",
    "connect": "No connection could be made. Check the firewall. `llava download` ignores HTTPS_PROXY.",
    "refused": "Every connection was refused. If this is your own mirror, check that it is running, and check the port.",
    "timeout": "No server answered in time. Check the firewall; otherwise pass a longer --timeout or a lower --concurrency.",
    "tls": "No certificate could be verified. Check the clock. If a proxy replaces them, set SSL_CERT_FILE to its certificate.",
    "blocked_address": "All addresses are private. If this is your own mirror, pass --allow-private.",
    "http_403": "The servers deny access. Pass --user-agent-contact with your URL or email address, and a lower --concurrency.",
    "http_407": "A proxy requires credentials, which `llava download` cannot send. Use a network without this proxy.",
    "scheme": "These are not http or https URLs. Check --url-column, and run the download again with a new --output.",
    "bad_url": "These are not URLs. Check --url-column, and run the download again with a new --output.",
}
# For these kinds, --retry would not help: it would fetch the same wrong URLs, which are stored in the output.
NOT_RETRIABLE = ("scheme", "bad_url")


def failure_advice(kind: str, otherwise: str) -> str:
    """Return what to do if most rows failed in this way.

    Args:
        kind: The kind of failure.
        otherwise: The advice for kinds without an entry in `FAILURE_ADVICE`.
    """
    advice = FAILURE_ADVICE.get(kind, otherwise)
    if kind in NOT_RETRIABLE:
        return advice
    # Without --retry, a run skips the rows that have failed already.
    return f"{advice} Then run the command again with --retry {kind}"


class DownloadProgress:
    """The outcomes of all rows so far, and the progress line.

    Args:
        work: The work folder with the journals.
        numbers: The shards of this run; other journals belong to other jobs.
        finished_before: The shards that were finished before this run.
        rows: Number of rows of the download; 0 if only a slice is fetched.
        enabled: Show the progress line.
        retry: Kinds of failures that are fetched again.
    """

    def __init__(
        self,
        work: Path,
        numbers: range,
        finished_before: set[int],
        rows: int,
        enabled: bool,
        retry: tuple[str, ...] = (),
    ) -> None:
        self._work = work
        self._retry = retry
        self._numbers = numbers
        self._finished_before = finished_before
        self._positions: Counter[Path] = Counter()  # number of bytes of each journal that were read
        self._outcomes: dict[int, Counter[str]] = {}  # shard -> its outcomes
        self._before: Counter[str] = Counter()  # outcomes of earlier runs
        self._read_journals()
        self._before = self.total()
        self.progress = Progress(rows, "rows", self._before.total(), enabled)

    def _read_journals(self) -> None:
        """Count the outcomes that were appended to the journals since the last call."""
        for path in self._work.glob("*.journal"):
            number = int(path.stem)
            if number not in self._numbers:
                continue
            try:
                with path.open("rb") as stream:
                    stream.seek(self._positions[path])
                    data = stream.read()
            except FileNotFoundError:  # the shard has just been finished, and its journal deleted
                continue
            # Journals only grow, so continue at the end of the last read. Leave an incomplete last line
            # for the next time.
            complete = data[: data.rfind(b"\n") + 1]
            self._positions[path] += len(complete)
            outcomes = self._outcomes.setdefault(number, Counter())
            for line in complete.splitlines():
                row = json.loads(line)
                if row["index"] < 0:
                    continue
                outcome = row["error"] or "ok"
                outcomes[outcome] += 1
                # The journal of a finished shard that is fetched again begins with the rows of the earlier run.
                if row.get("kept"):
                    self._before[outcome] += 1

    def tick(self) -> None:
        """Read the new lines of the journals, and update the progress line.

        Raises:
            ValueError: The first `FAIL_FAST_AFTER` rows of this run have all failed in the same way.
        """
        self._read_journals()
        self._check_first_rows()
        self._update()

    def _check_first_rows(self) -> None:
        """Raise ValueError if all of the first rows have failed in the same way."""
        in_this_run = self.total() - self._before
        if len(in_this_run) != 1 or in_this_run.total() < FAIL_FAST_AFTER or "ok" in in_this_run:
            return
        ((kind, count),) = in_this_run.items()
        # Most rows that are fetched again fail as they did before. That means nothing if earlier runs have fetched images.
        if self._before["ok"] and matches_kind(kind, self._retry):
            return
        advice = failure_advice(
            kind, "Look up the details of each row in the journals of the work folder."
        )
        raise ValueError(f"Stopped: the first {count} rows all failed with '{kind}'. {advice}")

    def finish_shard(self, number: int, outcomes: dict[str, int]) -> None:
        """Replace the outcomes from the journal of a shard with the final ones."""
        has_journal = number in self._outcomes
        self._outcomes[number] = Counter(outcomes)
        # If a shard that was finished before this run has no journal, `_before` does not contain its rows yet.
        if number in self._finished_before and not has_journal:
            self._before += self._outcomes[number]
        self._update()

    def total(self) -> Counter[str]:
        """Return the number of rows by outcome, including those of earlier runs."""
        return sum(self._outcomes.values(), Counter())

    def _update(self) -> None:
        self.progress.initial = self._before.total()
        total = self.total()
        done = total.total()
        details = f"{total['ok']:,} ok, {done - total['ok']:,} failed"
        self.progress.update(done, details)
