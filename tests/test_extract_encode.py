"""The batch encoder to the bit: batches side by side, quantising on the device, padding."""

import numpy as np
import pytest
import torch

from cache import Calibration
from cache.quantize import quantize
from pipelines.encoders import open_encoder
from pipelines.extract.batching import cut_batches
from pipelines.extract.encode import open_batch_encoder, quantize_tensor
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


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e7])
def test_features_quantised_on_the_device_are_those_of_the_store_to_the_bit(scale):
    random = np.random.default_rng(0)
    features = (scale * random.standard_normal((500, 24)) * random.lognormal(0, 2, 24)).astype(np.float32)
    features[7] = 0
    calibration = Calibration(
        mean=features.mean(axis=0), std=features.std(axis=0) * random.choice([1, 40], 24).astype("f4")
    )
    codes, scales = quantize(features, calibration)
    ours = quantize_tensor(torch.from_numpy(features), torch.from_numpy(calibration.array))
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
    assert cut_batches({"long": 999 * 16_000, "a": 400}, 320.0) == [["a"], ["long"]]
    assert cut_batches({}, 320.0) == []
