"""Providers: systems that turn clips into text, behind one small interface, so that one evaluation serves them all.

A provider gets clips of 16 kHz mono samples and gives every clip one answer, in any order; a clip that it could not do
is an answer with an error, never an empty text. It says who it is (`identity`: all that can change an answer, compared
before an evaluation goes on) and what it ran on (`environment`: recorded only).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

from pipelines.errors import EvaluationError
from pipelines.evaluate.providers.base import Provider, ProviderOptions


def _open_tinyaudio(options: ProviderOptions) -> Provider:
    from pipelines.evaluate.providers.tinyaudio import TinyAudioProvider

    return TinyAudioProvider.load(options)


def _open_ctc(options: ProviderOptions) -> Provider:
    from pipelines.evaluate.providers.ctc import CTCProvider

    return CTCProvider.load(options)


def _open_hf(options: ProviderOptions) -> Provider:
    from pipelines.evaluate.providers.hf import HubProvider

    return HubProvider.load(options)


def _open_assemblyai(options: ProviderOptions) -> Provider:
    try:
        from pipelines.evaluate.providers.assemblyai import AssemblyAIProvider
    except ModuleNotFoundError as error:
        raise EvaluationError(f"{error}; install the extra: pip install 'tinyaudio[providers]'") from error
    return AssemblyAIProvider.open(options)


@dataclass(frozen=True)
class _Kind:
    """How a provider is opened, and the options that it takes beside `model` and `output`."""

    open: Callable[[ProviderOptions], Provider]
    takes: tuple[str, ...]


_LOCAL = ("revision", "device", "batch_size")
_DECODING = ("num_beams", "max_new_tokens", "length_penalty")
# A provider is a function from options to a `Provider`; another one is one line here and a module of its own.
_KINDS = {
    "tinyaudio": _Kind(_open_tinyaudio, (*_LOCAL, *_DECODING, "guard")),
    "ctc": _Kind(_open_ctc, _LOCAL),
    "hf": _Kind(_open_hf, (*_LOCAL, *_DECODING)),
    "assemblyai": _Kind(_open_assemblyai, ("api_key", "concurrency")),
}


def provider_names() -> list[str]:
    """List the providers."""
    return list(_KINDS)


def open_provider(name: str, options: ProviderOptions) -> Provider:
    """Open a provider by name.

    Raises:
        EvaluationError: no provider of that name, an option that it would ignore, or one that it needs and lacks.
    """
    if name not in _KINDS:
        raise EvaluationError(f"no provider {name!r}; expected one of {', '.join(_KINDS)}")
    takes = _KINDS[name].takes
    chosen = [field.name for field in fields(options) if getattr(options, field.name) != field.default]
    ignored = [option for option in chosen if option not in ("model", "output", *takes)]
    if ignored:
        raise EvaluationError(
            f"provider {name!r} does not take {_as_typed(ignored)}; it takes {_as_typed(takes)}. Leave out the rest"
        )
    return _KINDS[name].open(options)


def _as_typed(options: Sequence[str]) -> str:
    return ", ".join("--no-guard" if option == "guard" else f"--{option.replace('_', '-')}" for option in options)
