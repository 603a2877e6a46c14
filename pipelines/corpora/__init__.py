"""Where utterances come from: a local folder, Parquet files, or a data set on the hub."""

from pipelines.corpora.corpus import Corpus
from pipelines.corpora.open import open_corpus

__all__ = ["Corpus", "open_corpus"]
