"""The `assemblyai` provider: the official SDK, wrapped in what it lacks.

The SDK retries nothing: one 429 while polling would lose a job that is paid for. Here every job is submitted once, its
id is kept in `assemblyai-jobs.jsonl` beside the predictions, and polling has its own patience; started again after a
kill, jobs are fetched by id. A job's status "error", a refused request and a job that never ends are failures with
their reason; a completed job without text is an empty answer.

Sent are the 16 kHz WAV bytes that every remote system gets, one model by name (`speech_models` must be given), and the
language; punctuation and formatting stay at the service's defaults.
"""

import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from importlib.metadata import version
from typing import Any

import assemblyai
import httpx
from assemblyai import api

from pipelines.errors import EvaluationError
from pipelines.evaluate.eval_sets import Clip
from pipelines.evaluate.predictions import Prediction
from pipelines.evaluate.providers.base import ProviderOptions
from pipelines.evaluate.providers.paid_jobs import (
    Job,
    Ledger,
    Patience,
    Quote,
    StoppedError,
    Verdict,
    Waiter,
    model_names,
    quote,
)

KEY_VARIABLE = "ASSEMBLYAI_API_KEY"
DEFAULT_MODEL = "universal-3-5-pro"
LANGUAGE = "en"
JOBS_FILE = "assemblyai-jobs.jsonl"
TRANSIENT = {429, 500, 502, 503, 504}
# What the SDK lets through of a reply with status 200 that is not what it should be: no JSON, or without its fields.
_MALFORMED = (ValueError, KeyError)
LOOKUP_PAGES, LOOKUP_LIMIT = 20, 200  # newest jobs searched for one whose id was lost; 200 is the service's page limit


