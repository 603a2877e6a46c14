"""Providers by name. Every provider has the interface `base.Provider`, so one evaluation serves them all.

A provider gets clips of 16 kHz mono samples and answers each once, in any order. It states its identity (everything
that can change an answer, compared before an evaluation resumes) and its environment (recorded only).
"""

from collections.abc import Sequence
from dataclasses import fields

from pipelines.errors import EvaluationError
from pipelines.evaluate.providers.base import DECODING, Provider, ProviderOptions

_LOCAL = ("revision", "device", "batch_size")
# Provider -> the options that it takes beside `model` and `output`. A new provider is listed here and opened below.
PROVIDERS = {
    "tinyaudio": (*_LOCAL, *DECODING, "draft", "ctc_nbest", "guard"),
    "ctc": _LOCAL,
    "projector": _LOCAL,
    "hf": (*_LOCAL, *DECODING),
    "assemblyai": ("api_key", "concurrency"),
}


def open_provider(name: str, options: ProviderOptions) -> Provider:
    """Open a provider by name.

    Raises:
        EvaluationError: no provider of that name, an option that it would ignore, or one that it requires and lacks.
    """
    if name not in PROVIDERS:
        raise EvaluationError(f"no provider {name!r}; expected one of {', '.join(PROVIDERS)}")
    chosen = [field.name for field in fields(options) if getattr(options, field.name) != field.default]
    ignored = [option for option in chosen if option not in ("model", "output", *PROVIDERS[name])]
    if ignored:
        raise EvaluationError(
            f"provider {name!r} does not take {_as_typed(ignored)}; it takes {_as_typed(PROVIDERS[name])}"
        )
    if name == "tinyaudio":
        from pipelines.evaluate.providers.tinyaudio import TinyAudioProvider

        return TinyAudioProvider.load(options)
    if name == "ctc":
        from pipelines.evaluate.providers.ctc import CTCProvider

        return CTCProvider.load(options)
    if name == "projector":
        from pipelines.evaluate.providers.projector import ProjectorProvider

        return ProjectorProvider.load(options)
    if name == "hf":
        from pipelines.evaluate.providers.hf import HubProvider

        return HubProvider.load(options)
    try:
        from pipelines.evaluate.providers.assemblyai import AssemblyAIProvider
    except ModuleNotFoundError as error:
        raise EvaluationError(f"{error}; install the extra: pip install 'tinyaudio[providers]'") from error
    return AssemblyAIProvider(options)


def _as_typed(options: Sequence[str]) -> str:
    return ", ".join("--no-guard" if option == "guard" else f"--{option.replace('_', '-')}" for option in options)
