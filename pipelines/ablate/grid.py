"""Grids: the combinations of recipe settings that an ablation trains, in one TOML file, checked strictly.

    recipe = "demo"
    [settings]                                   # for every run
    "train.steps" = 400
    [axes]                                       # the product of these
    "projector.kind" = ["mlp", "linear"]
    "train.seed" = [0, 1]
    [[also]]                                     # further combinations, each with every seed
    "projector.kind" = "mlp"
    "train.learning_rate" = 1e-3
    [stores]                                     # where "store.encoding" is an axis: the store of each encoding
    int8 = "data/demo-int8"

Every cell of the grid has a name made of its settings, which is its run's folder: what is done can be found again.
"""

import itertools
import re
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from pipelines.errors import RecipeError
from pipelines.recipes import Recipe, load_recipe
from pipelines.recipes.recipe import Section, explain

GRIDS = Path(__file__).parent / "grids"
SEED = "train.seed"

Value = str | int | float | bool


class GridFile(Section):
    """A grid as written."""

    recipe: str = "demo"
    settings: dict[str, Value] = Field(default_factory=dict)
    axes: Annotated[dict[str, Annotated[list[Value], Field(min_length=1)]], Field(min_length=1)]
    also: list[dict[str, Value]] = Field(default_factory=list)
    stores: dict[str, str] = Field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of a grid: its name, what it sets beside the grid's common settings, and the whole recipe."""

    name: str
    settings: dict[str, Value]
    recipe: Recipe

    @property
    def group(self) -> tuple[tuple[str, Value], ...]:
        """The settings without the seed: cells of one group are repetitions of each other."""
        return tuple((key, value) for key, value in self.settings.items() if key != SEED)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A grid with all its cells, in the order they run: the first seed of everything first."""

    name: str
    cells: tuple[Cell, ...]
    stores: dict[str, Path]

    def store_of(self, cell: Cell, default: Path | None) -> Path:
        """Say where a cell's store is: as the grid says for its encoding, else the default, else data/<recipe>."""
        named = self.stores.get(cell.recipe.store.encoding)
        return named or default or Path("data") / cell.recipe.name


def load_grid(name_or_path: str, overrides: Sequence[str] = ()) -> Grid:
    """Read and check a grid, and every recipe it leads to.

    Args:
        name_or_path: a shipped grid's name, or the path of a TOML file.
        overrides: "section.key=value" for every run, over the grid's own settings.

    Raises:
        RecipeError: not found, not TOML, an unknown key, or a combination that is no valid recipe.
    """
    path = _find(name_or_path)
    try:
        found = GridFile.model_validate(tomllib.loads(path.read_text()))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{str(path)!r} is not TOML: {error}") from error
    except ValidationError as error:
        raise RecipeError(f"grid {name_or_path!r}: {explain(error, GridFile)}") from error
    combinations = _combinations(found)
    short = _short_keys({key for settings in combinations for key in settings})
    cells = [_cell(found, settings, overrides, short) for settings in combinations]
    unique = {cell.name: cell for cell in cells}
    stores = {encoding: Path(store) for encoding, store in found.stores.items()}
    return Grid(name=path.stem, cells=tuple(unique.values()), stores=stores)


def _find(name_or_path: str) -> Path:
    shipped, path = GRIDS / f"{name_or_path}.toml", Path(name_or_path).expanduser()
    if shipped.is_file() or path.is_file():
        return shipped if shipped.is_file() else path
    known = ", ".join(sorted(one.stem for one in GRIDS.glob("*.toml")))
    raise RecipeError(f"no grid {name_or_path!r}; expected a TOML file or one of {known}")


def _combinations(found: GridFile) -> list[dict[str, Value]]:
    seeds = found.axes.get(SEED, [])
    product = [dict(zip(found.axes, values, strict=True)) for values in itertools.product(*found.axes.values())]
    repeated = [{**one, SEED: seed} for one in found.also for seed in seeds] if seeds else found.also
    combinations = product + repeated
    return sorted(combinations, key=lambda one: seeds.index(one[SEED]) if SEED in one and one[SEED] in seeds else 0)


def _short_keys(keys: Set[str]) -> dict[str, str]:
    """Give each setting its last part as name, or all of it where two settings would share a name."""
    times = Counter(key.split(".")[-1] for key in keys)
    return {key: key if times[last := key.split(".")[-1]] > 1 else last for key in keys}


def _cell(found: GridFile, settings: dict[str, Value], overrides: Sequence[str], short: Mapping[str, str]) -> Cell:
    common = [f"{key}={_toml(value)}" for key, value in found.settings.items()]
    own = [f"{key}={_toml(value)}" for key, value in settings.items()]
    name = "_".join(f"{short[key]}-{value}" for key, value in settings.items())
    recipe = load_recipe(found.recipe, [*common, *overrides, *own])
    return Cell(name=re.sub(r"[^A-Za-z0-9_.-]", "-", name), settings=settings, recipe=recipe)


def _toml(value: Value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
