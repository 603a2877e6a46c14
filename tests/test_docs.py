"""The documentation: every relative link resolves, and every command in a fenced block parses."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from tinyaudio.cli.app import app

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "cache/*.md", "pipelines/**/*.md", ".github/**/*.md")
    for path in ROOT.glob(pattern)
)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(?:bash|sh|console)?\n(.*?)^```", re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(page: Path) -> list[str]:
    """The lines of fenced blocks that begin with tinyaudio or make, comments removed and continued lines joined."""
    found = []
    for block in FENCE.findall(page.read_text()):
        for line in block.replace("\\\n", " ").splitlines():
            line = line.strip().removeprefix("$ ")
            line = line.split(" | ")[-1]
            line = re.sub(r"^torchrun .* -m -- ", "", line)
            if re.match(r"(tinyaudio|make)( |$)", line):
                found.append(line)
    return found


def parse(words: list[str]) -> None:
    """Parse a command line without running it.

    Raises:
        click.UsageError: no such command or option, or a value of the wrong type.
    """
    command, name = typer.main.get_command(app), "tinyaudio"
    context = command.make_context(name, list(words))
    while hasattr(command, "resolve_command"):
        name, command, words = command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(name, list(words), parent=context)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_relative_link_resolves(page: Path) -> None:
    for link in LINK.findall(page.read_text()):
        if re.match(r"[a-z]+:", link):
            continue
        place, _, anchor = link.partition("#")
        target = page.parent / place if place else page
        assert target.exists(), f"{page.name} links to {link!r}, which does not exist"
        assert not anchor or anchor in anchors(target), f"{page.name} links to {link!r}, which has no such heading"


LINES = [(page, line) for page in PAGES for line in commands(page)]


@pytest.mark.parametrize(("page", "line"), LINES, ids=[f"{p.name}-{line[:60]}" for p, line in LINES])
def test_every_command_in_a_fenced_block_parses(page: Path, line: str) -> None:
    program, *words = shlex.split(line, comments=True)
    if program == "tinyaudio":
        parse(words)
        return
    targets = set((ROOT / "Makefile").read_text().split(".PHONY:")[1].split("\n")[0].split())
    settings = re.findall(r"^([A-Z]+) +\?=", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for word in words:
        assert word in targets or word.partition("=")[0] in settings, f"{page.name}: make {word}"


def test_a_wrong_command_would_be_noticed() -> None:
    for wrong in (["extract", "--no-such-option"], ["nothing"], ["transcribe"], ["train", "--overfit", "many"]):
        with pytest.raises(Exception, match=r"(?i)no such|missing|valid integer"):
            parse(wrong)
    assert len(LINES) > 40
