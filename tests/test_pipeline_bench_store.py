"""The benchmark of the store runs and says what it should. Run: pytest tests/test_pipeline_bench_store.py"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pipelines import bench_store as bench


def test_the_benchmark_reports_every_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "NUM_UTTERANCES", 20_000)
    monkeypatch.setattr(bench, "PADDING_UTTERANCES", 20_000)
    result = json.loads(json.dumps(bench.bench_store(tmp_path, size_mb=16, rounds=1, seed=0)))
    for name in (
        "read_warm_vs_zarr",
        "read_cold_vs_zarr",
        "read_cold_vs_sequential",
        "write_vs_plain",
        "write_vs_zarr",
        "order_6m_s",
        "resume_s",
        "break_even_float16",
        "break_even_int8",
    ):
        assert result[name] > 0
    assert 1 <= result["read_amplification"] < 1.2
    assert 0 <= result["padding"] <= 0.03
    assert result["worlds_agree"] is True
    assert {"store", "sequential", "zarr", "memmap"} <= result["read_cold_mb_s"].keys()
    table = bench.format_table(result)
    assert "Break-even" in table
    assert all(name in table for name in ("read_warm_vs_zarr", "padding", "write_vs_plain"))
    assert list(tmp_path.iterdir()) == []


def test_lengths_are_like_those_of_loquacious_set() -> None:
    seconds = bench.loquacious_like_frames(50_000, 0) / 50
    assert seconds.min() >= 1.95
    assert seconds.max() <= 30
    assert 8 <= np.mean(seconds) <= 8.6
