"""The dev set: utterances transcribed by real generation while a run trains, from stored features.

They are always the same utterances, chosen by a fixed seed; several processes share the work. The audio gain is
measured on them too: the loss of a transcript under another utterance's audio minus the loss under its own. It shows
that the model uses the audio long before the word errors do.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cache import FeatureReader, FeatureStore
from pipelines.processes import gather, num_processes, rank
from pipelines.recipes import Recipe
from pipelines.train.batches import Dequantizer, collate, cut_by_budget
from pipelines.train.targets import Targets, stored_targets
from tinyaudio.model.audio import HOP_LENGTH, SAMPLING_RATE
from tinyaudio.model.guard import cut_loop, token_budget
from tinyaudio.model.modeling_tinyaudio import TinyAudioForConditionalGeneration
from tinyaudio.model.processing_tinyaudio import TinyAudioProcessor

BATCH_FRAMES = 40_000  # encoder frames in one batch of generation, padding included
GAIN_UTTERANCES = 64  # enough to resolve 0.1 nats per token


@dataclass(frozen=True, kw_only=True)
class AudioGain:
    """Mean loss (nats per token) of transcripts under their own audio, and under another utterance's."""

    own: float
    other: float

    @property
    def gain(self) -> float:
        """Nats per token; near 0 while the model ignores the audio."""
        return self.other - self.own


@dataclass(frozen=True, kw_only=True)
class DevSet:
    """Some utterances of one split; `positions` are rows of the reader's index."""

    reader: FeatureReader
    processor: TinyAudioProcessor
    positions: NDArray[np.int64]
    targets: Targets = field(repr=False)

    @classmethod
    def open(
        cls, recipe: Recipe, store: FeatureStore, processor: TinyAudioProcessor, say: Callable[[str], None] = print
    ) -> "DevSet | None":
        """Choose from the dev split, or take the overfitted utterances; None if the store has no dev split."""
        few, split = recipe.train.overfit_utterances, recipe.corpus.dev_split
        if few is not None:
            reader = FeatureReader(store, split=recipe.corpus.train_split)
            positions = overfit_positions(len(reader), few)
        elif split is not None and any(store.commit(shard).split == split for shard in store.committed_shards()):
            reader = FeatureReader(store, split=split)
            positions = np.random.default_rng(0).permutation(len(reader))[: recipe.train.eval_utterances]
        else:
            return None
        targets = stored_targets(reader, processor.tokenizer, say)
        return cls(reader=reader, processor=processor, positions=positions, targets=targets)

    def largest_batch(self) -> "DevSet":
        """Keep only the batch of generation that needs most memory."""
        frames = self.reader.num_frames.astype(np.int64)
        largest = max(self._cut(self.positions), key=lambda batch: len(batch) * int(frames[batch].max()))
        return replace(self, positions=largest)

    @torch.no_grad()
    def transcribe(
        self, model: TinyAudioForConditionalGeneration, should_stop: Callable[[], bool] = lambda: False
    ) -> tuple[list[str], list[str]] | None:
        """Generate greedily, within the token budget of inference, and cut loops as inference does.

        Args:
            should_stop: called before every batch.

        Returns:
            References and hypotheses in the order of `positions`; None if stopped before the last batch.
        """
        hypotheses: dict[int, str] = {}
        dequantize = Dequantizer(self.reader)
        for positions, batch in self._batches(self.positions, model.device):
            if should_stop():
                break
            longest_s = int(self.reader.num_frames[positions].max()) * HOP_LENGTH / SAMPLING_RATE
            budget = token_budget(longest_s, model.generation_config.max_new_tokens)
            tokens = model.generate(
                features=dequantize(batch), num_frames=batch["num_frames"], num_beams=1, max_new_tokens=budget
            )
            texts = map(cut_loop, self.processor.decode_transcripts(tokens))
            hypotheses |= dict(zip(positions, texts, strict=True))
        for others in gather(hypotheses):
            hypotheses |= others
        if len(hypotheses) < len(self.positions):
            return None
        references = self.reader.column("transcript").take(self.positions).to_pylist()
        return references, [hypotheses[int(position)] for position in self.positions]

    @torch.no_grad()
    def draft(self, model: TinyAudioForConditionalGeneration) -> tuple[list[str], list[str]]:
        """Transcribe by the CTC loss's tokens alone, without the decoder; references and hypotheses by `positions`."""
        assert model.token_ctc is not None
        hypotheses: dict[int, str] = {}
        dequantize = Dequantizer(self.reader)
        for positions, batch in self._batches(self.positions, model.device):
            projected, lengths = model.project(dequantize(batch), batch["num_frames"])
            paths = model.token_ctc.best_path(projected, lengths, model.get_input_embeddings().weight)
            hypotheses |= dict(zip(positions, self.processor.decode_transcripts(paths), strict=True))
        for others in gather(hypotheses):
            hypotheses |= others
        references = self.reader.column("transcript").take(self.positions).to_pylist()
        return references, [hypotheses[int(position)] for position in self.positions]

    @torch.no_grad()
    def audio_gain(self, model: TinyAudioForConditionalGeneration) -> AudioGain | None:
        """Compare the loss under the right audio with that under a neighbour's; None for a single utterance."""
        sums = [0.0, 0.0, 0.0]  # own, other, tokens
        dequantize = Dequantizer(self.reader)
        for positions, batch in self._batches(self.positions[:GAIN_UTTERANCES], model.device):
            if len(positions) < 2:
                continue
            features, num_frames, labels = dequantize(batch), batch["num_frames"], batch["labels"]
            for shift in (0, 1):
                shifted = {"features": features.roll(shift, 0), "num_frames": num_frames.roll(shift, 0)}
                output = model(**shifted, labels=labels, num_items_in_batch=1)
                assert output.loss is not None
                assert output.num_targets is not None
                sums[shift] += float(output.loss)
            sums[2] += output.num_targets
        own, other, count = (sum(column) for column in zip(sums, *gather(sums), strict=True))
        return AudioGain(own=own / count, other=other / count) if count else None

    def _batches(
        self, positions: NDArray[np.int64], device: torch.device
    ) -> Iterator[tuple[list[int], dict[str, Any]]]:
        """Yield this process's share, on the device."""
        for positions_here in self._cut(positions)[rank() :: num_processes()]:
            batch = collate(self.reader, self.targets, positions_here.tolist())
            tensors = {key: value.to(device) for key, value in batch.items() if isinstance(value, torch.Tensor)}
            yield positions_here.tolist(), tensors

    def _cut(self, positions: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Cut utterances into batches of similar length, the shortest first."""
        frames = self.reader.num_frames.astype(np.int64)
        ordered = np.array(sorted(positions.tolist(), key=lambda p: (frames[p], p)), np.int64)
        return cut_by_budget(ordered, frames, BATCH_FRAMES)


def overfit_positions(num_utterances: int, few: int) -> NDArray[np.int64]:
    """Choose the utterances of `train.overfit_utterances`."""
    return np.sort(np.random.default_rng(0).permutation(num_utterances)[:few])
