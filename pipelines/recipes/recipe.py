"""Recipes: everything a stage may be told, in one TOML file, checked strictly.

A recipe is found by name in `pipelines/recipes/` or by path; `section.key=value` overrides it; the resolved recipe is
saved with everything it made and is itself a recipe. Unknown keys are errors with a suggestion. Local folders named
with a leading `./` or `../` are relative to the recipe file, in an override to the working directory.
"""

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipelines.errors import RecipeError

RECIPES = Path(__file__).parent

RETIRED = (("projector", "whiten"), ("train", "liger"))  # keys of saved recipes, false unless the user set them

PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    """A part of a recipe: frozen, and closed to keys it does not know and to numbers that are not finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Columns(Section):
    """What the corpus calls its columns; the defaults are LoquaciousSet's."""

    id: str = "ID"
    audio: str = "wav"
    text: str = "text"
    duration: str | None = "duration"
    speaker: str | None = "spk_id"
    sex: str | None = "sex"
    source: str | None = None


class CorpusSection(Section):
    """Where speech and transcripts come from: `path` (a local folder) or `name` (a hub data set), not both."""

    path: str | None = None
    name: str | None = None
    config: str | None = None
    revision: str | None = None
    train_split: str = "train"
    dev_split: str | None = "dev"
    test_split: str = "test"
    columns: Columns = Columns()
    min_duration_s: Annotated[float, Field(ge=0)] = 0.1
    max_duration_s: PositiveFloat = 30.0
    max_chars_per_s: PositiveFloat = 50.0  # of text; fast speech is below 30, a pasted page far above
    text_case: Literal["keep", "lower"] = "keep"
    text_punctuation: Literal["keep", "remove"] = "keep"
    text_tags: Literal["keep", "remove"] = "keep"  # <COMMA>, [noise], ...
    no_speech: Annotated[float, Field(ge=0, le=0.5)] = 0.03  # items of silence and noise per utterance of train_split
    fetch: Literal["ranges", "files"] = "ranges"  # read a hub data set in place, or fetch its files into HF_HOME first
    fetch_patience_s: PositiveFloat = 600.0  # seconds to keep trying a request that fails

    @model_validator(mode="after")
    def _one_place(self) -> "CorpusSection":
        if (self.path is None) == (self.name is None):
            raise ValueError(f"needs exactly one of path and name; found path={self.path!r}, name={self.name!r}")
        return self


class EncoderSection(Section):
    """The frozen encoder of stage one and of inference."""

    id: str
    revision: str | None = None
    precision: Literal["float32", "bfloat16"] = "bfloat16"  # on a GPU; a CPU always computes float32
    compile: bool = False  # torch.compile; minutes of warm-up, other low bits


def encoder_name(encoder_id: str) -> str:
    """Name an encoder in a fingerprint: its hub id, or a local folder's own name, since weights identify a folder."""
    return Path(encoder_id).resolve().name if Path(encoder_id).is_dir() else encoder_id


class DecoderSection(Section):
    """The frozen language model."""

    id: str
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"


class StoreSection(Section):
    """How features are stored."""

    encoding: Literal["float16", "int8"] = "float16"
    rows_per_shard: PositiveInt = 131_072
    calibration: str | None = None  # an int8 store whose calibration is taken, so that the two can be merged

    @model_validator(mode="after")
    def _one_calibration(self) -> "StoreSection":
        if self.calibration is not None and self.encoding != "int8":
            raise ValueError(f"calibration is for encoding 'int8'; found encoding={self.encoding!r}")
        return self


class ExtractSection(Section):
    """How stage one works; nothing here may change more of what is stored than the last bits of a value."""

    batch_s: PositiveFloat = 320.0  # seconds of padded audio in one encoder batch; at most 15 on a CPU
    decode_workers: Annotated[int, Field(ge=0)] | None = None  # processes; 0: threads; None: processes for a GPU only
    max_bad: Annotated[float, Field(ge=0, le=1)] = 0.01  # share of the rows that may be bad, those filtered out aside
    disk_margin_gb: Annotated[float, Field(ge=0)] = 5.0  # begin no shard that would leave less than this free
    disk_patience_s: Annotated[float, Field(ge=0)] = 0.0  # seconds to wait for room before giving up


class ProjectorSection(Section):
    """The trained part."""

    kind: Literal["mlp", "linear", "norm_mlp", "conv"] = "mlp"  # a test compares them with `model.projectors`
    stack_factor: PositiveInt = 5
    hidden_size: PositiveInt = 2048


class TrainSection(Section):
    """Stage two."""

    steps: PositiveInt
    learning_rate: PositiveFloat
    warmup_steps: Annotated[int, Field(ge=0)]
    batch_tokens: PositiveInt  # decoder positions in one batch, padding included
    accumulate: PositiveInt = 1  # batches in one optimizer step, over all processes
    seed: Annotated[int, Field(ge=0)] = 0
    jitter_frames: Annotated[int, Field(ge=0)] = 0  # drop up to so many first frames, anew each epoch, at random
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: PositiveFloat = 1.0
    bf16: bool = True  # autocast on a GPU; the projector's weights stay float32
    gradient_checkpointing: bool = False
    compile: bool = False  # torch.compile on the decoder's training step
    overfit_utterances: PositiveInt | None = None  # train and evaluate on these few alone; the WER must go to zero
    log_every: PositiveInt = 10  # steps
    eval_every: PositiveInt = 1000  # steps
    eval_utterances: PositiveInt = 200
    save_every: PositiveInt = 1000  # steps
    keep_checkpoints: PositiveInt = 3
    report_to: list[str] = ["tensorboard"]


