"""What may be transcribed: every form of recording that Python code has at hand becomes an `Input` of the reader.

`Transcriber`, `pipeline()` and the command line share it. Travels with the checkpoint.
"""

import http.client
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from .errors import AudioError, one_line

MAX_URL_BYTES = 2 << 30  # of one recording: 18 hours of MP3 at 256 kbit/s
URL_TIMEOUT_S = 30.0  # without any answer
_SAFE = "!#$%&'()*+,/:;=?@[]~"  # characters that have a meaning in an address, or are quoted already
_HANDLERS = (  # those of `urlopen` without files, data and ftp, to which a server could redirect
    urllib.request.ProxyHandler,
    urllib.request.UnknownHandler,
    urllib.request.HTTPHandler,
    urllib.request.HTTPSHandler,
    urllib.request.HTTPDefaultErrorHandler,
    urllib.request.HTTPRedirectHandler,
    urllib.request.HTTPErrorProcessor,
)


def is_single(given: Any) -> bool:
    """Check whether something is one recording, not a collection of them."""
    if isinstance(given, tuple):
        has_rate = len(given) == 2 and isinstance(given[1], int | np.integer) and not isinstance(given[1], bool)
        return has_rate and isinstance(given[0], np.ndarray | torch.Tensor)
    return (
        isinstance(given, str | bytes | bytearray | memoryview | np.ndarray | torch.Tensor | Mapping)
        or hasattr(given, "read")
        or hasattr(given, "__fspath__")
        or hasattr(given, "get_all_samples")
        or not (hasattr(given, "__iter__") or hasattr(given, "__getitem__"))
    )


def each(inputs: Any) -> Iterator[Any]:
    """Iterate over a collection: any iterable, or a map-style data set of torch.

    Such a data set has `__len__` and `__getitem__` only. `iter` would wait for an IndexError, which it need not raise.
    """
    if not hasattr(inputs, "__iter__") and hasattr(inputs, "__getitem__") and hasattr(inputs, "__len__"):
        return (inputs[number] for number in range(len(inputs)))
    return iter(inputs)


def as_input(given: Any) -> Any:
    """Convert one recording to what `audio` reads.

    Args:
        given: a path or URL, encoded bytes (also bytearray, memoryview), a binary file object, an array or tensor of
            samples at 16 kHz, (samples, sampling rate in Hz), an AudioDecoder of `datasets` or torchcodec, or a dict as
            pipelines and rows of data sets have it: with `raw` or `array` and `sampling_rate`, with `bytes` or `path`,
            or with one of these forms under `audio`.

    Raises:
        AudioError: a dict without these keys, an array in a dict without its sampling rate, a decoder that fails, or an
            address that cannot be opened.
    """
    if isinstance(given, str) and given.lower().startswith(("http://", "https://")):
        return _Download(given)
    if isinstance(given, bytearray | memoryview):
        return bytes(given)
    if isinstance(given, torch.Tensor):
        samples = given.detach().cpu()
        return (samples.float() if samples.is_floating_point() else samples).numpy()
    if isinstance(given, tuple) and is_single(given):
        return as_input(given[0]), int(given[1])
    if hasattr(given, "get_all_samples"):
        return _decoded(given)
    return _of_dict(given) if isinstance(given, Mapping) else given


def _of_dict(given: Mapping[str, Any]) -> Any:
    samples, rate = given.get("raw", given.get("array")), given.get("sampling_rate")
    if samples is not None and rate is not None:
        return np.asarray(as_input(samples)), int(rate)
    for key in ("bytes", "path", "audio"):  # an undecoded row of a data set has bytes, path or both
        if samples is None and given.get(key) is not None:
            return as_input(given[key])
    raise AudioError(
        f"expected 'raw' (or 'array') and 'sampling_rate', or 'bytes', 'path' or 'audio'; found a dict with "
        f"{sorted(map(str, given))}"
    )


def _decoded(decoder: Any) -> tuple[Any, int]:
    """Read an AudioDecoder: `datasets` from version 4 gives one for a cell of audio."""
    try:
        decoded = decoder.get_all_samples()
        return as_input(decoded.data), int(decoded.sample_rate)
    except Exception as error:  # torchcodec raises RuntimeError, and ValueError for some files
        raise AudioError(f"{type(decoder).__name__} input cannot be decoded: {one_line(error)}") from error


class _Download:
    """A recording on the web, as a file to read once; http and https only, wherever it redirects to.

    A connection that ends early looks like the end of a file, so the length is compared with the promised one.
    """

    def __init__(self, url: str) -> None:
        self.name, self._num_read = url, 0
        opener = urllib.request.OpenerDirector()
        for handler in _HANDLERS:
            opener.add_handler(handler())
        try:
            address = urllib.parse.quote(url, safe=_SAFE)  # a space or a letter beyond ASCII
            request = urllib.request.Request(address, headers={"User-Agent": "tinyaudio"})
            self._answer = opener.open(request, timeout=URL_TIMEOUT_S)
        except urllib.error.HTTPError as error:
            error.close()
            raise AudioError(
                f"{url!r} cannot be fetched: the server answered {error.code}. Check the address"
            ) from error
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise self._failed(error) from error
        promised = self._answer.headers.get("Content-Length", "")
        self._promised = int(promised) if promised.isdigit() else 0

    def read(self, size: int = -1) -> bytes:
        """Read some bytes; none at the end.

        Raises:
            AudioError: the network fails, or the recording is longer than `MAX_URL_BYTES` or shorter than promised.
        """
        try:
            block = bytes(self._answer.read(min(size, MAX_URL_BYTES + 1) if size >= 0 else MAX_URL_BYTES + 1))
        except (OSError, http.client.HTTPException) as error:
            self._answer.close()
            raise self._failed(error) from error
        self._num_read += len(block)
        if self._num_read > MAX_URL_BYTES:
            self._answer.close()
            raise AudioError(f"{self.name!r} has more than {MAX_URL_BYTES:,} bytes. Download it, and name the file")
        if not block and size:
            self._answer.close()
            if self._num_read < self._promised:
                found = f"{self._num_read:,} of {self._promised:,} bytes"
                raise AudioError(f"{self.name!r} ended after {found}. Try again, or download it and name the file")
        return block

    def _failed(self, error: Exception) -> AudioError:
        reason = getattr(error, "reason", error)
        shown = one_line(reason) if isinstance(reason, BaseException) else str(reason)
        return AudioError(f"{self.name!r} cannot be fetched ({shown}). Check the address and the network")
