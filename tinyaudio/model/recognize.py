"""The one way from recordings to transcripts, for the command line, Python and `pipeline()` alike.

A thread (`reader`) reads inputs in order and cuts them into pieces; pieces of all inputs are batched by length; each is
decoded, judged by the guard and, if need be, decoded once more; transcripts come out in the order of the inputs. Memory
is bounded by the queue, whatever the length of a recording and the number of inputs. Travels with the checkpoint.

A draft of a transcript (say from the encoder's CTC head) could later be verified by the decoder in one pass: `_write`
is the only place that asks the decoder, and it is given the encoder's features.
"""

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from .audio import SAMPLING_RATE
from .encoder import encoder_inputs, give_back_free_memory
from .errors import ModelError
from .guard import RETRIED, cut_loop, judge, token_budget
from .reader import End, Event, Input, PieceReader
from .segments import Piece, join_texts
from .transcript import Segment, Transcript

# How an output that trips the guard is decoded again. Penalties see generated tokens only, never the prompt.
RETRY = {"repetition_penalty": 1.1, "no_repeat_ngram_size": 4}
RETRY_NUM_BEAMS = 4
BATCHES_AHEAD = 4  # batches read before any is decoded, so that pieces of like length meet
MAX_BATCH_S = 480.0  # seconds of padded audio in one batch: 16 pieces of 30 s


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to decode. None means: what the model's generation_config says.

    Args:
        batch_size: pieces decoded at once; changes the speed only.
        num_beams: beams; 1 is greedy.
        max_new_tokens: the most tokens of one piece; `guard.token_budget` may allow fewer.
        length_penalty: of beam search.
        window_s: the longest piece, seconds; None is the model's own window.
        generate: anything else `generate` takes.
    """

    batch_size: int = 8
    num_beams: int | None = None
    max_new_tokens: int | None = None
    length_penalty: float | None = None
    window_s: float | None = None
    generate: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("batch_size", "num_beams", "max_new_tokens", "window_s"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}; expected a positive number")


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a stream has come.

    Args:
        done_s: seconds of audio done with so far: transcribed, without speech, or of an input that ended.
        read_s: seconds of audio read so far.
        num_done: inputs finished, in whatever way.
    """

    done_s: float
    read_s: float
    num_done: int


OnProgress = Callable[[Progress], None]


