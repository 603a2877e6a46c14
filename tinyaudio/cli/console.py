"""What the commands print: results on stdout; messages, usage errors and progress bars on stderr; aligned tables."""

import json
import sys
from collections.abc import Sequence
from typing import Any, NoReturn


def say(message: str) -> None:
    """Print a message to stderr."""
    print(message, file=sys.stderr, flush=True)


def warn(message: str) -> None:
    """Print one line to stderr under the command's name; unprintable characters, as in file names, are escaped."""
    say(f"tinyaudio: {printable(message)}")


def usage(message: str) -> NoReturn:
    """Print what was found and what was expected, and exit with code 2."""
    warn(message)
    sys.exit(2)


def print_report(report: Any, as_json: bool) -> None:
    """Print results for people, then on request as one JSON object; `report` has `__str__` and `to_dict`."""
    print(report)
    if as_json:
        print(json.dumps(report.to_dict()))


def printable(text: str) -> str:
    """Escape everything that would not fit on one line of a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def aligned(rows: Sequence[Sequence[str]], indent: str = "") -> str:
    """Lay rows of text out in columns, two spaces apart; the last column is as wide as its text."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = (zip(row, widths, strict=True) for row in rows)
    return "\n".join(indent + "  ".join(f"{cell:<{width}}" for cell, width in row).rstrip() for row in padded)


class ProgressBar:
    """A progress bar on stderr, drawn on a terminal only.

    Args:
        title: printed before the bar.
        total: amount of work; None if it is not known yet (`update` may set it).
        unit: printed after the numbers, such as "s" or "utt".
        is_shown: False draws nothing on a terminal either.
    """

    def __init__(self, title: str, total: float | None = None, unit: str = "", is_shown: bool = True) -> None:
        from tqdm import tqdm

        self.is_drawn = is_shown and sys.stderr.isatty()
        self._bar: Any = tqdm(
            desc=title,
            total=total,
            file=sys.stderr,
            disable=not self.is_drawn,
            dynamic_ncols=True,
            leave=False,
            bar_format="{l_bar}{bar}| {n:.10g}/{total_fmt} " + unit + " [{elapsed}<{remaining}{postfix}]",
        )

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def update(self, done: float, total: float | None = None, note: str = "") -> None:
        """Set the amount done so far, in the unit of the total; `note` stands behind the numbers."""
        if not self.is_drawn:
            return
        if total is not None:
            self._bar.total = total
        self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(done - self._bar.n)

    def restart(self) -> None:
        """Count time from now on, if what came before says nothing about the speed."""
        self._bar.reset()

    def clear(self) -> None:
        """Remove the bar until its next update, so that a line can be printed in its place."""
        self._bar.clear()
