"""What the benchmarks run on: the bundled models, or the shapes of the real ones at random weights.

For `bench train`, the recordings are decoded and in memory: that favours the contestants that encode in the loop, which
would have to read and decode them. The store is on the disk that is measured.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from transformers import (
    HubertConfig,
    HubertModel,
    LlamaConfig,
    SmolLM3Config,
    SmolLM3ForCausalLM,
    Wav2Vec2FeatureExtractor,
)

from cache import FeatureReader, FeatureStore, make_plan
from pipelines.corpora import open_corpus
from pipelines.encoders import LoadedEncoder
from pipelines.recipes import load_recipe
from pipelines.train.model import load_tokenizer
from pipelines.train.targets import Targets, tokenize
from tinyaudio.model.audio import SAMPLING_RATE, Samples, load_audio
from tinyaudio.model.configuration_tinyaudio import TinyAudioConfig
from tinyaudio.model.encoder import encoder_inputs, load_encoder, load_feature_extractor
from tinyaudio.model.frozen import freeze, load_decoder, place
from tinyaudio.model.modeling_tinyaudio import TinyAudioForConditionalGeneration
from tinyaudio.model.prompt import end_of_text_id, prompt_ids

DEMO = Path(__file__).parents[1] / "demo"
NUM_UTTERANCES = 192
# LoquaciousSet: 2,500 h in 1,074,114 utterances are 8.4 s each; English speech is about 3.5 tokens a second.
MEAN_S, SPREAD, LONGEST_S, TOKENS_PER_S = 8.4, 0.55, 28.0, 3.5
FULL_BUDGET, SMALL_BUDGET = 4096, 1536  # decoder positions: of the A100 recipes and of the demo
SMALL_HIDDEN = 512  # the demo recipe's projector


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What `bench train` trains: one model, one set of recordings, and the store of their features."""

    model: TinyAudioForConditionalGeneration
    feature_extractor: Any
    recordings: list[Samples]  # in the order of the reader's index
    reader: FeatureReader
    targets: Targets  # in the same order
    costs: NDArray[np.int64]  # (N,) decoder positions
    budget: int  # decoder positions in one batch
    device: torch.device


def build_parts(folder: Path, *, full_size: bool, device: torch.device) -> Parts:
    """Load or make the models, encode the recordings once, and store their features in `folder`."""
    model, extractor, recordings, ids = (_full_size if full_size else _bundled)(device)
    place(model, device)
    reader = FeatureReader(_store(folder / "store", model, extractor, recordings), split="train")
    order = [int(name) for name in reader.index["utterance_id"].to_pylist()]
    rows = [ids[i] for i in order]
    targets = Targets(ids=np.concatenate(rows), offsets=np.append(0, np.cumsum([len(row) for row in rows])))
    config = model.config
    projected = -(-reader.num_frames.astype(np.int64) // config.stack_factor)
    return Parts(
        model=model,
        feature_extractor=extractor,
        recordings=[recordings[i] for i in order],
        reader=reader,
        targets=targets,
        costs=len(config.prompt_prefix_ids) + projected + len(config.prompt_suffix_ids) + targets.lengths,
        budget=FULL_BUDGET if full_size else SMALL_BUDGET,
        device=device,
    )


def bench_encoder(device: torch.device, *, full_size: bool) -> LoadedEncoder:
    """Load the bundled encoder, or make HuBERT-large at random weights."""
    if full_size:
        torch.manual_seed(0)
        model: Any = freeze(HubertModel(hubert_large()))
        extractor: Any = hubert_large_extractor()
    else:
        model, extractor = load_encoder(str(DEMO / "encoder")), load_feature_extractor(str(DEMO / "encoder"))
    precision = "bfloat16" if device.type == "cuda" else "float32"
    return LoadedEncoder(model=place(model, device), feature_extractor=extractor, precision=precision, fingerprint={})


def full_size_model(device: torch.device) -> TinyAudioForConditionalGeneration:
    """Build the real shapes at random weights: encoder in float32, decoder in bfloat16 from the start."""
    with device:
        encoder = HubertModel(hubert_large())
        torch.set_default_dtype(torch.bfloat16)
        try:
            decoder = SmolLM3ForCausalLM(SmolLM3Config())
        finally:
            torch.set_default_dtype(torch.float32)
    model = _model(encoder.eval(), decoder.eval(), 2048, ([128_000, 1, 2], [3, 4, 5]), 128_001)
    return place(model, device).eval()


def hubert_large() -> HubertConfig:
    """Return the shape of facebook/hubert-large-ls960-ft: 315,438,720 parameters."""
    return HubertConfig(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
        conv_bias=True,
    )


def smollm2_135m() -> LlamaConfig:
    """Return the shape of HuggingFaceTB/SmolLM2-135M: 134,515,008 parameters."""
    return LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1_536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        eos_token_id=None,  # random weights end no text
    )


