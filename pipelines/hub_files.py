"""Files of the hub, read by byte ranges or fetched whole, through whatever the network does.

Every answer is checked for its length; what is short, broken off, refused for now (429) or failing (5xx) is asked for
again, after 1, 2, 4, ... up to 60 seconds or as long as the server says, until the patience of the recipe is used up.
What will not get better by waiting (401, 403, 404, offline mode) is an error at once. Range reads keep nothing on the
disk; whole files go to the cache of huggingface_hub, which resumes them.
"""

import io
import logging
import os
import random
import re
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import constants, get_session, hf_hub_download, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

from pipelines.errors import CorpusError, FetchError

MIN_WAIT_S, MAX_WAIT_S = 1.0, 60.0  # between two attempts, whatever the server says
TIMEOUT_S = 30.0  # without a single byte
_LATER = {408, 425, 429, 500, 502, 503, 504}  # HTTP states that pass

# The HTTP client under huggingface_hub changed twice (requests, httpx, httpx2); its errors are the parents of theirs.
_CLIENT_ERRORS = tuple(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")
_log = logging.getLogger("tinyaudio")
if "HF_HUB_VERBOSITY" not in os.environ:  # two lines for each try of its own; `patiently` says it once
    logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)

Result = TypeVar("Result")
_giving_up = threading.Event()


def give_up() -> None:
    """Let nobody in this process wait any longer: somebody pressed Ctrl-C, or another part failed."""
    _giving_up.set()


def resume() -> None:
    """Be patient again."""
    _giving_up.clear()


def pause(seconds: float) -> bool:
    """Wait, but no longer than until somebody gives up; whether somebody has."""
    return _giving_up.wait(seconds)


def is_commit(revision: str | None) -> bool:
    """Say whether a revision is a whole commit id, which means the same for ever."""
    return revision is not None and re.fullmatch("[0-9a-f]{40}", revision) is not None


class ShortAnswerError(ConnectionError):
    """Fewer bytes came than were asked for."""


def is_passing(error: BaseException | None) -> bool:
    """Say whether trying again may help, by the error or by what caused it."""
    if error is None or constants.HF_HUB_OFFLINE:
        return False
    if isinstance(error, HfHubHTTPError):
        response = getattr(error, "response", None)
        return response is not None and response.status_code in _LATER
    kinds = (LocalEntryNotFoundError, ConnectionError, TimeoutError, *_CLIENT_ERRORS)  # the first: no way to the hub
    return isinstance(error, kinds) or is_passing(error.__cause__)


def patiently(call: Callable[[], Result], what: str, patience_s: float) -> Result:
    """Call until it works, waiting longer and longer after failures that may pass.

    Raises:
        FetchError: it failed for `patience_s` seconds.
        Exception: whatever `call` raised that waiting cannot cure.
    """
    begun, attempt = time.monotonic(), 0
    while True:
        try:
            return call()
        except Exception as error:
            if not is_passing(error):
                raise
            wait_s = _wait_s(error, attempt)
            spent_s = time.monotonic() - begun
            if _giving_up.is_set() or spent_s + wait_s > patience_s:
                raise FetchError(
                    f"{what}: {_failure(error)}; tried {attempt + 1} times in {spent_s:.0f} s. Check the network and "
                    "type the same again: it goes on where it stopped"
                ) from error
            left_s = patience_s - spent_s
            _log.warning("%s: %s; trying again in %.1f s, for %.0f s more", what, _failure(error), wait_s, left_s)
            _giving_up.wait(wait_s)
            attempt += 1


def _wait_s(error: Exception, attempt: int) -> float:
    """Wait as the server says, else twice as long each time, with jitter so that workers do not all come at once."""
    asked_s = _asked_s(getattr(getattr(error, "response", None), "headers", None) or {})
    if asked_s is not None:
        return min(max(asked_s, MIN_WAIT_S), MAX_WAIT_S)
    return max(MIN_WAIT_S, min(2.0**attempt, MAX_WAIT_S) * random.uniform(0.5, 1.0))


def _asked_s(headers: Mapping[str, str]) -> float | None:
    """Read how long the server wants to be left alone: Retry-After, or the hub's `RateLimit: "resolve";r=0;t=55`."""
    after = str(headers.get("Retry-After", ""))
    if after.isdigit():
        return float(after)
    limit = re.search(r";\s*r=0\s*;\s*t=(\d+)", str(headers.get("RateLimit", "")))
    return float(limit[1]) if limit else None


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}" if text else type(error).__name__


def _failure(error: BaseException) -> str:
    """Tell an answer that refuses from no answer at all."""
    return _reason(error) if isinstance(error, HfHubHTTPError) else f"the hub cannot be reached ({_reason(error)})"


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
                f"{self.name}: {_reason(error)}; check HF_TOKEN and that the file is still there"
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
        raise FetchError(
            f"{repo}/{path}: {_reason(error)}; check the disk of HF_HOME, HF_TOKEN and the name"
        ) from error


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
