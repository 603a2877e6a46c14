"""The configuration of a tinyaudio model: its two frozen parts, its projector, its prompt.

Flat, because the frozen parts keep their own configurations in their own folders. Of them it has only the names,
revisions and digests, and the sizes that the projector between them depends on.
"""

from typing import Any

from transformers import PreTrainedConfig

DEFAULT_ENCODER = "facebook/hubert-large-ls960-ft"
DEFAULT_DECODER = "HuggingFaceTB/SmolLM3-3B-Base"


class TinyAudioConfig(PreTrainedConfig):
    """The configuration saved in a checkpoint folder.

    Args:
        encoder_id, encoder_revision: hub id (or folder) and commit of the frozen encoder.
        encoder_digest: `frozen.weights_digest` of the encoder in float32; checked when loading. None: unknown.
        encoder_dim: D, width of the encoder's features.
        encoder_precision: "float32" or "bfloat16" (autocast on a GPU; a CPU always runs float32).
        encoder_context: of an encoder that has a choice, see `families.Family`; None: its family's own.
        ctc_alphabet: symbols of the encoder's CTC head, see `ctc_head.CTCHead`; None: as the encoder's tokenizer says.
        ctc_head_digest: `frozen.weights_digest` of that head; None: unknown.
        decoder_id, decoder_revision, decoder_digest: the same for the frozen decoder, in `decoder_dtype`.
        decoder_gguf_file: name of the GGUF file with the decoder's weights; None: the usual files.
        decoder_dim: H, width of the decoder's embeddings.
        decoder_dtype: precision of the decoder's weights.
        projector_kind, stack_factor, projector_hidden_size: see `projectors`.
        ctc_classes: tokens that `ctc.TokenCTC` was trained on; 0: the projector was trained without it.
        ctc_weight: of its loss beside the decoder's. With 0 the projector may have lost what a CTC phase taught it.
        prompt_prefix_ids, prompt_suffix_ids: token ids before and after the audio, see `prompt`.
        eos_token_id: ends a transcript. pad_token_id: fills finished beams.
        window_s: longest recording decoded at once, seconds; longer ones are cut at pauses. Stage two sets it from
            the utterances that the projector was trained on.
        store_fingerprint: id of the feature store this projector was trained from; None: unknown.
        calibration_id: id of the calibration of that store; None for float16 stores.
    """

    model_type = "tinyaudio"

    def __init__(
        self,
        encoder_id: str = DEFAULT_ENCODER,
        encoder_revision: str | None = None,
        encoder_digest: str | None = None,
        encoder_dim: int = 1024,
        encoder_precision: str = "float32",
        encoder_context: str | None = None,
        ctc_alphabet: dict[str, int] | None = None,
        ctc_head_digest: str | None = None,
        decoder_id: str = DEFAULT_DECODER,
        decoder_revision: str | None = None,
        decoder_digest: str | None = None,
        decoder_gguf_file: str | None = None,
        decoder_dim: int = 2048,
        decoder_dtype: str = "bfloat16",
        projector_kind: str = "mlp",
        stack_factor: int = 5,
        projector_hidden_size: int = 2048,
        ctc_classes: int = 0,
        ctc_weight: float = 0.0,
        prompt_prefix_ids: list[int] | None = None,
        prompt_suffix_ids: list[int] | None = None,
        eos_token_id: int = 128_001,
        pad_token_id: int = 128_004,
        window_s: float = 30.0,
        store_fingerprint: str | None = None,
        calibration_id: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.encoder_id, self.encoder_revision, self.encoder_digest = encoder_id, encoder_revision, encoder_digest
        self.encoder_dim, self.encoder_precision = encoder_dim, encoder_precision
        self.encoder_context = encoder_context
        self.ctc_alphabet, self.ctc_head_digest = ctc_alphabet, ctc_head_digest
        self.decoder_id, self.decoder_revision, self.decoder_digest = decoder_id, decoder_revision, decoder_digest
        self.decoder_gguf_file = decoder_gguf_file
        self.decoder_dim, self.decoder_dtype = decoder_dim, decoder_dtype
        self.projector_kind, self.stack_factor = projector_kind, stack_factor
        self.projector_hidden_size = projector_hidden_size
        self.ctc_classes, self.ctc_weight = ctc_classes, ctc_weight
        self.prompt_prefix_ids = list(prompt_prefix_ids or [])
        self.prompt_suffix_ids = list(prompt_suffix_ids or [])
        self.window_s = float(window_s)
        self.store_fingerprint, self.calibration_id = store_fingerprint, calibration_id
        super().__init__(eos_token_id=eos_token_id, pad_token_id=pad_token_id, **kwargs)
