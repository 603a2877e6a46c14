"""Stage two on the tiny parts, for the tests of `pipelines.train.stage`."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import NoiseMaker, write_folder_corpus, write_recipe
from extractions import stage_one
from safetensors.torch import load_file

from pipelines.recipes import load_recipe
from pipelines.train.runs import Run
from pipelines.train.stage import train


def tiny_recipe(root: Path, encoder_folder: Path, decoder_folder: Path) -> Path:
    """A recipe of six steps with its corpus of 40 + 8 utterances beside it."""
    write_folder_corpus(root / "corpus", NoiseMaker(seed=0), {"train": 40, "dev": 8})
    return write_recipe(root / "tiny.toml", root / "corpus", encoder_folder, decoder_folder)


def extracted(recipe_file: Path) -> Path:
    """The recipe's finished store, beside it."""
    stage_one(recipe_file, recipe_file.with_name("store"))
    return recipe_file.with_name("store")


@pytest.fixture(scope="module", name="recipe_file")
def module_recipe(tmp_path_factory, encoder_folder, decoder_folder):
    """A recipe that the tests of one file share; imported under its own name, used as `recipe_file`."""
    return tiny_recipe(tmp_path_factory.mktemp("tiny"), encoder_folder, decoder_folder)


@pytest.fixture(scope="module", name="store")
def module_store(recipe_file):
    """The finished store of that recipe, used as `store`."""
    return extracted(recipe_file)


def stage_two(recipe_file: Path, store: Path, run: Path, *overrides: str, resume: bool = False, lines=None):
    """Train on the CPU; what it says is appended to `lines`."""
    say = (lambda _: None) if lines is None else lines.append
    recipe = load_recipe(str(recipe_file), overrides)
    return train(recipe, store, Run(run), resume=resume, device="cpu", say=say)


def same_weights(one: Path, other: Path) -> bool:
    a, b = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return all(torch.equal(a[key], b[key]) for key in a)


def logged(run: Path, key: str) -> dict[int, float]:
    """Step to value, for the entries of the metrics that have this key."""
    return {entry["step"]: entry[key] for entry in Run(run).metrics() if key in entry}


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Let every larger file fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
