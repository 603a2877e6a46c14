"""The batch encoder to the bit: batches side by side, quantising on the device, padding."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import Wav2Vec2FeatureExtractor

from cache import Calibration, FeatureStore, make_plan
from cache.blocks import Rows
from cache.quantize import quantize
from pipelines.encoders import open_encoder
from pipelines.extract.batching import cut_batches
from pipelines.extract.encode import EncodedBatch, encode_tensor, open_batch_encoder, quantize_tensor
from pipelines.recipes.recipe import EncoderSection
from tinyaudio.model.encoder import encode, encoder_inputs


def features_of(wait):
    return [recording.features for recording in wait().recordings]


def test_batches_side_by_side_give_what_one_thread_gives_and_leave_the_threads_as_they_were(encoder_folder, noise):
    section = EncoderSection(id=str(encoder_folder))
    encoder, num_threads = open_batch_encoder(open_encoder(section, torch.device("cpu"))), torch.get_num_threads()
    prepared = [encoder.prepare([noise(1.0 + 0.1 * i), noise(0.5)]) for i in range(8)]
    encoder.num_lanes = 3
    try:
        torch.set_num_threads(1)
        alone = [features_of(encoder.encode(inputs)) for inputs in prepared]
        torch.set_num_threads(3)
        with encoder.lanes():
            together = [features_of(wait) for wait in [encoder.encode(inputs) for inputs in prepared]]
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(num_threads)
    for one, other in zip(alone, together, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_batch_encoder_gives_the_bits_of_a_plain_call(encoder_folder, noise):
    encoder = open_encoder(EncoderSection(id=str(encoder_folder)), torch.device("cpu"))
    recordings = [noise(1.0), noise(0.7), noise(0.01)]
    batch_encoder = open_batch_encoder(encoder)
    features = features_of(batch_encoder.encode(batch_encoder.prepare(recordings)))
    plain, counts = encode(encoder.model, *encoder_inputs(encoder.feature_extractor, recordings))
    assert [len(one) for one in features] == counts.tolist()
    assert all(np.array_equal(one, row[: len(one)].numpy()) for one, row in zip(features, plain, strict=True))


@pytest.mark.parametrize("normalizes", [True, False])
def test_prepared_inputs_have_the_bits_of_the_feature_extractor(normalizes, feature_extractor, noise):
    """Also in a batch of very different lengths, loud and quiet ones; the padding is zero."""
    extractor = Wav2Vec2FeatureExtractor(do_normalize=normalizes, return_attention_mask=True)
    recordings = [noise(3.3), 1e-4 * noise(0.7), 30_000 * noise(1.1) + 5, np.zeros(500, np.float32), noise(29.9)]
    recordings += [noise(0.001)[:10], noise(1.0)[::2]]  # shorter than a window; not contiguous
    values, mask = encoder_inputs(extractor, recordings)
    padded = [np.pad(samples, (0, max(0, 400 - len(samples)))) for samples in recordings]
    theirs = extractor(padded, sampling_rate=16_000, padding=True, return_tensors="np")
    assert np.array_equal(mask.numpy(), theirs["attention_mask"].astype(bool))
    assert np.array_equal(values.numpy(), np.where(mask, theirs["input_values"], 0))
    assert (values.dtype, mask.dtype) == (torch.float32, torch.bool)


def test_a_recording_is_normalised_by_itself_also_for_encoders_without_an_attention_mask(noise):
    """Their feature extractor normalises over the padding of a batch."""
    extractor = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=False)
    short = noise(0.7)
    alone = extractor([short], sampling_rate=16_000, return_tensors="np")["input_values"][0]
    values, _ = encoder_inputs(extractor, [noise(3.0), short])
    assert np.array_equal(values[1, : len(alone)].numpy(), alone)


def test_float16_on_the_device_is_what_a_store_makes_of_float32(tmp_path):
    """Bits, clamped values and what is not finite are those of `ShardWriter.append`."""
    random = np.random.default_rng(0)
    features = (random.standard_normal((4, 50, 24)) * 10 ** random.uniform(-9, 3, (4, 50, 24))).astype(np.float32)
    features[0, 3, :3] = 65_519, 65_520, -1e9  # 65,520 is the first that rounds to infinity
    features[2, 7, 1], features[3, 0, 0] = np.nan, -np.inf
    host = {name: tensor.numpy() for name, tensor in encode_tensor(torch.from_numpy(features), "float16", None).items()}
    batch = EncodedBatch.cut(host, [50] * 4, 0.0)
    assert [recording.is_finite for recording in batch.recordings] == [True, True, False, False]
    assert [recording.num_clamped for recording in batch.recordings][:2] == [2, 0]
    names = ["a", "b"]
    plan = pa.table(
        {"utterance_id": names, "source_id": names, "split": ["train"] * 2, "num_frames": pa.array([50] * 2)}
    )
    stores = []
    for way in ("append", "append_rows"):
        store = FeatureStore.create(tmp_path / way, plan=make_plan(plan), dim=24, fingerprint={})
        with store.write_shard(0) as writer:
            for i, name in enumerate(names):
                about = {"num_samples": 16_400, "duration_s": 1.0, "transcript": ""}
                if way == "append":
                    assert writer.append(name, features[i], **about)
                else:
                    found = batch.recordings[i]
                    entry = {"utterance_id": name, **about, "speaker": None, "source": None, "extra": None}
                    assert writer.append_rows(Rows(found.features, None), entry, num_clamped=found.num_clamped)
        stores.append(((tmp_path / way / "features" / "c.0.0").read_bytes(), store.commit(0).num_clamped))
    assert stores[0] == stores[1]
    assert stores[0][1] == 2


def test_a_batch_on_its_way_to_a_float16_store_is_narrow_on_the_device_already(encoder_folder, noise):
    encoder = open_encoder(EncoderSection(id=str(encoder_folder)), torch.device("cpu"))
    for encoding, dtype in (("float32", np.float32), ("float16", np.float16)):
        narrow = open_batch_encoder(encoder, encoding)
        (recording,) = narrow.encode(narrow.prepare([noise(1.0)]))().recordings
        assert recording.features.dtype == dtype


def test_bfloat16_reaches_a_float16_store_close_to_float32(encoder_folder, noise):
    """As on a GPU, here by the autocast of a CPU."""
    exact = open_encoder(EncoderSection(id=str(encoder_folder)), torch.device("cpu"))
    recordings = [noise(1.0), noise(0.4)]
    rows = []
    for encoder in (exact, replace(exact, precision="bfloat16")):
        batch_encoder = open_batch_encoder(encoder, "float16")
        rows.append(batch_encoder.encode(batch_encoder.prepare(recordings))().recordings)
    for one, other in zip(*rows, strict=True):
        assert other.features.dtype == np.float16
        assert other.is_finite
        assert not np.array_equal(one.features, other.features), "it was computed in bfloat16"
        assert np.abs(one.features.astype(np.float32) - other.features).max() < 0.2


def test_a_full_size_batch_is_encoded_without_reading_a_value_from_the_device():
    """320 seconds of HuBERT-large's features, on the meta device, from which nothing can be read."""
    features = torch.empty(10, 1599, 1024, device="meta")
    halves = encode_tensor(features, "float16", None)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in halves.items()} == {
        "features": (torch.float16, (10, 1599, 1024)),
        "is_finite": (torch.bool, (10, 1599)),
        "num_clamped": (torch.int32, (10, 1599)),
    }


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e7])
@pytest.mark.parametrize("bits", [8, 4, 3])
def test_features_quantised_on_the_device_are_those_of_the_store_to_the_bit(scale, bits):
    random = np.random.default_rng(0)
    features = (scale * random.standard_normal((500, 24)) * random.lognormal(0, 2, 24)).astype(np.float32)
    features[7] = 0
    calibration = Calibration(
        mean=features.mean(axis=0), std=features.std(axis=0) * random.choice([1, 40], 24).astype("f4")
    )
    codes, scales = quantize(features, calibration, bits)
    ours = quantize_tensor(torch.from_numpy(features), torch.from_numpy(calibration.array), bits)
    assert np.array_equal(ours[0].numpy(), codes)
    assert np.array_equal(ours[1].numpy(), scales)


def test_batches_cost_the_least_padding_within_their_budget():
    random = np.random.default_rng(0)
    durations = [d for d in random.lognormal(np.log(7), 0.55, 400) if 2 <= d <= 30]  # mean about 8 s
    lengths = {str(i): int(d * 16_000) for i, d in enumerate(durations)}
    batches = cut_batches(lengths, 320.0)
    assert sorted(i for batch in batches for i in batch) == sorted(lengths)
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    assert all(len(batch) * max(lengths[i] for i in batch) <= 320 * 16_000 for batch in batches)
    assert 1 - sum(lengths.values()) / padded < 0.03
    assert cut_batches(dict(reversed(lengths.items())), 320.0) == batches
    assert cut_batches({"long": 999 * 16_000, "b": 400, "a": 400}, 320.0) == [["a", "b"], ["long"]]
    assert cut_batches({}, 320.0) == []
