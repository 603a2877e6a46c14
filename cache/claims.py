"""Who is working on which shard, so that several writers share a store without doing anything twice.

A claim is one small file, made exclusively, that names its owner and is touched now and then. A claim whose owner is
dead (this boot of this machine: no such process; any other: silent for a lease) may be taken over. Claims only save
work: what keeps a store right is that nothing is ever placed twice (`durable.place`). Knows nothing of what is written.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from pathlib import Path
from typing import Self

from cache.commits import sealed_shards
from cache.files import clock_of, exclusive, link_into_place, silence_s, temporaries, write_temporary
from cache.layout import Header, Layout
from cache.owners import LEASE_S, Owner


class Claim:
    """The right to write one shard, held until released or until its process dies."""

    def __init__(self, path: Path, owner: Owner) -> None:
        self.path, self.owner = path, owner
        self._released = threading.Event()
        self._heart = threading.Thread(target=self._beat, name=f"claim-{path.name}", daemon=True)
        self._heart.start()

    @classmethod
    def take(cls, layout: Layout, shard: int) -> Self | None:
        """Claim a shard; None if a living writer holds it."""
        path, owner = layout.claim(shard), Owner.me()
        with exclusive(layout.lock):
            if not is_free(path):
                return None
            path.unlink(missing_ok=True)
            try:
                # Signed from its first moment: a death between making and signing would hold the shard for a lease.
                link_into_place(write_temporary(path, [str(owner).encode()], owner), path)
            except FileExistsError:  # another was faster, where the file system knows no locks
                return None
        return cls(path, owner)

    def is_mine(self) -> bool:
        """Say whether nobody took this claim over while its owner seemed dead."""
        return read_owner(self.path) == self.owner

    def release(self) -> None:
        """Let others claim the shard."""
        self._released.set()
        self._heart.join()
        if self.is_mine():
            self.path.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._released.wait(LEASE_S / 5):
            with contextlib.suppress(OSError):
                if self.is_mine():
                    os.utime(self.path)


def read_owner(path: Path) -> Owner | None:
    """Read who holds a claim; None if nobody does."""
    try:
        return Owner.parse(path.read_text())
    except FileNotFoundError:
        return None


def is_free(path: Path) -> bool:
    """Say whether a claim is absent or its owner dead."""
    if not path.exists():
        return True
    silent_s = silence_s(path, clock_of(path.parent))
    return _is_dead(read_owner(path), silent_s)


def sweep(layout: Layout, header: Header) -> list[Path]:
    """Remove what is provably nobody's: dead writers' temporary files, claims, and shard files without a commit.

    Returns:
        The files removed.
    """
    folders = [layout.root, *(path for path in layout.root.iterdir() if path.is_dir())]
    now = clock_of(layout.lock.parent)
    removed = [path for folder in folders for path in _dead_temporaries(folder, layout, now)]
    skeletons = [
        path
        for path in _dead_temporaries(layout.root.parent, layout, now)
        if path.is_dir() and path.name.startswith(f".{layout.root.name}~")
    ]
    for path in removed:
        path.unlink(missing_ok=True)
    for path in skeletons:
        shutil.rmtree(path, ignore_errors=True)
    with exclusive(layout.lock):
        for path in _claims(layout):
            if is_free(path):
                path.unlink(missing_ok=True)
                removed.append(path)
        removed += _remove_orphans(layout, header)
    return removed + skeletons


def _claims(layout: Layout) -> list[Path]:
    return sorted(layout.lock.parent.glob("[0-9]*"))


def _dead_temporaries(folder: Path, layout: Layout, now: float) -> list[Path]:
    """List the temporary files of a folder whose writer is dead, by the file and by the claim that it may hold."""
    suspects = [(path, owner) for path, owner in temporaries(folder) if _is_dead(owner, silence_s(path, now))]
    if not suspects:
        return []
    beating = {read_owner(path) for path in _claims(layout) if not is_free(path)}
    return [path for path, owner in suspects if owner is None or owner not in beating]


def _is_dead(owner: Owner | None, silent_s: float) -> bool:
    """Judge an owner; one who cannot be read is given a lease."""
    return silent_s > LEASE_S if owner is None else owner.is_dead(silent_s)


def _remove_orphans(layout: Layout, header: Header) -> list[Path]:
    """Remove shard files of shards that have neither a commit, nor a living claim, nor a place under the seal."""
    committed = {path.name for path in layout.commit(0).parent.iterdir()}
    suspects = []
    for directory in {path.parent for path in layout.files_of(0, header).values()}:
        for path in directory.iterdir():
            number = path.name.removeprefix("c.").partition(".")[0]
            if number.isdigit() and layout.commit(int(number)).name not in committed:
                suspects.append((path, int(number)))
    vouched = sealed_shards(layout) if suspects else set()
    removed = []
    for path, shard in suspects:
        # The claim first: a writer gives it back after its commit, so that a free claim and no commit mean no writer.
        if shard not in vouched and is_free(layout.claim(shard)) and not layout.commit(shard).exists():
            path.unlink(missing_ok=True)
            removed.append(path)
    return removed
