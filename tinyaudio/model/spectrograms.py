"""Log-mel spectrograms of a padded batch, computed in float32 on its device: those of Whisper and of w2v-BERT 2.0.

Each is checked against transformers' own feature extractor. A row's values do not depend on the other rows of its
batch, and are zero after its end. Travels with the checkpoint.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.audio_utils import mel_filter_bank, window_function

from .audio import SAMPLING_RATE

WINDOW_LENGTH, HOP_LENGTH = 400, 160  # samples, 25 and 10 ms
DYNAMIC_RANGE = 8.0  # Whisper: powers of ten below the loudest value of a recording
KALDI_FFT_LENGTH = 512
KALDI_SCALE = 2.0**15  # Kaldi computes on 16-bit integers
PREEMPHASIS = 0.97
LOWEST_POWER = 1.192092955078125e-07  # Kaldi's floor of a filter's power
VARIANCE_FLOOR = 1e-7


@functools.lru_cache(maxsize=8)
def _whisper_tables(num_bands: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the window (400,) and the filters (bands, 201)."""
    filters = mel_filter_bank(
        num_frequency_bins=WINDOW_LENGTH // 2 + 1,
        num_mel_filters=num_bands,
        min_frequency=0.0,
        max_frequency=SAMPLING_RATE / 2,
        sampling_rate=SAMPLING_RATE,
        norm="slaney",
        mel_scale="slaney",
    )
    with torch.inference_mode(False):
        return torch.hann_window(WINDOW_LENGTH, device=device), torch.from_numpy(filters.T).float().to(device)


def whisper_log_mel(values: Tensor, counts: Sequence[int], num_bands: int) -> Tensor:
    """Compute Whisper's log-mel spectrogram, of each recording's own length.

    Args:
        values: (B, S) float32 at 16 kHz, zero after each end; S at least 201.
        counts: frames of each row; the row's samples must end before the last one's hop does.
        num_bands: of the filters; 80, or 128 for large-v3.

    Returns:
        (B, bands, max(counts)) float32. The frames are those of `WhisperFeatureExtractor`, which pads to 30 s.

    Source: Radford et al. 2022 (arXiv 2212.04356), section 2.2, and `WhisperFeatureExtractor`.
    """
    window, filters = _whisper_tables(num_bands, values.device)
    # Frames are centred on multiples of the hop, and the beginning is mirrored. The two frames after the end still see
    # samples, so they count for the loudest value.
    num_frames = max(counts) + 2
    half = WINDOW_LENGTH // 2
    end = (num_frames - 1) * HOP_LENGTH + half
    mirrored = values[:, 1 : half + 1].flip(1)
    padded = torch.cat([mirrored, pad(values, (0, max(end - values.shape[1], 0)))], dim=1)
    with torch.autocast(values.device.type, enabled=False):
        spectrum = torch.stft(padded, WINDOW_LENGTH, HOP_LENGTH, window=window, center=False, return_complex=True)
        power = spectrum[..., :num_frames].abs().square().contiguous()
        levels = (filters @ power).clamp(min=1e-10).log10()
    levels = torch.maximum(levels, levels.amax((1, 2), keepdim=True) - DYNAMIC_RANGE)
    return ((levels + 4.0) / 4.0)[:, :, :-2] * frame_mask(counts, values.device)[:, None, :]


@functools.lru_cache(maxsize=8)
def _kaldi_tables(num_bands: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the window (400,) and the filters (257, bands)."""
    filters = mel_filter_bank(
        num_frequency_bins=KALDI_FFT_LENGTH // 2 + 1,
        num_mel_filters=num_bands,
        min_frequency=20,
        max_frequency=SAMPLING_RATE // 2,
        sampling_rate=SAMPLING_RATE,
        norm=None,
        mel_scale="kaldi",
        triangularize_in_mel_space=True,
    )
    window = window_function(WINDOW_LENGTH, "povey", periodic=False)
    with torch.inference_mode(False):
        return tuple(torch.from_numpy(table).float().to(device) for table in (window, filters))  # type: ignore[return-value]


def kaldi_log_mel(values: Tensor, counts: Sequence[int], num_bands: int) -> Tensor:
    """Compute the filter banks of Kaldi, each band of a recording at mean 0 and variance 1, as w2v-BERT 2.0 takes them.

    Args:
        values: (B, S) float32 at 16 kHz.
        counts: frames of each row, at least 2: (samples - 400) // 160 + 1.
        num_bands: of the filters.

    Returns:
        (B, max(counts), bands) float32.

    Source: `SeamlessM4TFeatureExtractor` of transformers.
    """
    window, filters = _kaldi_tables(num_bands, values.device)
    is_frame = frame_mask(counts, values.device)[:, :, None]
    with torch.autocast(values.device.type, enabled=False):
        frames = (values * KALDI_SCALE).unfold(1, WINDOW_LENGTH, HOP_LENGTH)[:, : max(counts)]
        frames = frames - frames.mean(-1, keepdim=True)
        before = torch.cat([frames[..., :1], frames[..., :-1]], dim=-1)
        spectrum = torch.fft.rfft((frames - PREEMPHASIS * before) * window, KALDI_FFT_LENGTH)
        levels = (spectrum.abs().square() @ filters).clamp(min=LOWEST_POWER).log() * is_frame
    sizes = torch.tensor(counts).to(values.device, non_blocking=True)[:, None, None]
    centred = (levels - levels.sum(1, keepdim=True) / sizes) * is_frame
    variance = centred.square().sum(1, keepdim=True) / (sizes - 1)
    return centred / (variance + VARIANCE_FLOOR).sqrt()


def frame_mask(counts: Sequence[int], device: torch.device) -> Tensor:
    """Return (B, max(counts)) bool, true before each row's end."""
    ends = torch.tensor(counts)
    return torch.arange(max(counts), device=device)[None, :] < ends.to(device, non_blocking=True)[:, None]
