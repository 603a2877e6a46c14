"""The CTC loss over the decoder's tokens: against torch's on all logits, and as a phase of stage two or beside it."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from trainings import logged, module_recipe, module_store, same_weights, stage_two  # noqa: F401 (fixtures)

from cache import FeatureReader, FeatureStore
from pipelines.errors import RecipeError
from pipelines.recipes import load_recipe
from pipelines.train.batches import ctc_coverage
from pipelines.train.runs import Run
from pipelines.train.stage import train
from pipelines.train.targets import tokenize
from tinyaudio.model import ctc as ctc_module
from tinyaudio.model.ctc import TokenCTC
from tinyaudio.model.drafts import open_drafter
from tinyaudio.model.modeling_tinyaudio import TinyAudioForConditionalGeneration

BOTH = ("train.ctc_steps=2", "train.steps=4", "train.ctc_weight=0.3")


def reference(head: TokenCTC, projected, lengths, labels, num_tokens, embeddings) -> Tensor:
    """The definition, with the scores of all classes at once and torch's own CTC, in the precision of its inputs."""
    vectors = nn.functional.normalize(embeddings[head.token_ids], dim=-1)
    vectors = torch.cat([nn.functional.normalize(head.blank, dim=0)[None], vectors])
    scores = nn.functional.normalize(projected, dim=-1) @ vectors.T * head.log_scale.exp() + head.bias
    classes = torch.searchsorted(head.token_ids, labels.clamp_min(0)) + 1
    of_rows = nn.functional.ctc_loss(
        scores.log_softmax(-1).transpose(0, 1), classes, lengths, num_tokens, reduction="none", zero_infinity=True
    )
    return of_rows.sum()


def example(seed: int):
    """Four rows over 30 of 50 tokens: full, with padding, without tokens, and with as many tokens as frames."""
    torch.manual_seed(seed)
    embeddings, token_ids = torch.randn(50, 8), torch.randperm(50)[:30].sort().values
    head = TokenCTC(30, 8)
    head.token_ids.copy_(token_ids)
    head.bias.data.normal_()
    projected, lengths, num_tokens = torch.randn(4, 17, 8), [17, 12, 9, 4], [9, 5, 0, 4]
    labels = token_ids[torch.randint(0, 6, (4, 10))]  # few, so that tokens repeat
    labels[3, :4] = token_ids[:4]  # can align exactly
    for row, number in zip(labels, num_tokens, strict=True):
        row[number:] = -100
    return head, projected.requires_grad_(), lengths, labels, num_tokens, embeddings


@pytest.mark.parametrize("frames_in_a_block", [1, 5, 1000])
@pytest.mark.parametrize("seed", range(4))
def test_loss_and_gradients_are_those_of_all_logits(seed, frames_in_a_block, monkeypatch):
    monkeypatch.setattr(ctc_module, "BLOCK_ENTRIES", frames_in_a_block * 31)
    head, projected, lengths, labels, num_tokens, embeddings = example(seed)
    weights = [projected, head.blank, head.log_scale, head.bias]
    loss, left_out = head.loss(projected, lengths, labels, num_tokens, embeddings)
    found = torch.autograd.grad(loss, weights)
    exact = head.double()
    wide = projected.detach().double().requires_grad_()
    expected = reference(exact, wide, lengths, labels, num_tokens, embeddings.double())
    gradients = torch.autograd.grad(expected, [wide, exact.blank, exact.log_scale, exact.bias])
    assert int(left_out) == 0
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    for one, other in zip(found, gradients, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0, atol=1e-5 * float(other.abs().max()))


def test_a_row_with_more_tokens_than_frames_is_counted_and_changes_nothing():
    head, projected, lengths, labels, num_tokens, embeddings = example(0)
    few = [17, 12, 9, 3]
    alone, _ = head.loss(projected[:3], lengths[:3], labels[:3], num_tokens[:3], embeddings)
    loss, left_out = head.loss(projected, few, labels, num_tokens, embeddings)
    assert int(left_out) == 1
    torch.testing.assert_close(loss, alone)
    weights = [projected, head.blank, head.bias]
    for one, other in zip(torch.autograd.grad(loss, weights), torch.autograd.grad(alone, weights), strict=True):
        torch.testing.assert_close(one, other)
    labels[3, :4] = labels[3, 0]  # a blank between two equal tokens: 7 frames, not 4
    assert [int(head.loss(projected, [17, 12, 9, n], labels, num_tokens, embeddings)[1]) for n in (6, 7)] == [1, 0]


