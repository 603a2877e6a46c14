"""What a corpus listed, kept beside the store that will be made of it: 25,000 hours are 10,000 files to ask for.

`--plan` on Friday afternoon and the extraction on Friday evening ask the hub once. Kept until the store has its plan.
Of local Parquet files only what took long is kept, of a folder of recordings nothing: their lengths may change without
its list.
"""

import hashlib
import json
import os
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.corpora.corpus import SCAN_SCHEMA, Corpus
from pipelines.recipes.recipe import Columns

KEEP_LOCAL_FROM_S = 10.0  # listing again what took less is no loss, and `--plan` leaves nothing behind


def scan_once(corpus: Corpus, columns: Columns, split: str, store: Path) -> pa.Table:
    """Scan a split, or read what an earlier scan of the same data found; errors as `Corpus.scan`."""
    provenance = corpus.provenance(split)
    if provenance["kind"] == "folder":
        return corpus.scan(split)
    document = json.dumps([provenance, columns.model_dump()], sort_keys=True)
    path = _folder(store) / f"{_prefix(store)}{hashlib.sha256(document.encode()).hexdigest()[:16]}.parquet"
    try:
        kept = pq.read_table(path)
        if kept.schema.equals(SCAN_SCHEMA):
            return kept
    except (OSError, pa.ArrowException):
        pass
    begun = time.monotonic()
    table = corpus.scan(split)
    if provenance["kind"] == "parquet" and time.monotonic() - begun < KEEP_LOCAL_FROM_S:
        return table
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    pq.write_table(table, temporary)
    temporary.replace(path)
    return table


def forget_scans(store: Path) -> None:
    """Remove what was kept for a store."""
    for path in _folder(store).glob(f"{_prefix(store)}*"):
        path.unlink(missing_ok=True)


def _folder(store: Path) -> Path:
    return store.absolute().parent


def _prefix(store: Path) -> str:
    return f".{store.name}.scan-"
