"""Open a corpus in one of three layouts:

- a data set on the hub (LoquaciousSet, or any other in Parquet); `datasets` resolves config, splits and revision;
- a local folder of Parquet files with the same columns: `<split>-*.parquet`, `<split>/*.parquet`, or one level deeper
  under the name of the config;
- a local `audiofolder`: `<split>/metadata.csv` or `.jsonl` with `file_name` and `text`.
"""

from pathlib import Path

from pipelines.corpora.corpus import Corpus
from pipelines.corpora.folder import FolderCorpus
from pipelines.corpora.parquet import HubCorpus, LocalParquetCorpus
from pipelines.errors import CorpusError
from pipelines.recipes.recipe import CorpusSection


def open_corpus(section: CorpusSection) -> Corpus:
    """Open the corpus that a recipe names.

    Raises:
        CorpusError: the folder does not exist, or has another layout.
    """
    if section.name is not None:
        return HubCorpus(section)
    root = Path(str(section.path)).expanduser()
    if not root.is_dir():
        raise CorpusError(
            f"corpus folder {str(root)!r} does not exist. Set corpus.path, or corpus.name for a data set on the hub"
        )
    if next(root.rglob("metadata.csv"), None) or next(root.rglob("metadata.jsonl"), None):
        return FolderCorpus(root)
    if next(root.rglob("*.parquet"), None):
        return LocalParquetCorpus(root, section.config, section.columns)
    raise CorpusError(
        f"expected Parquet files or <split>/metadata.csv (or .jsonl) in {str(root)!r}, found neither. Check corpus.path"
    )
