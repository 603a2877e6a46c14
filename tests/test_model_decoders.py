"""Any causal language model by its id: the loss is its own, and training, saving, generating and transcribing work."""

import numpy as np
import pytest
import torch
from conftest import write_recipe
from safetensors.torch import load_file
from tiny_decoders import DECODERS, save_decoder
from trainings import extracted, stage_two, tiny_recipe
from transformers import AutoModelForCausalLM

from cache import FeatureReader, FeatureStore
from pipelines.recipes import load_recipe
from pipelines.train.model import build_model
from tinyaudio.model.errors import ModelError
from tinyaudio.model.frozen import weights_digest
from tinyaudio.model.loss import check_head
from tinyaudio.model.prompt import end_of_text_id, prompt_ids, transcript_ids
from tinyaudio.transcribe import Transcriber


@pytest.fixture(scope="module")
def store(tmp_path_factory, encoder_folder, decoder_folder):
    return extracted(tiny_recipe(tmp_path_factory.mktemp("store"), encoder_folder, decoder_folder))


@pytest.fixture(params=DECODERS)
def decoder(request, tmp_path):
    return save_decoder(request.param, tmp_path / "decoder")


@pytest.fixture
def recipe_file(store, tmp_path, encoder_folder, decoder):
    return write_recipe(tmp_path / "tiny.toml", store.parent / "corpus", encoder_folder, decoder)


@torch.no_grad()
def test_loss_is_that_of_the_language_model_on_the_whole_prompt(recipe_file, store, decoder):
    opened = FeatureStore.open(store)
    model, processor = build_model(load_recipe(str(recipe_file)), opened, torch.device("cpu"))
    whole = AutoModelForCausalLM.from_pretrained(decoder, dtype=torch.float32).eval()
    reader, total, count = FeatureReader(opened, split="train"), 0.0, 0
    prefix, suffix = (torch.tensor(ids) for ids in prompt_ids(processor.tokenizer))
    texts = ["The dog sat", "a cat", ""]
    rows = [torch.from_numpy(reader.get(i).astype(np.float32)) for i in reader.index["utterance_id"][:3].to_pylist()]
    targets = [torch.tensor(transcript_ids(processor.tokenizer, text)) for text in texts]
    for features, target in zip(rows, targets, strict=True):
        audio = model.projector(features[None])[0]
        embed = whole.get_input_embeddings()
        inputs = torch.cat([embed(prefix), audio, embed(suffix), embed(target)])[None]
        labels = torch.full(inputs.shape[:2], -100)
        labels[0, -len(target) :] = target
        total += float(whole(inputs_embeds=inputs, labels=labels).loss) * len(target)
        count += len(target)
    batch = {
        "features": torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
        "num_frames": torch.tensor([len(row) for row in rows]),
        "labels": torch.nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=-100),
    }
    output = model(**batch)
    assert output.num_targets == count
    assert float(output.loss) == pytest.approx(total / count, rel=1e-4)
    rms = model.get_input_embeddings()(torch.arange(len(processor.tokenizer))).float().square().mean().sqrt()
    valid = torch.cat([model.projector(row[None])[0] for row in rows])
    assert float(output.projected_rms) == pytest.approx(float(valid.square().mean().sqrt() / rms), rel=0.05)


def test_it_trains_saves_loads_and_transcribes(recipe_file, store, decoder, tmp_path, talk):
    run = tmp_path / "run"
    report = stage_two(recipe_file, store, run, "train.eval_every=6", "train.save_every=6")
    assert report.is_finished
    assert np.isfinite(report.loss)
    assert all(key.startswith("projector.") for key in load_file(run / "model.safetensors"))
    loaded = Transcriber.load(run, device="cpu")
    assert weights_digest(loaded.model.decoder) == loaded.model.config.decoder_digest
    (alone,) = loaded.transcribe([talk], max_new_tokens=8)
    assert alone.error is None
    assert alone.segments
    many = [one.text for one in loaded.stream([talk, talk], max_new_tokens=8, batch_size=2)]
    assert many == [alone.text] * 2


def test_transcripts_survive_the_tokenizer_and_end_at_its_own_token(recipe_file, store):
    model, processor = build_model(load_recipe(str(recipe_file)), FeatureStore.open(store), torch.device("cpu"))
    tokenizer = processor.tokenizer
    assert model.generation_config.eos_token_id == end_of_text_id(tokenizer)
    for text in ("the cat sat on the mat", "Caf\u00e9 & 3 dogs, isn't it?", "", "the <|im_end|> </s> <eos> cat"):
        ids = transcript_ids(tokenizer, text)
        assert ids[-1] == end_of_text_id(tokenizer)
        assert end_of_text_id(tokenizer) not in ids[:-1]
        assert tokenizer.bos_token_id is None or tokenizer.bos_token_id not in ids[:-1]
        assert processor.decode_transcripts([ids]) == [text]
    # Rows of the tables that are no token can be written; they are no text.
    last_row = model.decoder.get_output_embeddings().weight.shape[0] - 1
    assert last_row < len(tokenizer) or processor.decode_transcripts([[last_row]]) == [""]


def test_decoder_with_other_logits_than_its_heads_is_refused(tmp_path, monkeypatch):
    decoder = AutoModelForCausalLM.from_pretrained(save_decoder("gemma2", tmp_path))
    check_head(decoder)
    monkeypatch.setattr("tinyaudio.model.loss.head_of", lambda decoder: decoder.get_output_embeddings())
    with pytest.raises(ModelError, match="found other ones in 'gemma2'"):
        check_head(decoder)