def hubert_large_extractor() -> Any:
    """Return a feature extractor with the settings of facebook/hubert-large-ls960-ft."""
    return Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)


_Speech = tuple[TinyAudioForConditionalGeneration, Any, list[Samples], list[NDArray[np.int32]]]


def _bundled(device: torch.device) -> _Speech:
    recipe = load_recipe("demo")
    tokenizer, decoder = load_tokenizer(recipe.decoder.id), load_decoder(recipe.decoder.id, None, torch.float32)
    encoder = load_encoder(recipe.encoder.id)
    model = _model(encoder, decoder, SMALL_HIDDEN, prompt_ids(tokenizer), end_of_text_id(tokenizer))
    corpus = open_corpus(recipe.corpus)
    rows = corpus.scan(recipe.corpus.train_split).slice(0, NUM_UTTERANCES).to_pylist()
    read = dict(corpus.read_audio([row["source_id"] for row in rows]))
    targets = tokenize(tokenizer, [row["transcript"] for row in rows])
    recordings = [load_audio(read[row["source_id"]]) for row in rows]
    return model, load_feature_extractor(recipe.encoder.id), recordings, [targets[i] for i in range(len(rows))]


def _full_size(device: torch.device) -> _Speech:
    random = np.random.default_rng(0)
    durations = np.minimum(random.lognormal(np.log(MEAN_S) - SPREAD**2 / 2, SPREAD, NUM_UTTERANCES), LONGEST_S)
    recordings = [(0.1 * random.standard_normal(int(s * SAMPLING_RATE))).astype(np.float32) for s in durations]
    ids = [random.integers(0, 128_000, max(1, int(s * TOKENS_PER_S)), dtype=np.int32) for s in durations]
    return full_size_model(device), hubert_large_extractor(), recordings, ids


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
def _store(
    folder: Path, model: TinyAudioForConditionalGeneration, extractor: Any, recordings: list[Samples]
) -> FeatureStore:
    """Encode every recording by itself and store its features; ids are positions in `recordings`."""
    features = []
    for samples in recordings:
        values, mask = encoder_inputs(extractor, [samples])
        (encoded,), (count,) = model.encode(values.to(model.device), mask.to(model.device))
        features.append(encoded[: int(count)].float().cpu().numpy())
    ids = [str(i) for i in range(len(features))]
    frames = pa.array([len(one) for one in features], pa.int32())
    table = pa.table({"utterance_id": ids, "split": ["train"] * len(ids), "source_id": ids, "num_frames": frames})
    dim = features[0].shape[1]
    store = FeatureStore.create(folder, plan=make_plan(table), dim=dim, fingerprint={"bench": True})
    for shard in store.pending_shards():
        writer = store.write_shard(shard)
        assert writer is not None
        with writer:
            for name in store.plan(shard)["utterance_id"].to_pylist():
                num_samples = len(recordings[int(name)])
                duration_s = num_samples / SAMPLING_RATE
                writer.append(
                    name, features[int(name)], num_samples=num_samples, duration_s=duration_s, transcript=name
                )
    store.seal()
    return store
