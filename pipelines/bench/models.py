"""What `bench train` trains: models and a store, the bundled stand-ins or the real sizes at random weights.

The recordings lie in memory, decoded: that favours the contestants that encode in the loop, which would have to read
and decode them. The store lies on the disk that is measured.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from transformers import HubertConfig, HubertModel, SmolLM3Config, SmolLM3ForCausalLM, Wav2Vec2FeatureExtractor

from cache import FeatureReader, FeatureStore, Moments, make_plan
from cache.layout import Encoding
from pipelines.corpora import open_corpus
from pipelines.recipes import load_recipe
from pipelines.train.batches import Targets, tokenize
from pipelines.train.model import load_tokenizer
from tinyaudio.model.audio import SAMPLING_RATE, load_audio
from tinyaudio.model.configuration_tinyaudio import TinyAudioConfig
from tinyaudio.model.encoder import encoder_inputs, load_encoder, load_feature_extractor
from tinyaudio.model.frozen import load_decoder
from tinyaudio.model.modeling_tinyaudio import TinyAudioForConditionalGeneration
from tinyaudio.model.prompt import end_of_text_id, prompt_ids

NUM_UTTERANCES = 192
ENCODINGS: tuple[Encoding, ...] = ("float16", "int8")
# LoquaciousSet: 2,500 h in 1,074,114 utterances are 8.4 s each; English speech is about 3.5 tokens a second.
MEAN_S, SPREAD, LONGEST_S, TOKENS_PER_S = 8.4, 0.55, 28.0, 3.5
FULL_BUDGET, SMALL_BUDGET = 4096, 1536  # decoder positions: of the A100 recipes and of the demo
SMALL_HIDDEN = 512  # the demo recipe's projector


@dataclass(frozen=True, kw_only=True)
class Parts:
    """One model, one set of recordings, and the stores of their features, as float16 and as int8."""

    model: TinyAudioForConditionalGeneration
    feature_extractor: Any
    recordings: list[NDArray[np.float32]]  # in the order of the reader's index
    reader: FeatureReader
    int8: FeatureReader  # the same utterances in the same order
    targets: Targets
    costs: NDArray[np.int64]
    budget: int
    device: torch.device


@dataclass(frozen=True, kw_only=True)
class _Speech:
    recordings: list[NDArray[np.float32]]
    targets: Targets


def build_parts(folder: Path, *, full_size: bool, device: torch.device) -> Parts:
    """Load or make the models, encode the recordings once, and store their features in `folder`."""
    model, extractor, speech = (_full_size if full_size else _stand_ins)(device)
    model.to(device)
    features = _encode(model, extractor, speech.recordings)
    reader, int8 = (
        FeatureReader(_store(folder / encoding, encoding, features, speech.recordings), split="train")
        for encoding in ENCODINGS
    )
    assert reader.index["utterance_id"] == int8.index["utterance_id"]
    order = [int(name) for name in reader.index["utterance_id"].to_pylist()]
    config = model.config
    around = len(config.prompt_prefix_ids) + len(config.prompt_suffix_ids)
    targets = _reordered(speech.targets, order)
    projected = -(-reader.num_frames.astype(np.int64) // config.stack_factor)
    return Parts(
        model=model,
        feature_extractor=extractor,
        recordings=[speech.recordings[i] for i in order],
        reader=reader,
        int8=int8,
        targets=targets,
        costs=around + projected + targets.lengths,
        budget=FULL_BUDGET if full_size else SMALL_BUDGET,
        device=device,
    )


def _stand_ins(device: torch.device) -> tuple[TinyAudioForConditionalGeneration, Any, _Speech]:
    recipe = load_recipe("demo")
    tokenizer, decoder = load_tokenizer(recipe.decoder.id), load_decoder(recipe.decoder.id, None, torch.float32)
    encoder = load_encoder(recipe.encoder.id)
    model = _model(encoder, decoder, SMALL_HIDDEN, prompt_ids(tokenizer), end_of_text_id(tokenizer))
    corpus = open_corpus(recipe.corpus)
    rows = corpus.scan(recipe.corpus.train_split).slice(0, NUM_UTTERANCES).to_pylist()
    read = dict(corpus.read_audio([row["source_id"] for row in rows]))
    recordings = [load_audio(read[row["source_id"]]) for row in rows]
    targets = tokenize(tokenizer, [row["transcript"] for row in rows])
    return model, load_feature_extractor(recipe.encoder.id), _Speech(recordings=recordings, targets=targets)


def _full_size(device: torch.device) -> tuple[TinyAudioForConditionalGeneration, Any, _Speech]:
    model = full_size_model(device)
    random = np.random.default_rng(0)
    durations = np.minimum(random.lognormal(np.log(MEAN_S) - SPREAD**2 / 2, SPREAD, NUM_UTTERANCES), LONGEST_S)
    recordings = [(0.1 * random.standard_normal(int(s * SAMPLING_RATE))).astype(np.float32) for s in durations]
    lengths = np.maximum(1, (durations * TOKENS_PER_S).astype(np.int64))
    ids = random.integers(0, 128_000, int(lengths.sum()), dtype=np.int32)
    targets = Targets(ids=ids, offsets=np.append(0, np.cumsum(lengths)))
    extractor = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
    return model, extractor, _Speech(recordings=recordings, targets=targets)


def full_size_model(device: torch.device) -> TinyAudioForConditionalGeneration:
    """Build the real shapes at random weights: encoder in float32, decoder in bfloat16 from the start."""
    with device:
        encoder = HubertModel(hubert_large())
        torch.set_default_dtype(torch.bfloat16)
        try:
            decoder = SmolLM3ForCausalLM(SmolLM3Config())
        finally:
            torch.set_default_dtype(torch.float32)
    return _model(encoder.eval(), decoder.eval(), 2048, ([128_000, 1, 2], [3, 4, 5]), 128_001).to(device).eval()


def hubert_large() -> HubertConfig:
    """The shape of facebook/hubert-large-ls960-ft: 315,438,720 parameters."""
    return HubertConfig(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
        conv_bias=True,
    )


def _model(
    encoder: Any, decoder: Any, hidden_size: int, prompt: tuple[list[int], list[int]], end_of_text: int
) -> TinyAudioForConditionalGeneration:
    config = TinyAudioConfig(
        encoder_dim=encoder.config.hidden_size,
        encoder_precision="bfloat16",  # on a GPU, as in the recipes; a CPU encodes in float32
        decoder_dim=decoder.config.hidden_size,
        projector_hidden_size=hidden_size,
        prompt_prefix_ids=prompt[0],
        prompt_suffix_ids=prompt[1],
        eos_token_id=end_of_text,
    )
    torch.manual_seed(0)
    return TinyAudioForConditionalGeneration(config, encoder=encoder, decoder=decoder)


@torch.no_grad()
def _encode(model: Any, extractor: Any, recordings: list[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
    """Encode every recording by itself."""
    features = []
    for samples in recordings:
        values, mask = encoder_inputs(extractor, [samples])
        (encoded,), (count,) = model.encode(values.to(model.device), mask.to(model.device))
        features.append(encoded[: int(count)].float().cpu().numpy())
    return features


def _store(
    folder: Path, encoding: Encoding, features: list[NDArray[np.float32]], recordings: list[NDArray[np.float32]]
) -> FeatureStore:
    """Store features; ids are places in `recordings`."""
    moments = Moments(features[0].shape[1])
    for one in features:
        moments.update(one)
    ids = [str(i) for i in range(len(features))]
    frames = [len(one) for one in features]
    columns = {"utterance_id": ids, "split": ["train"] * len(ids), "source_id": ids}
    table = pa.table({**columns, "num_frames": pa.array(frames, pa.int32())})
    plan = make_plan(table, rows_per_shard=131_072)
    store = FeatureStore.create(
        folder,
        plan=plan,
        dim=len(moments.mean),
        fingerprint={"bench": True},
        encoding=encoding,
        calibration=moments.calibration() if encoding == "int8" else None,
    )
    for shard in store.pending_shards():
        writer = store.write_shard(shard)
        assert writer is not None
        with writer:
            for name in store.plan(shard)["utterance_id"].to_pylist():
                samples = recordings[int(name)]
                duration_s = len(samples) / SAMPLING_RATE
                writer.append(
                    name, features[int(name)], num_samples=len(samples), duration_s=duration_s, transcript=name
                )
    store.seal()
    return store


def _reordered(targets: Targets, order: list[int]) -> Targets:
    rows = [targets[i] for i in order]
    return Targets(ids=np.concatenate(rows), offsets=np.append(0, np.cumsum([len(row) for row in rows])))