class Recipe(Section):
    """One complete way to get from a corpus to a model."""

    name: str
    corpus: CorpusSection
    encoder: EncoderSection
    decoder: DecoderSection
    store: StoreSection = StoreSection()
    extract: ExtractSection = ExtractSection()
    projector: ProjectorSection = ProjectorSection()
    train: TrainSection

    def save(self, path: Path) -> None:
        """Write the resolved recipe, as `to_toml`."""
        path.write_text(self.to_toml())

    def to_toml(self) -> str:
        """Give the resolved recipe as TOML; what is None is left out."""
        return tomli_w.dumps(self.model_dump(exclude_none=True))


def recipe_names() -> list[str]:
    """List the recipes that ship."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def load_recipe(name_or_path: str, overrides: Sequence[str] = (), *, corpus: Mapping[str, Any] | None = None) -> Recipe:
    """Read, override and check a recipe.

    Args:
        name_or_path: "demo", "loquacious-small", ... or the path of a TOML file.
        overrides: "section.key=value"; the value is TOML, or else taken as a string.
        corpus: another [corpus] section instead of the recipe's own; overrides come after it.

    Raises:
        RecipeError: not found, not TOML, an unknown key, or a value out of range.
    """
    path = _find(name_or_path)
    try:
        settings = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{str(path)!r} is not TOML: {error}") from error
    for section, key in RETIRED:
        table = settings.get(section)
        if isinstance(table, dict) and table.pop(key, False) is not False:
            raise RecipeError(f"{str(path)!r} sets {section}.{key}, which was removed. Delete the key")
    settings = {"name": path.stem, **settings, **({"corpus": dict(corpus)} if corpus is not None else {})}
    _anchor(settings, path.parent)
    _forget_revisions(settings, overrides)
    for override in overrides:
        _override(settings, override)
    _anchor(
        settings, Path.cwd()
    )  # what an override names is relative to where it was typed, and is saved as it is meant
    try:
        return Recipe.model_validate(settings)
    except ValidationError as error:
        raise RecipeError(f"recipe {name_or_path!r}: {explain(error, Recipe)}") from error


def _find(name_or_path: str) -> Path:
    shipped = RECIPES / f"{name_or_path}.toml"
    if shipped.is_file():
        return shipped
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return path.resolve()
    close = difflib.get_close_matches(name_or_path, recipe_names(), 1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise RecipeError(f"no recipe {name_or_path!r}; {hint}expected a TOML file or one of {', '.join(recipe_names())}")


def _anchor(settings: dict[str, Any], folder: Path) -> None:
    for section, key in (("corpus", "path"), ("encoder", "id"), ("decoder", "id"), ("store", "calibration")):
        table = settings.get(section)
        if not isinstance(table, dict):
            continue
        value = table.get(key)
        if isinstance(value, str) and value.startswith(("./", "../")):
            table[key] = str((folder / value).resolve())


def _forget_revisions(settings: dict[str, Any], overrides: Sequence[str]) -> None:
    """Drop the recipe's own revision of what an override replaces: it is a commit of something else."""
    for override in overrides:
        name, _, text = override.partition("=")
        section, _, key = name.strip().partition(".")
        table = settings.get(section)
        if isinstance(table, dict) and key in ("id", "name", "path") and text.strip(" \"'") != table.get(key):
            table.pop("revision", None)


def _override(settings: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    *sections, key = name.strip().split(".")
    if not equals or not sections:
        raise RecipeError(f"override {override!r}; expected section.key=value, such as train.steps=200")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    table = settings
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise RecipeError(f"override {override!r}: {section!r} is a value, not a section")
    table[key] = value
    if sections == ["corpus"] and key in ("path", "name"):  # one place; the override wins over the recipe's other one
        table.pop("name" if key == "path" else "path", None)


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """Say the first few faults, each with the key, and for an unknown key the nearest known one of the model."""
    return "; ".join(_explain_one(fault, model) for fault in error.errors()[:3])


def _explain_one(fault: Any, model: type[BaseModel]) -> str:
    where = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        known = _known_keys(model, fault["loc"][:-1])
        close = difflib.get_close_matches(str(fault["loc"][-1]), known, 1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        return f"unknown key {where!r}; {hint}known: {', '.join(known)}"
    if fault["type"] == "missing":
        return f"key {where!r} is missing"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "literal_error":
        choices = fault["ctx"]["expected"].replace(" or ", ", ").replace("'", "").split(", ")
        close = difflib.get_close_matches(str(fault["input"]), choices, 1)
        message = (f"did you mean {close[0]!r}? " if close else "") + f"expected one of {', '.join(choices)}"
    return f"{where or 'recipe'}: {message}; found {fault['input']!r}" if where.count(".") else f"{where}: {message}"


def _known_keys(model: type[BaseModel], location: Sequence[str | int]) -> list[str]:
    for part in location:
        annotation = model.model_fields[str(part)].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return sorted(model.model_fields)


def differing_keys(one: Recipe, other: Recipe, sections: Sequence[str]) -> dict[str, tuple[Any, Any]]:
    """Compare two recipes: {"train.seed": (0, 1)} for every key of these sections that differs."""
    flat_one, flat_other = (dict(_flatten(r.model_dump())) for r in (one, other))
    return {
        key: (flat_one.get(key), flat_other.get(key))
        for key in sorted(flat_one | flat_other)
        if key.split(".")[0] in sections and flat_one.get(key) != flat_other.get(key)
    }


def _flatten(table: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in table.items():
        pairs += _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return pairs
