"""The bench of extraction gives its keys and sane numbers; peak memory does not follow the corpus."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.bench import extract as bench_extract_module
from pipelines.bench.extract import bench_extract

ROOT = Path(__file__).parents[1]
KEYS = {"vs_batch1", "vs_padded", "padding", "encoder_busy", "matmul_share", "peak_rss_bytes"}


def test_bench_has_its_keys_and_shares_are_shares():
    found = bench_extract(audio_s=20.0, device="cpu")
    assert found.to_dict().keys() >= KEYS
    assert found.matmul_share is None
    for share in (found.padding, found.padding_fixed, found.encoder_busy, found.idle_share):
        assert 0 <= share <= 1
    assert min(found.vs_batch1, found.vs_padded, found.vs_npy, found.real_time_factor) > 0
    assert found.peak_rss_bytes > 50e6
    assert found.decode_share > 0
    assert "real time" in str(found)


# Extracts the corpus in a folder, which another process made, and prints its peak of memory in KiB; `ru_maxrss` would
# begin at the peak of the parent.
EXTRACT = """
import re, sys
from pathlib import Path
import torch
from pipelines.bench import extract as bench
from pipelines.corpora import open_corpus
from pipelines.extract.plan import plan_corpus
from pipelines.recipes import load_recipe

folder = Path(sys.argv[1])
settings = ["store.rows_per_shard=4096", "extract.disk_margin_gb=0"]
recipe = load_recipe("demo", [f"corpus.path={folder / 'corpus'}", *settings])
corpus, encoder = open_corpus(recipe.corpus), bench._open_encoder(False, torch.device("cpu"))
bench._ours(folder / "store", recipe, corpus, plan_corpus(recipe, corpus, ["train"]), encoder)
print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.slow  # two minutes: 25 minutes of audio through the stand-in, and 200
def test_peak_memory_does_not_follow_the_corpus(tmp_path):
    """A factor of eight apart, and both long enough for every kind of batch to have come by."""
    peaks = []
    for seconds in (1_500.0, 12_000.0):
        folder = tmp_path / f"{seconds:.0f}"
        folder.mkdir()
        bench_extract_module._make_corpus(folder, seconds)
        done = subprocess.run([sys.executable, "-c", EXTRACT, folder], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout))
    assert peaks[1] < 1.15 * peaks[0], f"peak memory {peaks} KiB for 25 and 200 minutes of audio"
