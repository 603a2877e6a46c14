"""How fast stage one is, beside what one would write oneself, in one run on one machine.

    (a) a plain transformers loop, one recording at a time
    (b) a loop over fixed-size padded batches, in the order of the corpus
    (c) loop (a) with one .npy file per recording
    ours: the line of `shard_line`, from encoded audio to committed shards

All decode the same WAV files with durations like LoquaciousSet's (log-normal, 2 to 30 s, mean about 8 s) and run the
same encoder: the bundled stand-in, or HuBERT-large's shape at random weights. Rounds are interleaved, ratios medians.
"""

import io
import multiprocessing
import os
import resource
import statistics
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
import torch
from numpy.typing import NDArray
from transformers import HubertConfig, HubertModel, Wav2Vec2FeatureExtractor

from cache import FeatureStore
from pipelines.corpora import Corpus, open_corpus
from pipelines.encoders import LoadedEncoder, pick_device
from pipelines.extract.plan import Plan, plan_corpus
from pipelines.extract.report import ExtractReport
from pipelines.extract.shard_pipeline import ShardLine
from pipelines.recipes import Recipe, load_recipe
from tinyaudio.model.audio import SAMPLING_RATE, Samples, load_audio, num_frames
from tinyaudio.model.encoder import encode, give_back_free_memory, load_encoder, load_feature_extractor
from tinyaudio.model.frozen import freeze

DEMO = Path(__file__).parents[1] / "demo"
PADDED_BATCH = 8  # recordings in a batch of (b)
STAND_IN_S, FULL_SIZE_S, GPU_S = 600.0, 100.0, 30_000.0  # seconds of audio in one round; a GPU's is some ten seconds
ROW_GROUP = 20  # recordings, so that a shard spans several row groups and a row group two shards, as in reality
STAND_IN_ROUNDS, FULL_SIZE_ROUNDS = 3, 1
MATMUL_SIZE = 8_192  # of the square matrices that measure a GPU's peak


@dataclass(frozen=True, kw_only=True)
class BenchExtract:
    """The outcome; ratios above 1 say that ours is faster."""

    encoder: str
    device: str
    audio_s: float
    mean_duration_s: float
    real_time_factor: float  # seconds of audio per second
    vs_batch1: float
    vs_padded: float
    vs_npy: float
    padding: float  # share of the encoder's input
    padding_fixed: float  # of (b), for comparison
    encoder_busy: float  # share of the time
    decode_share: float  # of the time, beside the encoder
    write_share: float  # of the time, beside the encoder
    idle_share: float  # the encoder's
    matmul_share: float | None  # of the measured matrix-product peak, by the wall clock; None without a GPU
    peak_rss_bytes: int  # of our first round alone, decoding processes included
    load_average: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        peak = "no GPU" if self.matmul_share is None else f"{100 * self.matmul_share:.0f} % of the matmul peak"
        return "\n".join(
            [
                f"encoder        {self.encoder} on {self.device}, {self.audio_s:,.0f} s of audio a round "
                f"(mean {self.mean_duration_s:.1f} s), load average {self.load_average:.1f}",
                f"speed          {self.real_time_factor:,.1f}x real time; {peak}",
                f"against        {self.vs_batch1:.2f}x one at a time, {self.vs_padded:.2f}x padded batches of "
                f"{PADDED_BATCH}, {self.vs_npy:.2f}x one at a time into .npy files",
                f"padding        {100 * self.padding:.1f} % (fixed batches: {100 * self.padding_fixed:.1f} %)",
                f"encoder        busy {100 * self.encoder_busy:.0f} %, idle {100 * self.idle_share:.0f} %; beside it "
                f"decoding {100 * self.decode_share:.1f} %, writing {100 * self.write_share:.1f} % of the time",
                f"peak memory    {self.peak_rss_bytes / 1e9:.2f} GB",
            ]
        )


def bench_extract(*, full_size: bool = False, audio_s: float | None = None, device: str = "auto") -> BenchExtract:
    """Measure.

    Args:
        full_size: HuBERT-large's shape at random weights (315 million parameters) instead of the stand-in.
        audio_s: seconds of audio in one round; None chooses a few minutes of work.
    """
    where = pick_device(device)
    encoder = _open_encoder(full_size, where)
    seconds = audio_s or (GPU_S if where.type == "cuda" else FULL_SIZE_S if full_size else STAND_IN_S)
    rounds = FULL_SIZE_ROUNDS if full_size and where.type != "cuda" else STAND_IN_ROUNDS
    with tempfile.TemporaryDirectory(prefix="bench-extract-") as folder:
        recipe = _make_corpus(Path(folder), seconds)
        give_back_free_memory()  # so that the peak is not that of making the corpus
        return _measure(Path(folder), recipe, encoder, rounds, full_size)


