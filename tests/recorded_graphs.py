"""CUDA graphs without a GPU: what runs between `capture_begin` and `capture_end` is recorded, `replay` runs it again.

Recorded are torch's operators and `opaque` functions, with the tensors that they were called on. On a GPU, a graph
writes where memory of its pool was free when it was captured: `replay` fills that with NaN.
"""

import contextlib
import functools
import itertools
import threading
import weakref
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from siglip2_packed import graphs
from siglip2_packed.ops import positions
from siglip2_packed.ops.attention import VarlenAttention, eager, operators
from siglip2_packed.ops.attention.kernels import Kernels
from siglip2_packed.ops.pool import triton as pool_kernels
from siglip2_packed.ops.positions import triton as position_kernels
from siglip2_packed.ops.segments import Segments

WAITS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}


class Recorded(TorchDispatchMode):
    """What stands for `torch.cuda.CUDAGraph`."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple] = []
        self.pool: _Pool | None = None
        self.free: list[Tensor] = []

    def capture_begin(self, pool: object = None, capture_error_mode: str = "global") -> None:
        assert _now.recording is None, "two captures at once"
        self.pool = _pools.setdefault(pool, _Pool())
        uses = Counter(_memory(x) for x in (*self.pool.made, *_tensors([g.parts() for g in self.pool.graphs])))
        made = {_memory(x): x for x in self.pool.made}
        self.free = [x for memory, x in made.items() if torch._C._storage_Use_Count(memory) == uses[memory] + _SEEN]
        self.pool.graphs.add(self)
        _now.recording = self
        self.__enter__()

    def capture_end(self) -> None:
        self.__exit__(None, None, None)
        _now.recording = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in WAITS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        with _not_recording():
            out = func(*args, **(kwargs or {}))
        given = {_memory(x) for x in _tensors((args, kwargs))}
        results = [x.detach() for x in _tensors(out)]
        self.calls.append((func, *_alone((args, kwargs or {})), [(x, _memory(x) not in given) for x in results]))
        self.pool.made += [x.detach() for x in results if _memory(x) not in given]
        return out

    def call(self, function, args: tuple) -> None:
        self.calls.append((function, _alone(args), {}, []))
        with _not_recording(), _disable_current_modes():
            function(*args)

    @torch.no_grad()
    def replay(self) -> None:
        for x in self.free:
            _poison(x)
        for function, args, kwargs, results in self.calls:
            out = _tensors(function(*args, **kwargs))
            for (place, is_made), x in zip(results, out):
                if is_made:
                    place.copy_(x)

    def parts(self) -> tuple:
        return self.calls, self.free


class _Pool:
    """Memory that its graphs made: given back, and somebody else's, as soon as there is none of them."""

    def __init__(self):
        self.graphs: weakref.WeakSet[Recorded] = weakref.WeakSet()
        self.made: list[Tensor] = []

    def __del__(self):
        _given_back.extend(self.made)
        for x in self.made:
            _poison(x)


def _poison(x: Tensor) -> None:
    """NaN, in every floating dtype."""
    torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.untyped_storage()).fill_(255)


class _Now(threading.local):
    recording: Recorded | None = None


_now = _Now()
_handles = itertools.count()
_pools: weakref.WeakValueDictionary[object, _Pool] = weakref.WeakValueDictionary()
_given_back: list[Tensor] = []


@contextlib.contextmanager
def _not_recording() -> Iterator[None]:
    recording, _now.recording = _now.recording, None
    try:
        yield
    finally:
        _now.recording = recording


def _tensors(values) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


def _alone(values):
    """The same memory, without what autograd keeps for it."""
    return tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, values)


