"""Projectors: parameter counts, the zero-padded last stack, and independence of padding."""

import pytest
import torch

from tinyaudio.model.errors import ModelError
from tinyaudio.model.projectors import PROJECTORS, build_projector, num_projected, stack_frames


@pytest.mark.parametrize("frames", [1, 4, 5, 6, 49, 50])
def test_last_stack_is_zero_padded_and_never_dropped(frames):
    features = torch.randn(2, frames, 3)
    stacked = stack_frames(features, 5)
    expected = int(num_projected(torch.tensor(frames), 5))
    assert stacked.shape == (2, expected, 15)
    assert torch.equal(stacked.reshape(2, -1, 3)[:, :frames], features)
    assert not stacked.reshape(2, -1, 3)[:, frames:].any()


def test_nothing_to_stack_is_an_error():
    with pytest.raises(ValueError, match="0 frames"):
        stack_frames(torch.zeros(1, 0, 3), 5)


@pytest.mark.parametrize("kind", PROJECTORS)
@pytest.mark.parametrize("stack_factor", [1, 4, 5])
def test_padding_changes_no_valid_projected_frame(kind, stack_factor):
    torch.manual_seed(0)
    projector = build_projector(kind, 6, 7, stack_factor, 8)
    for frames in (1, 4, 5, 13):
        features = torch.randn(1, frames, 6)
        alone = projector(features)
        padded = projector(torch.nn.functional.pad(features, (0, 0, 0, 9)))
        count = int(num_projected(torch.tensor(frames), stack_factor))
        assert alone.shape == (1, count, 7)
        assert torch.allclose(alone, padded[:, :count], atol=1e-6)


def test_conv_projector_is_a_strided_convolution():
    torch.manual_seed(0)
    projector = build_projector("conv", 6, 7, 5, 8)
    features = torch.randn(2, 15, 6)
    context = torch.nn.functional.pad(features, (0, 0, 2, 2)).transpose(1, 2)
    hidden = torch.nn.functional.gelu(projector.conv(context)).transpose(1, 2)
    assert torch.allclose(projector(features), projector.linear_out(hidden), atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "parameters"),
    [("mlp", 14_684_160), ("linear", 5120 * 2048 + 2048), ("norm_mlp", 14_684_160 + 5120)],
)
def test_full_size_parameter_counts(kind, parameters):
    projector = build_projector(kind, 1024, 2048, 5, 2048)
    assert sum(p.numel() for p in projector.parameters()) == parameters


def test_unknown_kind_names_the_known_ones():
    with pytest.raises(ModelError, match="expected one of mlp, linear, norm_mlp, conv"):
        build_projector("mpl", 1, 1, 1, 1)
    with pytest.raises(ModelError, match="must be positive"):
        build_projector("mlp", 1, 1, 0, 1)
