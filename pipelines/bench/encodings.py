"""What a smaller store costs: bytes per frame, error per dimension, and word errors of projectors trained from it.

    <output>/<encoding>/     a store of each encoding
    <output>/runs/           a run of each encoding and seed, with its evaluation; what is finished is not done again

The error is measured against the encoder's own float32 output. Two encodings that no store holds stand beside, by
arithmetic alone: bfloat16, and int8 with one step for all frames. Knows nothing of how a store is laid out.
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cache import Calibration, FeatureReader, FeatureStore, Quantized
from pipelines.ablate.grid import Cell, Grid
from pipelines.ablate.sweep import ablate
from pipelines.corpora import open_corpus
from pipelines.encoders import open_encoder, pick_device
from pipelines.evaluate.eval_sets import open_eval_set
from pipelines.evaluate.providers.base import ProviderOptions
from pipelines.evaluate.providers.registry import open_provider
from pipelines.evaluate.stage import evaluate
from pipelines.extract.decode import Decoder
from pipelines.extract.encode import EncoderLine
from pipelines.extract.stage import cut_batches, extract, wanted_splits
from pipelines.recipes import Recipe, load_recipe

Features = NDArray[np.float32]
Say = Callable[[str], None]

STORED = ("float16", "int8")
REFERENCE_SPLIT, REFERENCE_UTTERANCES = "dev", 120
SPLITS = ("test", "test_unseen")
REFERENCE_BATCH_S = 30.0
CODE_MAX = 127


@dataclass(frozen=True, kw_only=True)
class EncodingRow:
    """One encoding.

    Attributes:
        bytes_per_frame: in the store's shards; by arithmetic where no store holds this.
        snr_db: median over dimensions of variance over mean squared error, in dB; None where nothing was lost.
        worst_snr_db: the same of the dimension that suffers most.
        wers: word error rate of each seed, by split; empty where nothing was trained.
    """

    encoding: str
    bytes_per_frame: float
    snr_db: float | None
    worst_snr_db: float | None
    wers: dict[str, list[float]]


def bench_encodings(output: Path, *, seeds: int = 3, jobs: int = 1, say: Say = print) -> dict[str, Any]:
    """Extract the demo corpus in each encoding, train on it with several seeds, evaluate, and compare.

    Args:
        output: folder of stores and runs; the same call again goes on with it.
        seeds: 0 to seeds - 1.
        jobs: runs at the same time.

    Returns:
        `rows` (`EncodingRow`s) and `int8_within_float16`: whether int8's mean word error rate over seeds and splits
        is no worse than the worst float16 seed.
    """
    recipes = {encoding: load_recipe("demo", [f"store.encoding={encoding}"]) for encoding in STORED}
    stores = {encoding: output / encoding for encoding in STORED}
    for encoding, recipe in recipes.items():
        splits, _ = wanted_splits(recipe, open_corpus(recipe.corpus))
        say(f"store of {encoding}: {extract(recipe, stores[encoding], splits=splits)}")
    errors = _errors(recipes["float16"], stores)
    wers = _word_errors(stores, output / "runs", seeds, jobs, say)
    dim = FeatureStore.open(stores["float16"]).dim
    sizes = {encoding: _bytes_per_frame(path) for encoding, path in stores.items()}
    sizes |= {"bfloat16": 2.0 * dim, "int8, one step for all frames": 1.0 * dim}
    rows = [
        EncodingRow(
            encoding=name, bytes_per_frame=sizes[name], snr_db=snr[0], worst_snr_db=snr[1], wers=wers.get(name, {})
        )
        for name, snr in errors.items()
    ]
    means = {name: _means_over_splits(found) for name, found in wers.items()}
    return {
        "rows": [asdict(row) for row in rows],
        "dim": dim,
        "seeds": seeds,
        "int8_within_float16": statistics.mean(means["int8"]) <= max(means["float16"]),
    }


def format_table(result: dict[str, Any]) -> str:
    """Write the result as a Markdown table and a sentence."""
    lines = [
        "| encoding | bytes a frame | SNR, median dimension | worst dimension | "
        + " | ".join(f"WER {split}, mean (seeds)" for split in SPLITS)
        + " |",
        "|" + "---|" * (4 + len(SPLITS)),
    ]
    for row in result["rows"]:
        cells = [row["encoding"], f"{row['bytes_per_frame']:.0f}", _decibels(row["snr_db"])]
        cells.append(_decibels(row["worst_snr_db"]))
        cells += [_percents(row["wers"].get(split)) for split in SPLITS]
        lines.append("| " + " | ".join(cells) + " |")
    verdict = "within" if result["int8_within_float16"] else "outside"
    lines += [
        "",
        f"int8's mean is {verdict} what {result['seeds']} seeds of float16 span ({result['dim']} dimensions).",
    ]
    return "\n".join(lines)


def snr_db(reference: Features, decoded: Features) -> tuple[float | None, float | None]:
    """Return (median, worst) over dimensions of 10 log10(variance / mean squared error).

    Args:
        reference: (N, D).
        decoded: (N, D), what came back.
    """
    noise = np.square(reference.astype(np.float64) - decoded).mean(axis=0)
    signal = reference.astype(np.float64).var(axis=0)
    touched = (noise > 0) & (signal > 0)
    if not touched.any():
        return None, None
    levels = 10 * np.log10(signal[touched] / noise[touched])
    return float(np.median(levels)), float(levels.min())


def _errors(recipe: Recipe, stores: dict[str, Path]) -> dict[str, tuple[float | None, float | None]]:
    """Compare what stores give back with the encoder's float32 output, on the same utterances."""
    readers = {encoding: FeatureReader(path, split=REFERENCE_SPLIT) for encoding, path in stores.items()}
    utterances = open_eval_set(recipe.corpus, split=REFERENCE_SPLIT, max_samples=REFERENCE_UTTERANCES).utterances
    live = _encode(recipe, [one.source_id for one in utterances])
    reference = np.concatenate([live[one.source_id] for one in utterances])
    errors = {}
    for encoding, reader in readers.items():
        rows = [reader.get(one.utterance_id) for one in utterances]
        errors[encoding] = snr_db(reference, np.concatenate([_floats(row) for row in rows]))
    calibration = FeatureStore.open(stores["int8"]).calibration
    assert calibration is not None
    errors["bfloat16"] = snr_db(reference, torch.from_numpy(reference).bfloat16().float().numpy())
    errors["int8, one step for all frames"] = snr_db(reference, _one_step(reference, calibration))
    return errors


