"""The bundled corpus and models in `pipelines/demo/` are what their README says."""

import hashlib
import io
import random
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile as sf
import torch
from transformers import (
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    HubertForCTC,
    HubertModel,
    SmolLM3ForCausalLM,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
)

from pipelines.demo.make import corpus as demo_corpus

DEMO = Path(__file__).resolve().parents[1] / "pipelines" / "demo"
SPLIT_SIZES = {"train": 2_400, "dev": 120, "test": 200, "test_unseen": 200}
EXPECTED_FILES = {
    "README.md",
    *(f"corpus/{split}-00000-of-00001.parquet" for split in SPLIT_SIZES),
    "encoder/config.json",
    "encoder/model.safetensors",
    "encoder/preprocessor_config.json",
    "encoder/tokenizer_config.json",
    "encoder/vocab.json",
    "decoder/config.json",
    "decoder/generation_config.json",
    "decoder/model.safetensors",
    "decoder/tokenizer.json",
    "decoder/tokenizer_config.json",
}


@pytest.fixture(scope="module")
def splits() -> dict[str, pa.Table]:
    return {split: pq.read_table(DEMO / f"corpus/{split}-00000-of-00001.parquet") for split in SPLIT_SIZES}


def test_folder_holds_the_expected_files_and_no_other() -> None:
    found = {path.relative_to(DEMO).as_posix() for path in DEMO.rglob("*") if path.is_file()}
    assert {name for name in found if not name.startswith("make/")} == EXPECTED_FILES


def test_folder_stays_under_ten_megabytes() -> None:
    assert sum(path.stat().st_size for path in DEMO.rglob("*") if path.is_file()) < 10_000_000


def test_schema_is_that_of_loquacious_set(splits: dict[str, pa.Table]) -> None:
    expected = pa.schema(
        [
            ("ID", pa.string()),
            ("duration", pa.float32()),
            ("wav", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            ("spk_id", pa.string()),
            ("sex", pa.string()),
            ("text", pa.string()),
        ]
    )
    for split, table in splits.items():
        assert table.schema.remove_metadata() == expected
        assert len(table) == SPLIT_SIZES[split]


def test_datasets_reads_undecoded_audio(tmp_path: Path) -> None:
    path = DEMO / "corpus/dev-00000-of-00001.parquet"
    dev = datasets.load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(tmp_path))
    assert dev.features["wav"] == datasets.Audio(decode=False)
    assert dev[0]["wav"]["bytes"].startswith(b"OggS")


def test_no_sentence_is_in_two_splits(splits: dict[str, pa.Table]) -> None:
    sentences = [sentence for table in splits.values() for sentence in table["text"].to_pylist()]
    assert len(set(sentences)) == len(sentences)


def test_sentences_are_lower_case_words(splits: dict[str, pa.Table]) -> None:
    for table in splits.values():
        for sentence in table["text"].to_pylist():
            assert all(word.isascii() and word.isalpha() and word.islower() for word in sentence.split(" "))


def test_unseen_voices_occur_in_no_other_split(splits: dict[str, pa.Table]) -> None:
    known = {voice for split in ("train", "dev", "test") for voice in splits[split]["spk_id"].to_pylist()}
    unseen = set(splits["test_unseen"]["spk_id"].to_pylist())
    assert len(known) >= 76
    assert len(unseen) >= 8
    assert not known & unseen
    assert not {_variant(voice) for voice in known} & {_variant(voice) for voice in unseen}


def _variant(voice: str) -> str:
    return voice.split("+")[1].split("-")[0]


def test_dev_and_test_voices_are_known(splits: dict[str, pa.Table]) -> None:
    known = set(splits["train"]["spk_id"].to_pylist())
    assert set(splits["dev"]["spk_id"].to_pylist()) <= known
    assert set(splits["test"]["spk_id"].to_pylist()) <= known


def test_ids_and_paths_are_unique(splits: dict[str, pa.Table]) -> None:
    rows = [row for table in splits.values() for row in table.select(["ID", "wav"]).to_pylist()]
    assert len({row["ID"] for row in rows}) == len(rows)
    assert all(row["wav"]["path"] == f"{row['ID']}.opus" for row in rows)


def test_duration_is_the_decoded_length(splits: dict[str, pa.Table]) -> None:
    for table in splits.values():
        for row in table.slice(0, 40).to_pylist():
            samples, rate = sf.read(io.BytesIO(row["wav"]["bytes"]), dtype="float32")
            assert (rate, samples.ndim) == (16_000, 1)
            assert np.float32(row["duration"]) == np.float32(len(samples) / 16_000)
            assert np.abs(samples).max() > 0.1


def test_corpus_is_what_the_generator_says(splits: dict[str, pa.Table]) -> None:
    for split, sentences in demo_corpus.split_sentences(seed=0).items():
        assert splits[split]["text"].to_pylist() == sentences


def test_opus_bytes_depend_on_nothing_random() -> None:
    samples = np.sin(np.arange(16_000, dtype=np.float32) * 0.1) * 0.3
    first, second = (demo_corpus.encode_opus(samples, "a") for _ in range(2))
    assert first == second
    assert len(demo_corpus.decode_opus(first)) == 16_000


