"""The bench of extraction gives its keys and sane numbers; peak memory does not follow the corpus."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.bench_extract import bench_extract

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
    assert "real time" in str(found)


@pytest.mark.slow  # ten minutes of audio through the stand-in
def test_peak_memory_does_not_follow_the_corpus():
    script = (
        "import sys, resource, tempfile\nfrom pathlib import Path\n"
        "import torch\nfrom pipelines import bench_extract as b\n"
        "from pipelines.planning import plan_corpus\nfrom pipelines.corpora import open_corpus\n"
        "encoder = b._open_encoder(False, torch.device('cpu'))\n"
        "with tempfile.TemporaryDirectory() as folder:\n"
        "    recipe = b._make_corpus(Path(folder), float(sys.argv[1]))\n"
        "    recipe = recipe.model_copy(update={'store': recipe.store.model_copy(update={'rows_per_shard': 4096})})\n"
        "    corpus = open_corpus(recipe.corpus)\n"
        "    b._ours(Path(folder) / 's', recipe, corpus, plan_corpus(recipe, corpus, ['train']), encoder)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    peaks = [
        int(subprocess.run([sys.executable, "-c", script, seconds], cwd=ROOT, capture_output=True, check=True).stdout)
        for seconds in ("300", "2400")
    ]
    assert peaks[1] < 1.15 * peaks[0], f"peak memory {peaks} KiB for 5 and 40 minutes of audio"
