"""From recordings to transcripts; used by the command line, Python and `pipeline()` alike.

A thread (`reader`) reads inputs in order and cuts them into pieces. Pieces of all inputs are batched by length and
decoded; the guard judges each output, and a faulty one is decoded once more. Transcripts are returned in the order of
the inputs. Memory is bounded, whatever the length of a recording and the number of inputs. Travels with the checkpoint.
"""

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from .align import align_words
from .audio import HOP_LENGTH, SAMPLING_RATE
from .confidence import no_speech_probs, tokens_of_words, word_probabilities
from .drafts import KINDS, Drafter, open_drafter, vocabulary_of
from .encoder import encoder_inputs, give_back_free_memory
from .errors import ModelError
from .families import family_of
from .guard import RETRIED, cut_loop, judge, token_budget
from .prompt import first_line, many_transcript_ids
from .reader import End, Event, Input, PieceReader
from .segments import MAX_EXCESS_S, Piece, join_texts
from .transcript import DraftCounts, Segment, Transcript, Word

# How a faulty output is decoded again. Penalties count generated tokens only, never the prompt.
RETRY = {"repetition_penalty": 1.1, "no_repeat_ngram_size": 4}
RETRY_NUM_BEAMS = 4
BATCHES_AHEAD = 4  # batches read before any is decoded, so that pieces of similar length share a batch
MAX_BATCH_S, GPU_MAX_BATCH_S = 480.0, 1_920.0  # seconds of padded audio in one batch: 16 and 64 pieces of 30 s
ENCODER_BATCH_S = 480.0  # seconds of padded audio that the encoder gets at once; its activations are the largest
# A step of generation on a GPU costs the start of its kernels, 20 to 30 ms, whether it has 8 rows or 64.
BATCH_SIZE, GPU_BATCH_SIZES = 8, (64, 32, 16)
CACHE_SHARE = 0.4  # of a GPU's free memory, for keys and values; the rest is for the encoder, logits and prompts
MIN_WINDOW_S = 1.0  # in much shorter pieces no word is heard, and nothing would be written
MAX_TEXTS = 100  # the decoder reads them all in one batch
DECODER_WEIGHT = 0.5  # of the decoder's log-probability beside CTC's; 0.1 to 2 choose nearly the same texts
WORD_END_LEVEL = 0.01  # of a piece's peak: the last word ends there, 40 dB below it; its segment may end in an echo

# Settings that change nothing about greedy decoding; with any other, drafts would not give the text of `generate`.
_OF_GREEDY = {"num_beams", "max_new_tokens", "length_penalty", "early_stopping", "do_sample", "temperature", "top_k"}
_OF_GREEDY |= {"top_p", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "transformers_version"}


@dataclass(frozen=True, kw_only=True)
class Scores:
    """How sure the text of a piece is, if that was asked for; what is not explained here is as in `Segment`."""

    avg_logprob: float | None = None
    no_speech_prob: float | None = None
    words: tuple[Word, ...] | None = None  # with their times; None without a CTC head
    is_missing: bool = False  # the head heard letters where nothing is written, outside of what other pieces hold too


