"""One run a folder: who is second hears who is first; the dead hold nothing; between hosts a heartbeat decides."""

import errno
import fcntl
import json
import os
import signal
import socket
import time

import pytest

from siglip2_packed.collection import lock
from siglip2_packed.collection.lock import Lock
from siglip2_packed.collection.ranks import Ranks
from siglip2_packed.encode import locked


@pytest.fixture
def path(tmp_path):
    return tmp_path / "made" / "out" / ".run.lock"


@pytest.fixture
def other_host(monkeypatch):
    """What a host sees that this one's flock does not reach, or that has none: `other_host(name)`."""

    def be(name, flock=lambda *args: None):
        monkeypatch.setattr(fcntl, "flock", flock)
        monkeypatch.setattr(socket, "gethostname", lambda: name)

    return be


def test_the_second_hears_who_is_first(path):
    first, second = Lock(path), Lock(path)
    first.take()
    with pytest.raises(BlockingIOError, match=f"process {os.getpid()} on {socket.gethostname()}, since .* writes here"):
        second.take()
    second.release()
    first.held()
    first.release()
    assert not path.parent.parent.exists()  # made for it, and nothing was written
    second.take()
    (path.parent / "run.json").touch()
    second.release()
    assert [file.name for file in path.parent.iterdir()] == ["run.json"]


def test_a_killed_holder_leaves_no_lock(path):
    """Nor do processes that it forked and that outlive it."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        Lock(path).take()
        if not os.fork():
            os.write(writer, str(os.getpid()).encode())
            signal.pause()
        signal.pause()
    grandchild = int(os.read(reader, 100))
    with pytest.raises(BlockingIOError, match=f"process {child} on"):
        Lock(path).take()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    ours = Lock(path)
    ours.take()
    os.kill(grandchild, signal.SIGKILL)
    ours.held()
    ours.release()


def no_flock(*args):
    raise OSError(errno.ENOLCK, "No locks available")


@pytest.mark.parametrize("flock", [lambda *args: None, no_flock])
def test_between_hosts_two_minutes(path, other_host, flock):
    here = Lock(path)
    here.take()
    other_host("elsewhere", flock)
    there = Lock(path)
    with pytest.raises(BlockingIOError, match=r"process \d+ on .*, since .* seen 0 s ago; stale after 120 s"):
        there.take()
    now = time.time()
    os.utime(path, (now - 110, now - 110))
    with pytest.raises(BlockingIOError, match="seen 1[01]. s ago"):
        there.take()
    here.held()
    os.utime(path, (now - 125, now - 125))
    there.take()
    with pytest.raises(OSError, match=r"lost its lock .*on elsewhere, since .* has taken it over.*--resume"):
        here.held()
    here.release()  # not its own any more
    there.held()
    there.release()


def test_two_hosts_at_the_same_instant(path, other_host):
    """Neither sees the other's flock: the last to write has it, and the first hears of it before its next rename."""
    first, second = Lock(path), Lock(path)
    other_host("a")
    path.parent.mkdir(parents=True)
    assert first._open()  # nobody is there; before it writes its name ...
    other_host("b")
    second.take()
    first._write_name()
    with pytest.raises(OSError, match=r"process \d+ on .* has taken it over"):
        second.held()
    first.held()
    second.release()
    first.held()
    first.release()


def test_the_heart_beats(path, monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT", 0.005)
    ours = Lock(path)
    ours.take()
    os.utime(path, (1, 1))
    end = time.monotonic() + 20
    while path.stat().st_mtime < 2 and time.monotonic() < end:
        time.sleep(0.005)
    assert path.stat().st_mtime > time.time() - 20
    ours.release()


def test_a_lock_that_is_removed_is_lost(path):
    ours = Lock(path)
    ours.take()
    path.unlink()
    with pytest.raises(OSError, match="it was removed"):
        ours.held()
    theirs = Lock(path)
    theirs.take()
    ours.release()
    theirs.held()
    theirs.release()


def test_of_a_boot_before_or_of_nobody(path, other_host):
    """A host of the same name that is another one; and what a holder left that died before it wrote its name."""
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({**lock.this_host(), "boot": "another", "pid": 7}))
    with pytest.raises(BlockingIOError, match="process 7"):
        Lock(path).take()
    path.write_text("")
    ours = Lock(path)
    ours.take()
    ours.release()


def test_a_full_disk_leaves_nothing(path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space"):
        Lock(path).take()
    assert not path.parent.exists()


def test_a_signal_as_soon_as_it_is_taken_leaves_no_lock(path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Lock, "join", interrupted)
    with pytest.raises(KeyboardInterrupt), locked(path.parent, Ranks()):
        pass
    assert not path.parent.exists()
