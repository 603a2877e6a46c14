"""Files of the hub, read by byte ranges or fetched whole, through whatever the network does.

Every answer is checked for its length; what is short, broken off, refused for now (429) or failing (5xx) is asked for
again, after 1, 2, 4, ... up to 60 seconds or as long as the server says, until the patience of the recipe is used up.
What will not get better by waiting (401, 403, 404, offline mode) is an error at once. Range reads keep nothing on the
disk; whole files go to the cache of huggingface_hub, which resumes them.
"""

import io
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import get_session, hf_hub_download, hf_hub_url
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

from pipelines.errors import CorpusError, FetchError
from pipelines.retry import ShortAnswerError, patiently, reason

TIMEOUT_S = 30.0  # without a single byte

if "HF_HUB_VERBOSITY" not in os.environ:  # two lines for each try of its own; `patiently` says it once
    logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)


def is_commit(revision: str | None) -> bool:
    """Say whether a revision is a whole commit id, which means the same for ever."""
    return revision is not None and re.fullmatch("[0-9a-f]{40}", revision) is not None


class HubFile(io.RawIOBase):
    """One file of a data set at one commit, read by ranges; not a byte more than asked for is fetched."""

    def __init__(self, repo: str, path: str, revision: str, *, patience_s: float) -> None:
        self.name, self._patience_s = f"{repo}/{path}", patience_s
        self._url = hf_hub_url(repo, path, repo_type="dataset", revision=revision)
        self._position = 0
        self._size: int | None = None
        self._tail = b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position}.get(whence)
        self._position = offset + (self.size if start is None else start)
        return self._position

    @property
    def size(self) -> int:
        """Bytes of the whole file, from the answer to a request for its last eight."""
        if self._size is None:
            self._tail = self._get("bytes=-8", 8)
        assert self._size is not None
        return self._size

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self.size - self._position)
        if wanted <= 0:
            return 0
        before_tail = self.size - len(self._tail) - self._position
        if before_tail <= 0:  # a Parquet reader's first question
            body = self._tail[-before_tail:][:wanted]
        else:
            body = self._get(f"bytes={self._position}-{self._position + wanted - 1}", wanted)
        buffer[:wanted] = body
        self._position += wanted
        return wanted

    def _get(self, range_: str, length: int) -> bytes:
        try:
            return patiently(lambda: self._get_once(range_, length), self.name, self._patience_s)
        except (FetchError, CorpusError):
            raise
        except Exception as error:
            raise FetchError(
                f"{self.name}: {reason(error)}; check HF_TOKEN and that the file is still there"
            ) from error

    def _get_once(self, range_: str, length: int) -> bytes:
        headers = {**build_hf_headers(), "Range": range_, "Accept-Encoding": "identity"}
        response = get_session().request("GET", self._url, headers=headers, timeout=TIMEOUT_S, follow_redirects=True)
        hf_raise_for_status(response)
        place, _, total = response.headers.get("Content-Range", "").rpartition("/")
        if response.status_code != 206 or not total.isdigit():
            raise FetchError(f"{self.name}: the server ignores byte ranges; set corpus.fetch to 'files'")
        if self._size not in (None, int(total)):
            raise FetchError(
                f"{self.name} changed from {self._size} to {total} bytes under way; expected a fixed commit"
            )
        self._size = int(total)
        if len(response.content) != min(length, self._size):
            raise ShortAnswerError(f"{len(response.content)} bytes came of {length} ({place or 'no place stated'})")
        return bytes(response.content)


def fetch_whole(repo: str, path: str, revision: str, *, patience_s: float) -> Path:
    """Bring a whole file of a data set into huggingface_hub's cache (it checks the size and resumes what broke off).

    Raises:
        FetchError: it cannot be had.
    """
    try:
        return Path(
            patiently(
                lambda: hf_hub_download(repo, path, repo_type="dataset", revision=revision),
                f"{repo}/{path}",
                patience_s,
            )
        )
    except FetchError:
        raise
    except OSError as error:
        raise FetchError(f"{repo}/{path}: {reason(error)}; check the disk of HF_HOME, HF_TOKEN and the name") from error


def _is_refused(error: BaseException | None) -> bool:
    """Say whether the hub knows the data set but wants to know who asks: a gated or private one."""
    if error is None:
        return False
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status in (401, 403) or "gated" in str(error) or _is_refused(error.__cause__)


def resolve_dataset(name: str, config: str | None, revision: str | None, patience_s: float) -> Mapping[str, list[str]]:
    """List the files of every split of a data set, each pinned to the commit that the revision means now.

    Raises:
        CorpusError: no such data set, config or revision. FetchError: no way to the hub for `patience_s` seconds.
    """
    from datasets import load_dataset_builder

    try:
        builder = patiently(
            lambda: load_dataset_builder(name, config, revision=revision),
            f"data set {name!r}",
            patience_s,
        )
    except FetchError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        cure = "check the name, the network and HF_TOKEN, or set corpus.path to a local copy"
        if _is_refused(error):
            cure = f"accept its terms at https://huggingface.co/datasets/{name} and set HF_TOKEN"
        raise CorpusError(
            f"data set {name!r} (config {config!r}, revision {revision or 'main'!r}) cannot be opened: {reason}; {cure}"
        ) from error
    return {str(split): [str(file) for file in files] for split, files in (builder.config.data_files or {}).items()}