def _memory(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _uses_once_seen() -> int:
    """That torch counts beside those of tensors, once `_memory` was asked for."""
    x = torch.empty(1)
    return torch._C._storage_Use_Count(_memory(x)) - 1


_SEEN = _uses_once_seen()


def opaque(function):
    """A function that fills some of the tensors that it is given: one call in a recording, whatever it does."""

    @functools.wraps(function)
    def run(*args) -> None:
        if _now.recording is None:
            function(*args)
        else:
            _now.recording.call(function, args)

    return run


def install(monkeypatch) -> None:
    """Graphs of models on the CPU, until the test ends. Needs `forced(positions=["triton"], pool=["triton"])`.

    What only kernels do, as it needs metadata that the device alone knows, is done by formulas.
    """
    _given_back.clear()
    for name in ("Stream", "Event", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, _Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorded)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, next(_handles)))
    monkeypatch.setattr(torch.cuda, "memory_snapshot", _memory_snapshot)
    monkeypatch.setattr(Tensor, "pin_memory", lambda x: x)
    monkeypatch.setattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)  # nobody follows calls but a capture
    monkeypatch.setattr(graphs, "buckets_unmet", lambda *args: None)
    monkeypatch.setattr(graphs, "for_bucket", lambda segments, *args: VarlenAttention(segments, "triton"))
    by_formula = Kernels(opaque(eager.forward), opaque(eager.backward), ())
    monkeypatch.setattr(operators, "for_tensors", lambda q, *args, **kwargs: by_formula if len(q) else None)
    monkeypatch.setattr(pool_kernels, "attention_pool", attention_pool)
    monkeypatch.setattr(position_kernels, "_add", add_positions)
    monkeypatch.setattr(position_kernels, "table_gradient", table_gradient)


class _Stream:
    """And events."""

    def __init__(self, *args):
        pass

    def record_event(self) -> "_Stream":
        return self

    def nothing(self, *args) -> None:
        pass

    record = wait_event = wait_stream = synchronize = nothing


def _memory_snapshot() -> list[dict]:
    sizes = {handle: {_memory(x): x.nbytes for x in pool.made} for handle, pool in _pools.items()}
    return [{"segment_pool_id": pool, "total_size": sum(found.values())} for pool, found in sizes.items()]


def attention_pool(q: Tensor, k: Tensor, v: Tensor, images: Segments) -> Tensor:
    """`[H, K]`, `[T, H, K]` twice -> `[N, H, K]`, of all rows with a mask."""
    rows, ends = torch.arange(len(k), device=k.device), images.cu_seqlens[:, None]
    inside = ((rows >= ends[:-1]) & (rows < ends[1:]))[:, None]
    scores = torch.einsum("hk,thk->ht", q * q.shape[1] ** -0.5, k)
    weights = scores.masked_fill(~inside, -1e9).softmax(-1) * inside
    return torch.einsum("nht,thk->nhk", weights, v)


def add_positions(patches: Tensor, table: Tensor, images: Tensor, image_of_row: Tensor) -> Tensor:
    out = torch.empty_like(patches)
    _fill_positions(out, patches, table, images)
    return out


@opaque
def _fill_positions(out: Tensor, patches: Tensor, table: Tensor, images: Tensor) -> None:
    out.zero_()
    for rows, places in _images(images):
        out[rows] = _eager_positions(patches[rows], table, places)


def table_gradient(grad: Tensor, images: Tensor, entries: int) -> Tensor:
    out = grad.new_empty(entries, grad.shape[1])
    _fill_table_gradient(out, grad, images)
    return out


@opaque
def _fill_table_gradient(out: Tensor, grad: Tensor, images: Tensor) -> None:
    out.zero_()
    for rows, places in _images(images):
        with torch.enable_grad():
            table = torch.zeros_like(out, requires_grad=True)
            added = _eager_positions(torch.zeros_like(grad[rows]), table, places)
        out.add_(*torch.autograd.grad(added, table, grad[rows]))


def _eager_positions(patches: Tensor, table: Tensor, places: positions.Places) -> Tensor:
    return positions.ADD_POSITIONS.of("eager")(patches, table, places, patches.dtype)


def _images(images: Tensor) -> Iterator[tuple[slice, positions.Places]]:
    for first, t, h, w in images.tolist():
        if t:
            yield slice(first, first + t * h * w), positions.Places([(t, h, w)])
