"""The model: a frozen encoder, a trained projector, a frozen decoder.

Shape letters, here and in all modules: B batch, S samples, T encoder frames, P projected frames, D encoder width,
H decoder width, L text tokens, V vocabulary.

Invariants: the frozen parts never train and are never in a checkpoint; the projector is float32, also under bf16
autocast; training and inference build the same prompt (`prompt.assemble`); the loss is over transcript and end-of-text,
and the decoder's head is applied at those positions only, so logits of audio positions are never computed.

This file is also the single entry point of a checkpoint's own code (`trust_remote_code`): it and the modules it imports
travel in the checkpoint folder, so they import each other relatively and no other module of the project.
"""

import copy
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES
from transformers.utils import ModelOutput

from .configuration_tinyaudio import TinyAudioConfig
from .ctc import TokenCTC
from .ctc_head import CTCHead
from .drafts import Drafter
from .encoder import encode, load_encoder_with_head
from .errors import MissingModelError, ModelError, one_line
from .frozen import check_digest, check_files, freeze, is_hub_id, load_decoder, naming_damage, place
from .loss import head_of, summed_cross_entropy, target_log_probs
from .pipeline_tinyaudio import TinyAudioPipeline
from .processing_tinyaudio import TinyAudioProcessor
from .projectors import build_projector, num_projected
from .prompt import assemble, pad_left, pad_right
from .verify import Written, write_with_drafts

__all__ = ["TinyAudioConfig", "TinyAudioForConditionalGeneration", "TinyAudioPipeline", "TinyAudioProcessor"]

# Without this entry transformers treats the model as a CTC model and decodes its logits into plausible garbage.
MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES.setdefault("tinyaudio", "TinyAudioForConditionalGeneration")

# Beam width and length as on the card of the original Tiny Audio; transformers' own default is 5 beams.
GENERATION_DEFAULTS = {"num_beams": 4, "max_new_tokens": 200, "length_penalty": 1.0, "do_sample": False}

IGNORED_LABEL = -100
# Files that travel in a checkpoint: this module and all it imports relatively (a test compares the two).
TRAVELLING = sorted(path.name for path in Path(__file__).parent.glob("*.py") if path.name != "__init__.py")
# Every class is named through this one module: transformers copies each entry file of a local folder into its own
# package, so two entries would mean two different TinyAudioConfig classes.
_HERE = "modeling_tinyaudio"
AUTO_MAP = {
    "AutoConfig": f"{_HERE}.TinyAudioConfig",
    "AutoModelForSpeechSeq2Seq": f"{_HERE}.TinyAudioForConditionalGeneration",
}
CUSTOM_PIPELINES = {
    "automatic-speech-recognition": {
        "impl": f"{_HERE}.TinyAudioPipeline",
        "pt": ["AutoModelForSpeechSeq2Seq"],
        "default": {},
        "type": "multimodal",
    }
}


@dataclass
class TinyAudioOutput(ModelOutput):
    """The result of a training step.

    Args:
        loss: scalar, cross-entropy in nats per target token (or summed and divided by `num_items_in_batch`), with the
            weighted CTC loss if that is computed.
        num_targets: target tokens in the batch.
        ctc_loss: scalar, CTC loss over the decoder's tokens, divided as `loss`; None if not computed.
        ctc_left_out: scalar, rows that the CTC loss left out, having more tokens than projected frames.
        projected_rms: scalar, RMS of the valid projected frames over the RMS of the decoder's embeddings. It shows
            problems earlier than the loss: too small saturates attention, too large drowns the prompt.
    """

    loss: Tensor | None = None
    num_targets: int | None = None
    ctc_loss: Tensor | None = None
    ctc_left_out: Tensor | None = None
    projected_rms: Tensor | None = None


class TinyAudioForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Transcribes speech.

    Args:
        encoder, decoder: the frozen parts, or None to attach them later (`attach`). Stage two trains without encoder.
    """

    config_class = TinyAudioConfig
    pipeline_class = TinyAudioPipeline  # the pipeline of a loaded model, see there
    base_model_prefix = ""
    main_input_name = "input_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(
        self, config: TinyAudioConfig, encoder: PreTrainedModel | None = None, decoder: PreTrainedModel | None = None
    ) -> None:
        super().__init__(config)
        # The encoder comes first: pipelines cast the waveform to the type of the first parameter.
        self.register_module("encoder", None)
        self.projector = build_projector(
            config.projector_kind,
            config.encoder_dim,
            config.decoder_dim,
            config.stack_factor,
            config.projector_hidden_size,
        )
        self.register_module("decoder", None)
        self.register_module("ctc_head", None)
        self.register_module("token_ctc", None)
        if config.ctc_classes:
            self.token_ctc = TokenCTC(config.ctc_classes, config.decoder_dim)
        # Otherwise Trainer counts labels[:, 1:], as for a model that shifts them itself.
        self.loss_type = None
        self._checkpoints_activations = False
        self._compiled_decoder: Any = None
        self._cached_embedding_rms: Tensor | None = None
        self._cached_prompt_ids: tuple[Tensor, Tensor] | None = None
        self.generation_config = GenerationConfig(
            **GENERATION_DEFAULTS, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
        )
        self.post_init()
        self.attach(encoder, decoder)

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Keep PyTorch's initialisation: the frozen parts are loaded, and the projector initialises itself."""

    def attach(
        self,
        encoder: PreTrainedModel | None = None,
        decoder: PreTrainedModel | None = None,
        ctc_head: CTCHead | None = None,
    ) -> None:
        """Attach frozen parts, and freeze them. A new encoder takes the place of the old one's head too.

        Raises:
            ModelError: a part's width is not the configured one.
        """
        if encoder is not None:
            _check_width("encoder", encoder.config.hidden_size, self.config.encoder_dim)
            self.encoder, self.ctc_head = freeze(encoder), ctc_head
        if decoder is not None:
            _check_width("decoder", decoder.get_input_embeddings().embedding_dim, self.config.decoder_dim)
            self.decoder = freeze(decoder)
            decoder.generation_config = self.generation_config
        # Exact names, as transformers compares them literally: omitted when saving, expected missing when resuming.
        trained = ("projector.", "token_ctc.")
        self._keys_to_ignore_on_save = {key for key in self.state_dict() if not key.startswith(trained)}

    def add_token_ctc(self, token_ids: Tensor) -> None:
        """Add the CTC loss over tokens, for training.

        Args:
            token_ids: (C,) the tokens that occur in transcripts, ascending, without end-of-text.
        """
        self.config.ctc_classes = len(token_ids)
        self.token_ctc = TokenCTC(len(token_ids), self.config.decoder_dim).to(self.get_input_embeddings().weight.device)
        self.token_ctc.token_ids.copy_(token_ids)
        self.attach()

    def train(self, mode: bool = True) -> "TinyAudioForConditionalGeneration":
        """Switch the projector's mode. The encoder stays in eval mode: SpecAugment and dropout would change features.

        The decoder is switched only if it checkpoints activations, which transformers does in training mode only.
        """
        super().train(mode)
        if self.encoder is not None:
            self.encoder.eval()
        if self.decoder is not None:
            self.decoder.train(mode and self._checkpoints_activations)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move all parts, but change the precision of the decoder alone: `model.half()` is `dtype="float16"`.

        The encoder chooses its own precision (`encode`), and the projector is float32.
        """

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        for name, part in self.named_children():
            part._apply(fn if name == "decoder" else move, recurse)
        return self

    def checkpoint_activations(self) -> None:
        """Trade decoder compute for memory: recompute activations in the backward pass instead of keeping them."""
        decoder = self._decoder()
        enable = getattr(decoder, "activation_checkpointing_enable", None) or decoder.gradient_checkpointing_enable
        enable()
        self._checkpoints_activations = True

    def compile_decoder(self) -> None:
        """Compile the decoder's training step, for any length; generation is not compiled."""
        self._compiled_decoder = torch.compile(self._decoder().get_decoder().forward, dynamic=True)

    def get_input_embeddings(self) -> Any:
        return self._decoder().get_input_embeddings()

    def _decoder(self) -> PreTrainedModel:
        if self.decoder is None:
            raise ModelError(
                "this model has no decoder attached. Load it with from_pretrained, or call attach(decoder=...)"
            )
        return self.decoder

    def encode(self, input_values: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Run the encoder in the precision this model was trained for; shapes as `encoder.encode`.

        Raises:
            ModelError: no encoder attached.
        """
        if self.encoder is None:
            raise ModelError("this model has no encoder attached. Pass features=, or call attach(encoder=...)")
        precision = self.config.encoder_precision if input_values.is_cuda else "float32"
        return encode(self.encoder, input_values, attention_mask, precision)

    def _features(
        self,
        input_values: Tensor | None,
        attention_mask: Tensor | None,
        features: Tensor | None,
        num_frames: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        if features is not None and num_frames is not None:
            return features, num_frames
        if input_values is None:
            raise ModelError("expected input_values (with attention_mask), or features with num_frames")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_values, dtype=torch.long)
        return self.encode(input_values, attention_mask)

    def project(self, features: Tensor, num_frames: Tensor) -> tuple[Tensor, Tensor]:
        """Run the projector.

        Args:
            features: (B, T, D), any float type, zero after each end.
            num_frames: (B,).

        Returns:
            (B, P, H) in the decoder's precision, and the number of valid projected frames (B,).
        """
        projected = self.projector(features.to(next(self.projector.parameters()).dtype))
        embeddings = self.get_input_embeddings().weight
        return projected.to(embeddings.dtype), num_projected(num_frames, self.config.stack_factor)

    def forward(
        self,
        input_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        features: Tensor | None = None,
        num_frames: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        host_counts: tuple[list[int], list[int]] | None = None,
        ctc_weight: float = 0.0,
        is_ctc_only: bool = False,
        **_: Any,
    ) -> TinyAudioOutput:
        """Compute the loss of transcripts, from stored features or from audio.

        Args:
            input_values, attention_mask: (B, S), from the processor; used if `features` is None.
            features: (B, T, D) encoder output, zero after each end. num_frames: (B,) valid frames.
            labels: (B, L) ids of `prompt.transcript_ids`, -100 after each end.
            num_items_in_batch: target tokens over all accumulated batches; the summed loss is divided by it.
            host_counts: `num_frames` and the targets of each row as plain numbers, if the caller has them; otherwise
                they are read from the device, and the host waits for it.
            ctc_weight: of the CTC loss over tokens beside the decoder's; 0 does not compute it.
            is_ctc_only: compute the CTC loss alone, with weight 1; the decoder does not run.

        Raises:
            ModelError: neither audio nor features, no labels, or a part that is not attached.
        """
        if labels is None:
            raise ModelError("forward computes a loss and requires labels. Use generate() for transcripts")
        features, num_frames = self._features(input_values, attention_mask, features, num_frames)
        projected, lengths = self.project(features, num_frames)
        if host_counts is None:
            host_counts = num_frames.tolist(), (labels != IGNORED_LABEL).sum(-1).tolist()
        frames, num_targets = (torch.tensor(counts) for counts in host_counts)
        host_lengths = num_projected(frames, self.config.stack_factor)
        divisor = sum(host_counts[1]) if num_items_in_batch is None else num_items_in_batch
        loss, ctc_loss, ctc_left_out = projected.new_zeros((), dtype=torch.float32), None, None
        if not is_ctc_only:
            hidden, targets = self._hidden_at_targets(projected, host_lengths, labels, num_targets)
            loss = summed_cross_entropy(hidden, head_of(self._decoder()), targets) / divisor
        if is_ctc_only or ctc_weight:
            if self.token_ctc is None:
                raise ModelError("this model has no CTC loss over tokens. Call add_token_ctc(token_ids)")
            # The last target is end-of-text, which no frame stands for.
            total, ctc_left_out = self.token_ctc.loss(
                projected, host_lengths.tolist(), labels, (num_targets - 1).tolist(), self.get_input_embeddings().weight
            )
            ctc_loss = total / divisor
            loss = loss + (1.0 if is_ctc_only else ctc_weight) * ctc_loss
        elif self.token_ctc is not None:  # all processes of DDP expect a gradient for every weight
            loss = loss + 0.0 * sum(weight.sum() for weight in self.token_ctc.parameters())
        valid = torch.arange(projected.shape[1], device=projected.device)[None, :] < lengths[:, None]
        # Selecting the valid frames would wait for the device.
        energy = (projected.detach().float().square() * valid[:, :, None]).sum()
        if self._cached_embedding_rms is None:
            # A float32 copy of SmolLM3's embeddings and its square would be 2.1 GB.
            embed = self.get_input_embeddings()
            weight = embed.weight.detach()
            norms = torch.linalg.vector_norm(weight, dim=-1, dtype=torch.float32)
            some = torch.arange(min(64, len(weight)), device=weight.device)
            # Gemma scales what it reads from the table.
            scale = embed(some).detach().float().norm() / norms[some].norm()
            self._cached_embedding_rms = scale * torch.linalg.vector_norm(norms) / weight.numel() ** 0.5
        projected_rms = (energy / (lengths.sum() * projected.shape[-1])).sqrt() / self._cached_embedding_rms
        return TinyAudioOutput(
            loss=loss,
            num_targets=sum(host_counts[1]),
            ctc_loss=None if ctc_loss is None else ctc_loss.detach(),
            ctc_left_out=ctc_left_out,
            projected_rms=projected_rms,
        )

    def _hidden_at_targets(
        self, projected: Tensor, lengths: Tensor, labels: Tensor, num_targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Run the decoder: the hidden states that predict a target, (N, H), and the targets, (N,).

        Args:
            lengths, num_targets: (B,) projected frames and targets of each row, on the host.
        """
        prefix, suffix = self._prompt_embeddings()
        target_ids = [row[:n] for row, n in zip(labels, num_targets.tolist(), strict=True)]
        embed = self.get_input_embeddings()
        rows = assemble(prefix, projected, lengths, suffix, [embed(ids) for ids in target_ids])
        # Right padding needs no mask: causal attention never looks beyond a position, and without a mask attention
        # takes its fast causal path. With None, transformers checks on the device whether rows are packed; under
        # torch.compile it assumes that they are and builds a mask. A dictionary is a mask that is already prepared;
        # SmolLM3 accepts one, Llama does not.
        config = self._decoder().config
        is_plain = config.model_type == "smollm3" and set(config.layer_types) == {"full_attention"}
        mask: Any = {"full_attention": None} if is_plain else None
        decoder = self._compiled_decoder or self._decoder().get_decoder()
        states = decoder(inputs_embeds=pad_right(rows), attention_mask=mask, use_cache=False).last_hidden_state
        first = len(prefix) + lengths + len(suffix) - 1  # the last prompt position predicts the first target
        row = torch.repeat_interleave(torch.arange(len(rows)), num_targets)
        offset = torch.cat([torch.arange(n) for n in num_targets.tolist()])
        row, position = torch.stack([row, first[row] + offset]).to(states.device, non_blocking=True)
        return states[row, position], torch.cat(target_ids)

    def _prompt_embeddings(self) -> tuple[Tensor, Tensor]:
        embed = self.get_input_embeddings()
        ids = self._cached_prompt_ids
        if ids is None or ids[0].device != embed.weight.device:
            parts = (self.config.prompt_prefix_ids, self.config.prompt_suffix_ids)
            prefix, suffix = (torch.tensor(part, dtype=torch.long, device=embed.weight.device) for part in parts)
            ids = self._cached_prompt_ids = (prefix, suffix)
        return embed(ids[0]), embed(ids[1])

    @torch.no_grad()
    def target_log_probs(
        self, features: Tensor, num_frames: Tensor, targets: Sequence[Sequence[int]]
    ) -> tuple[Tensor, ...]:
        """Compute how probable given transcripts are: one pass of the decoder, without generation.

        Args:
            features, num_frames: as in `project`.
            targets: ids of `prompt.transcript_ids` of each row; at least one.

        Returns:
            For each row (L_i,) float32 on the CPU, the log-probability of each target after those before it, in nats.
        """
        projected, lengths = self.project(features, num_frames)
        num_targets = torch.tensor([len(row) for row in targets])
        labels = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in targets], batch_first=True)
        hidden, flat = self._hidden_at_targets(projected, lengths.cpu(), labels.to(projected.device), num_targets)
        found = target_log_probs(hidden, head_of(self._decoder()), flat)
        return torch.split(found.cpu(), num_targets.tolist())

    @torch.no_grad()
    def generate(
        self,
        input_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        features: Tensor | None = None,
        num_frames: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Generate transcripts.

        Args:
            input_values, attention_mask, features, num_frames: as in `forward`.
            generation_config, kwargs: as in `transformers.GenerationMixin.generate`: num_beams, max_new_tokens, ...

        Returns:
            (B, L) token ids of the transcripts without the prompt, padded with `pad_token_id`.
        """
        features, num_frames = self._features(input_values, attention_mask, features, num_frames)
        projected, lengths = self.project(features, num_frames)
        prefix, suffix = self._prompt_embeddings()
        embeds, mask = pad_left(assemble(prefix, projected, lengths, suffix))
        # Options of generation go into the configuration: transformers deprecates both in one call.
        config = copy.deepcopy(generation_config or self.generation_config)
        others = config.update(**kwargs)
        return self._decoder().generate(inputs_embeds=embeds, attention_mask=mask, generation_config=config, **others)

    @torch.no_grad()
    def generate_with_drafts(
        self, features: Tensor, num_frames: Tensor, drafter: Drafter, vocabulary: Sequence[str], budgets: Sequence[int]
    ) -> list[Written]:
        """Generate transcripts as greedy `generate` does, from drafts that the decoder checks.

        Args:
            features, num_frames: as in `forward`.
            drafter: see `drafts`. vocabulary: `drafts.vocabulary_of` the tokenizer.
            budgets: the most tokens of each row.
        """
        projected, lengths = self.project(features, num_frames)
        drafts = drafter.draft(features, num_frames, projected, lengths)
        prefix, suffix = self._prompt_embeddings()
        prompts = assemble(prefix, projected, lengths, suffix)
        return write_with_drafts(self._decoder(), prompts, drafts, vocabulary, budgets, self.config.eos_token_id)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *args: Any,
        dtype: Any = None,
        torch_dtype: Any = None,
        device_map: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Load a checkpoint: the projector from its folder, the frozen parts as named in its configuration.

        Args:
            pretrained_model_name_or_path: folder or hub id.
            dtype: precision of the decoder; "auto" or None is the one it was trained with. Encoder and projector are
                always float32.
            device_map: the device of all parts, or "auto" for CUDA if available. None: the CPU.
            kwargs: as in transformers; also any field of `TinyAudioConfig`, such as encoder_id="/a/local/copy".

        Raises:
            MissingModelError: there is no such checkpoint, or a frozen part cannot be found.
            ModelError: no projector weights, damaged files, or a frozen part other than the one that the projector was
                trained with.
        """
        name = str(pretrained_model_name_or_path)
        if not Path(name).is_dir() and not is_hub_id(name):
            raise MissingModelError(
                f"no tinyaudio model at {name!r}. Expected a folder such as 'runs/first', or a hub id"
            )
        overrides = {key: kwargs.pop(key) for key in _OVERRIDABLE if key in kwargs}
        device = _one_device(device_map)  # an error before anything is loaded
        kwargs["output_loading_info"] = True
        if Path(name).is_dir():
            check_files(Path(name))
        try:
            with naming_damage(name):
                model, info = super().from_pretrained(
                    pretrained_model_name_or_path, *args, dtype=torch.float32, **kwargs
                )
        except OSError as error:
            if Path(name).is_dir():
                remedy = "Expected the folder of a run or a checkpoint"
            else:
                remedy = "Check the id and the network, or name a folder"
            raise MissingModelError(f"no tinyaudio model at {name!r} ({one_line(error)}). {remedy}") from error
        lost = sorted(info["missing_keys"]) + sorted(key for key, *_ in info["mismatched_keys"])
        if lost:
            raise ModelError(f"{name!r} lacks the weights {lost}. Train it again")
        for part in ("encoder", "decoder"):
            if f"{part}_id" in overrides:  # the pinned revision is a commit of the original's repository
                overrides.setdefault(f"{part}_revision", None)
        replacement, gguf_file = overrides.get("decoder_id"), model.config.decoder_gguf_file
        if replacement is not None and gguf_file is not None and not Path(replacement, gguf_file).is_file():
            overrides.setdefault("decoder_gguf_file", None)  # the copy is in the usual files
        for key, value in overrides.items():
            setattr(model.config, key, value)
        model.load_frozen_parts(torch_dtype if dtype is None else dtype)
        return place(model, device).eval()

    def load_frozen_parts(self, dtype: Any = None) -> None:
        """Load and attach the encoder and the decoder named in the configuration; errors as `from_pretrained`."""
        config = self.config
        encoder, head = load_encoder_with_head(
            config.encoder_id, config.encoder_revision, config.ctc_alphabet, config.encoder_context
        )
        check_digest("encoder", config.encoder_id, config.encoder_digest, encoder)
        if head is not None:
            check_digest("ctc_head", config.encoder_id, config.ctc_head_digest, head)
        self.attach(encoder=encoder, ctc_head=head)
        dtype = config.decoder_dtype if dtype in (None, "auto") else dtype
        if isinstance(dtype, str):
            name, dtype = dtype, getattr(torch, dtype, None)
            if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
                raise ModelError(f"expected a dtype of float32, bfloat16 or float16, found {name!r}")
        decoder = load_decoder(config.decoder_id, config.decoder_revision, dtype, config.decoder_gguf_file)
        # A hub revision pins the decoder; only a local folder may have changed (a digest of 6 GB takes 4 s).
        if Path(config.decoder_id).is_dir() and dtype == getattr(torch, config.decoder_dtype):
            check_digest("decoder", config.decoder_id, config.decoder_digest, decoder)
        self.attach(decoder=decoder)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save the projector, the configuration and the code that loads them; the frozen parts are not copied."""
        self.config.auto_map = dict(AUTO_MAP)
        self.config.custom_pipelines = CUSTOM_PIPELINES
        super().save_pretrained(save_directory, *args, **kwargs)
        for name in TRAVELLING:
            source, target = Path(__file__).with_name(name), Path(save_directory) / name
            if source.resolve() != target.resolve():
                shutil.copyfile(source, target)


_OVERRIDABLE = {f"{part}_{field}" for part in ("encoder", "decoder") for field in ("id", "revision", "digest")}
_OVERRIDABLE |= {"ctc_alphabet", "ctc_head_digest", "decoder_gguf_file"}


def _one_device(device_map: Any) -> torch.device:
    """Read a device_map that names one device. The model is not split: it is small for a GPU."""
    if isinstance(device_map, dict) and set(device_map) == {""}:
        device_map = device_map[""]
    if device_map is None:
        return torch.device("cpu")
    if device_map == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if isinstance(device_map, (str, int, torch.device)) and device_map not in ("balanced", "sequential"):
        return torch.device(device_map)
    raise ModelError(f"device_map={device_map!r} would split the model. Expected one device: 'auto', 'cuda:1', ...")


def _check_width(part: str, found: int, expected: int) -> None:
    if found != expected:
        raise ModelError(f"expected {part} width {expected}, which this projector was made for, found {found}")
