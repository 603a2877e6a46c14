"""Claims: which writer works on which shard, so that several writers share a store without doing work twice.

A claim is a small file that is created exclusively, names its owner and is touched regularly. It may be taken over once
its owner is dead (see `Owner.is_dead`). Claims only save work: a store stays correct because no file is ever placed
twice (`files.place`). Knows nothing of what is written.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from pathlib import Path
from typing import Self

from cache.files import clock_of, exclusive, link_into_place, silence_s, temporaries, write_temporary
from cache.layout import Header, Layout
from cache.owners import LEASE_S, Owner


class Claim:
    """The right to write one shard, held until it is released or its process dies."""

    def __init__(self, path: Path, owner: Owner) -> None:
        self.path, self.owner = path, owner
        self._released = threading.Event()
        self._heartbeat = threading.Thread(target=self._keep_alive, name=f"claim-{path.name}", daemon=True)
        self._heartbeat.start()

    @classmethod
    def take(cls, layout: Layout, shard: int) -> Self | None:
        """Claim a shard; None if a living writer holds it."""
        path, owner = layout.claim(shard), Owner.me()
        with exclusive(layout.lock):
            if not is_free(path):
                return None
            path.unlink(missing_ok=True)
            try:  # linked in complete: a claim without an owner, left by a kill, would block the shard for a lease
                link_into_place(write_temporary(path, [str(owner).encode()], owner), path)
            except FileExistsError:  # another writer was faster, on a file system without locks
                return None
        return cls(path, owner)

    def is_mine(self) -> bool:
        """Check that no other writer has taken this claim over."""
        return read_owner(self.path) == self.owner

    def release(self) -> None:
        """Let other writers claim the shard."""
        self._released.set()
        self._heartbeat.join()
        if self.is_mine():
            self.path.unlink(missing_ok=True)

    def _keep_alive(self) -> None:
        while not self._released.wait(LEASE_S / 5):
            with contextlib.suppress(OSError):
                if self.is_mine():
                    os.utime(self.path)


def read_owner(path: Path) -> Owner | None:
    """Read the owner of a claim; None if there is no claim."""
    try:
        return Owner.parse(path.read_text())
    except FileNotFoundError:
        return None


def is_free(path: Path) -> bool:
    """Check whether a claim is absent or its owner dead."""
    return not path.exists() or _is_dead(read_owner(path), silence_s(path, clock_of(path.parent)))


def _is_dead(owner: Owner | None, silent_s: float) -> bool:
    """Check whether an owner is dead; one whose name cannot be parsed is after a lease."""
    return silent_s > LEASE_S if owner is None else owner.is_dead(silent_s)


def sweep(layout: Layout, header: Header) -> list[Path]:
    """Remove and return what dead writers left: temporary files, unfinished stores, claims, shards without a commit."""
    claims = sorted(layout.lock.parent.glob("[0-9]*"))
    folders = [layout.root, *(path for path in layout.root.iterdir() if path.is_dir())]
    found = [each for folder in folders for each in temporaries(folder)]
    found += [each for each in temporaries(layout.root.parent) if each[0].name.startswith(f".{layout.root.name}~")]
    now = clock_of(layout.lock.parent)
    dead = [(path, owner) for path, owner in found if _is_dead(owner, silence_s(path, now))]
    if dead:  # a writer on another machine may flush one file for longer than a lease while it keeps its claim alive
        alive = {read_owner(path) for path in claims if not is_free(path)} - {None}
        dead = [(path, owner) for path, owner in dead if owner not in alive]
    removed = [path for path, _ in dead]
    for path in removed:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    with exclusive(layout.lock):
        for path in claims:
            if is_free(path):
                path.unlink(missing_ok=True)
                removed.append(path)
        committed = {path.name for path in layout.commit(0).parent.iterdir()}
        for directory in {path.parent for path in layout.files_of(0, header).values()}:
            for path in directory.iterdir():
                number = path.name.removeprefix("c.").partition(".")[0]
                if not number.isdigit() or layout.commit(int(number)).name in committed:
                    continue
                # The claim is checked first: a writer releases it after its commit, so if the claim is free and there
                # is still no commit, the shard has no writer.
                if is_free(layout.claim(int(number))) and not layout.commit(int(number)).exists():
                    path.unlink(missing_ok=True)
                    removed.append(path)
    return removed
