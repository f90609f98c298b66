"""The one self-check: a kernel is trusted once its results have been compared with the reference's in float64.

At the first launch of every specialisation, on this device; the verdict is remembered. What it says does not depend on
where that launch is made: the comparison runs in a thread of its own, where none of the caller's modes and hooks are
(autocast, inference mode, saved-tensor hooks, dispatch and function modes, default device belong to a thread; what
belongs to the process is set aside). An exception there is the kernel's own, and is remembered as the reason; lack of
memory or of room on the disk is nobody's, and is passed on.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib
import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from siglip2_packed.ops.runtime.tracing import capturing

logger = logging.getLogger("siglip2_packed")

BOUNDS = {
    torch.float8_e4m3fn: 5e-2,
    torch.bfloat16: 1e-2,
    torch.float16: 2e-3,
    torch.float32: 1e-5,
    torch.float64: 1e-10,
    torch.uint8: 0.0,
}
"""Largest relative error of a result, by the dtype that its kernel works in or that it is rounded to."""
SDPA = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
    SDPBackend.CUDNN_ATTENTION,
)
TF32_BOUND = 5e-3
"""In float32, where products on CUDA may be in TF32."""


class Refused(ValueError):
    """No implementation may run that could, and why."""


T = TypeVar("T")
Results = dict[str, Tensor]


class Verdict(NamedTuple):
    """What a check found: relative errors ‖x − ref‖ / ‖ref‖ by the results' names, or what was raised."""

    errors: dict[str, float]
    bounds: dict[str, float]
    reason: str = ""

    @property
    def right(self) -> bool:
        return bool(self.errors) and all(error <= self.bounds[name] for name, error in self.errors.items())

    def __str__(self) -> str:
        if self.reason:
            return self.reason
        errors = ", ".join(f"{name} {error:.1e}" for name, error in self.errors.items())
        return f"{errors} (bound {', '.join(f'{bound:.0e}' for bound in dict.fromkeys(self.bounds.values()))})"


_verdicts: dict[tuple, Verdict] = {}
_settings_lock = threading.Lock()
_here = threading.local()
"""Whether this thread was started by a check."""


def check(
    what: str,
    key: Hashable,
    kernel: Callable[..., Results],
    reference: Callable[..., Results],
    cases: Callable[[], Iterable[tuple]],
    device: torch.device,
    dtype: torch.dtype,
    rounded: Mapping[str, torch.dtype] = {},
) -> Verdict | None:
    """Compares `kernel(*case)` with `reference(*case)`, whose floating tensors are float64, on every case.

    Args:
        what: the kernel, as it is named in the log.
        key: what tells this specialisation from others of the same name.
        cases: makes the arguments, tensors on `device`; floating ones in `dtype`, or in float32.
        rounded: results that are rounded to another dtype than `dtype`.

    Returns:
        The worst of all cases. None, and nothing remembered, where nothing can be compared: while a CUDA graph is
        captured, or torch.compile traces.

    Raises:
        torch.OutOfMemoryError: which says nothing about a kernel.
    """
    tf32 = dtype == torch.float32 and device.type == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32"
    key = (key, "tf32") if tf32 else key
    known = _verdicts.get((what, key))
    if known is None and checkable(device):
        bound = TF32_BOUND if tf32 else BOUNDS[dtype]
        bounds = defaultdict(lambda: bound, {name: BOUNDS[other] for name, other in rounded.items()})
        known = _compare(kernel, reference, cases, device, bounds)
        _verdicts[what, key] = known
        if not known.right:
            logger.warning("%s is not used on %s in %s: %s", what, device, str(dtype).removeprefix("torch."), known)
    return known


def checkable(device: torch.device) -> bool:
    """Whether anything can be compared now: not while a CUDA graph is captured, nor where torch.compile traces."""
    return not (capturing(device) or torch.compiler.is_compiling())


def _compare(kernel, reference, cases, device: torch.device, bounds: Mapping[str, float]) -> Verdict:
    def worst() -> dict[str, float]:
        errors: dict[str, float] = {}
        for case in cases():
            given, exactly = [_own(x) for x in case], [_exact(x) for x in case]
            results, exact = kernel(*given), reference(*exactly)
            for name, result in results.items():
                errors[name] = float(np.maximum(_error(result, exact[name]), errors.get(name, 0.0)))  # keeps a NaN
            for number, (x, y) in enumerate(zip(given, exactly)):
                if isinstance(x, Tensor) and not torch.allclose(_double(x), _double(y), 0.1, 0.1, equal_nan=True):
                    raise RuntimeError(f"it writes to its argument number {number}")
        return errors

    try:
        errors = in_clean_context(worst, device)
        return Verdict(errors, {name: bounds[name] for name in errors})
    except Exception as error:  # whatever a compiler or a kernel raises is the reason it cannot be used
        if _lacks_room(error):
            raise
        return Verdict({}, {}, f"{type(error).__name__}: {error}")