def _measure(folder: Path, recipe: Recipe, encoder: LoadedEncoder, rounds: int, full_size: bool) -> BenchExtract:
    corpus = open_corpus(recipe.corpus)
    plan = plan_corpus(recipe, corpus, ["train"])
    durations = plan.accepted["duration_s"].to_numpy()
    times: dict[str, list[float]] = {"ours": [], "batch1": [], "padded": [], "npy": []}
    _encode_padded(encoder, [np.zeros(SAMPLING_RATE, np.float32)])  # first calls allocate and choose kernels
    report, peak_rss = ExtractReport(store=""), 0
    for number in range(rounds):
        with _PeakMemory() as peak:
            seconds, report = _ours(folder / f"store-{number}", recipe, corpus, plan, encoder)
        times["ours"].append(seconds)
        peak_rss = peak_rss or peak.size_bytes
        times["batch1"].append(_loop(corpus, plan, encoder, 1))
        times["padded"].append(_loop(corpus, plan, encoder, PADDED_BATCH))
        times["npy"].append(_loop(corpus, plan, encoder, 1, folder))
    wall, audio_s = statistics.median(times["ours"]), float(durations.sum())
    ratio = {name: statistics.median(t / o for t, o in zip(times[name], times["ours"], strict=True)) for name in times}
    is_gpu = encoder.model.device.type == "cuda"
    return BenchExtract(
        encoder="HuBERT-large at random weights" if full_size else "stand-in",
        device=torch.cuda.get_device_name() if is_gpu else f"{len(os.sched_getaffinity(0))} CPU cores",
        audio_s=audio_s,
        mean_duration_s=float(durations.mean()),
        real_time_factor=audio_s / wall,
        vs_batch1=ratio["batch1"],
        vs_padded=ratio["padded"],
        vs_npy=ratio["npy"],
        padding=report.padding,
        padding_fixed=_fixed_padding(durations),
        encoder_busy=report.encoder_busy,
        decode_share=report.decode_s / times["ours"][-1],
        write_share=report.write_s / times["ours"][-1],
        idle_share=max(0.0, 1 - report.encoder_busy),
        matmul_share=_matmul_share(encoder, audio_s / wall) if is_gpu else None,
        peak_rss_bytes=peak_rss,
        load_average=os.getloadavg()[0],
    )


# ------------------------------------------------------------------------------------------- what is measured


def _open_encoder(full_size: bool, device: torch.device) -> LoadedEncoder:
    if full_size:
        torch.manual_seed(0)
        config = HubertConfig(
            hidden_size=1024,
            num_hidden_layers=24,
            num_attention_heads=16,
            intermediate_size=4096,
            feat_extract_norm="layer",
            do_stable_layer_norm=True,
            conv_bias=True,
        )
        model: Any = freeze(HubertModel(config))
        extractor: Any = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
    else:
        folder = str(DEMO / "encoder")
        model, extractor = load_encoder(folder), load_feature_extractor(folder)
    precision = "bfloat16" if device.type == "cuda" else "float32"
    return LoadedEncoder(model=model.to(device), feature_extractor=extractor, precision=precision, fingerprint={})


def _make_corpus(folder: Path, seconds: float) -> Recipe:
    """Write WAV files of noise into Parquet with LoquaciousSet's columns; the recipe that reads them."""
    random, total = np.random.default_rng(0), 0.0
    rows: list[dict[str, Any]] = []
    while total < seconds:
        duration_s = float(random.lognormal(np.log(7.0), 0.55))
        if 2.0 <= duration_s <= 30.0:
            total += duration_s
            buffer = io.BytesIO()
            samples = 0.1 * random.standard_normal(round(duration_s * SAMPLING_RATE))
            soundfile.write(buffer, samples, SAMPLING_RATE, format="WAV", subtype="PCM_16")
            cell = {"bytes": buffer.getvalue(), "path": f"{len(rows)}.wav"}
            rows.append({"ID": str(len(rows)), "duration": duration_s, "wav": cell, "text": "nothing"})
    path = folder / "corpus" / "train-00000-of-00001.parquet"
    path.parent.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=ROW_GROUP)
    overrides = [f"corpus.path={folder / 'corpus'}", "store.rows_per_shard=131072", "extract.batch_s=320"]
    return load_recipe("demo", [*overrides, "extract.disk_margin_gb=0"])


