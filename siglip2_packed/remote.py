"""Files by URL (s3, gs, http, ...), through fsspec: opened, listed, and their state told.

What goes wrong is an OSError that begins with the URL, whatever a file system of fsspec raises; one that is not there
is an ImportError that says what to install.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import IO, Any

INSTALL = {"http": "'siglip2-packed[remote]'", "https": "'siglip2-packed[remote]'", "s3": "s3fs", "s3a": "s3fs",
           "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "hf": "huggingface_hub"}  # fmt: skip
"""What pip installs for a scheme."""
BLOCK, BLOCKS = 4 << 20, 4
"""Bytes that are read at a time, the next while these are used; how many of them an open file holds."""
AT_ONCE = 32
"""Files that are read, or asked for their state, at the same time."""
STATE = ("size", "ETag", "etag", "md5Hash", "LastModified", "Last-Modified", "mtime", "updated", "created")
"""What file systems tell of a file that another state of it would not have."""
FRESH = 10.0
"""Seconds for which a state that was asked for is taken for the one there is."""


class RemoteError(OSError):
    """What is there cannot be had: nothing that a file holds."""


def is_url(path: Any) -> bool:
    """Of something that is no file of this machine."""
    return isinstance(path, str) and re.match(r"(?!file://)[a-z][a-z0-9+.-]+://", path, re.IGNORECASE) is not None


def open_url(url: str) -> IO[bytes]:
    """For reading, in any order, ahead of who reads on."""
    with named(url):
        return RemoteFile(url)  # type: ignore[return-value]


class RemoteFile(io.RawIOBase):
    """A file of fsspec whose errors name the URL. A read that fails is tried once more."""

    def __init__(self, url: str):
        self.url, self.file = url, begun(url)

    def read(self, size: int = -1) -> bytes:  # type: ignore[override]
        place = self.file.tell()
        with named(self.url):
            try:
                return self.file.read(size)
            except Exception:  # a dropped connection; fsspec would raise what it met ahead at every other read, too
                self.file.close()
                self.file = begun(self.url)
                self.file.seek(place)
                return self.file.read(size)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        with named(self.url):
            return self.file.seek(offset, whence)

    def tell(self) -> int:
        return self.file.tell()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        if not self.closed:
            self.file.close()
        super().close()


def begun(url: str) -> Any:
    system, path = system_of(url)
    file = system.open(path, "rb", block_size=BLOCK, cache_type="background", cache_options={"maxblocks": BLOCKS})
    try:
        file.seek(0, os.SEEK_END)
        file.seek(0)
    except ValueError:
        raise OSError("the server gives no parts of a file (HTTP ranges): download it") from None
    return file


def read_urls(urls: Sequence[str]) -> Iterator[bytes | ValueError]:
    """What the files hold, or why that could not be had twice, in order, several ahead."""
    yield from at_once(_read, urls)


def _read(url: str) -> bytes | ValueError:
    try:
        with named(url):
            system, path = system_of(url)
            try:
                return system.cat_file(path)
            except FileNotFoundError:
                raise
            except Exception:  # a dropped connection
                return system.cat_file(path)
    except (OSError, ValueError, ImportError) as error:
        return ValueError(str(error))


def states(urls: Sequence[str]) -> list[str]:
    """Of each file, as `state`; "" where it cannot be told: reading tells why."""

    def told(url: str) -> str:
        try:
            return state(url)
        except OSError:
            return ""

    return [*at_once(told, urls)]


def state(url: str) -> str:
    """Size and whatever else tells one state of a file from another, "" if nothing does; or that there is none."""
    try:
        with named(url):
            system, path = system_of(url)
            return described(system.info(path))
    except (FileNotFoundError, ValueError):
        return "absent"


@lru_cache(1024)
def _state_at(url: str, period: int) -> str:
    return state(url)


def recent_state(url: str) -> str:
    """The same, not asked for more often than every ten seconds."""
    return _state_at(url, int(time.monotonic() / FRESH))


def forget_states() -> None:
    _state_at.cache_clear()


def described(info: dict[str, Any]) -> str:
    return ":".join(str(info[name]).replace(" ", "_") for name in STATE if info.get(name) is not None)


def size_of(url: str) -> int:
    with named(url):
        system, path = system_of(url)
        size = system.info(path)["size"]
        if size is None:
            raise OSError("the server does not tell its size: download it")
        return size


def files_below(url: str) -> dict[str, str]:
    """{URL: state} of all files below a folder, sorted part by part; the state is "" where listings do not tell."""
    with named(url):
        system, path = system_of(url)
        found = system.find(path, detail=True)
        told = {full_name(url, path, name): info for name, info in found.items() if info.get("type") != "directory"}
    states = {name: described(info) if info.get("size") is not None else "" for name, info in told.items()}
    return dict(sorted(states.items(), key=lambda one: one[0].split("/")))


def full_name(url: str, path: str, name: str) -> str:
    """The URL of a file that a listing of `url`, which is `path` to its file system, calls `name`."""
    if is_url(name):
        return name
    scheme, _, root = url.partition("://")  # with a host, say, which the path has not
    below = name.removeprefix(path.rstrip("/")).lstrip("/")
    return f"{scheme}://{root.rstrip('/')}/{below}" if below else url


def system_of(url: str) -> tuple[Any, str]:
    """(file system, path there). Listings are not kept: they would tell states that are past."""
    try:
        import fsspec
    except ImportError as error:
        raise ImportError(f"it needs fsspec (pip install 'siglip2-packed[remote]'): {error}") from error
    scheme = url.partition("://")[0].lower()
    if "::" in url:  # in a name too: fsspec would open the file that is called as what stands before it
        raise ValueError("fsspec takes '::' for a chain of file systems, which is not read")
    try:
        return fsspec.core.url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        raise ImportError(f"it needs another package (pip install {INSTALL.get(scheme, scheme)}): {error}") from error


@contextlib.contextmanager
def named(url: str) -> Iterator[None]:
    """Raises RemoteError, FileNotFoundError or ImportError that begins with the URL, for whatever is raised within."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{url}: not found") from error
    except ImportError as error:
        raise ImportError(f"{url}: {error}") from error
    except Exception as error:
        if isinstance(error, RemoteError):
            raise
        raise RemoteError(f"{url}: {str(error) or type(error).__name__}") from error


def at_once(function, items: Iterable[Any]) -> Iterator[Any]:
    """Its results in order, by threads, not more than `AT_ONCE` of them before they are asked for."""
    waiting: deque = deque()
    pool = ThreadPoolExecutor(AT_ONCE)
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) == AT_ONCE:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