def _lacks_room(error: Exception) -> bool:
    """Whether it is memory, threads or disk that lack, which says nothing about a kernel."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOMEM, errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, ImportError):  # "cannot allocate memory in static TLS block": no later call finds it
        return False
    words = "out of memory", "alloc_failed", "can't allocate", "cannot allocate", "new thread"
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in words)


def in_clean_context(run: Callable[[], T], device: torch.device) -> T:
    """`run()` in a new thread, where nothing is set but what torch begins with. One at a time.

    A backward within it runs there too: autograd's own thread may be the one that waits for it.
    """

    def start() -> T:
        with torch.autograd.set_multithreading_enabled(False):
            if device.type != "cuda":
                return run()
            with torch.cuda.device(device):
                return run()

    future: Future[T] = Future()

    def settle() -> None:
        _here.checking = True
        try:
            future.set_result(start())
        except BaseException as error:
            future.set_exception(error)

    with _process_settings(device):
        thread = threading.Thread(target=settle, name="siglip2_packed check")  # no pool: those end before others do
        thread.start()
        thread.join()
    return future.result()


@contextlib.contextmanager
def _process_settings(device: torch.device) -> Iterator[None]:
    """Sets aside what belongs to the process: a comparison waits for the device, and takes sdpa as it comes.

    Two at once would leave to the process what the first had set: the second waits. One within another finds it set.
    """
    if getattr(_here, "checking", False):
        yield
        return
    with _settings_lock, _set_aside(device):
        yield


@contextlib.contextmanager
def _set_aside(device: torch.device) -> Iterator[None]:
    waiting = torch.cuda.get_sync_debug_mode() if device.type == "cuda" else 0
    if waiting:
        torch.cuda.set_sync_debug_mode("default")
    try:
        with sdpa_kernel(list(SDPA)):
            yield
    finally:
        if waiting:
            torch.cuda.set_sync_debug_mode(waiting)


def relative_error(x: Tensor, reference: Tensor) -> float:
    """‖x − ref‖ / ‖ref‖ in float64."""
    x, reference = _double(x), _double(reference)
    return float((x - reference).norm() / reference.norm())


def _error(x: Tensor, reference: Tensor) -> float:
    """The relative error of all; or, where one element stands out, 1/32 of its error in the reference's rms."""
    if x.shape != reference.shape:
        raise RuntimeError(f"it gives {list(x.shape)}, not {list(reference.shape)}")
    apart, reference = (_double(x) - _double(reference)).abs(), _double(reference)
    rms = reference.square().mean().sqrt()
    return float(torch.maximum(apart.norm() / reference.norm(), apart.max() / (32 * rms)))


def _double(x: Tensor) -> Tensor:
    x = x.detach()
    return x.float().double() if x.dtype.itemsize == 1 else x.double()


def _own(value: Any) -> Any:
    """A copy that a kernel may write to."""
    return value.detach().clone() if isinstance(value, Tensor) else value


def _exact(value: Any) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.detach().to(torch.float64, copy=True) if floating else value


def missing(module: str, name: str = "") -> str | None:
    """Why a module, or a name in it, cannot be imported here; None if it can."""
    error = import_error(module, name)
    if error is None:
        return None
    return f"{module}{f'.{name}' * bool(name)} cannot be imported ({type(error).__name__}: {error})"


def broken(module: str, name: str = "") -> bool:
    """Whether it is installed and yet cannot be imported."""
    error = import_error(module, name)
    absent = isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}.")
    return error is not None and not absent


@functools.cache
def import_error(module: str, name: str) -> Exception | None:
    try:
        found = importlib.import_module(module)
        if name:
            getattr(found, name)
    except Exception as error:  # a broken binary raises OSError, an ABI mismatch ImportError, a DSL whatever it likes
        return error.with_traceback(None)
    return None


def random(device: torch.device, dtype: torch.dtype, *shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    """Normal numbers of a fixed seed, the same on every device, to compare kernels on."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    numbers = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    return (numbers * scale).to(device, dtype)
