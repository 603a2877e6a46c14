"""Target token ids: the transcripts of a split, tokenized once and kept with the store.

    <store>/derived/token-ids-<key>.npz

The key is a digest of everything the ids depend on, so a store that has grown or another tokenizer finds no file and
computes its own. A missing or damaged file is computed again; the folder may be deleted at any time. Processes that
start together may both do the work: they write the same bytes, each atomically.
"""

import contextlib
import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache import FeatureReader
from cache.commits import root_digest
from cache.files import canonical_json
from pipelines.files import replacing
from tinyaudio.model.prompt import many_transcript_ids

TOKENIZED_AT_ONCE = 16_384  # transcripts in one call; a Python number takes 36 bytes where the array takes 4


@dataclass(frozen=True, kw_only=True)
class Targets:
    """Token ids of all transcripts, flat: utterance i is ids[offsets[i]:offsets[i + 1]], end-of-text included."""

    ids: NDArray[np.int32]
    offsets: NDArray[np.int64]

    def __getitem__(self, position: int) -> NDArray[np.int32]:
        return self.ids[self.offsets[position] : self.offsets[position + 1]]

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.offsets)


def tokenize(tokenizer: Any, transcripts: Sequence[str]) -> Targets:
    """Tokenize transcripts as `prompt.transcript_ids` does, on all threads."""
    ids, lengths = [np.zeros(0, np.int32)], [np.zeros(1, np.int64)]
    with _tokenizer_threads():
        for first in range(0, len(transcripts), TOKENIZED_AT_ONCE):
            rows = many_transcript_ids(tokenizer, transcripts[first : first + TOKENIZED_AT_ONCE])
            ids.append(np.concatenate([np.asarray(row, np.int32) for row in rows]))
            lengths.append(np.asarray([len(row) for row in rows], np.int64))
    return Targets(ids=np.concatenate(ids), offsets=np.cumsum(np.concatenate(lengths)))


@contextlib.contextmanager
def _tokenizer_threads() -> Iterator[None]:
    """Let the Rust tokenizer use its threads, then restore the setting: forking later is safe only without them."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        yield
    finally:
        del os.environ["TOKENIZERS_PARALLELISM"]
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def stored_targets(reader: FeatureReader, tokenizer: Any, say: Callable[[str], None] = print) -> Targets:
    """Return the targets of a reader's split: read from the store's folder, or computed and kept there.

    Args:
        say: receives a line when they are computed, and a warning when they cannot be kept.
    """
    store = reader.store
    if store.is_sealed:
        content = json.loads(store.layout.sealed.read_bytes())["root"]
    else:
        content = root_digest(store.commit(shard) for shard in store.committed_shards())
    tokenizer_state = f"{tokenizer.backend_tokenizer.to_str()}\n{tokenizer.eos_token_id}"
    depends_on = {
        "content": content,
        "split": reader.split,
        "tokenizer": hashlib.sha256(tokenizer_state.encode()).hexdigest(),
        "targets": 2,  # 1 parsed special tokens in transcripts
    }
    key = hashlib.sha256(canonical_json(depends_on)).hexdigest()[:24]
    path = store.path / "derived" / f"token-ids-{key}.npz"
    try:
        with np.load(path) as kept:  # the CRC of each array is checked
            return Targets(ids=kept["ids"], offsets=kept["offsets"])
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        damaged = "; the stored token ids are damaged" if path.exists() else ""
    say(f"tokenizing the {reader.split or 'stored'} transcripts of {store.path}{damaged}")
    targets = tokenize(tokenizer, reader.column("transcript").to_pylist())
    try:
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, ids=targets.ids, offsets=targets.offsets)
    except OSError as error:
        say(f"warning: cannot keep token ids in {path.parent} ({error.strerror}); every start will compute them again")
    return targets
