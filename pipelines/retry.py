"""Calling something over the network again until it works, or until the time the recipe allows is used up.

A short, broken, refused (429) or failing (5xx) answer is asked for again after 1, 2, 4, ... up to 60 seconds, or after
as long as the server says. What waiting cannot cure (401, 403, 404, offline mode) is an error at once.
"""

import logging
import random
import re
import threading
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from pipelines.errors import FetchError

MIN_WAIT_S, MAX_WAIT_S = 1.0, 60.0  # between two attempts, whatever the server says
_LATER = {408, 425, 429, 500, 502, 503, 504}  # HTTP states that pass
# The HTTP client under huggingface_hub changed twice (requests, httpx, httpx2); its errors are the parents of theirs.
_CLIENT_ERRORS = tuple(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")

Result = TypeVar("Result")
_giving_up = threading.Event()
_log = logging.getLogger("tinyaudio")


def give_up() -> None:
    """Let nobody in this process wait any longer: somebody pressed Ctrl-C, or another part failed."""
    _giving_up.set()


def resume() -> None:
    """Be patient again."""
    _giving_up.clear()


def pause(seconds: float) -> bool:
    """Wait, but no longer than until somebody gives up; whether somebody has."""
    return _giving_up.wait(seconds)


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


def reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}" if text else type(error).__name__


def _failure(error: BaseException) -> str:
    """Tell an answer that refuses from no answer at all."""
    return reason(error) if isinstance(error, HfHubHTTPError) else f"the hub cannot be reached ({reason(error)})"
