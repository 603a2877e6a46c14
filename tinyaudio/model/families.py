"""The families of encoders: how each is loaded, fed, run and counted, by the `model_type` of its configuration.

Every family takes samples at 16 kHz and gives 50 frames a second; frames are counted from samples with integers alone,
so that a plan needs a configuration and no weights. An utterance has the same features alone and in any padded batch.
A new family is a class here, and an entry of `FAMILIES`. Travels with the checkpoint.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AutoModel, PreTrainedModel
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from .audio import HOP_LENGTH, WINDOW_LENGTH, num_frames
from .errors import ModelError
from .spectrograms import frame_mask, kaldi_log_mel, whisper_log_mel


class Family:
    """One family of encoders, for one configuration.

    Args:
        context: a value of `contexts`; None is the first of them, or nothing for a family without a choice.

    Raises:
        ModelError: the configuration or the context is not one that this family can serve.
    """

    contexts: ClassVar[tuple[str, ...]] = ()
    formula: ClassVar[str]  # of `num_frames`, as a store's fingerprint states it
    min_samples: ClassVar[int] = WINDOW_LENGTH  # shorter recordings are zero-padded to this
    max_samples: int | None = None  # of one recording; None: any

    def __init__(self, config: Any, context: str | None = None) -> None:
        if context is not None and context not in self.contexts:
            expected = f"one of {', '.join(self.contexts)}" if self.contexts else "none for this encoder"
            raise ModelError(f"expected an encoder.context of {expected}, found {context!r} for {config.model_type!r}")
        if getattr(config, "add_adapter", False):  # of wav2vec 2.0, WavLM and w2v-BERT
            raise ModelError(
                "expected an encoder at 50 Hz, found one with an adapter (add_adapter), which joins frames"
            )
        self.config = config
        self.context = context or next(iter(self.contexts), None)

    def num_frames(self, num_samples: int) -> int:
        """Count the frames of a recording, after it is padded to `min_samples`."""
        raise NotImplementedError

    def load(self, from_pretrained: Callable[..., PreTrainedModel]) -> PreTrainedModel:
        """Load the encoder's weights, and no others.

        Args:
            from_pretrained: takes a class of transformers, and keywords of its `from_pretrained`.
        """
        return from_pretrained(AutoModel)

    def build(self) -> PreTrainedModel:
        """Make an encoder with random weights."""
        return AutoModel.from_config(self.config)

    def run(self, encoder: PreTrainedModel, values: Tensor, mask: Tensor, lengths: Sequence[int]) -> Tensor:
        """Compute the features.

        Args:
            values: (B, S) float32, zero after each end. mask: (B, S), 1 on samples. lengths: samples of each row.

        Returns:
            (B, T, D) with T at least the frames of the longest row; undefined after each row's end.
        """
        raise NotImplementedError

    def fingerprint(self) -> dict[str, Any]:
        """Describe what happens between samples and weights, unless the samples themselves are the encoder's input."""
        return {}


class Waveform(Family):
    """HuBERT, wav2vec 2.0, WavLM, UniSpeech and Data2Vec: convolutions over samples, a window of 25 ms, a hop of 20."""

    formula = f"(samples - {WINDOW_LENGTH}) // {HOP_LENGTH} + 1"

    def __init__(self, config: Any, context: str | None = None) -> None:
        super().__init__(config, context)
        window, hop = 1, 1
        for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
            window, hop = window + (kernel - 1) * hop, hop * stride
        if (window, hop) != (WINDOW_LENGTH, HOP_LENGTH):
            raise ModelError(
                f"expected an encoder with window {WINDOW_LENGTH} and hop {HOP_LENGTH} samples (50 Hz), "
                f"found window {window} and hop {hop}"
            )
        # Group norm (the "base" sizes) averages over time, and Data2Vec's positional convolutions read beyond a row's
        # end; padding would change the features.
        self.takes_padding = config.model_type != "data2vec-audio" and config.feat_extract_norm == "layer"

    def num_frames(self, num_samples: int) -> int:
        return num_frames(num_samples)

    def run(self, encoder: PreTrainedModel, values: Tensor, mask: Tensor, lengths: Sequence[int]) -> Tensor:
        if self.takes_padding:
            return encoder(values, attention_mask=mask).last_hidden_state
        features = values.new_zeros(len(lengths), self.num_frames(max(lengths)), self.config.hidden_size)
        for i, num_samples in enumerate(lengths):
            alone = encoder(values[i : i + 1, :num_samples]).last_hidden_state[0]
            features[i, : len(alone)] = alone
        return features