def _ours(
    path: Path, recipe: Recipe, corpus: Corpus, plan: Plan, encoder: LoadedEncoder
) -> tuple[float, ExtractReport]:
    """Extract; the seconds it took, without those in which decoding processes start (once in days), and the report."""
    dim = encoder.model.config.hidden_size
    store = FeatureStore.create(
        path, plan=plan.table, dim=dim, fingerprint={"bench": True}, rows_per_shard=plan.rows_per_shard
    )
    report = ExtractReport(store=str(path))
    with ShardLine(recipe, corpus, encoder, store, report) as line:
        line.warm_up()
        begun = time.perf_counter()
        line.run(store.pending_shards())
        return time.perf_counter() - begun, report


class _PeakMemory:
    """Sample the resident memory of this process and its children while its `with` block runs."""

    def __init__(self) -> None:
        self.size_bytes = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak-memory", daemon=True)

    def _watch(self) -> None:
        while True:
            pids = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
            self.size_bytes = max(self.size_bytes, sum(_resident_bytes(pid) for pid in pids if pid))
            if self._done.wait(0.05):
                return

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def _resident_bytes(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:  # it has just ended, or this is not Linux
        return 0


def _loop(corpus: Corpus, plan: Plan, encoder: LoadedEncoder, size: int, npy: Path | None = None) -> float:
    """Decode and encode `size` recordings at a time in the order of the corpus; the seconds it took."""
    begun = time.perf_counter()
    kept: list[NDArray[np.float16]] = []
    waiting: list[Samples] = []
    for _, audio in corpus.read_audio(plan.accepted["source_id"].to_pylist()):
        waiting.append(load_audio(audio))
        if len(waiting) == size:
            kept += _encode_padded(encoder, waiting)
            waiting = []
            if npy is not None:
                np.save(npy / f"{len(kept)}.npy", kept[-1])
    if waiting:
        kept += _encode_padded(encoder, waiting)
    return time.perf_counter() - begun


def _encode_padded(encoder: LoadedEncoder, recordings: list[Samples]) -> list[NDArray[np.float16]]:
    """Encode as the documentation of transformers does."""
    inputs = encoder.feature_extractor(
        recordings, sampling_rate=SAMPLING_RATE, padding=True, return_attention_mask=True, return_tensors="pt"
    ).to(encoder.model.device)
    is_low = encoder.precision == "bfloat16"
    with torch.no_grad(), torch.autocast(encoder.model.device.type, torch.bfloat16, enabled=is_low):
        hidden = encoder.model(**inputs).last_hidden_state
    host = hidden.float().cpu().numpy().astype(np.float16)
    return [row[: num_frames(len(samples))] for row, samples in zip(host, recordings, strict=True)]


def _fixed_padding(durations: NDArray[np.float64]) -> float:
    batches = [durations[i : i + PADDED_BATCH] for i in range(0, len(durations), PADDED_BATCH)]
    return 1 - float(durations.sum()) / float(sum(len(batch) * batch.max() for batch in batches))


def _matmul_share(encoder: LoadedEncoder, speed: float) -> float:
    """Compare the encoder's arithmetic with a large matrix product on the same GPU.

    Args:
        speed: seconds of audio per second of the whole line, idle time included.
    """
    from torch.utils.flop_counter import FlopCounterMode

    device, seconds = encoder.model.device, 10
    values = torch.randn(1, seconds * SAMPLING_RATE, device=device)
    with FlopCounterMode(display=False) as counter:
        encode(encoder.model, values, torch.ones_like(values, dtype=torch.long), encoder.precision)
    matrix = torch.randn(MATMUL_SIZE, MATMUL_SIZE, device=device, dtype=torch.bfloat16)
    for _ in range(3):
        matrix @ matrix
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    for _ in range(20):
        matrix @ matrix
    end.record()
    torch.cuda.synchronize()
    peak = 20 * 2 * MATMUL_SIZE**3 / (begin.elapsed_time(end) / 1000)
    return float(counter.get_total_flops() / seconds * speed / peak)
