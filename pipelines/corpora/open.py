"""Corpora: where utterances come from. Three layouts, one interface (`corpus.Corpus`):

- a hub data set (LoquaciousSet and any other with Parquet files); `datasets` resolves config, splits and revision;
- a local folder of Parquet files with the same columns: `<split>-*.parquet`, `<split>/*.parquet`, or one level deeper
  under the config's name;
- a local `audiofolder`: `<split>/metadata.csv` or `.jsonl` with `file_name` and `text`.
"""

from pathlib import Path

from pipelines.corpora.corpus import Corpus
from pipelines.corpora.folder import FolderCorpus
from pipelines.corpora.parquet import HubCorpus, LocalParquetCorpus
from pipelines.errors import CorpusError
from pipelines.recipes.recipe import CorpusSection


def open_corpus(section: CorpusSection) -> Corpus:
    """Open the corpus a recipe names.

    Raises:
        CorpusError: no such folder, or a layout that is none of the three.
    """
    if section.name is not None:
        return HubCorpus(section)
    root = Path(str(section.path)).expanduser()
    if not root.is_dir():
        raise CorpusError(
            f"corpus folder {str(root)!r} does not exist; set corpus.path, or corpus.name for a hub data set"
        )
    if next(root.rglob("metadata.csv"), None) or next(root.rglob("metadata.jsonl"), None):
        return FolderCorpus(root)
    if next(root.rglob("*.parquet"), None):
        return LocalParquetCorpus(root, section.config, section.columns)
    raise CorpusError(
        f"{str(root)!r} holds neither Parquet files nor <split>/metadata.csv or metadata.jsonl; expected one of them"
    )