@dataclass(frozen=True, kw_only=True)
class Output:
    """What became of a piece."""

    text: str
    warnings: tuple[str, ...] = ()  # codes of `guard.CODES`
    scores: Scores = Scores()
    drafts: DraftCounts | None = None  # what drafts did, if any were checked


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to decode. None takes the value of the model's generation_config.

    Args:
        batch_size: pieces decoded at once; changes the speed only. None: `default_batch_size`.
        draft: what drafts the text of greedy decoding, which makes it faster; one of `drafts.KINDS`.
        ctc_nbest: let the decoder choose among this many texts (2 to MAX_TEXTS), the most probable ones of the
            projector's CTC head, instead of writing one. It needs a projector that was trained with a CTC loss.
        max_new_tokens: the most tokens of one piece; `guard.token_budget` may allow fewer.
        window_s: the longest piece, seconds, at least MIN_WINDOW_S; None is the model's own window.
        word_timestamps: find out when each word was said, and how sure it is; needs an encoder with a CTC head.
        confidence: compute the scores of `Segment`; with a CTC head also the warnings `unheard` and `missing`.
        track: number of the audio track of files, from 1; None is each file's default track.
        generate: any other options of `generate`.
    """

    batch_size: int | None = None
    num_beams: int | None = None
    draft: str = "auto"
    ctc_nbest: int | None = None
    max_new_tokens: int | None = None
    length_penalty: float | None = None
    window_s: float | None = None
    word_timestamps: bool = False
    confidence: bool = False
    track: int | None = None
    generate: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("batch_size", "num_beams", "max_new_tokens", "track"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}; expected a positive number")
        if self.window_s is not None and not MIN_WINDOW_S <= self.window_s < math.inf:
            raise ValueError(f"window_s is {self.window_s}; expected at least {MIN_WINDOW_S:g} second")
        if self.ctc_nbest is not None and not 2 <= self.ctc_nbest <= MAX_TEXTS:
            raise ValueError(f"ctc_nbest is {self.ctc_nbest}; expected 2 to {MAX_TEXTS}")
        if self.draft not in KINDS:
            raise ValueError(f"draft is {self.draft!r}; expected one of {', '.join(KINDS)}")


@dataclass(frozen=True, kw_only=True)
class Progress:
    """The progress of a stream.

    Args:
        done_s: seconds of audio that are transcribed, without speech, or part of an input that ended.
        read_s: seconds of audio read so far.
        num_done: inputs finished, with or without an error.
    """

    done_s: float
    read_s: float
    num_done: int


OnProgress = Callable[[Progress], None]
Encoded = tuple[Tensor, Tensor]  # features and their numbers of frames, as `encoder.encode` returns
Lines = list[tuple[str, bool]]  # of each row the text, and whether it ended by itself within its token budget


class TokenBudgets(StoppingCriteria):
    """Stop every row of a batch at its own budget, so that its text does not depend on the other rows."""

    def __init__(self, budgets: Tensor) -> None:
        self.budgets = budgets

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        budgets = self.budgets.to(input_ids.device)
        return torch.repeat_interleave(budgets, len(input_ids) // len(budgets)) <= input_ids.shape[1]


class Recognizer:
    """A loaded model that transcribes recordings.

    Args:
        model: a TinyAudioForConditionalGeneration with both frozen parts attached.
        feature_extractor, tokenizer: of its processor.
    """

    def __init__(self, model: Any, feature_extractor: Any, tokenizer: Any) -> None:
        self.model, self.feature_extractor, self.tokenizer = model, feature_extractor, tokenizer
        self._vocabulary: list[str] | None = None  # of the tokenizer, once drafts are checked

    def stream(
        self, sources: Iterable[Input], options: Options, on_progress: OnProgress | None = None
    ) -> Iterator[Transcript]:
        """Transcribe inputs: one transcript each, in their order, with bounded memory.

        An input that cannot be read gives a transcript with `error` set; nothing is raised for it.

        Raises:
            ModelError: a batch does not fit into the GPU's memory; word times without a CTC head; a drafter that the
                model does not have, or that decoding with beams or other settings has no use for.
        """
        self.drafter(options)
        if options.word_timestamps and self.model.ctc_head is None:
            raise ModelError(
                f"expected an encoder with a CTC head and its letters, found none in {self.model.config.encoder_id!r}: "
                "words have no times. Omit --word-timestamps (word_timestamps), or use a model with another encoder"
            )
        window_s = longest_window_s(self.model, options)
        if options.batch_size is None:
            options = replace(options, batch_size=default_batch_size(self.model, options))
        assert options.batch_size is not None
        max_batch_s = GPU_MAX_BATCH_S if self.model.device.type == "cuda" else MAX_BATCH_S
        inputs: dict[int, OpenInput] = {}
        done_s, num_done = 0.0, 0
        with PieceReader(
            sources, window_s, max_pieces=BATCHES_AHEAD * options.batch_size, track=options.track
        ) as reader:

            def report() -> None:
                if on_progress is not None:
                    on_progress(Progress(done_s=done_s, read_s=reader.read_s, num_done=num_done))

            for events in reader.groups():
                for event in events:
                    opened = OpenInput(event.name, with_words=options.word_timestamps)
                    inputs.setdefault(event.input, opened).add(event)
                pieces = [event for event in events if isinstance(event, Piece)]
                for batch in batches_by_length(pieces, options.batch_size, max_batch_s):
                    for piece, output in zip(batch, self.decode(batch, options), strict=True):
                        inputs[piece.input].finish(piece, output)
                        done_s += piece.advance_s
                    report()
                finished = []
                while num_done in inputs and (end := inputs[num_done].end):  # its pieces came before and are decoded
                    entry = inputs.pop(num_done)
                    finished.append(entry.transcript(end))
                    done_s += end.duration_s - entry.done_s
                    num_done += 1
                give_back_free_memory()
                report()
                yield from finished

    def decode(self, pieces: Sequence[Piece], options: Options) -> list[Output]:
        """Decode one batch of pieces that fit the window; a ModelError if the GPU's memory is too small."""
        try:
            return self._decode(pieces, options)
        except torch.OutOfMemoryError as error:
            longest_s = max(len(piece.samples) for piece in pieces) / SAMPLING_RATE
            raise ModelError(
                f"{len(pieces)} segments of up to {longest_s:.1f} s do not fit into the memory of {self.model.device}. "
                f"Lower --batch-size (batch_size, now {options.batch_size}), or free memory there"
            ) from error

    def _decode(self, pieces: Sequence[Piece], options: Options) -> list[Output]:
        config = self._settings(options)
        encoded = self._encode(pieces)
        durations = [len(piece.samples) / SAMPLING_RATE for piece in pieces]
        budgets = [token_budget(duration, config.max_new_tokens) for duration in durations]

        def find_fault(i: int, text: str, is_complete: bool) -> str | None:
            return judge(text, durations[i], is_complete, speech_s=pieces[i].end_s - pieces[i].start_s)

        drafter = self.drafter(options)
        counts: Sequence[DraftCounts | None] = [None] * len(pieces)
        if options.ctc_nbest is not None:
            first = self._choose_text(encoded, options.ctc_nbest)
        elif drafter is None:
            first = self._write(encoded, budgets, config, options.generate)
        else:
            first, counts = self._write_with_drafts(encoded, budgets, drafter)
        faults = [find_fault(i, *output) for i, output in enumerate(first)]
        outputs = [Output(text=text) for text, _ in first]
        again = [i for i, fault in enumerate(faults) if fault is not None]
        if again:
            features, num_frames = (part[again] for part in encoded)
            second = self._write_again((features, num_frames), [budgets[i] for i in again], config, options.generate)
            for i, (text, is_complete) in zip(again, second, strict=True):
                outputs[i] = _choose(first[i][0], str(faults[i]), text, find_fault(i, text, is_complete))
        outputs = [replace(output, drafts=counted) for output, counted in zip(outputs, counts, strict=True)]
        if not (options.word_timestamps or options.confidence):
            return outputs
        scores = self._score(pieces, [output.text for output in outputs], encoded)
        return [replace(output, scores=one) for output, one in zip(outputs, scores, strict=True)]

    def _score(self, pieces: Sequence[Piece], texts: Sequence[str], encoded: Encoded) -> list[Scores]:
        """Score finished texts: by the decoder, which reads them once more, and by the CTC head if there is one."""
        features, num_frames = encoded
        ids, tokens = tokens_of_words(self.tokenizer, texts)
        log_probs = self.model.target_log_probs(features, num_frames, ids)
        scores = [Scores(avg_logprob=float(row.mean())) for row in log_probs]
        head = self.model.ctc_head
        if head is None:
            return scores
        heard, counts = head(features), num_frames.tolist()
        spans = [_speech_span(piece) for piece in pieces]
        aligned = align_words(texts, heard, counts, head.alphabet, offset_s=head.offset_s, spans=spans)
        silences = no_speech_probs(heard, counts, head.alphabet)
        for i, piece in enumerate(pieces):
            words = [
                replace(word, start=word.start + piece.begin_s, end=word.end + piece.begin_s, probability=probability)
                for word, probability in zip(aligned[i].words, word_probabilities(log_probs[i], tokens[i]), strict=True)
            ]
            first_s, last_s = piece.overlap_s, len(piece.samples) / SAMPLING_RATE - piece.overlap_after_s
            is_missing = any(begin >= first_s and end <= last_s for begin, end in aligned[i].missing)
            scores[i] = replace(scores[i], words=tuple(words), no_speech_prob=silences[i], is_missing=is_missing)
        return scores

    def _encode(self, pieces: Sequence[Piece]) -> Encoded:
        """Run the encoder, over a part of a large batch at a time."""
        device, parts = self.model.device, []
        for part in batches_by_length(pieces, len(pieces), ENCODER_BATCH_S, is_sorted=True):
            values, mask = encoder_inputs(self.feature_extractor, [piece.samples for piece in part])
            parts.append(self.model.encode(values.to(device), mask.to(device)))
        longest = max(features.shape[1] for features, _ in parts)
        padded = [torch.nn.functional.pad(features, (0, 0, 0, longest - features.shape[1])) for features, _ in parts]
        return torch.cat(padded), torch.cat([num_frames for _, num_frames in parts])

    def _write(
        self, encoded: Encoded, budgets: Sequence[int], config: GenerationConfig, settings: dict[str, Any]
    ) -> Lines:
        """Run the decoder; `settings` are options of `generate` that take precedence over `config`."""
        features, num_frames = encoded
        config = copy.deepcopy(config)
        others = config.update(**{**settings, "max_new_tokens": max(budgets)})
        criteria = StoppingCriteriaList([TokenBudgets(torch.tensor(budgets))])
        with warnings.catch_warnings():
            # Penalties do not count the prompt, as intended: it is audio.
            warnings.filterwarnings("ignore", message=".*with `inputs_embeds` and without `input_ids`")
            tokens = self.model.generate(
                features=features, num_frames=num_frames, generation_config=config, stopping_criteria=criteria, **others
            )
        ended = _ended(tokens.cpu(), self.model.config.eos_token_id, torch.tensor(budgets)).tolist()
        return self._lines(tokens, ended)

    def _write_again(
        self, encoded: Encoded, budgets: Sequence[int], config: GenerationConfig, generate: dict[str, Any]
    ) -> Lines:
        """Decode faulty rows again, as `_write` does: without the decoder, if the projector kept its CTC head.

        The head's text follows the audio, and cannot loop, refuse or invent; penalties make a decoder write
        other words.
        """
        if self.model.token_ctc is None or not self.model.config.ctc_weight:
            settings = {**generate, **RETRY, "num_beams": max(RETRY_NUM_BEAMS, config.num_beams)}
            return self._write(encoded, budgets, config, settings)
        projected, lengths = self.model.project(*encoded)
        paths = self.model.token_ctc.best_path(projected, lengths, self.model.get_input_embeddings().weight)
        return self._lines(paths, [True] * len(paths))

    def _choose_text(self, encoded: Encoded, count: int) -> Lines:
        """Let the decoder choose among the most probable texts of the projector's CTC head; it reads, and writes none.

        CTC knows what was heard, and the decoder which words follow each other. This is n-best rescoring, with both
        log-probabilities added.
        """
        features, num_frames = encoded
        projected, lengths = self.model.project(features, num_frames)
        embeddings, chosen = self.model.get_input_embeddings().weight, []
        for row, found in enumerate(self.model.token_ctc.best_texts(projected, lengths, embeddings, count)):
            texts = [text for text, _ in self._lines([ids for ids, _ in found], [True] * len(found))]
            scores: dict[str, float] = {}
            for text, (_, score) in zip(texts, found, strict=True):
                scores.setdefault(text, score)  # the best of the tokens that give this text
            ids, heard = many_transcript_ids(self.tokenizer, list(scores)), features[row, : int(num_frames[row])]
            log_probs = self.model.target_log_probs(
                heard.expand(len(ids), -1, -1), num_frames[row].expand(len(ids)), ids
            )
            totals = {
                text: score + DECODER_WEIGHT * float(own.sum())
                for (text, score), own in zip(scores.items(), log_probs, strict=True)
            }
            chosen.append((max(totals, key=totals.__getitem__), True))
        return chosen

    def _lines(self, token_ids: Any, ended: Sequence[bool]) -> Lines:
        """Decode rows into one line each; a line break ends a text, too."""
        texts = self.tokenizer.batch_decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return [
            (" ".join(first_line(text).split()), has_ended or "\n" in text.strip())
            for text, has_ended in zip(texts, ended, strict=True)
        ]

    def _settings(self, options: Options) -> GenerationConfig:
        """Return the model's settings of generation with those of `options`, without `options.generate`."""
        config = copy.deepcopy(self.model.generation_config)
        for name in ("num_beams", "max_new_tokens", "length_penalty"):
            if getattr(options, name) is not None:
                setattr(config, name, getattr(options, name))
        return config

    def drafter(self, options: Options) -> Drafter | None:
        """Open the drafter; None for "none", and for "auto" if decoding is not greedy or the model has none.

        Raises:
            ModelError: a drafter that cannot be used.
        """
        if options.ctc_nbest is not None:
            self._check_ctc_nbest(options)
            return None
        if options.draft == "none":
            return None
        config = self._settings(options)
        others = config.update(**options.generate)
        own_end = self.model.config.eos_token_id
        is_greedy = config.num_beams == 1 and not config.do_sample and config.eos_token_id in (own_end, [own_end])
        if is_greedy and not others and set(config.to_diff_dict()) <= _OF_GREEDY:
            return open_drafter(self.model, self.tokenizer, options.draft)
        if options.draft == "auto":
            return None
        found = f"{config.num_beams} beams" if config.num_beams != 1 else "other options of generate"
        raise ModelError(
            f"--draft {options.draft} (draft) expects greedy decoding, found {found}. Try --num-beams 1 (num_beams), "
            "or omit it"
        )

    def _check_ctc_nbest(self, options: Options) -> None:
        if self.model.token_ctc is None or not self.model.config.ctc_weight:
            raise ModelError(
                "--ctc-nbest (ctc_nbest) expects a projector that was trained with train.ctc_weight above 0, found one "
                "without. Omit it"
            )
        if options.num_beams is not None or options.draft not in ("auto", "none") or options.generate:
            raise ModelError(
                "--ctc-nbest (ctc_nbest) chooses a text and writes none: beams, drafts and options of generate have no "
                "use. Omit them"
            )

    def _write_with_drafts(
        self, encoded: Encoded, budgets: Sequence[int], drafter: Drafter
    ) -> tuple[Lines, list[DraftCounts]]:
        """Run the decoder as `_write` does, greedy, over drafts; also return what these did for each row."""
        if self._vocabulary is None:
            self._vocabulary = vocabulary_of(self.tokenizer, len(self.model.get_input_embeddings().weight))
        written = self.model.generate_with_drafts(*encoded, drafter, self._vocabulary, budgets)
        ended = [one.token_ids[-1] == self.model.config.eos_token_id for one in written]
        counts = [
            DraftCounts(
                draft=drafter.kind,
                num_passes=one.num_passes,
                num_tokens=len(one.token_ids),
                num_accepted=one.num_accepted,
            )
            for one in written
        ]
        return self._lines([one.token_ids for one in written], ended), counts


