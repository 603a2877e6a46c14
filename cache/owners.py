"""Which process writes to a store, on which machine, and whether it is still running."""

from __future__ import annotations

import re
import secrets
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import psutil

LEASE_S = 300.0  # a writer on another machine whose files were not touched for this long counts as dead


@dataclass(frozen=True, kw_only=True)
class Owner:
    """One writer of a store: a process, or one of the claims that a process holds."""

    host: str  # with the number of its process namespace
    boot: str  # first eight hex digits of the boot id: a reboot ends every process
    pid: int
    started: int  # hundredths of a second from boot to the start of the process, since process ids are reused
    token: str  # unique per owner

    @classmethod
    def me(cls) -> Self:
        """Create a new owner for this process."""
        process = psutil.Process()
        started = _started(process)
        return cls(host=_host(), boot=_boot_id(), pid=process.pid, started=started, token=secrets.token_hex(8))

    def __str__(self) -> str:
        return f"{self.host}+{self.boot}+{self.pid}+{self.started}+{self.token}"

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """Read `str(owner)` back; None for any other text."""
        match text.strip().split("+"):
            case [host, boot, pid, started, token] if pid.isdigit() and started.isdigit():
                return cls(host=host, boot=boot, pid=int(pid), started=int(started), token=token)
        return None

    @property
    def machine(self) -> str:
        """The host name without the number of the process namespace."""
        return re.sub(r"\.4\d{9}$", "", self.host)  # Linux numbers namespaces from 0xF0000000

    def is_dead(self, silent_s: float) -> bool:
        """Check whether this owner can no longer write.

        Under the same boot of the same host the process itself is looked up. Any other owner counts as dead after
        `LEASE_S`: another boot id may mean a reboot, or a second machine with the same name.

        Args:
            silent_s: seconds since the owner last touched its file.
        """
        if (self.host, self.boot) != (_host(), _boot_id()):
            return silent_s > LEASE_S
        try:
            process = psutil.Process(self.pid)
            return process.status() == psutil.STATUS_ZOMBIE or _started(process) != self.started
        except psutil.NoSuchProcess:
            return True
        except psutil.AccessDenied:
            return silent_s > LEASE_S


def _started(process: psutil.Process) -> int:
    """Compute when a process started, counted from boot: unlike a time of day, it survives changes of the clock."""
    return round((process.create_time() - psutil.boot_time()) * 100)


def _host() -> str:
    """Return the host name with the number of the process namespace, since containers may share a host name."""
    name = re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname()) or "localhost"
    try:
        return f"{name}.{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return name


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
    except OSError:  # not Linux: a process from before a reboot is found missing, or started at another time
        return "unknown"
