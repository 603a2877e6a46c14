"""The utterances on which a run is judged while it trains: transcribed by real generation, from stored features.

Always the same utterances, chosen by a fixed seed. With several processes each transcribes its share. Also here: does
the model listen? The loss of a transcript under its own audio and under another utterance's tells it, long before
the word errors do.
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
from pipelines.train.batches import Dequantizer, Targets, collate, cut_by_budget, stored_targets
from tinyaudio.model.modeling_tinyaudio import TinyAudioForConditionalGeneration
from tinyaudio.model.processing_tinyaudio import TinyAudioProcessor

BATCH_FRAMES = 40_000  # encoder frames in one batch of generation, padding included
LISTENING_UTTERANCES = 64  # enough to tell 0.1 nats a token


@dataclass(frozen=True, kw_only=True)
class Listening:
    """Mean loss (nats per token) of transcripts under their own audio, and under another utterance's."""

    own: float
    other: float

    @property
    def gain(self) -> float:
        """What the right audio is worth, nats per token; near 0 while the model is deaf."""
        return self.other - self.own


@dataclass(frozen=True, kw_only=True)
class DevSet:
    """Some utterances of one split; `positions` are rows of the reader's index, in the order they are shown."""

    reader: FeatureReader
    processor: TinyAudioProcessor
    positions: NDArray[np.int64]
    targets: Targets = field(repr=False)

    @classmethod
    def open(
        cls, recipe: Recipe, store: FeatureStore, processor: TinyAudioProcessor, say: Callable[[str], None] = print
    ) -> "DevSet | None":
        """Choose from the dev split, or from what is being overfitted; None if the store has no dev split."""
        settings = recipe.train
        if settings.overfit_utterances is not None:
            reader = FeatureReader(store, split=recipe.corpus.train_split)
            return cls.of(reader, processor, chosen_for_overfitting(len(reader), settings.overfit_utterances), say)
        split = recipe.corpus.dev_split
        if split is None or not any(store.commit(shard).split == split for shard in store.committed_shards()):
            return None
        reader = FeatureReader(store, split=split)
        positions = np.random.default_rng(0).permutation(len(reader))[: settings.eval_utterances]
        return cls.of(reader, processor, positions, say)

    @classmethod
    def of(
        cls,
        reader: FeatureReader,
        processor: TinyAudioProcessor,
        positions: NDArray[np.int64],
        say: Callable[[str], None],
    ) -> "DevSet":
        targets = stored_targets(reader, processor.tokenizer, say)
        return cls(reader=reader, processor=processor, positions=positions, targets=targets)

    def largest_batch(self) -> "DevSet":
        """Keep the one batch of generation that takes most memory."""
        frames = self.reader.num_frames.astype(np.int64)
        return replace(
            self, positions=max(self._cut(self.positions), key=lambda batch: len(batch) * int(frames[batch].max()))
        )

    @torch.no_grad()
    def transcribe(
        self, model: TinyAudioForConditionalGeneration, should_stop: Callable[[], bool] = lambda: False
    ) -> tuple[list[str], list[str]] | None:
        """Generate greedily.

        Args:
            should_stop: asked before every batch.

        Returns:
            References and hypotheses in the order of `positions`; None if stopped on the way.
        """
        found: dict[int, str] = {}
        dequantize = Dequantizer(self.reader)
        for positions, batch in self._batches(self.positions, model.device):
            if should_stop():
                break
            tokens = model.generate(features=dequantize(batch), num_frames=batch["num_frames"], num_beams=1)
            found |= dict(zip(positions, self.processor.decode_transcripts(tokens), strict=True))
        for other in gather(found):
            found |= other
        if len(found) < len(self.positions):
            return None
        references = self.reader.column("transcript").take(self.positions).to_pylist()
        return references, [found[int(position)] for position in self.positions]

    @torch.no_grad()
    def listen(self, model: TinyAudioForConditionalGeneration) -> Listening | None:
        """Compare the loss under the right audio with that under a neighbour's; None for a single utterance."""
        sums = [0.0, 0.0, 0.0]
        dequantize = Dequantizer(self.reader)
        for positions, batch in self._batches(self.positions[:LISTENING_UTTERANCES], model.device):
            if len(positions) < 2:
                continue
            features, num_frames, labels = dequantize(batch), batch["num_frames"], batch["labels"]
            for i, shift in enumerate((0, 1)):
                shifted = {"features": features.roll(shift, 0), "num_frames": num_frames.roll(shift, 0)}
                output = model(**shifted, labels=labels, num_items_in_batch=1)
                assert output.loss is not None
                assert output.num_targets is not None
                sums[i] += float(output.loss)
            sums[2] += output.num_targets
        own, other, count = (sum(column) for column in zip(sums, *gather(sums), strict=True))
        return Listening(own=own / count, other=other / count) if count else None

    def _batches(
        self, positions: NDArray[np.int64], device: torch.device
    ) -> Iterator[tuple[list[int], dict[str, Any]]]:
        """Cut this process's share into batches of like length, on the device."""
        for positions_here in self._cut(positions)[rank() :: num_processes()]:
            batch = collate(self.reader, self.targets, positions_here.tolist())
            tensors = {key: value.to(device) for key, value in batch.items() if isinstance(value, torch.Tensor)}
            yield positions_here.tolist(), tensors

    def _cut(self, positions: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        frames = self.reader.num_frames.astype(np.int64)
        ordered = np.array(sorted(positions.tolist(), key=lambda p: (frames[p], p)), np.int64)
        return cut_by_budget(ordered, frames, BATCH_FRAMES)


def chosen_for_overfitting(num_utterances: int, wanted: int) -> NDArray[np.int64]:
    """Choose the few utterances of `train.overfit_utterances`."""
    return np.sort(np.random.default_rng(0).permutation(num_utterances)[:wanted])
