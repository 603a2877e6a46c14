"""The roof: the `tinyaudio` command. Parse, call, print; nobody imports it.

One verb per stage, in a module of its own. Heavy imports happen inside commands, so that
`--help` answers at once. stdout carries results, stderr progress and messages. Errors of ours, and places that cannot
be read or written, are one line and exit 1; usage errors exit 2; an interrupt exits 130; bugs keep their traceback.
"""

import errno
import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from tinyaudio.version import __version__

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_UNUSABLE = {
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
    errno.EIO,
}


class _Root(TyperGroup):
    """All commands; says a word about Ctrl-C, which typer by itself turns into a silent exit 130."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            if os.environ.get("RANK", "0") == "0":  # of torchrun's processes, one speaks
                print("tinyaudio: interrupted; the same command again goes on", file=sys.stderr)
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Root,
    name="tinyaudio",
    help="Speech recognition out of a frozen encoder, a small trained projector and a frozen language model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"tinyaudio {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Set up nothing; commands bring what they need."""


def _add_commands() -> None:
    from tinyaudio.cli import bench, demo, evaluate, extract, publish, store, tour, train, transcribe

    for module in (extract, train, evaluate, publish, tour, transcribe, demo, store, bench):
        module.add_to(app)


_add_commands()


def _quieten_libraries() -> None:
    """Keep stdout and stderr ours; anything the user has set wins. Takes effect because commands import late."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # busy-waiting pools on shared cores run several times slower
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def main() -> None:
    """Run the command line and turn errors of ours into one line and an exit code."""
    if sys.stderr is None:  # closed by the caller; print would else send messages to stdout
        sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115 (for as long as the process lives)
    _quieten_libraries()
    try:
        app(standalone_mode=True)
    except Exception as error:
        message = str(error) if _is_ours(error) else _explain_place(error)
        if message is None:
            raise
        print(f"tinyaudio: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(2 if type(error).__name__ == "RecipeError" else 1)


def _is_ours(error: BaseException) -> bool:
    """Tell our error trees apart from bugs, without importing what did not run."""
    names = {f"{kind.__module__}.{kind.__name__}" for kind in type(error).__mro__}
    return bool(
        names & {"tinyaudio.model.errors.TinyAudioError", "cache.errors.CacheError", "pipelines.errors.PipelineError"}
    )


def _explain_place(error: Exception) -> str | None:
    """Say which file cannot be read or written and why; None for anything else, which is a bug."""
    if not isinstance(error, OSError):
        return None
    name = None if error.filename is None else os.fsdecode(error.filename)
    if error.errno in _FULL:
        return (
            f"{'a file' if name is None else repr(name)} cannot be written: {error.strerror}; make room and try again"
        )
    if error.errno in _UNUSABLE and name is not None:
        return f"{name!r} cannot be read or written: {error.strerror}; name another place, or make this one usable"
    return None
