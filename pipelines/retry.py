"""Repeat requests over the network until they succeed, or until a time or a number of attempts is used up.

`retry` is the engine for any service. `retry_hub` applies it to the Hugging Face hub: a short, broken, refused (429) or
failing (5xx) answer is requested again after 1, 2, 4, ... up to 60 seconds, or after as long as the server asks for.
Errors that waiting cannot cure (401, 403, 404, offline mode) are raised at once.
"""

import logging
import math
import random
import re
import threading
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

from huggingface_hub import constants, get_token
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from pipelines.errors import FetchError, one_line

MIN_WAIT_S, MAX_WAIT_S = 1.0, 60.0  # between two attempts, whatever the server asks for
TRANSIENT_STATUS = {408, 425, 429, 500, 502, 503, 504}  # HTTP states that pass
# The HTTP client under huggingface_hub changed twice (requests, httpx, httpx2); its errors are the parents of theirs.
_CLIENT_ERRORS = tuple(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")

Result = TypeVar("Result")
_giving_up = threading.Event()
_log = logging.getLogger("tinyaudio")


class StoppedError(Exception):
    """A stop event was set while `retry` waited; the last error is the cause."""


class ShortAnswerError(ConnectionError):
    """A server sent fewer bytes than requested."""


def retry(
    call: Callable[[], Result],
    is_transient: Callable[[Exception], bool],
    *,
    stop: threading.Event,
    timeout_s: float = math.inf,
    attempts: float = math.inf,
    asked_s: Callable[[Exception], float | None] | None = None,
    on_wait: Callable[[Exception, float], None] | None = None,
) -> Result:
    """Call until it succeeds, waiting twice as long after each transient failure.

    Args:
        is_transient: whether a repeated call may succeed after this error.
        stop: ends a wait at once. It is not checked before the first call.
        timeout_s: seconds from the first call; no wait begins that would exceed them.
        attempts: the most calls.
        asked_s: returns the wait in seconds that the server asks for with an error; by default from its response.
        on_wait: called with the error and the seconds before each wait.

    Raises:
        StoppedError: `stop` was set.
        Exception: the last error of `call`, if it is not transient or the limits are used up.
    """
    begun, failed = time.monotonic(), 0
    while True:
        try:
            return call()
        except Exception as error:
            wait_s = _wait_s((asked_s or _asked_s)(error), failed)
            failed += 1
            if not is_transient(error) or failed >= attempts or time.monotonic() - begun + wait_s > timeout_s:
                raise
            if on_wait is not None and not stop.is_set():
                on_wait(error, wait_s)
            if stop.wait(wait_s):
                raise StoppedError from error


def _wait_s(asked_s: float | None, failed: int) -> float:
    """Return how long to wait: as the server asks, else doubled each time, with jitter so that workers spread out."""
    if asked_s is None:
        asked_s = min(2.0**failed, MAX_WAIT_S) * random.uniform(0.5, 1.0)
    return min(max(asked_s, MIN_WAIT_S), MAX_WAIT_S)


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Read the wait that a server asks for: Retry-After, or the hub's `RateLimit: "resolve";r=0;t=55`."""
    after = str(headers.get("Retry-After", ""))
    if after.isdigit():
        return float(after)
    limit = re.search(r";\s*r=0\s*;\s*t=(\d+)", str(headers.get("RateLimit", "")))
    return float(limit[1]) if limit else None


def _asked_s(error: Exception) -> float | None:
    return retry_after_s(getattr(getattr(error, "response", None), "headers", None) or {})


def retry_hub(call: Callable[[], Result], what: str, timeout_s: float) -> Result:
    """Call something on the hub until it succeeds.

    Args:
        what: the subject of messages, such as "model 'x/y'".
        timeout_s: seconds to keep trying.

    Raises:
        FetchError: it failed for `timeout_s` seconds, or `give_up` was called.
        Exception: an error of `call` that waiting cannot cure.
    """
    begun, num_calls = time.monotonic(), 0

    def counted() -> Result:
        nonlocal num_calls
        num_calls += 1
        return call()

    def warn(error: Exception, wait_s: float) -> None:
        left_s = timeout_s - (time.monotonic() - begun)
        _log.warning("%s: %s; trying again in %.1f s, for %.0f s more", what, _failure(error), wait_s, left_s)

    try:
        return retry(counted, is_passing, stop=_giving_up, timeout_s=timeout_s, on_wait=warn)
    except Exception as error:
        last = error.__cause__ if isinstance(error, StoppedError) else error
        if not is_passing(last):
            raise
        raise FetchError(
            f"{what}: {_failure(last)}; tried {num_calls} times in {time.monotonic() - begun:.0f} s. "
            "Check the network, then run the same command again to resume."
        ) from last


def is_passing(error: BaseException | None) -> bool:
    """Return whether a hub error, or its cause, is one that may pass."""
    if error is None or constants.HF_HUB_OFFLINE:
        return False
    if isinstance(error, HfHubHTTPError):
        response = getattr(error, "response", None)
        return response is not None and response.status_code in TRANSIENT_STATUS
    kinds = (LocalEntryNotFoundError, ConnectionError, TimeoutError, *_CLIENT_ERRORS)  # the first: hub unreachable
    return isinstance(error, kinds) or is_passing(error.__cause__)


def _failure(error: BaseException | None) -> str:
    """Describe a refusal by the hub, or the lack of any answer."""
    assert error is not None
    text = f"{type(error).__name__}: {one_line(error)}"
    if getattr(getattr(error, "response", None), "status_code", None) == 429 and get_token() is None:
        text += ". HF_TOKEN is not set; the hub allows more requests with one"
    return text if isinstance(error, HfHubHTTPError) else f"the hub cannot be reached ({text})"


def give_up() -> None:
    """End all waits in this process, now and later: after Ctrl-C, or after another part has failed."""
    _giving_up.set()


def resume() -> None:
    """Allow waits again."""
    _giving_up.clear()


def pause(seconds: float) -> bool:
    """Wait, at most until `give_up`; return whether it was called."""
    return _giving_up.wait(seconds)