def _speech_span(piece: Piece) -> tuple[float, float]:
    """Find where the words of a piece begin and end, seconds from its first sample."""
    begins, ends = 0.0, len(piece.samples) / SAMPLING_RATE
    if not piece.overlap_s:
        begins = piece.start_s - piece.begin_s
    if not piece.overlap_after_s:
        levels = np.abs(piece.samples)
        loud = np.flatnonzero(levels > WORD_END_LEVEL * levels.max())
        ends = min(piece.end_s - piece.begin_s, (loud[-1] + 1) / SAMPLING_RATE if len(loud) else ends)
    return begins, max(begins, ends)


def default_batch_size(model: Any, options: Options) -> int:
    """Choose how many pieces to decode at once: on a GPU as many as its free memory holds, from 64 down; else 8.

    Counted are keys and values of the longest piece, of all positions, and of as many beams as a second decoding takes.
    """
    if model.device.type != "cuda":
        return BATCH_SIZE
    free_bytes = torch.cuda.mem_get_info(model.device)[0]
    for batch_size in GPU_BATCH_SIZES:
        if batch_size * cache_bytes(model, options) <= CACHE_SHARE * free_bytes:
            return batch_size
    return BATCH_SIZE


def longest_window_s(model: Any, options: Options) -> float:
    """Return the window: that of the options, or of the model; never more than the encoder takes at once."""
    window_s = options.window_s or float(model.config.window_s)
    max_samples = family_of(model.encoder.config).max_samples
    return window_s if max_samples is None else min(window_s, max_samples / SAMPLING_RATE - MAX_EXCESS_S)


