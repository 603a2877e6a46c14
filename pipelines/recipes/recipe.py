"""Recipes: all settings of the stages in one TOML file, checked strictly.

A recipe is found by its name in `pipelines/recipes/` or by path, and `section.key=value` overrides single settings. The
resolved recipe is saved with every store and run, and is itself a recipe. Unknown keys are errors with a suggestion. A
path that begins with `./` or `../` is relative to the recipe file, or in an override to the working directory.
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

RETIRED = (("projector", "whiten"), ("train", "liger"))  # in recipes saved by earlier versions, usually false

PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    """A part of a recipe: frozen; unknown keys and numbers that are not finite are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Columns(Section):
    """The names of the corpus's columns; the defaults are LoquaciousSet's."""

    id: str = "ID"
    audio: str = "wav"
    text: str = "text"
    duration: str | None = "duration"
    speaker: str | None = "spk_id"
    sex: str | None = "sex"
    source: str | None = None


class CorpusSection(Section):
    """The source of speech and transcripts: either `path` (a local folder) or `name` (a hub data set)."""

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
    max_chars_per_s: PositiveFloat = 50.0  # of the transcript; fast speech is below 30, a pasted page far above
    text_case: Literal["keep", "lower"] = "keep"
    text_punctuation: Literal["keep", "remove"] = "keep"
    text_tags: Literal["keep", "remove"] = "keep"  # <COMMA>, [noise], ...
    no_speech: Annotated[float, Field(ge=0, le=0.5)] = 0.03  # items of silence and noise per utterance of train_split
    fetch: Literal["ranges", "files"] = "ranges"  # read byte ranges on the hub, or download files into HF_HOME first
    fetch_patience_s: PositiveFloat = 600.0  # seconds to retry a failing request

    @model_validator(mode="after")
    def _one_place(self) -> "CorpusSection":
        if (self.path is None) == (self.name is None):
            raise ValueError(f"expected exactly one of path and name; found path={self.path!r}, name={self.name!r}")
        return self


class EncoderSection(Section):
    """The frozen encoder of stage one and of inference."""

    id: str
    revision: str | None = None
    precision: Literal["float32", "bfloat16"] = "bfloat16"  # on a GPU; a CPU always computes float32
    compile: bool = False  # torch.compile; takes minutes to start and changes the last bits
    context: Literal["own", "full"] | None = None  # what Whisper hears: the recording's own length (None), or 30 s


def model_name(model: str) -> str:
    """Name a model: its hub id, or a local folder's own name (`runs/latest` is named after the run it points to)."""
    return Path(model).resolve().name if Path(model).is_dir() else model


class DecoderSection(Section):
    """The frozen language model."""

    id: str
    revision: str | None = None
    gguf_file: str | None = None  # name of a GGUF file there, with the weights, configuration and tokenizer
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"


StoredEncoding = Literal["float16", "int8", "int4", "int3"]


class StoreSection(Section):
    """How features are stored."""

    encoding: StoredEncoding = "float16"
    rows_per_shard: PositiveInt = 131_072
    calibration: str | None = None  # a quantised store whose calibration is reused, so that the two can be merged

    @model_validator(mode="after")
    def _one_calibration(self) -> "StoreSection":
        if self.calibration is not None and self.encoding == "float16":
            raise ValueError("calibration is for the encodings int8, int4 and int3; found encoding='float16'")
        return self


class ExtractSection(Section):
    """How stage one works; nothing here changes more than the last bits of a stored value."""

    batch_s: PositiveFloat = 320.0  # seconds of padded audio in one encoder batch; at most 15 on a CPU
    # Processes that decode; 0: threads; None: processes with a GPU, else threads.
    decode_workers: Annotated[int, Field(ge=0)] | None = None
    max_bad: Annotated[float, Field(ge=0, le=1)] = 0.01  # of rows, that stops extraction; filtered rows do not count
    disk_margin_gb: Annotated[float, Field(ge=0)] = 5.0  # no shard begins that would leave less free space
    disk_patience_s: Annotated[float, Field(ge=0)] = 0.0  # seconds to wait for free space before stopping


class ProjectorSection(Section):
    """The trained part."""

    kind: Literal["mlp", "linear", "norm_mlp", "conv"] = "mlp"  # the kinds of `model.projectors`, as a test checks
    stack_factor: PositiveInt = 5
    hidden_size: PositiveInt = 2048


class TrainSection(Section):
    """Stage two."""

    steps: Annotated[int, Field(ge=0)]  # through the decoder; 0 only with ctc_steps
    ctc_steps: Annotated[int, Field(ge=0)] = 0  # before them, on the CTC loss over the decoder's tokens alone
    ctc_weight: Annotated[float, Field(ge=0)] = 0.0  # of the CTC loss beside the decoder's; 0: not computed
    learning_rate: PositiveFloat
    warmup_steps: Annotated[int, Field(ge=0)]
    batch_tokens: PositiveInt  # decoder positions in one batch, padding included
    accumulate: PositiveInt = 1  # batches in one optimizer step, over all processes
    seed: Annotated[int, Field(ge=0)] = 0
    jitter_frames: Annotated[int, Field(ge=0)] = 0  # drop up to this many first frames, drawn again in each epoch
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: PositiveFloat = 1.0
    bf16: bool = True  # autocast on a GPU; the projector's weights stay float32
    gradient_checkpointing: bool = False
    compile: bool = False  # torch.compile on the decoder's training step
    overfit_utterances: PositiveInt | None = None  # train and evaluate on this many only; the WER must reach zero
    log_every: PositiveInt = 10  # steps
    eval_every: PositiveInt = 1000  # steps
    eval_utterances: PositiveInt = 200
    save_every: PositiveInt = 1000  # steps
    keep_checkpoints: PositiveInt = 3
    report_to: list[str] = ["tensorboard"]

    @model_validator(mode="after")
    def _some_steps(self) -> "TrainSection":
        if self.all_steps == 0:
            raise ValueError("steps and ctc_steps are both 0; expected at least one greater than 0")
        return self

    @property
    def all_steps(self) -> int:
        """Steps of both phases."""
        return self.ctc_steps + self.steps


