"""The `tinyaudio` command: every command under its heading, and what errors become. Nothing imports the command line.

Commands parse, call and print, and import heavy packages inside functions, so that `--help` answers at once. Results
go to stdout; messages and progress go to stderr. An error of ours, or a path that cannot be read or written, is one
line and exit code 1; usage errors exit 2, an interrupt 130; bugs keep their traceback.
"""

import errno
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any, ClassVar

import typer

from tinyaudio.cli import bench, demo, doctor, evaluate, extract, publish, serve, store, train, transcribe
from tinyaudio.cli.console import warn
from tinyaudio.cli.options import CommandGroup
from tinyaudio.version import __version__

# Heading in `tinyaudio --help` -> name -> command, in the order in which a newcomer needs them.
COMMANDS: dict[str, dict[str, Callable[..., None] | typer.Typer]] = {
    "Try": {"demo": demo.demo, "transcribe": transcribe.transcribe, "doctor": doctor.doctor, "serve": serve.serve},
    "Train": {
        "extract": extract.extract,
        "train": train.train,
        "eval": evaluate.evaluate,
        "ablate": train.ablate,
        "runs": train.runs,
    },
    "Store and publish": {"store": store.store, "publish": publish.publish},
    "Measure": {"bench": bench.bench},
}
_UNUSABLE = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG}
_UNUSABLE |= {errno.EIO}  # the user can change these; a missing file (ENOENT) is a bug unless an error of ours says so


_WHISPER_SWITCHES = ("--word-timestamps", "--highlight-words")
_BOOLEANS = {"true": True, "false": False}


class _Root(CommandGroup):
    """All commands. Ctrl-C prints a line; typer by itself exits with 130 and prints nothing."""

    headings: ClassVar = COMMANDS

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Accept True and False behind switches that have a value on Whisper's command line and none here."""
        kept: list[str] = []
        for i, word in enumerate(args):
            name, following = word.replace("_", "-"), args[i + 1].lower() if i + 1 < len(args) else ""
            is_value = i > 0 and args[i - 1].replace("_", "-") in _WHISPER_SWITCHES and word.lower() in _BOOLEANS
            if not is_value and not (name in _WHISPER_SWITCHES and _BOOLEANS.get(following) is False):
                kept.append(word)
        return super().parse_args(ctx, kept)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            from pipelines.processes import is_main_process

            if is_main_process():
                warn("interrupted; run the same command again to resume")
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Root,
    name="tinyaudio",
    help="Speech recognition from a frozen encoder, a small trained projector and a frozen language model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda name: name.replace("_", "-"),  # --output_dir is --output-dir, as in Whisper
    },
)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        print(f"tinyaudio {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


for commands in COMMANDS.values():
    for name, command in commands.items():
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name, cls=CommandGroup)
        else:
            app.command(name)(command)


def main() -> None:
    """Run the command line and turn errors of ours into one line and an exit code."""
    if sys.stderr is None:  # closed by the caller; print would write messages to stdout instead
        sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115 (open until the process ends)
    # Defaults for libraries that commands import later; what the user has set wins.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # busy-waiting pools on shared cores run several times slower
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name
        # Batches differ in shape; without this the fragments between them are lost to a GPU's allocator.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app(standalone_mode=True)
    except Exception as error:
        message = _one_line(error)
        if message is None:
            raise
        warn(message)
        sys.exit(2 if type(error).__name__ == "RecipeError" else 1)
    finally:
        # If Ctrl-C hits code that exec() runs from a string, as while torch is imported, `python -m` ends by SIGINT and
        # not with 130, even if it was caught (CPython, run_eval_code_obj). Running another string resets that.
        exec("")


def _one_line(error: Exception) -> str | None:
    """Describe an error that the user can act on; None for anything else, which is a bug."""
    if type(error).__module__.split(".")[0] in ("tinyaudio", "cache", "pipelines"):
        return " ".join(str(error).split())
    from pipelines.files import full_disk

    text = str(error).split("] ", 1)[-1] if isinstance(error, OSError) else None  # without [Errno 28]
    if reason := full_disk(error):
        return f"{text or reason}. Free some space and run the same command again."
    if isinstance(error, OSError) and error.errno in _UNUSABLE and error.filename is not None:
        return f"{text}. Name another path, or make this one accessible."
    return None
