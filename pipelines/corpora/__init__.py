"""Corpora: a local folder of recordings, Parquet files, or a data set on the hub, behind one interface."""

from pipelines.corpora.corpus import Corpus
from pipelines.corpora.open import open_corpus

__all__ = ["Corpus", "open_corpus"]