class Recipe(Section):
    """All settings from a corpus to a model."""

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
        """Return the resolved recipe as TOML; settings that are None are omitted."""
        return tomli_w.dumps(self.model_dump(exclude_none=True))


def recipe_names() -> list[str]:
    """List the bundled recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def load_recipe(name_or_path: str, overrides: Sequence[str] = (), *, corpus: Mapping[str, Any] | None = None) -> Recipe:
    """Read, override and check a recipe.

    Args:
        name_or_path: "demo", "loquacious-small", ... or the path of a TOML file.
        overrides: "section.key=value"; the value is TOML, or else taken as a string.
        corpus: a [corpus] section that replaces the recipe's own; overrides are applied to it.

    Raises:
        RecipeError: not found, not TOML, an unknown key, or a value out of range.
    """
    path, settings = read_toml(name_or_path, RECIPES, "recipe")
    for section, key in RETIRED:
        if isinstance(table := settings.get(section), dict) and table.pop(key, False) is not False:
            raise RecipeError(f"{str(path)!r} sets {section}.{key}, which was removed. Delete the key")
    settings = {"name": path.stem, **settings, **({"corpus": dict(corpus)} if corpus is not None else {})}
    _resolve_paths(settings, path.parent)
    parsed = [_parse_override(override) for override in overrides]
    for (*sections, key), value in parsed:
        # A revision is a commit of one repository, and a file is in it: neither applies to another id, name or path.
        table = settings.get(sections[0])
        if isinstance(table, dict) and key in ("id", "name", "path") and value != table.get(key):
            table.pop("revision", None)
            table.pop("gguf_file", None)
    for (*sections, key), value in parsed:
        table = settings
        for section in sections:
            table = table.setdefault(section, {})
            if not isinstance(table, dict):
                raise RecipeError(f"override of {'.'.join([*sections, key])}: {section!r} is a value, not a section")
        table[key] = value
        if sections == ["corpus"] and key in ("path", "name"):  # exactly one of them
            table.pop("name" if key == "path" else "path", None)
    _resolve_paths(settings, Path.cwd())
    try:
        return Recipe.model_validate(settings)
    except ValidationError as error:
        raise RecipeError(f"recipe {name_or_path!r}: {explain(error, Recipe)}") from error


def read_toml(name_or_path: str, bundled: Path, kind: str) -> tuple[Path, dict[str, Any]]:
    """Find a bundled TOML file by name or any by path, and read it.

    Args:
        kind: "recipe" or "grid", for messages.

    Raises:
        RecipeError: not found, or not TOML.
    """
    path = bundled / f"{name_or_path}.toml"
    if not path.is_file():
        path = Path(name_or_path).expanduser().resolve()
    if not path.is_file():
        names = sorted(one.stem for one in bundled.glob("*.toml"))
        hint = _did_you_mean(name_or_path, names)
        raise RecipeError(f"no {kind} {name_or_path!r}; {hint}expected a TOML file or one of {', '.join(names)}")
    try:
        return path, tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{str(path)!r} is not TOML: {error}") from error


def _resolve_paths(settings: dict[str, Any], folder: Path) -> None:
    """Make the paths that begin with ./ or ../ absolute."""
    for section, key in (("corpus", "path"), ("encoder", "id"), ("decoder", "id"), ("store", "calibration")):
        table = settings.get(section)
        value = table.get(key) if isinstance(table, dict) else None
        if isinstance(table, dict) and isinstance(value, str) and value.startswith(("./", "../")):
            table[key] = str((folder / value).resolve())


def _parse_override(override: str) -> tuple[list[str], Any]:
    """Split "section.key=value" into its keys and its value."""
    name, equals, text = override.partition("=")
    keys = name.strip().split(".")
    if not equals or len(keys) < 2:
        raise RecipeError(f"override {override!r}; expected section.key=value, such as train.steps=200")
    try:
        return keys, tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return keys, text


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """Describe the first three faults: each with its key, and for an unknown key with the nearest known one."""
    return "; ".join(_explain_one(fault, model) for fault in error.errors()[:3])


def _explain_one(fault: Any, model: type[BaseModel]) -> str:
    where, kind = ".".join(str(part) for part in fault["loc"]), fault["type"]
    if kind == "missing":
        return f"key {where!r} is missing"
    if kind == "extra_forbidden":
        for part in fault["loc"][:-1]:
            annotation = model.model_fields[str(part)].annotation
            assert isinstance(annotation, type)
            assert issubclass(annotation, BaseModel), "only sections can have unknown keys"
            model = annotation
        known = sorted(model.model_fields)
        hint = _did_you_mean(str(fault["loc"][-1]), known)
        return f"unknown key {where!r}; {hint.rstrip() or 'known: ' + ', '.join(known)}"
    message = fault["msg"].removeprefix("Value error, ")
    if kind == "literal_error":
        choices = fault["ctx"]["expected"].replace(" or ", ", ").replace("'", "").split(", ")
        message = f"{_did_you_mean(str(fault['input']), choices)}expected one of {', '.join(choices)}"
    return f"{where or 'recipe'}: {message}; found {fault['input']!r}" if where.count(".") else f"{where}: {message}"


def _did_you_mean(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, 1)
    return f"did you mean {close[0]!r}? " if close else ""