def cache_bytes(model: Any, options: Options) -> int:
    """Compute the bytes of keys and values of one piece; 149 MB for SmolLM3-3B, 30 s, 200 tokens and 4 beams."""
    config, decoder, generation = model.config, model.decoder.config.get_text_config(), model.generation_config
    num_samples = math.ceil((options.window_s or config.window_s) * SAMPLING_RATE)
    num_positions = len(config.prompt_prefix_ids) + len(config.prompt_suffix_ids)
    num_positions += math.ceil(num_samples / HOP_LENGTH / config.stack_factor)
    num_positions += options.max_new_tokens or generation.max_new_tokens
    heads = getattr(decoder, "num_key_value_heads", None) or decoder.num_attention_heads
    head_dim = getattr(decoder, "head_dim", None) or decoder.hidden_size // decoder.num_attention_heads
    num_beams = max(RETRY_NUM_BEAMS, options.num_beams or generation.num_beams)
    itemsize = model.get_input_embeddings().weight.dtype.itemsize
    return int(2 * decoder.num_hidden_layers * heads * head_dim * itemsize * num_positions * num_beams)


def batches_by_length(
    pieces: Sequence[Piece], batch_size: int, max_batch_s: float = MAX_BATCH_S, *, is_sorted: bool = False
) -> Iterator[list[Piece]]:
    """Sort pieces by length and batch them: at most `batch_size` pieces and `max_batch_s` padded seconds each.

    With `is_sorted` they keep the order that they have.
    """
    batch: list[Piece] = []
    longest_s = 0.0
    for piece in pieces if is_sorted else sorted(pieces, key=lambda piece: len(piece.samples)):
        longest_s = max(longest_s, len(piece.samples) / SAMPLING_RATE)
        if batch and (len(batch) == batch_size or longest_s * (len(batch) + 1) > max_batch_s):
            yield batch
            batch, longest_s = [], len(piece.samples) / SAMPLING_RATE
        batch.append(piece)
    if batch:
        yield batch


