"""Word errors of a set of transcripts, counted over the whole set (jiwer's alignment)."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jiwer


@dataclass(frozen=True, kw_only=True)
class WordErrors:
    """Counts of one evaluation; utterances that failed are in `failed` and in nothing else."""

    substitutions: int
    deletions: int
    insertions: int
    words: int  # in the references
    utterances: int  # scored
    failed: int = 0

    @property
    def wer(self) -> float:
        """Errors per reference word, 0..; infinite when words were inserted where the references have none."""
        errors = self.substitutions + self.deletions + self.insertions
        if self.words == 0:
            return float("inf") if errors else 0.0
        return errors / self.words

    def to_dict(self) -> dict[str, Any]:
        return {"wer": self.wer, **asdict(self)}

    def __str__(self) -> str:
        line = (
            f"WER {100 * self.wer:.2f} % (S {self.substitutions} D {self.deletions} I {self.insertions}; "
            f"{self.words} words, {self.utterances} utterances)"
        )
        return line + (f"; {self.failed} FAILED and not scored" if self.failed else "")


def count_word_errors(references: Sequence[str], hypotheses: Sequence[str], failed: int = 0) -> WordErrors:
    """Align pairs and add up their errors; neither side is normalised beyond white space.

    Raises:
        ValueError: lists of different lengths.
    """
    if len(references) != len(hypotheses):
        raise ValueError(f"{len(references)} references and {len(hypotheses)} hypotheses; expected pairs")
    substitutions = deletions = insertions = words = 0
    if references:
        # whitespace-only sentences would not be taken as empty
        output = jiwer.process_words([" ".join(r.split()) for r in references], [" ".join(h.split()) for h in hypotheses])
        substitutions, deletions, insertions = output.substitutions, output.deletions, output.insertions
        words = sum(len(reference.split()) for reference in references)
    return WordErrors(
        substitutions=substitutions,
        deletions=deletions,
        insertions=insertions,
        words=words,
        utterances=len(references),
        failed=failed,
    )
