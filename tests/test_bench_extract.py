"""`bench extract` reports plausible numbers under its keys; peak memory does not grow with the corpus."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipelines.bench.extract import NOTES, bench_extract, encoder_alone, make_wav_corpus, slow_share
from pipelines.bench.host import HOST_NOTES
from pipelines.bench.models import bench_encoder
from pipelines.corpora import open_corpus
from pipelines.extract.plan import plan_corpus

ROOT = Path(__file__).parents[1]
KEYS = {"vs_batch1", "vs_padded", "padding", "encoder_busy", "matmul_share", "peak_rss_bytes"}


def test_bench_has_its_keys_and_shares_are_shares():
    found = bench_extract(audio_s=20.0, rounds=1, device="cpu")
    assert found.keys() >= KEYS | NOTES.keys()
    assert found["matmul_share"] is None
    for share in ("padding", "padding_fixed", "encoder_busy", "idle_share"):
        assert 0 <= found[share] <= 1
    assert min(found[name] for name in ("vs_batch1", "vs_padded", "vs_npy", "real_time_factor")) > 0
    assert found["peak_rss_bytes"] > 50e6
    assert found["decode_share"] > 0
    assert found["vs_cudnn_attention"] is found["bf16_vs_float32"] is found["compiled_vs_plain"] is None
    assert min(found[name] for name in HOST_NOTES) > 0


def test_the_encoder_alone_is_measured_in_bfloat16_with_cudnn_and_compiled(monkeypatch):
    """With the compiler replaced: it takes a minute, and the rows are what counts here."""
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compiled.append(options))
    encoder = replace(bench_encoder(torch.device("cpu"), full_size=False), precision="bfloat16")
    speeds = encoder_alone(encoder, num_batches=1, batch_s=2.0)
    assert speeds.keys() == {"plain", "cudnn", "float32", "compiled"}
    assert min(speeds.values()) > 0
    assert compiled == [{"dynamic": True}]
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_slow_contestants_get_a_tenth_of_the_audio_on_a_gpu(tmp_path):
    recipe = make_wav_corpus(tmp_path, 4_000.0)
    plan = plan_corpus(recipe, open_corpus(recipe.corpus), ["train"])
    everything = plan.accepted["source_id"].to_pylist()
    assert slow_share(plan, 1.0) == everything
    assert len(slow_share(plan, 0.1)) == len(everything) // 10


# Extracts the corpus in a folder, which another process made, and prints its peak of memory in KiB; `ru_maxrss` would
# begin at the peak of the parent.
EXTRACT = """
import re, sys
from pathlib import Path
import torch
from pipelines.bench.extract import extract_once
from pipelines.bench.models import bench_encoder
from pipelines.corpora import open_corpus
from pipelines.extract.plan import plan_corpus
from pipelines.recipes import load_recipe

folder = Path(sys.argv[1])
settings = ["store.rows_per_shard=4096", "extract.disk_margin_gb=0"]
recipe = load_recipe("demo", [f"corpus.path={folder / 'corpus'}", *settings])
corpus, encoder = open_corpus(recipe.corpus), bench_encoder(torch.device("cpu"), full_size=False)
extract_once(folder / "store", recipe, corpus, plan_corpus(recipe, corpus, ["train"]), encoder)
print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.slow  # two minutes: 25 minutes of audio through the bundled encoder, and 200
def test_peak_memory_does_not_follow_the_corpus(tmp_path):
    """A factor of eight apart, and both long enough for every kind of batch to have come by."""
    peaks = []
    for seconds in (1_500.0, 12_000.0):
        folder = tmp_path / f"{seconds:.0f}"
        folder.mkdir()
        make_wav_corpus(folder, seconds)
        done = subprocess.run([sys.executable, "-c", EXTRACT, folder], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout))
    assert peaks[1] < 1.15 * peaks[0], f"peak memory {peaks} KiB for 25 and 200 minutes of audio"