def _one_step(features: Features, calibration: Calibration) -> Features:
    """Round to 255 levels between the extremes of all frames, after centring and scaling each dimension."""
    normal = (features - calibration.mean) / calibration.std
    step = np.abs(normal).max() / CODE_MAX
    return np.asarray(np.rint(normal / step) * step * calibration.std + calibration.mean, dtype=np.float32)


def _floats(stored: NDArray[Any] | Quantized) -> Features:
    return stored.dequantize() if isinstance(stored, Quantized) else stored.astype(np.float32)


def _encode(recipe: Recipe, source_ids: list[str]) -> dict[str, Features]:
    line = EncoderLine(open_encoder(recipe.encoder, pick_device("cpu")))
    with Decoder(open_corpus(recipe.corpus), 0, recipe.corpus.max_duration_s) as decoder:
        decoded, _ = decoder.collect(decoder.submit(source_ids))
    samples = {source_id: found for source_id, found in decoded if not isinstance(found, str)}
    features: dict[str, Features] = {}
    for batch in cut_batches({source_id: len(one) for source_id, one in samples.items()}, REFERENCE_BATCH_S):
        rows, _ = line.encode(line.prepare([samples[source_id] for source_id in batch])).read()
        features |= zip(batch, rows, strict=True)
    return features


def _word_errors(
    stores: dict[str, Path], folder: Path, seeds: int, jobs: int, say: Say
) -> dict[str, dict[str, list[float]]]:
    """Train every encoding with every seed, then score the runs from raw audio, greedily."""
    cells = []
    for seed in range(seeds):
        for encoding in STORED:
            recipe = load_recipe("demo", [f"store.encoding={encoding}", f"train.seed={seed}"])
            settings: dict[str, Any] = {"store.encoding": encoding, "train.seed": seed}
            cells.append(Cell(name=f"{encoding}_seed-{seed}", settings=settings, recipe=recipe))
    ablate(Grid(name="encodings", cells=tuple(cells), stores=stores), None, folder, jobs=jobs, say=say).check()
    wers: dict[str, dict[str, list[float]]] = {encoding: {split: [] for split in SPLITS} for encoding in STORED}
    for cell in cells:
        run = folder / cell.name
        provider = open_provider("tinyaudio", ProviderOptions(model=str(run), num_beams=1, batch_size=32))
        for split in SPLITS:
            done = evaluate(provider, open_eval_set(cell.recipe.corpus, split=split), run / "eval" / split)
            wers[cell.recipe.store.encoding][split].append(done.word_errors.wer)
            say(f"{cell.name}, {split}: {done.word_errors}")
    return wers


def _bytes_per_frame(path: Path) -> float:
    """Divide the array files by the frames they hold; checksums, indices, scales and rows left empty count."""
    store = FeatureStore.open(path)
    commits = [store.commit(shard) for shard in store.committed_shards()]
    size = sum(file.size_bytes for commit in commits for file in commit.arrays.values())
    return size / sum(commit.num_frames for commit in commits)


def _means_over_splits(found: dict[str, list[float]]) -> list[float]:
    return [statistics.mean(seed) for seed in zip(*found.values(), strict=True)]


def _decibels(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.1f} dB"


def _percents(values: list[float] | None) -> str:
    if not values:
        return "-"
    return f"{100 * statistics.mean(values):.2f} % ({', '.join(f'{100 * value:.2f}' for value in values)})"
