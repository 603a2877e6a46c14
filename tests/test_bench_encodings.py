"""The price of a smaller store: the error is measured per dimension, and the table says what was not measured."""

from pathlib import Path

import numpy as np
import pytest
from cache_stores import make_features, sealed

from pipelines.bench.encodings import _bytes_per_frame, format_table, snr_db


def test_the_error_is_that_of_each_dimension_and_a_loud_one_does_not_hide_a_quiet_one() -> None:
    rng = np.random.default_rng(0)
    reference = rng.normal(size=(20_000, 3)).astype(np.float32) * np.float32([1, 1, 1_000]) + np.float32(50)
    noise = rng.normal(size=reference.shape).astype(np.float32) * np.float32([0.1, 0.01, 1.0])
    median, worst = snr_db(reference, reference + noise)
    assert worst == pytest.approx(20.0, abs=0.2)  # 1 to 0.1
    assert median == pytest.approx(40.0, abs=0.2)  # 1 to 0.01; the loud dimension is at 60


def test_nothing_lost_is_not_a_number() -> None:
    reference = np.ones((4, 2), dtype=np.float32)
    assert snr_db(reference, reference) == (None, None)


def test_bytes_per_frame_are_those_of_the_frames_that_are_stored(tmp_path: Path) -> None:
    features = make_features([500, 300], dim=64)
    store = sealed(tmp_path / "store", features, dim=64, rows_per_shard=4096)  # most of the shard is not in the file
    size = store.layout.array("features", 0).stat().st_size
    assert _bytes_per_frame(store.path) == size / 800
    assert size / 800 < 1.4 * 128


def test_the_table_says_who_is_better_and_leaves_out_what_was_not_trained() -> None:
    trained = {"test": [0.02, 0.03, 0.04], "test_unseen": [0.03, 0.03, 0.03]}
    rows = [
        {"encoding": "float16", "bytes_per_frame": 256.0, "snr_db": 70.0, "worst_snr_db": 65.0, "wers": trained},
        {"encoding": "bfloat16", "bytes_per_frame": 256.0, "snr_db": None, "worst_snr_db": None, "wers": {}},
    ]
    text = format_table({"rows": rows, "dim": 128, "seeds": 3, "int8_within_float16": False})
    assert "| float16 | 256 | 70.0 dB | 65.0 dB | 3.00 % (2.00, 3.00, 4.00) | 3.00 % (3.00, 3.00, 3.00) |" in text
    assert "| bfloat16 | 256 | - | - | - | - |" in text
    assert "outside what 3 seeds" in text