class AnyLengthWhisperEncoder(WhisperEncoder):
    """Whisper's encoder for spectrograms of any even length up to its 30 s, with a mask of the frames."""

    _keys_to_ignore_on_load_unexpected = (r"decoder\.", r"proj_out")

    def forward(self, input_features: Tensor, attention_mask: Tensor | None = None, **_: Any) -> BaseModelOutput:
        """Encode.

        Args:
            input_features: (B, bands, 2 T), zero after each end.
            attention_mask: (B, T) bool, true on frames; None if all rows have the same length.
        """
        hidden = nn.functional.gelu(self.conv1(input_features))
        hidden = nn.functional.gelu(self.conv2(hidden)).transpose(1, 2)
        hidden = hidden + self.embed_positions.weight[: hidden.shape[1]]
        mask = None if attention_mask is None else create_bidirectional_mask(self.config, hidden, attention_mask)
        for layer in self.layers:
            hidden = layer(hidden, mask)
        return BaseModelOutput(last_hidden_state=self.layer_norm(hidden))


class Whisper(Family):
    """Whisper's encoder without its decoder: log-mel spectrograms, frames of 20 ms, at most 30 s.

    With the context "own" it encodes the length of a recording, rounded up to a frame, and its positions alone. With
    "full" it encodes 30 s as it was trained, with silence after the recording, and the frames of the silence are
    dropped: 6 to 10 times as slow on short recordings.
    """

    contexts = ("own", "full")
    formula = f"ceil(samples / {HOP_LENGTH})"

    def __init__(self, config: Any, context: str | None = None) -> None:
        super().__init__(config, context)
        self.max_samples = config.max_source_positions * HOP_LENGTH

    def num_frames(self, num_samples: int) -> int:
        return -(-max(num_samples, self.min_samples) // HOP_LENGTH)

    def load(self, from_pretrained: Callable[..., PreTrainedModel]) -> PreTrainedModel:
        return from_pretrained(AnyLengthWhisperEncoder, key_mapping={r"^(model\.)?encoder\.": ""})

    def build(self) -> PreTrainedModel:
        return AnyLengthWhisperEncoder(self.config)

    def run(self, encoder: PreTrainedModel, values: Tensor, mask: Tensor, lengths: Sequence[int]) -> Tensor:
        counts = [self.num_frames(length) for length in lengths]
        if self.context == "full":
            longest = [self.config.max_source_positions] * len(counts)
            return encoder(self._log_mel(values, longest)).last_hidden_state
        is_frame = frame_mask(counts, values.device) if len(set(counts)) > 1 else None
        return encoder(self._log_mel(values, counts), attention_mask=is_frame).last_hidden_state

    def _log_mel(self, values: Tensor, counts: Sequence[int]) -> Tensor:
        """Compute the spectrogram, (B, bands, 2 * max(counts)): a frame of the encoder is two of its own."""
        return whisper_log_mel(values, [2 * count for count in counts], self.config.num_mel_bins)

    def fingerprint(self) -> dict[str, Any]:
        return {"input": f"log-mel, {self.config.num_mel_bins} bands", "context": self.context}


class W2vBert(Family):
    """w2v-BERT 2.0: pairs of Kaldi's filter banks (25 ms every 10 ms), each band of a recording normalised."""

    formula = "((samples - 400) // 160 + 1) // 2"
    min_samples = 560  # two windows

    def __init__(self, config: Any, context: str | None = None) -> None:
        super().__init__(config, context)
        self.num_bands = config.feature_projection_input_dim // 2

    def num_frames(self, num_samples: int) -> int:
        return self._num_windows(num_samples) // 2

    def _num_windows(self, num_samples: int) -> int:
        return (max(num_samples, self.min_samples) - 400) // 160 + 1

    def run(self, encoder: PreTrainedModel, values: Tensor, mask: Tensor, lengths: Sequence[int]) -> Tensor:
        windows = [self._num_windows(length) for length in lengths]
        values = pad(values, (0, max(self.min_samples - values.shape[1], 0)))
        bands = kaldi_log_mel(values, windows, self.num_bands)
        bands = bands[:, : max(windows) // 2 * 2].reshape(len(values), -1, 2 * self.num_bands)
        is_frame = frame_mask([count // 2 for count in windows], values.device)
        return encoder(bands, attention_mask=is_frame).last_hidden_state

    def fingerprint(self) -> dict[str, Any]:
        return {"input": f"filter banks, 2 x {self.num_bands} bands"}


FAMILIES: dict[str, type[Family]] = {
    **dict.fromkeys(("hubert", "wav2vec2", "wavlm", "unispeech", "unispeech-sat", "data2vec-audio"), Waveform),
    "whisper": Whisper,
    "wav2vec2-bert": W2vBert,
}


def family_of(config: Any, context: str | None = None) -> Family:
    """Choose the family of an encoder by its configuration.

    Args:
        context: None is that of a loaded encoder, or the family's own.

    Raises:
        ModelError: no family takes it.
    """
    if config.model_type not in FAMILIES:
        raise ModelError(
            f"expected an encoder of {', '.join(FAMILIES)}, found {config.model_type!r}. Try another encoder.id"
        )
    context = context or getattr(config, "encoder_context", None)  # set by `encoder.load_encoder`
    return FAMILIES[config.model_type](config, context)