class TokenBudgets(StoppingCriteria):
    """Stop every row of a batch at its own budget, so that a row ends the same alone and in company."""

    def __init__(self, budgets: Tensor) -> None:
        self.budgets = budgets

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        budgets = self.budgets.to(input_ids.device)
        return torch.repeat_interleave(budgets, len(input_ids) // len(budgets)) <= input_ids.shape[1]


class Recognizer:
    """A loaded model, ready for recordings.

    Args:
        model: a TinyAudioForConditionalGeneration with both frozen parts attached.
        feature_extractor, tokenizer: of its processor.
    """

    def __init__(self, model: Any, feature_extractor: Any, tokenizer: Any) -> None:
        self.model, self.feature_extractor, self.tokenizer = model, feature_extractor, tokenizer

    def stream(
        self, sources: Iterable[Input], options: Options, on_progress: OnProgress | None = None
    ) -> Iterator[Transcript]:
        """Transcribe inputs: one transcript each, in their order, with bounded memory.

        An input that cannot be read gives a transcript with `error` set; nothing is raised for it.

        Raises:
            ModelError: a batch that the GPU's memory does not hold.
        """
        window_s = options.window_s or self.model.config.window_s
        desk = _Desk()
        tell = on_progress or (lambda _: None)
        with PieceReader(sources, window_s, max_pieces=BATCHES_AHEAD * options.batch_size) as reader:
            for events in reader.groups():
                desk.open(events)
                pieces = [event for event in events if isinstance(event, Piece)]
                for batch in batches_by_length(pieces, options.batch_size):
                    desk.fill(batch, self._decode_if_it_fits(batch, options))
                    tell(Progress(done_s=desk.done_s, read_s=reader.read_s, num_done=desk.num_done))
                finished = list(desk.finished())
                give_back_free_memory()
                tell(Progress(done_s=desk.done_s, read_s=reader.read_s, num_done=desk.num_done))
                yield from finished

    def _decode_if_it_fits(self, batch: Sequence[Piece], options: Options) -> list[tuple[str, tuple[str, ...]]]:
        try:
            return self.decode(batch, options)
        except torch.OutOfMemoryError as error:
            longest_s = max(len(piece.samples) for piece in batch) / SAMPLING_RATE
            raise ModelError(
                f"{len(batch)} segments of up to {longest_s:.1f} s do not fit into the memory of {self.model.device}; "
                f"lower --batch-size (batch_size, now {options.batch_size}), or free memory there"
            ) from error

    def decode(self, pieces: Sequence[Piece], options: Options) -> list[tuple[str, tuple[str, ...]]]:
        """Decode one batch of pieces that fit the window: (text, warnings) of each."""
        recordings = [piece.samples for piece in pieces]
        values, mask = encoder_inputs(self.feature_extractor, recordings)
        features, num_frames = self.model.encode(values.to(self.model.device), mask.to(self.model.device))
        durations = [len(samples) / SAMPLING_RATE for samples in recordings]
        first = self._write(features, num_frames, durations, options, {})
        find_fault = [
            partial(judge, duration_s=duration, speech_s=piece.end_s - piece.start_s)
            for piece, duration in zip(pieces, durations, strict=True)
        ]
        faults = [find(text, is_complete=whole) for find, (text, whole) in zip(find_fault, first, strict=True)]
        outputs: list[tuple[str, tuple[str, ...]]] = [(text, ()) for text, _ in first]
        again = [i for i, fault in enumerate(faults) if fault is not None]
        if again:
            settings = {**RETRY, "num_beams": max(RETRY_NUM_BEAMS, self._setting(options, "num_beams"))}
            second = self._write(features[again], num_frames[again], [durations[i] for i in again], options, settings)
            for i, (text, whole) in zip(again, second, strict=True):
                outputs[i] = _settle(first[i][0], str(faults[i]), text, find_fault[i](text, is_complete=whole))
        return outputs

    def _write(
        self,
        features: Tensor,
        num_frames: Tensor,
        durations: Sequence[float],
        options: Options,
        settings: dict[str, Any],
    ) -> list[tuple[str, bool]]:
        """Ask the decoder: the text of each row, and whether it ended by itself within its token budget."""
        limit = self._setting(options, "max_new_tokens")
        budgets = torch.tensor([token_budget(duration, limit) for duration in durations])
        config = copy.deepcopy(self.model.generation_config)
        chosen = {"num_beams": options.num_beams, "length_penalty": options.length_penalty}
        config.update(**{name: value for name, value in chosen.items() if value is not None})
        others = config.update(**{**options.generate, **settings, "max_new_tokens": int(budgets.max())})
        criteria = StoppingCriteriaList([TokenBudgets(budgets)])
        with warnings.catch_warnings():
            # Penalties not seeing the prompt is what we want: it holds audio.
            warnings.filterwarnings("ignore", message=".*with `inputs_embeds` and without `input_ids`")
            tokens = self.model.generate(
                features=features, num_frames=num_frames, generation_config=config, stopping_criteria=criteria, **others
            )
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        ended = _ended(tokens.cpu(), self.model.config.eos_token_id, budgets).tolist()
        return [(" ".join(text.split()), whole) for text, whole in zip(texts, ended, strict=True)]

    def _setting(self, options: Options, name: str) -> int:
        chosen = getattr(options, name)
        return int(getattr(self.model.generation_config, name) if chosen is None else chosen)


def batches_by_length(pieces: Sequence[Piece], batch_size: int) -> Iterator[list[Piece]]:
    """Sort pieces by length and batch them: at most `batch_size` pieces and `MAX_BATCH_S` padded seconds each."""
    batch: list[Piece] = []
    for piece in sorted(pieces, key=lambda piece: len(piece.samples)):
        longest_s = len(piece.samples) / SAMPLING_RATE
        if batch and (len(batch) == batch_size or longest_s * (len(batch) + 1) > MAX_BATCH_S):
            yield batch
            batch = []
        batch.append(piece)
    if batch:
        yield batch


def _ended(tokens: Tensor, eos_token_id: int, budgets: Tensor) -> Tensor:
    """Tell which rows ended by themselves, (B,) bool: what fills a row stopped at its budget may be end-of-text too."""
    num_written = (tokens != eos_token_id).cumprod(-1).sum(-1)
    return (num_written < tokens.shape[1]) & (num_written != budgets)


def _settle(first: str, fault: str, second: str, new_fault: str | None) -> tuple[str, tuple[str, ...]]:
    """Choose between an output that tripped the guard and its second decoding; nothing is no better than a loop cut."""
    if new_fault is None and (second or fault in ("refusal", "implausible_rate")):
        return second, (fault + RETRIED,)
    if fault == "repetition":  # the cut first output: penalties distort what an unfinished loop says
        return cut_loop(first), (fault,)
    return first, (fault,)


@dataclass
class _Open:
    """An input some of whose pieces are still to be decoded."""

    name: str
    pieces: list[Piece] = field(default_factory=list)
    outputs: dict[int, tuple[str, tuple[str, ...]]] = field(default_factory=dict)
    end: End | None = None
    done_s: float = 0.0

    def transcript(self) -> Transcript:
        if self.end is None:
            raise AssertionError("an input was finished before its end was read")
        segments: list[Segment] = []
        whole, num_skipped = "", 0  # the last output as it came, and how many words its seam took from its beginning
        for piece in self.pieces:
            output, codes = self.outputs[piece.index]
            text = output
            if piece.overlap_s and segments:
                before, text, agreed = join_texts(whole, output, piece.overlap_s)
                segments[-1] = replace(segments[-1], text=" ".join(before.split()[num_skipped:]))
                codes = (*codes, *(() if agreed else ("seam",)))
            whole, num_skipped = output, len(output.split()) - len(text.split())
            codes = (*piece.warnings, *codes)
            segments.append(Segment(id=piece.index, start=piece.start_s, end=piece.end_s, text=text, warnings=codes))
        return Transcript(
            source=self.name,
            text=" ".join(segment.text for segment in segments if segment.text),
            segments=tuple(segments),
            duration_s=self.end.duration_s,
            warnings=tuple(code for segment in segments for code in segment.warnings)
            + (() if segments or self.end.error else ("no_speech",))
            + self.end.warnings,
            error=self.end.error,
        )


class _Desk:
    """Where outputs, decoded in order of length, are put back under the inputs they belong to."""

    def __init__(self) -> None:
        self.done_s, self.num_done = 0.0, 0
        self._inputs: dict[int, _Open] = {}

    def open(self, events: Sequence[Event]) -> None:
        for event in events:
            entry = self._inputs.setdefault(event.input, _Open(event.name))
            if isinstance(event, End):
                entry.end = event
            else:
                entry.pieces.append(replace(event, samples=np.zeros(0, np.float32)))

    def fill(self, batch: Sequence[Piece], outputs: Sequence[tuple[str, tuple[str, ...]]]) -> None:
        for piece, output in zip(batch, outputs, strict=True):
            self._inputs[piece.input].outputs[piece.index] = output
            self._advance(self._inputs[piece.input], piece.advance_s)

    def _advance(self, entry: _Open, seconds: float) -> None:
        self.done_s += seconds
        entry.done_s += seconds

    def finished(self) -> Iterator[Transcript]:
        """Hand out, in order of the inputs, those whose end was read (all pieces before it are decoded by then)."""
        for number in sorted(self._inputs):
            entry = self._inputs[number]
            if entry.end is None:
                return
            del self._inputs[number]
            self.num_done += 1
            self._advance(entry, entry.end.duration_s - entry.done_s)  # what follows its last piece
            yield entry.transcript()