def test_the_loss_is_float32_under_autocast():
    head, projected, *rest = example(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under, _ = head.loss(projected, *rest)
    assert torch.equal(under, head.loss(projected, *rest)[0])


def test_the_best_path_has_no_repeats_and_no_blanks(monkeypatch):
    monkeypatch.setattr(ctc_module, "BLOCK_ENTRIES", 1)
    embeddings = torch.eye(6)
    head = TokenCTC(3, 6)
    head.token_ids.copy_(torch.tensor([1, 3, 4]))
    head.blank.data = embeddings[5].clone()
    rows = torch.tensor([[5, 1, 1, 5, 1, 4, 3, 3], [3, 5, 5, 4, 4, 4, 4, 4]])
    assert head.best_path(7 * embeddings[rows], torch.tensor([8, 3]), embeddings) == [[1, 1, 4, 3], [3]]


def test_a_phase_before_and_a_weight_beside(recipe_file, store, tmp_path, monkeypatch):
    """The decoder does not run in the CTC phase; both losses are logged; the drafts' word errors stand beside."""
    decoder_runs: list[int] = []
    hidden = TinyAudioForConditionalGeneration._hidden_at_targets

    def counted(self, *args):
        decoder_runs.append(self.training)
        return hidden(self, *args)

    monkeypatch.setattr(TinyAudioForConditionalGeneration, "_hidden_at_targets", counted)
    lines: list[str] = []
    report = stage_two(recipe_file, store, tmp_path / "run", *BOTH, "train.log_every=1", lines=lines)
    assert sum(decoder_runs) == 4, "training steps through the decoder"
    assert (report.steps, report.is_finished) == (6, True)
    run = tmp_path / "run"
    loss, ctc_loss, decoder_loss = (logged(run, key) for key in ("loss", "ctc_loss", "decoder_loss"))
    assert sorted(ctc_loss) == [1, 2, 3, 4, 5, 6]
    assert sorted(decoder_loss) == [3, 4, 5, 6]
    for step in (1, 2):
        assert math.isclose(loss[step], ctc_loss[step], rel_tol=1e-3)
    for step in (3, 4, 5, 6):
        assert math.isclose(loss[step], decoder_loss[step] + 0.3 * ctc_loss[step], rel_tol=1e-3)
    assert sorted(logged(run, "dev_ctc_wer")) == [2, 4, 6], "at the end of the phase, too"
    assert sorted(logged(run, "dev_wer")) == [4, 6], "not in the phase: the decoder would write nonsense"
    assert report.loss == decoder_loss[6]
    assert report.ctc_wer == logged(run, "dev_ctc_wer")[6]
    assert any("CTC loss is over" in line for line in lines)
    assert any("CTC loss" in line and line.startswith("step      1/6") for line in lines)

    model = TinyAudioForConditionalGeneration.from_pretrained(run)
    assert (model.config.ctc_weight, model.config.ctc_classes) == (0.3, len(model.token_ctc.token_ids))
    tokens = set(model.token_ctc.token_ids.tolist())
    assert tokens
    assert model.config.eos_token_id not in tokens
    assert torch.isfinite(model.token_ctc.blank).all()


def test_the_gradient_is_the_sum_of_both(recipe_file, store, tmp_path):
    """One step on the CTC loss, one through the decoder, one on both: the gradients add up."""
    stage_two(recipe_file, store, tmp_path / "run", *BOTH)
    model = TinyAudioForConditionalGeneration.from_pretrained(tmp_path / "run")
    torch.manual_seed(0)
    batch = {
        "features": torch.randn(2, 60, model.config.encoder_dim),
        "num_frames": torch.tensor([60, 50]),
        "labels": torch.tensor([[*model.token_ctc.token_ids[:3].tolist(), model.config.eos_token_id]] * 2),
    }
    weight = next(model.projector.parameters())

    def gradient(**options):
        model.zero_grad()
        model(**batch, **options).loss.backward()
        return weight.grad.clone()

    both, ctc, plain = gradient(ctc_weight=0.5), gradient(is_ctc_only=True), gradient()
    torch.testing.assert_close(both, plain + 0.5 * ctc)
    assert ctc.abs().max() > 0


def test_a_phase_alone_needs_no_step_through_the_decoder(recipe_file, store, tmp_path, monkeypatch):
    monkeypatch.setattr(TinyAudioForConditionalGeneration, "_hidden_at_targets", lambda *_: pytest.fail("decoder ran"))
    report = stage_two(recipe_file, store, tmp_path / "run", "train.ctc_steps=4", "train.steps=0")
    assert (report.is_finished, report.steps, report.dev_wer) == (True, 4, None)
    assert report.ctc_wer is not None
    assert "by CTC alone" in str(report)


@pytest.mark.parametrize("stop_after", [None, 3])
def test_what_the_phase_reached_is_not_reported_once_it_is_outdated(recipe_file, store, tmp_path, stop_after):
    """Without a weight, training through the decoder destroys it; also told after a resume."""
    settings = ("train.ctc_steps=2", "train.steps=4", "train.save_every=1")
    recipe, run = load_recipe(str(recipe_file), settings), Run(tmp_path / "run")
    if stop_after is not None:
        train(recipe, store, run, device="cpu", say=lambda _: None, stop_after=stop_after)
    report = train(recipe, store, run, device="cpu", say=lambda _: None, resume=stop_after is not None)
    assert sorted(logged(run.folder, "dev_ctc_wer")) == [2]
    assert (report.is_finished, report.ctc_wer) == (True, None)
    assert "by CTC alone" not in str(report)


def test_no_steps_at_all_are_refused():
    with pytest.raises(RecipeError, match="steps and ctc_steps are both 0"):
        load_recipe("demo", ["train.steps=0", "train.ctc_steps=0"])


def test_a_run_without_ctc_is_not_touched_by_it(recipe_file, store, tmp_path):
    stage_two(recipe_file, store, tmp_path / "run")
    assert not logged(tmp_path / "run", "ctc_loss")
    model = TinyAudioForConditionalGeneration.from_pretrained(tmp_path / "run")
    assert model.token_ctc is None


def test_each_phase_warms_up_and_decays(recipe_file, store, tmp_path):
    settings = ("train.ctc_steps=4", "train.steps=4", "train.warmup_steps=2", "train.log_every=1")
    stage_two(recipe_file, store, tmp_path / "run", *settings)
    rates = logged(tmp_path / "run", "learning_rate")
    phase = [0.0, 0.5e-3, 1e-3, 0.5e-3]
    np.testing.assert_allclose([rates[step] for step in sorted(rates)], [*phase, *phase], atol=1e-9)


class Killed(BaseException):
    """Ends train() on the spot."""


@pytest.mark.parametrize("step", [1, 3, 5])
def test_killed_in_either_phase_it_resumes_bit_identical(recipe_file, store, tmp_path, monkeypatch, step):
    from pipelines.train.callback import TrainingCallback

    often = ("train.ctc_steps=3", "train.steps=3", "train.ctc_weight=0.3", "train.save_every=1", "train.log_every=1")
    whole = recipe_file.with_name("whole-ctc")
    if not Run(whole).is_finished:
        stage_two(recipe_file, store, whole, *often)
    on_step_end = TrainingCallback.on_step_end

    def struck(self, args, state, control, **kwargs):
        if state.global_step == step:
            raise Killed
        on_step_end(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingCallback, "on_step_end", struck)
        with pytest.raises(Killed):
            stage_two(recipe_file, store, tmp_path / "run", *often)
    stage_two(recipe_file, store, tmp_path / "run", *often, resume=True)
    assert same_weights(whole, tmp_path / "run")
    for key in ("loss", "ctc_loss", "learning_rate", "dev_ctc_wer"):
        assert logged(whole, key) == logged(tmp_path / "run", key)


def test_the_coverage_counts_utterances_that_cannot_align(recipe_file, store):
    reader = FeatureReader(FeatureStore.open(store), split="train")
    model_tokens = tokenize(_Letters(), ["aab" for _ in range(len(reader))])
    stack = int(np.sort(reader.num_frames)[len(reader) // 2])  # half of them keep one projected frame, half keep two
    projected = -(-reader.num_frames // stack)
    assert f"leaves out {len(reader):,} of {len(reader):,}" in ctc_coverage(reader, model_tokens, stack)
    one = tokenize(_Letters(), ["ab" for _ in range(len(reader))])
    assert f"leaves out {(projected < 2).sum():,} of {len(reader):,}" in ctc_coverage(reader, one, stack)


class _Letters:
    """A tokenizer of letters whose end-of-text is 0."""

    eos_token_id, eos_token, name_or_path, vocab_size = 0, "<eos>", "letters", 30

    def __call__(self, texts, **_):
        return {"input_ids": [[ord(letter) - 96 for letter in text if letter.isalpha()] for text in texts]}

    def convert_tokens_to_ids(self, token):
        return 0

    def __len__(self):
        return 30


def test_drafts_are_left_alone_where_the_ctc_loss_had_no_weight(recipe_file, store, tmp_path):
    """Training through the decoder alone makes the projector forget them; they can still be asked for."""
    stage_two(recipe_file, store, tmp_path / "run", "train.ctc_steps=2", "train.steps=2")
    model = TinyAudioForConditionalGeneration.from_pretrained(tmp_path / "run")
    assert model.token_ctc is not None
    assert open_drafter(model, None, "auto") is None
    assert open_drafter(model, None, "projector").kind == "projector"
    model.config.ctc_weight = 0.3
    assert open_drafter(model, None, "auto").kind == "projector"
