"""The `assemblyai` provider: the official SDK, with retries and a ledger of paid jobs.

The SDK retries nothing: one 429 while polling would lose a job that is paid for. Here every request goes through
`pipelines.retry`, and a job's id is kept in `assemblyai-jobs.jsonl` beside the predictions, so that a resumed
evaluation fetches it instead of paying again. A job with status "error", a refused request and a job that does not end
are failures with their reason; a completed job without text is an empty answer.

The service is sent the 16 kHz WAV bytes that every remote system gets, one model by name (`speech_models` is required),
and the language; punctuation and formatting are the service's defaults.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import version
from typing import Any, TypeVar

import assemblyai
import httpx
from assemblyai import TranscriptStatus, api
from assemblyai.types import AssemblyAIError

from pipelines.errors import EvaluationError, one_line
from pipelines.evaluate.eval_sets import Clip
from pipelines.evaluate.predictions import Prediction
from pipelines.evaluate.providers.base import ProviderOptions
from pipelines.evaluate.providers.paid_jobs import Ledger, Quote, model_names, quote
from pipelines.retry import TRANSIENT_STATUS, StoppedError, retry, retry_after_s

KEY_VARIABLE = "ASSEMBLYAI_API_KEY"
DEFAULT_MODEL = "universal-3-5-pro"
LANGUAGE = "en"
JOBS_FILE = "assemblyai-jobs.jsonl"
ATTEMPTS = 8  # of one request
MAX_POLL_S = 15.0  # pause between two polls of a job; the first is the SDK's, 3 s, and each is half as long again
JOB_TIMEOUT_S = 1_800.0  # how long to wait for one job; it can be fetched later by its id
# What the SDK raises for a reply with status 200 whose body is not JSON, or lacks its fields.
_MALFORMED = (ValueError, KeyError)

Result = TypeVar("Result")


class AssemblyAIProvider:
    """An account and a model."""

    name = "assemblyai"

    def __init__(self, options: ProviderOptions) -> None:
        """Open an account.

        Raises:
            EvaluationError: no key, no output folder, or no such speech model.
        """
        api_key = options.api_key or os.environ.get(KEY_VARIABLE)
        if not api_key:
            raise EvaluationError(f"provider 'assemblyai' needs a key; pass --api-key or set {KEY_VARIABLE}")
        if options.output is None:
            raise EvaluationError("provider 'assemblyai' requires an output folder for the ids of paid jobs")
        self.model = options.model or DEFAULT_MODEL
        if self.model not in model_names(self.name):
            raise EvaluationError(
                f"AssemblyAI has no speech model {self.model!r}; expected one of {', '.join(model_names(self.name))}"
            )
        self.concurrency = options.concurrency
        self.settings = assemblyai.Settings(api_key=api_key)
        self.ledger = Ledger(options.output / JOBS_FILE)
        self._stop = threading.Event()
        self._local = threading.local()

    def identity(self) -> dict[str, Any]:
        return {"name": self.model, "speech_models": [self.model], "language_code": LANGUAGE}

    def environment(self) -> dict[str, Any]:
        return {
            "is_remote": True,
            "url": self.settings.base_url,
            "sdk": version("assemblyai"),
            "concurrency": self.concurrency,
            "audio": "16 kHz mono, 16-bit WAV",
        }

    def quote(self, clips: Sequence[tuple[str, float]]) -> Quote:
        """Compute what clips (id, seconds) will cost; those that have a job already cost nothing."""
        self.ledger.read()
        return quote(self.name, self.model, [seconds for name, seconds in clips if self.ledger.job_id(name) is None])

    def transcribe(self, clips: Sequence[Clip]) -> Iterator[Prediction]:
        self.ledger.read()
        with ThreadPoolExecutor(self.concurrency) as pool:
            futures = [pool.submit(self._transcribe_one, clip) for clip in clips]
            try:
                for future in as_completed(futures):
                    yield future.result()
            finally:  # after an error or an interrupt, no wait continues and no clip is begun
                if not all(future.done() for future in futures):
                    self._stop.set()
                for future in futures:
                    future.cancel()

    def _transcribe_one(self, clip: Clip) -> Prediction:
        """Submit the clip's job, unless it has one, and wait for its result."""
        started = time.perf_counter()
        job_id = self.ledger.job_id(clip.utterance_id)
        text, error = None, None
        warnings: tuple[str, ...] = ()
        try:
            if job_id is None:
                job_id = self._submit(clip)
                self.ledger.note(clip.utterance_id, job_id)
            done = self._wait_for(job_id)
            if done.status == TranscriptStatus.error:
                self.ledger.note(clip.utterance_id, None)  # failed jobs are not charged; a retry submits another
                error = done.error or "status error without a reason"
            else:
                text = done.text or ""
                used = getattr(done, "speech_model_used", None)
                warnings = (f"other_model:{used}",) if used not in (None, self.model) else ()
        except AssemblyAIError as refused:
            error = _reason(refused)
            if refused.status_code == 401:
                raise EvaluationError(
                    f"AssemblyAI refused the key ({error}); check --api-key or {KEY_VARIABLE}"
                ) from refused
            if refused.status_code == 400 and "balance" in error:
                raise EvaluationError(
                    f"AssemblyAI: {error} Top up and run the same command again; no clip is paid for twice."
                ) from refused
        except (httpx.HTTPError, TimeoutError) as failed:
            error = f"{type(failed).__name__}: {failed}"
        except _MALFORMED:
            error = "HTTP 200 with a body that is not the service's JSON"
        time_s = time.perf_counter() - started
        return clip.answer(text, time_s=time_s, error=error, warnings=warnings, provider_id=job_id)

    def _submit(self, clip: Clip) -> str:
        """Upload a clip and create its job; where it is not certain that the service made one, another is created."""
        wav = clip.to_wav()
        config = assemblyai.TranscriptionConfig(speech_models=[self.model], language_code=LANGUAGE)
        upload = self._request(lambda: assemblyai.Transcriber(client=self._client()).upload_file(wav))
        return self._request(lambda: str(assemblyai.Transcriber(client=self._client()).submit(upload, config).id))

    def _wait_for(self, job_id: str) -> Any:
        deadline, pause_s = time.monotonic() + JOB_TIMEOUT_S, self.settings.polling_interval
        while True:
            found = self._request(lambda: api.get_transcript(self._client().http_client, job_id))
            if found.status in (TranscriptStatus.completed, TranscriptStatus.error):
                return found
            if time.monotonic() >= deadline:
                raise TimeoutError(
                    f"job {job_id} is {found.status.value} after {JOB_TIMEOUT_S:g} s; fetch it later with "
                    "--retry-failed, which pays nothing"
                )
            if self._stop.wait(pause_s):
                raise StoppedError
            pause_s = min(1.5 * pause_s, MAX_POLL_S)

    def _request(self, call: Callable[[], Result]) -> Result:
        return retry(call, _may_pass, stop=self._stop, attempts=ATTEMPTS, asked_s=self._asked_s)

    def _asked_s(self, error: Exception) -> float | None:
        """Return the wait that the service asked for in its last response to this thread."""
        response = self._client().last_response if isinstance(error, AssemblyAIError) else None
        return None if response is None else retry_after_s(response.headers)

    def _client(self) -> Any:
        """Return this thread's client: `last_response` of a shared one would belong to any thread."""
        if not hasattr(self._local, "client"):
            self._local.client = assemblyai.Client(settings=self.settings)
        return self._local.client


def _may_pass(error: Exception) -> bool:
    if isinstance(error, AssemblyAIError):
        return error.status_code in TRANSIENT_STATUS
    return isinstance(error, (httpx.HTTPError, *_MALFORMED))


def _reason(error: AssemblyAIError) -> str:
    """Return the service's message on one line, without a page of HTML."""
    text = one_line(error)
    if "<html" in text.lower() or "Reason: Request" in text:
        return f"HTTP {error.status_code} with a body that is not JSON"
    return f"HTTP {error.status_code}: {text}" if error.status_code else text
