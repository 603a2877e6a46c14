"""Who writes a store: which process, on which machine, and whether it still runs."""

import os
import re
import secrets
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Self

LEASE_S = 300.0  # a writer that cannot be looked up and has not shown itself for so long is taken for dead


_NAMESPACE = re.compile(r"\.4\d{9}$")  # process namespaces are numbered from 0xF0000000 up


@dataclass(frozen=True, kw_only=True)
class Owner:
    """One writing process (or one of its claims), recognisable after its death."""

    host: str
    boot: str  # first eight hex digits of the boot id: a reboot ends every process
    pid: int
    started: int  # ticks from boot to start of the process, to tell it from a later one of its pid; 0: unknown
    token: str  # unique per owner

    @classmethod
    def me(cls) -> Self:
        """Make a new owner in this process."""
        pid = os.getpid()
        return cls(host=_host(), boot=_boot_id(), pid=pid, started=_started(pid), token=secrets.token_hex(8))

    def __str__(self) -> str:
        return f"{self.host}+{self.boot}+{self.pid}+{self.started}+{self.token}"

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """Read back `str(owner)`, also as it was before it told the start of the process; None for anything else."""
        match text.strip().split("+"):
            case [host, boot, pid, started, token] if pid.isdigit() and started.isdigit():
                return cls(host=host, boot=boot, pid=int(pid), started=int(started), token=token)
            case [host, boot, pid, token] if pid.isdigit():
                return cls(host=host, boot=boot, pid=int(pid), started=0, token=token)
        return None

    @property
    def machine(self) -> str:
        """The host's name as people know it, without the number of the process namespace."""
        return _NAMESPACE.sub("", self.host)

    def is_dead(self, silent_s: float) -> bool:
        """Say whether this owner can never write again.

        A process of this boot of this machine is looked up. Of any other one only its silence speaks: another boot
        may be this machine's last one or a second machine of the same name.

        Args:
            silent_s: seconds since it last touched its file.
        """
        mine = Owner.me()
        if (self.host, self.boot) != (mine.host, mine.boot):
            return silent_s > LEASE_S
        if not _is_running(self.pid):
            return True
        started = _started(self.pid)
        if self.started and started:
            return self.started != started
        return silent_s > LEASE_S  # its pid lives, but whether that is still the same process nothing tells


def _host() -> str:
    name = re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname()) or "localhost"
    try:  # containers may share a name but not process ids: the namespace tells them apart
        return f"{name}.{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return name


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
    except OSError:  # not Linux: a reboot is then seen as a dead process
        return "unknown"


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return not _is_zombie(pid)


def _is_zombie(pid: int) -> bool:
    return _stat(pid)[:1] == ["Z"]


def _started(pid: int) -> int:
    """Read when a process was started, in ticks since the boot; 0 if nothing tells."""
    fields = _stat(pid)
    return int(fields[19]) if len(fields) > 19 else 0


def _stat(pid: int) -> list[str]:
    """Read what Linux knows of a process, from its state (field 3 of proc_pid_stat(5)) on; nothing elsewhere."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
