"""Stage two on tiny random parts: what it refuses, reports and warns of while it learns."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from trainings import logged, module_recipe, module_store, stage_two  # noqa: F401 (fixtures)

from cache import FeatureReader, FeatureStore
from pipelines.errors import RunError
from pipelines.recipes import load_recipe
from pipelines.train import stage as train_module
from pipelines.train import trainer as trainer_module
from pipelines.train.batches import Dequantizer
from pipelines.train.dev_set import DevSet
from pipelines.train.runs import Run
from pipelines.train.stage import train
from pipelines.train.trainer import ProjectorTrainer
from tinyaudio.model.guard import token_budget
from tinyaudio.model.modeling_tinyaudio import TinyAudioForConditionalGeneration
from tinyaudio.model.processing_tinyaudio import TinyAudioProcessor


@pytest.fixture(scope="module")
def whole(recipe_file, store):
    """An undisturbed run."""
    lines: list[str] = []
    stage_two(recipe_file, store, recipe_file.with_name("whole"), lines=lines)
    recipe_file.with_name("lines.txt").write_text("\n".join(lines))
    return recipe_file.with_name("whole")


def test_gradient_that_is_not_finite_under_a_finite_loss_saves_nothing(recipe_file, store, tmp_path, monkeypatch):
    compute = ProjectorTrainer.compute_loss

    def poison(self, model, inputs, *args, **kwargs):
        loss = compute(self, model, inputs, *args, **kwargs)
        zero = sum(weight.sum() for weight in model.projector.parameters()) * 0
        return loss + zero.sqrt() if self.state.global_step == 1 else loss  # sqrt(0) is 0, its slope is not

    monkeypatch.setattr(ProjectorTrainer, "compute_loss", poison)
    with pytest.raises(RunError, match=r"projector weights are not finite after step 2, on utterances train/\d+.wav, "):
        stage_two(recipe_file, store, tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").glob("checkpoint-*"))


def test_loss_that_is_not_finite_stops_with_the_utterances(recipe_file, store, tmp_path, monkeypatch):
    def poison(self, batch):
        broken = "train/017.wav" in batch["utterance_ids"]
        return batch["features"] * (float("nan") if broken else 1.0)

    monkeypatch.setattr(Dequantizer, "__call__", lambda self, batch: batch["features"].float())
    monkeypatch.setattr(trainer_module.Dequantizer, "__call__", poison)
    monkeypatch.setattr("pipelines.train.stage.DevSet.open", lambda *_: None)
    with pytest.raises(RunError, match=r"loss is nan at step \d+, on utterances (\S+ ){5}and \d+ more \(all in "):
        stage_two(recipe_file, store, tmp_path / "run")
    assert "train/017.wav" in (tmp_path / "run" / "not_finite.txt").read_text().splitlines()
    for checkpoint in (tmp_path / "run" / "checkpoints").glob("checkpoint-*"):
        assert all(torch.isfinite(w).all() for w in load_file(checkpoint / "model.safetensors").values())


class CountReads(TorchDispatchMode):
    """Count the values that are read from a device, each of which waits for all that is queued there."""

    num_reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.num_reads += func._overloadpacket is torch.ops.aten._local_scalar_dense
        return func(*args, **(kwargs or {}))


def test_a_step_reads_nothing_from_the_device(recipe_file, store, tmp_path, monkeypatch):
    reads, compute = [], ProjectorTrainer.compute_loss

    def counted(self, *args, **kwargs):
        with CountReads() as mode:
            loss = compute(self, *args, **kwargs)
        reads.append(mode.num_reads)
        return loss

    monkeypatch.setattr(ProjectorTrainer, "compute_loss", counted)
    stage_two(recipe_file, store, tmp_path / "run")
    assert len(reads) >= 6
    assert set(reads) == {0}


def test_the_flag_of_a_loss_on_a_gpu_is_copied_in_the_background_and_waited_for_alone(monkeypatch):
    """Fakes stand for CUDA: page-locked memory, and an event after the copy."""
    calls = []

    class Event:
        def record(self, stream):
            calls.append("record")

        def synchronize(self):
            calls.append("synchronize")

    class Loss(torch.Tensor):
        is_cuda = True
        device = torch.device("cuda", 0)

    empty = torch.empty

    def pinned(*args, pin_memory=False, **kwargs):
        calls.append(f"pinned={pin_memory}")
        return empty(*args, **kwargs)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch, "empty", pinned)
    for value, is_finite in ((1.5, True), (float("nan"), False)):
        calls.clear()
        unchecked = trainer_module.UncheckedLoss(1, ["a"], torch.tensor(value).as_subclass(Loss))
        assert calls == ["pinned=True", "record"]
        assert unchecked.is_finite() is is_finite
        assert calls[-1] == "synchronize"


@pytest.mark.parametrize("setting", ["train.bf16", "decoder.dtype"])
def test_bfloat16_on_a_gpu_without_it_is_one_line(recipe_file, store, tmp_path, monkeypatch, setting):
    value = {"train.bf16": "true", "decoder.dtype": "bfloat16"}
    recipe = load_recipe(str(recipe_file), ["train.bf16=false", f"{setting}={value[setting]}"])
    monkeypatch.setattr(train_module, "pick_device", lambda _: torch.device("cuda"))
    for name, answer in (("set_device", None), ("is_bf16_supported", False), ("get_device_name", "Tesla T4")):
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    with pytest.raises(RunError, match=rf"{setting} asks for bfloat16, which Tesla T4 does not compute. Try --set "):
        train(recipe, store, Run(tmp_path / "run"))


def test_only_the_first_process_speaks(recipe_file, store, whole, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    lines: list[str] = []
    stage_two(recipe_file, store, whole, lines=lines)
    assert lines == []


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "train.accumulate=1",
            r"train.accumulate is 1 with 3 processes; expected a multiple of 3.* Try train.accumulate=3",
        ),
        ("train.report_to=['nobody']", r"names nobody, which is not installed"),
    ],
)
def test_what_cannot_be_had_is_refused_before_anything_is_loaded(
    recipe_file, store, tmp_path, monkeypatch, override, message
):
    monkeypatch.setenv("WORLD_SIZE", "3" if "accumulate" in override else "1")
    monkeypatch.setattr(train_module, "build_model", lambda *_, **__: pytest.fail("loaded a model"))
    with pytest.raises(RunError, match=message):
        stage_two(recipe_file, store, tmp_path / "run", override)
    assert not (tmp_path / "run").exists()


def test_a_gpu_by_its_number_is_refused_with_what_to_do(recipe_file, store, tmp_path):
    with pytest.raises(RunError, match=r"device 'cuda:1'; expected cuda, cpu or auto. Set CUDA_VISIBLE_DEVICES=1"):
        train(load_recipe(str(recipe_file)), store, Run(tmp_path / "run"), device="cuda:1", say=print)


def test_the_reported_loss_is_that_of_the_last_steps(recipe_file, store, tmp_path):
    report = stage_two(recipe_file, store, tmp_path / "every", "train.log_every=1")
    losses = logged(tmp_path / "every", "loss")
    sparse = stage_two(recipe_file, store, tmp_path / "sparse", "train.log_every=4")
    assert report.loss == losses[6]
    assert list(logged(tmp_path / "sparse", "loss")) == [4, 6]
    assert sparse.loss == pytest.approx((losses[5] + losses[6]) / 2, rel=1e-4)


def test_latest_is_a_link_in_runs_and_nowhere_else(recipe_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(str(recipe_file))
    for folder in (Path("runs/mine"), Path("elsewhere/other")):
        Run(folder.resolve()).begin(recipe, {})
    assert Path("runs/latest").resolve() == Path("runs/mine").resolve()
    assert not Path("elsewhere/latest").exists()


def test_metrics_and_log_hold_what_one_looks_for(store, whole):
    keys = {key for entry in Run(whole).metrics() for key in entry}
    assert {
        *("loss", "learning_rate", "grad_norm", "projected_rms", "tokens_per_second", "audio_seconds_per_second"),
        *("peak_memory_bytes", "loader_share", "num_utterances", "num_tokens"),
        *("dev_wer", "dev_loss", "dev_listening_gain"),
    } <= keys
    report = Run(whole).state["report"]
    assert (report["encoder_passes"], report["steps"]) == (0, 6)
    assert report["parameters"] == sum(weight.numel() for weight in load_file(whole / "model.safetensors").values())
    index = FeatureReader(FeatureStore.open(store), split="train").index
    assert 0 < report["audio_s"] < 6 * sum(index["duration_s"].to_pylist())
    lines = whole.with_name("lines.txt").read_text().splitlines()
    assert not any("ref " in line for line in lines), "pairs are not printed"
    log = (whole / "log.txt").read_text()
    assert "    worst:" in log
    assert log.count("    ref ") >= 16


def test_curves_reach_tensorboard(whole):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(whole / "tensorboard"))
    events.Reload()
    tags = {tag.split("/")[-1] for tag in events.Tags()["scalars"]}
    assert {"loss", "dev_wer", "projected_rms", "tokens_per_second"} <= tags


def test_model_that_ignores_the_audio_is_warned_about_once(recipe_file, store, tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.train.callback.WARN_AFTER_UTTERANCES", 20)
    lines: list[str] = []
    stage_two(recipe_file, store, tmp_path / "run", lines=lines)
    (warning,) = [line for line in lines if line.startswith("warning")]
    assert "still ignores the audio" in warning
    assert "train.learning_rate" in warning


def test_without_a_dev_split_the_loss_decides_about_the_warning(recipe_file, store, tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.train.callback.WARN_AFTER_UTTERANCES", 20)
    lines: list[str] = []
    report = stage_two(recipe_file, store, tmp_path / "run", "corpus.dev_split=absent", lines=lines)
    assert report.is_finished
    assert report.dev_wer is None
    assert len([line for line in lines if "nothing will be evaluated" in line]) == 1
    assert len([line for line in lines if "still ignores the audio" in line]) == 1
    monkeypatch.setattr("pipelines.train.callback.USED_AUDIO_LOSS", 100.0)
    lines.clear()
    stage_two(recipe_file, store, tmp_path / "heard", "corpus.dev_split=absent", lines=lines)
    assert not [line for line in lines if line.startswith("warning")]


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="torch.compile wants a C++ compiler")
def test_compiled_decoder_gives_the_same_losses(recipe_file, store, tmp_path):
    """Minutes of compiling for two steps."""
    short = ("train.steps=2", "train.log_every=1", "corpus.dev_split=absent")
    stage_two(recipe_file, store, tmp_path / "plain", *short)
    stage_two(recipe_file, store, tmp_path / "compiled", *short, "train.compile=true")
    expected, found = logged(tmp_path / "plain", "loss"), logged(tmp_path / "compiled", "loss")
    assert list(found) == [1, 2]
    assert all(abs(found[step] - expected[step]) < 1e-4 for step in expected)


@pytest.mark.gpu
@pytest.mark.parametrize("more", [[], ["train.compile=true"], ["train.gradient_checkpointing=true"]])
def test_four_steps_on_a_gpu_follow_the_cpu(recipe_file, store, tmp_path, more):
    """bf16 autocast, pinned batches, a fused optimizer; compiled, and with activations checkpointed."""
    settings = ["train.steps=4", "train.log_every=1", *more]
    train(load_recipe(str(recipe_file), settings), store, Run(tmp_path / "gpu"), device="cuda", say=print)
    stage_two(recipe_file, store, tmp_path / "cpu", "train.steps=4", "train.log_every=1")
    expected, found = logged(tmp_path / "cpu", "loss"), logged(tmp_path / "gpu", "loss")
    assert list(found) == [1, 2, 3, 4]
    assert all(abs(found[step] - expected[step]) < 0.02 * expected[step] for step in expected)


def test_the_dev_set_has_inferences_token_budget_and_loops_are_cut(recipe_file, store, whole):
    """One looping transcript would count more errors than all others together."""
    model = TinyAudioForConditionalGeneration.from_pretrained(whole)
    processor = TinyAudioProcessor.from_pretrained(whole)
    budgets: list[int] = []
    generate = model.generate
    model.generate = lambda **options: (budgets.append(options["max_new_tokens"]), generate(**options))[1]
    processor.decode_transcripts = lambda tokens: ["the cat " + "fur " * 90] * len(tokens)
    dev = DevSet.open(load_recipe(str(recipe_file)), FeatureStore.open(store), processor)
    references, hypotheses = dev.transcribe(model)
    assert hypotheses == ["the cat fur"] * len(references)
    longest_s = max(int(dev.reader.num_frames[p]) for p in dev.positions) / 50
    assert max(budgets) == token_budget(longest_s, 200) < 200
