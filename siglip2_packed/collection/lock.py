"""One run a folder: a lock that the death of its holder opens.

Two things hold it. `flock` on the open file, which the kernel drops with the process however it ends: on one host, and
on file systems that carry it between hosts, nothing else is needed. And a heartbeat, the file's modification time, for
hosts that each other's `flock` does not reach: a lock of another host counts until its file is two minutes old by the
clock of the file system, which is everybody's. The file says who the holder is.

A holder that was stopped for longer may have lost its lock. So it asks, before every rename, whether it is still the
one (`held`); the ranks of a run that rank 0 holds the lock for ask the same.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import tempfile
import threading
import time
import uuid
import weakref
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows: by the heartbeat alone
    fcntl = None  # type: ignore[assignment]

HEARTBEAT, STALE = 15.0, 120.0
"""Seconds."""
_open: weakref.WeakSet[Lock] = weakref.WeakSet()


class Lock:
    """`take`, then `held` as often as it matters, then `release`. Another process has it after `join(token)`."""

    def __init__(self, path: Path):
        self.path, self.token = path, ""
        self.descriptor = -1
        self.made: list[Path] = []
        self.over = threading.Event()

    def take(self) -> str:
        """What to tell those the lock is held for as well. Makes the folder.

        Raises:
            BlockingIOError: somebody else has it; it says who.
        """
        folder = self.path.parent
        self.made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        try:
            while not self._open():
                pass
            self._write_name()
            self.held()
        except OSError:
            if self.descriptor >= 0 and not read(self.path):  # nobody's: there was no room for the name
                self.path.unlink(missing_ok=True)
            self._close()
            self._unmake()
            raise
        threading.Thread(target=self._beat, daemon=True).start()
        return self.token

    def join(self, token: str) -> None:
        """Of a process that another one has taken the lock for."""
        self.token = token

    def held(self) -> None:
        """Raises OSError if the lock is gone, or somebody else's."""
        found = read(self.path)
        if found.get("token") != self.token:
            what = f"{who(found)} has taken it over" if found else "it was removed"
            raise OSError(f"this run has lost its lock {str(self.path)!r} ({what}) and ends; --resume goes on")

    def release(self) -> None:
        """Also takes away the folders that were made for it, where nothing was written to them."""
        if self.descriptor < 0:
            return
        self.over.set()
        with contextlib.suppress(OSError):
            self.held()
            self.path.unlink()
        os.close(self.descriptor)
        self.descriptor = -1
        self._unmake()

    def _unmake(self) -> None:
        with contextlib.suppress(OSError):
            for folder in self.made:
                folder.rmdir()

    def _open(self) -> bool:
        """Whether the file is open and ours to write. False: it was taken away meanwhile, try again."""
        self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        _open.add(self)
        try:
            reached = self._flock()
            if reached and not self._is_there():
                self._close()
                return False
            holder = read(self.path)
            # the kernel has let go of a holder of this host: it is dead
            if not (reached and {**holder, **this_host()} == holder) and os.fstat(self.descriptor).st_size:
                age = self._age()
                if age < STALE:
                    raise in_use(self.path, holder, f", seen {max(age, 0):.0f} s ago; stale after {STALE:.0f} s")
        except BaseException:
            self._close()
            raise
        return True

    def _write_name(self) -> None:
        self.token = uuid.uuid4().hex
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        described = {**this_host(), "pid": os.getpid(), "since": since, "token": self.token}
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, json.dumps(described).encode(), 0)

    def _flock(self) -> bool:
        """Whether the kernel gave it; False where it cannot. Raises BlockingIOError if a living process has it."""
        if fcntl is None:
            return False
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise in_use(self.path, read(self.path)) from None
        except OSError:  # a file system without
            return False
        return True

    def _is_there(self) -> bool:
        """Whether the open file is still the one of that name."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self.descriptor))
        except FileNotFoundError:
            return False

    def _age(self) -> float:
        """Seconds since the last beat, by the clock of the file system."""
        with tempfile.TemporaryFile(dir=self.path.parent) as probe:
            return os.fstat(probe.fileno()).st_mtime - os.fstat(self.descriptor).st_mtime

    def _beat(self) -> None:
        while not self.over.wait(HEARTBEAT):
            with contextlib.suppress(OSError):
                self.held()  # a heart that beats for somebody else would keep a lock alive
                os.utime(self.path)

    def _close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
        self.descriptor = -1


def lock_of(out: Path, one_file: bool) -> Path:
    return out.with_name(f".{out.name}.lock") if one_file else out / ".run.lock"


def this_host() -> dict[str, str]:
    """Its name, and what tells it from another of that name."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return {"host": socket.gethostname(), "boot": boot.read_text().strip() if boot.exists() else ""}


def read(path: Path) -> dict[str, Any]:
    """What the holder wrote; nothing if there is none, or it has not come to it yet."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def who(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process"
    return f"process {holder.get('pid')} on {holder.get('host')}, since {holder.get('since')},"


def in_use(path: Path, holder: dict[str, Any], seen: str = "") -> BlockingIOError:
    return BlockingIOError(
        f"{who(holder)} writes here{seen}: wait for it, or choose another --out (its lock is {str(path)!r})"
    )


def _let_go() -> None:
    """A forked process has the file open as well and would hold the lock for longer than its parent lives."""
    for lock in list(_open):
        lock._close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
