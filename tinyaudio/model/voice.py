"""Voice activity: the probability of speech, 31 times a second.

The model and its weights are Silero VAD's, from the `silero-vad` package (MIT, needs only torch, contains its weights).
The package computes frame by frame, which is ten times slower, and importing it sets torch to one thread for the whole
process. So the forward pass is written here, for blocks of frames; a test compares the two. Travels with the
checkpoint.
"""

import warnings
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .audio import SAMPLING_RATE, Samples
from .errors import ModelError

FRAME_LENGTH = 512  # samples, 32 ms: what the model was trained on at 16 kHz
FRAME_S = FRAME_LENGTH / SAMPLING_RATE
# Silero hears nothing in clean speech whose peak is below about -50 dBFS. A recording that has been softer than
# `QUIET_PEAK` so far is made as loud as speech usually is; of a louder one nothing changes. Noise stays noise.
QUIET_PEAK, USUAL_PEAK = 0.02, 0.25  # -34 and -12 dBFS
MAX_GAIN = 200.0  # 46 dB; more makes the last bit of 16-bit samples audible
LOUD_FRAMES = 3  # that reach a peak; a click is in one or two
_CONTEXT = 64  # samples of the previous frame at the beginning of every frame
# The package's .safetensors has older weights than its .jit, which is what its own functions load (6.2.3).
_WEIGHTS = "data/silero_vad.jit"
_NAMES = {
    "stft_conv.weight": "stft.forward_basis_buffer",
    **{f"conv{i + 1}.{kind}": f"encoder.{i}.reparam_conv.{kind}" for i in range(4) for kind in ("weight", "bias")},
    **{f"lstm.{kind}_{gate}_l0": f"decoder.rnn.{kind}_{gate}" for kind in ("weight", "bias") for gate in ("ih", "hh")},
    **{f"final_conv.{kind}": f"decoder.decoder.2.{kind}" for kind in ("weight", "bias")},
}


class VoiceActivity:
    """The voice activity of one recording, given block by block."""

    def __init__(self) -> None:
        self._model = _load_model()
        self._rest = np.zeros(0, np.float32)
        self._context = np.zeros(_CONTEXT, np.float32)
        self._state: tuple[Tensor, Tensor] | None = None
        self._peaks = np.zeros(LOUD_FRAMES, np.float32)  # of the loudest frames so far, the softest first

    def feed(self, samples: Samples) -> NDArray[np.float32]:
        """Take the next samples, any number of them.

        Returns:
            (n,) probabilities of speech in 0..1, one for every frame of 512 samples that is now complete.
        """
        joined = np.concatenate([self._rest, samples * self._gain(samples)])
        num_whole = len(joined) // FRAME_LENGTH * FRAME_LENGTH
        self._rest = joined[num_whole:]
        return self._probabilities(joined[:num_whole])

    def finish(self) -> NDArray[np.float32]:
        """Return the probability of the last, incomplete frame, zero-padded: (1,) or (0,)."""
        last, self._rest = self._rest, np.zeros(0, np.float32)
        return self._probabilities(np.pad(last, (0, -len(last) % FRAME_LENGTH)))

    def _gain(self, samples: Samples) -> np.float32:
        """Take the next samples, and return how much louder they must be for the model to hear speech in them."""
        whole = samples[: len(samples) // FRAME_LENGTH * FRAME_LENGTH] if len(samples) >= FRAME_LENGTH else samples
        peaks = np.abs(whole.reshape(-1, min(FRAME_LENGTH, max(len(whole), 1)))).max(axis=1, initial=0.0)
        self._peaks = np.sort(np.concatenate([self._peaks, peaks]))[-LOUD_FRAMES:]
        peak = float(self._peaks[0])
        return np.float32(min(USUAL_PEAK / peak, MAX_GAIN) if 0 < peak < QUIET_PEAK else 1.0)

    def _probabilities(self, samples: Samples) -> NDArray[np.float32]:
        if not len(samples):
            return np.zeros(0, np.float32)
        lead = np.concatenate([self._context, samples])
        self._context = samples[-_CONTEXT:]
        frames = np.lib.stride_tricks.sliding_window_view(lead, _CONTEXT + FRAME_LENGTH)[::FRAME_LENGTH]
        with torch.no_grad():
            probabilities, self._state = self._model(torch.from_numpy(frames.copy()), self._state)
        return np.asarray(probabilities.numpy(), dtype=np.float32)


class _Silero(nn.Module):
    """Source: `tinygrad_model.py` of the silero-vad package, 6.2.3."""

    def __init__(self) -> None:
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 258, 256, stride=128, bias=False)
        self.conv1 = nn.Conv1d(129, 128, 3, padding=1)
        self.conv2 = nn.Conv1d(128, 64, 3, stride=2, padding=1)
        self.conv3 = nn.Conv1d(64, 64, 3, stride=2, padding=1)
        self.conv4 = nn.Conv1d(64, 128, 3, padding=1)
        self.lstm = nn.LSTM(128, 128)
        self.final_conv = nn.Conv1d(128, 1, 1)

    def forward(self, frames: Tensor, state: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Map frames with their context (n, 576) to probabilities (n,); the state carries over to the next block."""
        padded = nn.functional.pad(frames, (0, 64), "reflect")[:, None]
        real, imaginary = self.stft_conv(padded).chunk(2, dim=1)
        hidden = (real.square() + imaginary.square()).sqrt()
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            hidden = torch.relu(conv(hidden))
        hidden, state = self.lstm(hidden.squeeze(-1), state)
        return torch.sigmoid(self.final_conv(torch.relu(hidden)[:, :, None])).flatten(), state


@lru_cache(maxsize=1)
def _load_model() -> _Silero:
    package = find_spec("silero_vad")
    if package is None or not package.submodule_search_locations:
        raise ModelError("finding speech requires silero-vad, which is not installed. Try: pip install silero-vad")
    path = Path(package.submodule_search_locations[0]) / _WEIGHTS
    if not path.is_file():
        raise ModelError(f"expected silero-vad 6.2 or later; {str(path)!r} is missing. Try: pip install -U silero-vad")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of TorchScript, from which only the weights are read
        theirs = torch.jit.load(str(path), map_location="cpu").state_dict()  # type: ignore[no-untyped-call]
    model = _Silero()
    model.load_state_dict({ours: theirs[f"_model.{name}"] for ours, name in _NAMES.items()})
    return model.eval().requires_grad_(False)
