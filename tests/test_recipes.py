"""Recipes: strict, overridable, saved as recipes."""

from typing import get_args

import pytest

from pipelines.corpora.hub import is_commit
from pipelines.errors import RecipeError
from pipelines.recipes import load_recipe
from pipelines.recipes.recipe import CorpusSection, recipe_names


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_loads(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.corpus.name is None or recipe.corpus.no_speech == 0.03, "silence is taught"


@pytest.mark.parametrize("name", ["small", "medium", "clean", "large"])
def test_loquacious_recipes_are_the_card(name):
    recipe = load_recipe(f"loquacious-{name}")
    assert recipe.corpus.name == "speechbrain/LoquaciousSet"
    assert recipe.corpus.config == name
    assert recipe.encoder.id == "facebook/hubert-large-ls960-ft"
    assert recipe.decoder.id == "HuggingFaceTB/SmolLM3-3B-Base"
    assert (recipe.projector.kind, recipe.projector.stack_factor, recipe.projector.hidden_size) == ("mlp", 5, 2048)
    assert recipe.train.steps == (317_000 if name == "large" else 50_000)  # large: one epoch
    assert recipe.train.bf16
    assert not recipe.train.gradient_checkpointing, "21 GB without it: an A100 of 40 GB does not ask for it"


@pytest.mark.parametrize("name", sorted(set(recipe_names()) - {"demo"}))
def test_real_recipes_pin_whole_commits(name):
    recipe = load_recipe(name)
    assert is_commit(recipe.encoder.revision)
    assert is_commit(recipe.corpus.revision) == (recipe.corpus.name == "speechbrain/LoquaciousSet")
    assert is_commit(recipe.decoder.revision)


def test_a_revision_goes_with_what_it_is_a_revision_of():
    name, commit = "loquacious-small", "0" * 40
    assert load_recipe(name, ["encoder.id=me/mine"]).encoder.revision is None
    assert load_recipe(name, ["corpus.name=me/mine"]).corpus.revision is None
    assert load_recipe(name, ["corpus.path=/a"]).corpus.revision is None
    assert load_recipe(name, [f"encoder.revision={commit}", "encoder.id=me/mine"]).encoder.revision == commit
    shipped = load_recipe(name).encoder
    assert load_recipe(name, [f'encoder.id="{shipped.id}"']).encoder == shipped


def test_saved_recipe_is_a_recipe(tmp_path):
    recipe = load_recipe("demo", ["train.seed=7", "corpus.columns.audio=sound"])
    recipe.save(tmp_path / "recipe.toml")
    assert load_recipe(str(tmp_path / "recipe.toml")) == recipe


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stesp=3", "did you mean 'steps'"),
        ("trian.steps=3", "did you mean 'train'"),
        ("train.steps=-1", "train.steps.*greater than or equal to 0"),
        ("train.steps=many", "train.steps"),
        ("store.encoding=float8", "float16.*int8"),
        ("steps=3", "section.key=value"),
        ("train.steps", "section.key=value"),
        ("projector.kind=mlpp", "projector.kind: did you mean 'mlp'[?] expected one of mlp, linear, .*; found 'mlpp'"),
        ("train.learning_rate=inf", "train.learning_rate: .*finite"),
        ("corpus.max_duration_s=nan", "corpus.max_duration_s: .*finite"),
    ],
)
def test_wrong_settings_are_named(override, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe("demo", [override])


def test_corpus_is_in_one_place(tmp_path):
    load_recipe("demo").save(tmp_path / "both.toml")
    text = (tmp_path / "both.toml").read_text()
    (tmp_path / "both.toml").write_text(text.replace("[corpus]\n", '[corpus]\nname = "some/set"\n'))
    with pytest.raises(RecipeError, match="exactly one of path and name"):
        load_recipe(str(tmp_path / "both.toml"))
    assert load_recipe("loquacious-small", ["corpus.path=/a"]).corpus.name is None


def test_missing_recipe_and_broken_file(tmp_path):
    with pytest.raises(RecipeError, match="did you mean 'loquacious-small'"):
        load_recipe("loquacious-smal")
    (tmp_path / "broken.toml").write_text("[train\n")
    with pytest.raises(RecipeError, match="is not TOML"):
        load_recipe(str(tmp_path / "broken.toml"))


def test_a_folder_named_in_an_override_is_the_one_that_was_meant_wherever_the_recipe_is_kept(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "store").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    recipe = load_recipe("demo", ["corpus.path=./speech", "store.encoding=int8", "store.calibration=../other"])
    recipe.save(tmp_path / "store" / "recipe.toml")
    again = load_recipe(str(tmp_path / "store" / "recipe.toml"))
    assert again.corpus.path == str(tmp_path / "here" / "speech")
    assert again.store.calibration == str(tmp_path / "other")


def test_silence_is_taught_unless_a_recipe_says_otherwise():
    assert CorpusSection(path="x").no_speech == 0.03
    assert load_recipe("demo").corpus.no_speech == 0


def test_a_calibration_for_half_precision_is_refused():
    with pytest.raises(RecipeError, match="calibration is for the encodings int8, int4 and int3"):
        load_recipe("demo", ["store.calibration=elsewhere"])


def test_a_recipe_knows_every_kind_of_projector():
    """The recipe spells the kinds, so that reading one does not bring torch."""
    from pipelines.recipes.recipe import ProjectorSection
    from tinyaudio.model.projectors import PROJECTORS

    assert set(get_args(ProjectorSection.model_fields["kind"].annotation)) == set(PROJECTORS)


def test_a_recipe_saved_before_whitening_and_liger_were_removed_still_loads(tmp_path):
    path = tmp_path / "recipe.toml"
    recipe = load_recipe("demo")
    saved = recipe.to_toml().replace("[projector]\n", "[projector]\nwhiten = false\n")
    path.write_text(saved.replace("[train]\n", "[train]\nliger = false\n"))
    assert load_recipe(str(path)) == recipe
    path.write_text(saved.replace("whiten = false", "whiten = true"))
    with pytest.raises(RecipeError, match=r"recipe.toml' sets projector.whiten, which was removed. Delete the key"):
        load_recipe(str(path))
    with pytest.raises(RecipeError, match=r"unknown key 'train.liger'"):
        load_recipe("demo", ["train.liger=true"])
