"""Files of data sets on the hub, read by byte ranges or fetched whole, with every answer checked for its length.

Range reads leave nothing on the disk. The hub answers a request for a large file with a signed address on another host.
That address is kept until it is refused, so that the hub, which limits requests, is asked once per file and process and
not once per range. HF_TOKEN goes to the hub alone.

Whole files go to the cache of huggingface_hub, which resumes interrupted ones. Failed requests are repeated as
`pipelines.retry` describes, for as long as the recipe allows.
"""

import io
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

from huggingface_hub import get_session, hf_hub_download, hf_hub_url
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

from pipelines.errors import CorpusError, FetchError, one_line
from pipelines.retry import ShortAnswerError, retry_hub
from tinyaudio.model.errors import is_missing_revision

TIMEOUT_S = 30.0  # without a single byte
MAX_REDIRECTS = 5
REFUSED = {400, 401, 403, 404, 410}  # HTTP states of a signed address that has expired

if "HF_HUB_VERBOSITY" not in os.environ:  # it logs two lines for each of its own attempts; `retry_hub` logs one
    logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)


def is_commit(revision: str | None) -> bool:
    """Return whether a revision is a full commit id, which never changes its meaning."""
    return revision is not None and re.fullmatch("[0-9a-f]{40}", revision) is not None


@dataclass
class _Known:
    """What this process knows of a file at one commit."""

    size: int | None = None
    address: str | None = None  # where the hub's redirect led to last


_known: dict[str, _Known] = {}  # by URL on the hub; 2 KB for each file of a corpus


class HubFile(io.RawIOBase):
    """One file of a data set at one commit. Each read is one ranged request of exactly the bytes asked for."""

    def __init__(self, repo: str, path: str, revision: str, *, timeout_s: float) -> None:
        """Prepare; the first request is made by the first read.

        Args:
            timeout_s: seconds to keep repeating a request that fails.
        """
        self.name, self._timeout_s = f"{repo}/{path}", timeout_s
        self._url = hf_hub_url(repo, path, repo_type="dataset", revision=revision)
        self._position = 0
        self._known = _known.setdefault(self._url, _Known())
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
        """Size of the file in bytes, from the answer to a request for its last eight."""
        if self._known.size is None:
            self._tail = self._get("bytes=-8", 8)
        assert self._known.size is not None
        return self._known.size

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self.size - self._position)
        if wanted <= 0:
            return 0
        before_tail = self.size - len(self._tail) - self._position
        if before_tail <= 0:  # a Parquet reader begins with the last eight bytes
            body = self._tail[-before_tail:][:wanted]
        else:
            body = self._get(f"bytes={self._position}-{self._position + wanted - 1}", wanted)
        buffer[:wanted] = body
        self._position += wanted
        return wanted

    def _get(self, range_: str, length: int) -> bytes:
        try:
            return retry_hub(lambda: self._get_once(range_, length), self.name, self._timeout_s)
        except (FetchError, CorpusError):
            raise
        except Exception as error:
            raise FetchError(
                f"{self.name}: {one_line(error)}. Check HF_TOKEN, and that the file still exists"
            ) from error

    def _get_once(self, range_: str, length: int) -> bytes:
        response = self._ask(range_)
        hf_raise_for_status(response)
        place, _, total = response.headers.get("Content-Range", "").rpartition("/")
        if response.status_code != 206 or not total.isdigit():
            raise FetchError(f"{self.name}: the server ignores byte ranges. Set corpus.fetch to 'files'")
        if self._known.size not in (None, int(total)):
            raise FetchError(f"{self.name}: expected {self._known.size} bytes at a fixed commit, found {total}")
        self._known.size = int(total)
        if len(response.content) != min(length, self._known.size):
            raise ShortAnswerError(f"expected {length} bytes, received {len(response.content)} ({place or 'no range'})")
        return bytes(response.content)

    def _ask(self, range_: str) -> Any:
        """Request a range at the address that is kept; ask the hub if there is none, or if it is refused."""
        kept = self._known.address  # threads share it: it is dropped only after it has failed
        if kept is not None:
            try:
                response = self._request(kept, range_)
            except BaseException:
                self._known.address = None
                raise
            if response.status_code != 206:
                self._known.address = None
            if response.status_code not in REFUSED:
                return response
        url = self._url
        for _ in range(MAX_REDIRECTS):
            response = self._request(url, range_)
            if not (300 <= response.status_code < 400 and "Location" in response.headers):
                break
            url = urljoin(url, response.headers["Location"])
        if response.status_code == 206 and not self._is_hub(url):
            self._known.address = url
        return response

    def _request(self, url: str, range_: str) -> Any:
        headers = build_hf_headers() if self._is_hub(url) else build_hf_headers(token=False)
        headers |= {"Range": range_, "Accept-Encoding": "identity"}
        return get_session().request("GET", url, headers=headers, timeout=TIMEOUT_S, follow_redirects=False)

    def _is_hub(self, url: str) -> bool:
        return urlsplit(url)[:2] == urlsplit(self._url)[:2]


def fetch_whole(repo: str, path: str, revision: str, *, timeout_s: float) -> Path:
    """Download a file of a data set into the cache of huggingface_hub, which checks its size and resumes it.

    Raises:
        FetchError: the download failed.
    """

    def download() -> Path:
        return Path(hf_hub_download(repo, path, repo_type="dataset", revision=revision))

    try:
        return retry_hub(download, f"{repo}/{path}", timeout_s)
    except FetchError:
        raise
    except OSError as error:
        raise FetchError(
            f"{repo}/{path}: {one_line(error)}. Check the name, HF_TOKEN and the disk of HF_HOME"
        ) from error


def resolve_dataset(name: str, config: str | None, revision: str | None, timeout_s: float) -> Mapping[str, list[str]]:
    """List the files of every split of a data set, with the commit that the revision names at present.

    Returns:
        `hf://datasets/<name>@<commit>/<file>` paths by split.

    Raises:
        CorpusError: no such data set, config or revision. FetchError: the hub was unreachable for `timeout_s` seconds.
    """
    from datasets import load_dataset_builder

    try:
        builder = retry_hub(
            lambda: load_dataset_builder(name, config, revision=revision), f"data set {name!r}", timeout_s
        )
    except FetchError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        if is_missing_revision(error):
            raise CorpusError(
                f"data set {name!r} has no revision {revision!r} on the hub. Name another commit or a branch, such as "
                "--set corpus.revision=main"
            ) from error
        cure = "Check the name, the network and HF_TOKEN, or set corpus.path to a local copy"
        if _is_refused(error):
            cure = f"Accept its terms at https://huggingface.co/datasets/{name} and set HF_TOKEN"
        raise CorpusError(
            f"data set {name!r} (config {config!r}, revision {revision or 'main'!r}) cannot be opened: "
            f"{one_line(error)}. {cure}"
        ) from error
    return {str(split): [str(file) for file in files] for split, files in (builder.config.data_files or {}).items()}


def _is_refused(error: BaseException | None) -> bool:
    """Return whether the hub refuses access to a data set that it knows: a gated or private one."""
    if error is None:
        return False
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status in (401, 403) or "gated" in str(error) or _is_refused(error.__cause__)
