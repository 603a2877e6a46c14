"""Small feature stores for the tests of `cache`."""

from collections.abc import Iterable, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cache import Calibration, FeatureStore, Moments, make_plan, store_repair

Features = dict[str, NDArray[np.float32]]


def make_features(lengths: Sequence[int], dim: int = 8, seed: int = 0) -> Features:
    """Draw frames for utterances u0, u1, ... with loud and quiet dimensions, like those of trained encoders."""
    rng = np.random.default_rng(seed)
    loudness = np.exp(rng.normal(0, 1, dim)).astype(np.float32)
    return {
        f"u{i}": (rng.standard_normal((length, dim)) * loudness).astype(np.float32) for i, length in enumerate(lengths)
    }


def make_table(features: Mapping[str, Sized], splits: Sequence[str] | None = None) -> pa.Table:
    """Make the table of a plan; for lengths alone, `range(length)` is as good as frames."""
    return pa.table(
        {
            "utterance_id": pa.array(features.keys(), pa.string()),
            "split": pa.array(splits or ["train"] * len(features), pa.string()),
            "source_id": pa.array([f"file/{i}" for i in range(len(features))], pa.string()),
            "num_frames": pa.array([len(frames) for frames in features.values()], pa.int32()),
        }
    )


def calibrate(features: Features, dim: int) -> Calibration:
    moments = Moments(dim)
    for frames in features.values():
        moments.update(frames)
    return moments.calibration()


def create(
    path: Path,
    features: Features,
    *,
    dim: int = 8,
    rows_per_shard: int = 64,
    splits: Sequence[str] | None = None,
    **options: Any,
) -> FeatureStore:
    """Make an empty store for these utterances."""
    options = {"fingerprint": {"encoder": {"id": "tiny", "layer": 3}}, "encoding": "float16"} | options
    if options["encoding"] != "float16":
        options.setdefault("calibration", calibrate(features, dim))
    plan = make_plan(make_table(features, splits), rows_per_shard=rows_per_shard)
    return FeatureStore.create(path, plan=plan, dim=dim, rows_per_shard=rows_per_shard, **options)


def fill(store: FeatureStore, features: Features, shards: Iterable[int] | None = None) -> None:
    """Write the pending shards, or these."""
    for shard in store.pending_shards() if shards is None else shards:
        writer = store.write_shard(shard)
        assert writer is not None
        with writer:
            for utterance_id in store.plan(shard)["utterance_id"].to_pylist():
                frames = features[utterance_id]
                writer.append(
                    utterance_id,
                    frames,
                    num_samples=320 * len(frames) + 80,
                    duration_s=len(frames) / 50,
                    transcript=f"words of {utterance_id}",
                    speaker="s1",
                )


def sealed(path: Path, features: Features, **options: Any) -> FeatureStore:
    """Make a finished store of these utterances."""
    store = create(path, features, **options)
    fill(store, features)
    store.seal()
    return store


def flip(path: Path, byte: int) -> None:
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes())
    content[byte] ^= 1
    path.write_bytes(content)


def make_again(store: FeatureStore, features: Features) -> list[int]:
    """Do what `tinyaudio extract` does when it is run again; returns the shards that it made."""
    options = {"encoding": store.encoding}
    again = create(store.path, features, **options)
    store_repair(again)
    pending = again.pending_shards()
    fill(again, features)
    again.seal()
    return pending