class AssemblyAIProvider:
    """An account and a model."""

    name = "assemblyai"

    def __init__(self, options: ProviderOptions, api_key: str, patience: Patience | None = None) -> None:
        if options.output is None:
            raise EvaluationError("provider 'assemblyai' needs an output folder, to keep the ids of paid jobs in")
        self.model = options.model or DEFAULT_MODEL
        if self.model not in model_names(self.name):
            raise EvaluationError(
                f"AssemblyAI has no speech model {self.model!r}; expected one of {', '.join(model_names(self.name))}"
            )
        self.concurrency = options.concurrency
        self.settings = assemblyai.Settings(api_key=api_key)
        self.waiter = Waiter(patience or Patience(poll_first_s=self.settings.polling_interval))
        self.ledger = Ledger(options.output / JOBS_FILE)
        self._local = threading.local()

    @classmethod
    def open(cls, options: ProviderOptions) -> "AssemblyAIProvider":
        """Open an account.

        Raises:
            EvaluationError: no key, no output folder, or no such speech model.
        """
        api_key = options.api_key or os.environ.get(KEY_VARIABLE)
        if not api_key:
            raise EvaluationError(f"provider 'assemblyai' needs a key; pass --api-key or set {KEY_VARIABLE}")
        return cls(options, api_key)

    def identity(self) -> dict[str, Any]:
        return {"name": self.model, "speech_models": [self.model], "language_code": LANGUAGE}

    def environment(self) -> dict[str, Any]:
        sdk = version("assemblyai")
        where = {"is_remote": True, "url": self.settings.base_url, "sdk": sdk, "concurrency": self.concurrency}
        return {**where, "audio": "16 kHz mono, 16-bit WAV"}

    def quote(self, clips: Sequence[tuple[str, float]]) -> Quote:
        """Say what clips (id, seconds) will cost; those whose job is known already cost nothing."""
        self.ledger.read_again()
        unpaid = [seconds for name, seconds in clips if self.ledger.job(name).job_id is None]
        return quote(self.name, self.model, unpaid)

    def transcribe(self, clips: Sequence[Clip]) -> Iterator[Prediction]:
        self.ledger.read_again()
        with ThreadPoolExecutor(self.concurrency) as pool:
            futures = [pool.submit(self._answer, clip) for clip in clips]
            try:
                yield from _as_they_come(futures)
            finally:  # also on an interrupt: nobody sleeps on, nothing new is submitted
                if not all(future.done() for future in futures):
                    self.waiter.stop()
                for future in futures:
                    future.cancel()

    def _answer(self, clip: Clip) -> Prediction:
        started = time.perf_counter()
        job_id: str | None = None
        try:
            job_id = self._job_id(clip)
            done = self._wait_for(job_id)
        except assemblyai.types.AssemblyAIError as error:
            _raise_if_fatal(error)
            return _failed(clip, _reason(error), started, job_id)
        except (httpx.HTTPError, TimeoutError) as error:
            return _failed(clip, f"{type(error).__name__}: {error}", started, job_id)
        except _MALFORMED:
            return _failed(clip, "HTTP 200 with a body that is not the service's JSON", started, job_id)
        if done.status == assemblyai.TranscriptStatus.error:
            self.ledger.note(clip.utterance_id, Job())  # failed jobs are not charged; a retry submits anew
            return _failed(clip, done.error or "status error without a reason", started, job_id)
        used = getattr(done, "speech_model_used", None)
        warnings = (f"other_model:{used}",) if used not in (None, self.model) else ()
        time_s = time.perf_counter() - started
        return clip.answer(done.text or "", time_s=time_s, warnings=warnings, provider_id=job_id)

    def _job_id(self, clip: Clip) -> str:
        """Return the clip's job, submitting it if there is none yet."""
        known = self.ledger.job(clip.utterance_id)
        if known.job_id is not None:
            return known.job_id
        found = self._look_up(known.upload) if known.upload is not None else None
        if found is None:
            found = self._submit(clip)
        return found

    def _submit(self, clip: Clip) -> str:
        wav = clip.to_wav()
        upload = self.waiter.persist(lambda: self._sdk().upload_file(wav), self._judge)
        self.ledger.note(clip.utterance_id, Job(upload=upload))
        config = assemblyai.TranscriptionConfig(speech_models=[self.model], language_code=LANGUAGE)
        is_uncertain = False

        def create() -> str:
            nonlocal is_uncertain
            found = self._look_up(upload) if is_uncertain else None
            if found is not None:
                return found
            try:
                return str(self._sdk().submit(upload, config).id)
            except assemblyai.types.AssemblyAIError as error:
                is_uncertain = error.status_code != 429  # a refusal is certain; anything else may have made a job
                raise
            except (httpx.HTTPError, *_MALFORMED):
                is_uncertain = True
                raise

        job_id = self.waiter.persist(create, self._judge)
        self.ledger.note(clip.utterance_id, Job(upload=upload, job_id=job_id))
        return job_id

    def _look_up(self, upload: str) -> str | None:
        """Find the job of an upload among the newest ones; None if the service never made it."""
        before: str | None = None
        for _ in range(LOOKUP_PAGES):
            params = assemblyai.ListTranscriptParameters(limit=LOOKUP_LIMIT, before_id=before)
            page = self.waiter.persist(lambda: self._sdk().list_transcripts(params), self._judge)  # noqa: B023
            for item in page.transcripts:
                if item.audio_url == upload:
                    return str(item.id)
            before = page.page_details.before_id_of_prev_url
            if before is None:
                break
        return None

    def _wait_for(self, job_id: str) -> Any:
        patience = self.waiter.patience
        deadline, pause_s = time.monotonic() + patience.give_up_s, patience.poll_first_s
        while True:
            found = self.waiter.persist(lambda: api.get_transcript(self._client().http_client, job_id), self._judge)
            if found.status in (assemblyai.TranscriptStatus.completed, assemblyai.TranscriptStatus.error):
                return found
            if time.monotonic() >= deadline:
                raise TimeoutError(
                    f"job {job_id} is {found.status.value} after {patience.give_up_s:g} s; fetch it later "
                    "with --retry-failed, which pays nothing"
                )
            self.waiter.pause(pause_s)
            pause_s = min(1.5 * pause_s, patience.poll_most_s)

    def _judge(self, error: Exception) -> Verdict:
        if isinstance(error, assemblyai.types.AssemblyAIError):
            response = self._client().last_response
            after = response.headers.get("retry-after", "") if response is not None else ""
            retry_after_s = float(after) if error.status_code == 429 and after.isdigit() else 0.0
            return Verdict(is_transient=error.status_code in TRANSIENT, retry_after_s=retry_after_s)
        return Verdict(is_transient=isinstance(error, (httpx.HTTPError, *_MALFORMED)))

    def _client(self) -> Any:
        """One client for each thread, since `last_response` belongs to whoever asked last."""
        if not hasattr(self._local, "client"):
            self._local.client = assemblyai.Client(settings=self.settings)
        return self._local.client

    def _sdk(self) -> Any:
        return assemblyai.Transcriber(client=self._client())


def _as_they_come(futures: Sequence[Future[Prediction]]) -> Iterator[Prediction]:
    for future in as_completed(futures):
        try:
            yield future.result()
        except StoppedError:
            continue


def _raise_if_fatal(error: Any) -> None:
    """Stop the evaluation for what no other clip will survive either: a wrong key, an empty account."""
    reason = _reason(error)
    if error.status_code == 401:
        raise EvaluationError(f"AssemblyAI refused the key ({reason}); check --api-key or {KEY_VARIABLE}") from error
    if error.status_code == 400 and "balance" in reason:
        raise EvaluationError(f"AssemblyAI: {reason} Top up and type the same again; nothing is paid twice.") from error


def _reason(error: Exception) -> str:
    """Fold an error into one line; a page of HTML is named and not quoted."""
    text = " ".join(str(error).split())
    status = getattr(error, "status_code", None)
    if "<html" in text.lower() or "Reason: Request" in text:
        return f"HTTP {status} with a body that is no JSON"
    return f"HTTP {status}: {text}" if status else text


def _failed(clip: Clip, reason: str, started: float, job_id: str | None) -> Prediction:
    return clip.answer(None, time_s=time.perf_counter() - started, error=reason, provider_id=job_id)
