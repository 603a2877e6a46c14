"""Stage one on the tiny parts, and what its stores hold, for the tests of `pipelines.extract.stage`."""

from pathlib import Path

import numpy as np

from cache import FeatureReader
from cache.quantize import Quantized
from pipelines.corpora import open_corpus
from pipelines.extract.request import wanted_splits
from pipelines.extract.stage import extract
from pipelines.recipes import load_recipe

INT8 = "store.encoding='int8'"


def stage_one(recipe_file: Path, store: Path, *overrides: str, split: str | None = None, **options):
    """Extract the splits of a recipe on the CPU; options go to `extract`."""
    recipe = load_recipe(str(recipe_file), overrides)
    splits, _ = wanted_splits(recipe, open_corpus(recipe.corpus), split)
    return extract(recipe, store, splits=splits, device="cpu", **options)


def content(store: Path) -> dict[str, np.ndarray]:
    """Every utterance's features, dequantised: id to (num_frames, dim)."""
    reader = FeatureReader(store)
    stored = {i: reader.get(i) for i in reader.index["utterance_id"].to_pylist()}
    return {i: one.dequantize() if isinstance(one, Quantized) else one for i, one in stored.items()}


def same_content(one: Path, other: Path) -> bool:
    a, b = content(one), content(other)
    return a.keys() == b.keys() and all(np.array_equal(a[i], b[i]) for i in a)


def spoil(corpus: Path, count: int) -> None:
    """Make the first recordings of the train split undecodable."""
    for path in sorted((corpus / "train").glob("*.wav"))[:count]:
        path.write_bytes(b"no audio")