def test_shipped_recordings_have_the_checksums_of_the_generator(splits: dict[str, pa.Table]) -> None:
    """An Ogg page that the generator would write differently is found without espeak-ng."""
    for table in splits.values():
        for row in table.slice(0, 40).to_pylist():
            opus, serial = row["wav"]["bytes"], hashlib.sha256(row["ID"].encode()).digest()[:4]
            assert demo_corpus._renumber_ogg(opus, serial) == opus


def test_held_out_sentences_are_not_drawn_twice() -> None:
    taken: set[str] = set()
    sentences = demo_corpus.make_sentences(random.Random(0), 500, taken)
    assert len(set(sentences)) == 500
    assert taken == set(sentences)


def test_encoder_loads_both_ways_and_is_finite() -> None:
    samples = torch.sin(torch.arange(16_000) * 0.05)[None]
    encoder = AutoModel.from_pretrained(DEMO / "encoder", dtype=torch.float32).eval()
    with_head = HubertForCTC.from_pretrained(DEMO / "encoder", dtype=torch.float32).eval()
    assert isinstance(encoder, HubertModel)
    assert encoder.config.feat_extract_norm == "layer"
    assert encoder.config.do_stable_layer_norm
    assert list(encoder.config.conv_kernel) == [10, 3, 3, 3, 3, 2, 2]
    assert list(encoder.config.conv_stride) == [5, 2, 2, 2, 2, 2, 2]
    with torch.no_grad():
        features = encoder(samples).last_hidden_state
        logits = with_head(samples).logits
    assert features.shape == (1, 49, encoder.config.hidden_size)
    assert logits.shape == (1, 49, 32)
    assert features.isfinite().all()
    assert logits.isfinite().all()


def test_feature_extractor_is_that_of_hubert_large() -> None:
    extractor = AutoFeatureExtractor.from_pretrained(DEMO / "encoder")
    assert isinstance(extractor, Wav2Vec2FeatureExtractor)
    assert extractor.do_normalize
    assert extractor.return_attention_mask
    assert (extractor.feature_size, extractor.sampling_rate, extractor.padding_value) == (1, 16_000, 0.0)


def test_ctc_head_and_tokenizer_spell_words(splits: dict[str, pa.Table]) -> None:
    tokenizer = Wav2Vec2CTCTokenizer.from_pretrained(DEMO / "encoder")
    extractor = AutoFeatureExtractor.from_pretrained(DEMO / "encoder")
    model = HubertForCTC.from_pretrained(DEMO / "encoder", dtype=torch.float32).eval()
    rows = splits["dev"].slice(0, 8).to_pylist()
    correct = total = 0
    for row in rows:
        samples, rate = sf.read(io.BytesIO(row["wav"]["bytes"]), dtype="float32")
        batch = extractor(samples, sampling_rate=rate, return_tensors="pt")
        with torch.no_grad():
            text = tokenizer.decode(model(batch["input_values"]).logits[0].argmax(-1))
        total += len(row["text"].split())
        correct += len(set(row["text"].split()) & set(text.split()))
    assert correct > total / 2


def test_decoder_tokenizer_round_trips_and_adds_nothing(splits: dict[str, pa.Table]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "decoder")
    assert tokenizer.eos_token == "<|end_of_text|>"
    assert tokenizer.pad_token == "<|finetune_right_pad_id|>"
    assert tokenizer.bos_token is None
    assert tokenizer.padding_side == "right"
    for text in [
        "Speech:",
        "\nTranscript:",
        " N\u00e4chster Halt: 42 \U0001f642",
        *splits["test"]["text"].to_pylist()[:50],
    ]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert tokenizer(text)["input_ids"] == ids


def test_decoder_is_a_small_smollm3() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "decoder")
    model = AutoModelForCausalLM.from_pretrained(DEMO / "decoder", dtype=torch.float32).eval()
    assert isinstance(model, SmolLM3ForCausalLM)
    assert model.config.tie_word_embeddings
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.max_position_embeddings >= 1_024
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    with torch.no_grad():
        assert model(torch.tensor([tokenizer.encode("Speech:")])).logits.isfinite().all()


def test_weights_are_stored_in_half_precision() -> None:
    for part in ("encoder", "decoder"):
        header = (DEMO / part / "model.safetensors").read_bytes()[:200_000]
        assert b'"F16"' in header
        assert b'"F32"' not in header


def test_examples_of_the_page_are_recordings_of_the_corpus(splits: dict[str, pa.Table]) -> None:
    examples = DEMO.with_name("space") / "examples"
    first = {split: splits[split].slice(0, 6).to_pylist() for split in ("test", "test_unseen")}
    assert (examples / "one-sentence.opus").read_bytes() == first["test"][0]["wav"]["bytes"]
    assert (examples / "voice-never-heard.opus").read_bytes() == first["test_unseen"][0]["wav"]["bytes"]
    five = sf.info(examples / "five-sentences.opus").duration
    assert five == pytest.approx(sum(row["duration"] for row in first["test"][1:6]) + 4 * 0.7, abs=0.05)