def _ended(tokens: Tensor, eos_token_id: int, budgets: Tensor) -> Tensor:
    """Find the rows that ended by themselves, (B,) bool. A row stopped at its budget may be padded with end-of-text."""
    num_written = (tokens != eos_token_id).cumprod(-1).sum(-1)
    return (num_written < tokens.shape[1]) & (num_written != budgets)


def _choose(first: str, fault: str, second: str, new_fault: str | None) -> Output:
    """Choose between a faulty output and its second decoding. An empty text is no better than a loop that was cut."""
    if new_fault is None and (second or fault in ("refusal", "implausible_rate")):
        return Output(text=second, warnings=(fault + RETRIED,))
    if fault == "repetition":  # cut the first output: penalties distort the text of a loop that did not end
        return Output(text=cut_loop(first), warnings=(fault,))
    return Output(text=first, warnings=(fault,))


def _not_before(words: Sequence[Word], second: float) -> tuple[Word, ...]:
    """Move the times of words behind a second: where windows overlap, each has its own times of the same words."""
    return tuple(replace(word, start=max(word.start, second), end=max(word.end, second)) for word in words)


@dataclass
class OpenInput:
    """An input that is not finished: its events so far, and the outputs of its pieces by their index."""

    name: str
    with_words: bool = False  # whether its segments show their words
    pieces: list[Piece] = field(default_factory=list)  # so far, without their samples
    outputs: dict[int, Output] = field(default_factory=dict)  # of the pieces that are decoded, in any order
    end: End | None = None  # the last event, once it is read
    done_s: float = 0.0  # of the input, decoded

    def add(self, event: Event) -> None:
        if isinstance(event, End):
            self.end = event
        else:
            self.pieces.append(replace(event, samples=np.zeros(0, np.float32)))

    def finish(self, piece: Piece, output: Output) -> None:
        """Take the output of one of its pieces."""
        self.outputs[piece.index] = output
        self.done_s += piece.advance_s

    def segments(self) -> list[Segment]:
        """Return the segments whose text will not change any more; after the end, and the last output, all of them."""
        segments: list[Segment] = []
        previous, num_skipped = "", 0  # the previous output, and how many words its seam took from its beginning
        for piece in self.pieces:
            output = self.outputs.get(piece.index)
            if output is None:
                return self._finished(segments[:-1] if piece.overlap_s else segments)
            text, codes, scores = output.text, output.warnings, output.scores
            words = scores.words
            if piece.overlap_s and segments:
                before, text, agreed = join_texts(previous, output.text, piece.overlap_s)
                kept = before.split()[num_skipped:]
                words_before = segments[-1].words
                if words is not None and words_before is not None:
                    words_before = words_before[: len(kept)]
                    words = _not_before(words, words_before[-1].end if words_before else 0.0)
                segments[-1] = replace(segments[-1], text=" ".join(kept), words=words_before)
                codes = (*codes, *(() if agreed else ("seam",)))
            previous, num_skipped = output.text, len(output.text.split()) - len(text.split())
            segments.append(
                Segment(
                    id=piece.index,
                    start=piece.start_s,
                    end=piece.end_s,
                    text=text,
                    warnings=(*piece.warnings, *codes, *(("missing",) if scores.is_missing else ())),
                    words=None if words is None else words[num_skipped:],
                    avg_logprob=scores.avg_logprob,
                    no_speech_prob=scores.no_speech_prob,
                )
            )
        return self._finished(segments if self.end is not None else segments[:-1])

    def _finished(self, segments: Sequence[Segment]) -> list[Segment]:
        """Warn of words that were not heard, of those that the seams have left."""
        finished = []
        for segment in segments:
            is_unheard = any(word.is_unheard for word in segment.words or ())
            codes = (*segment.warnings, *(("unheard",) if is_unheard else ()))
            finished.append(replace(segment, warnings=codes, words=segment.words if self.with_words else None))
        return finished

    def transcript(self, end: End) -> Transcript:
        segments = self.segments()
        counts = [output.drafts for output in self.outputs.values() if output.drafts is not None]
        return Transcript(
            source=self.name,
            text=" ".join(segment.text for segment in segments if segment.text),
            segments=tuple(segments),
            duration_s=end.duration_s,
            warnings=tuple(code for segment in segments for code in segment.warnings)
            + (() if segments or end.error else ("no_speech",))
            + end.warnings,
            error=end.error,
            drafts=sum(counts[1:], counts[0]) if counts else None,
        )
