"""What a paid provider needs: the ids of the jobs it has paid for, on disk, and prices.

A job's id is on disk before anything else happens with the job, so a clip that has a job is never submitted again, even
if the process is killed. Between the service's accepting a job and this process noting its id there is a moment: a job
that is lost there was paid for and is submitted again. That can happen once for each request in flight.

Reading and writing the ledger requires the lock of the evaluation's folder (`predictions.claimed`).
"""

import json
import os
import threading
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.evaluate.predictions import drop_torn_line

PRICES = Path(__file__).parent / "prices.toml"


class Ledger:
    """Job ids by utterance, in a file of JSON lines that only grows; safe among threads of one process."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        self._job_ids: dict[str, str | None] = {}

    def read(self) -> None:
        """Read what is on disk now: another process may have paid for jobs in the meantime."""
        drop_torn_line(self._path)
        lines = self._path.read_text().splitlines() if self._path.is_file() else []
        entries = [json.loads(line) for line in lines]
        self._job_ids = {entry["utterance_id"]: entry["job_id"] for entry in entries}

    def job_id(self, utterance_id: str) -> str | None:
        return self._job_ids.get(utterance_id)

    def note(self, utterance_id: str, job_id: str | None) -> None:
        """Write a job's id; it is on disk when this returns. None forgets a job that failed and was not charged."""
        with self._lock:
            self._job_ids[utterance_id] = job_id
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as stream:
                stream.write(json.dumps({"utterance_id": utterance_id, "job_id": job_id}) + "\n")
                stream.flush()
                os.fsync(stream.fileno())


@dataclass(frozen=True, kw_only=True)
class Quote:
    """What an evaluation will cost, before it starts; `usd` is None for a model without a known price."""

    clips: int
    hours: float
    usd: float | None
    as_of: str  # date of the list price

    def __str__(self) -> str:
        cost = "at an unknown price" if self.usd is None else f"about ${self.usd:.2f} (list price of {self.as_of})"
        return f"{self.clips:,} clips, {self.hours:.2f} h: {cost}"


def model_names(provider: str) -> list[str]:
    """List the models that a provider offers, from `prices.toml`."""
    return list(tomllib.loads(PRICES.read_text())[provider]["models"])


def quote(provider: str, model: str, durations_s: Sequence[float]) -> Quote:
    """Compute a price from `prices.toml`."""
    prices = tomllib.loads(PRICES.read_text())[provider]
    hours = sum(durations_s) / 3600
    per_hour = prices["usd_per_hour"].get(model)
    usd = None if per_hour is None else hours * per_hour
    return Quote(clips=len(durations_s), hours=hours, usd=usd, as_of=prices["as_of"])
