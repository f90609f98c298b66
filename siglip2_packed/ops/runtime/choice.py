"""Which implementation runs: the rules, the thresholds, where each was measured. Nobody else compares cards or sizes.

A rule is a function of the card, the dtype and the sizes of a call; it gives what is worth trying, best first. `take`
goes down that list to the first that is present here and was found right (`runtime.check`); "eager" always is.

Shapes: T rows, S segments, H heads, K head_dim, D hidden size, F MLP width.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch

from siglip2_packed.ops.runtime.check import Refused, Results, Verdict, check, missing

logger = logging.getLogger("siglip2_packed")

Order = tuple[str, ...]
HALF = (torch.bfloat16, torch.float16)


class Card(NamedTuple):
    """What rules know of a device."""

    kind: str
    capability: int = 0
    """Compute capability, 90 for an H100; 0 if it is no CUDA device."""
    multiprocessors: int = 1


def card(device: torch.device) -> Card:
    return _pretended[-1] if _pretended else _card(device)


@cache
def _card(device: torch.device) -> Card:
    if device.type != "cuda":
        return Card(device.type)
    properties = torch.cuda.get_device_properties(device)
    return Card("cuda", 10 * properties.major + properties.minor, properties.multi_processor_count)


# Work on rows: norm, mlp, columns, positions, float8

SUMS_ROWS = 2048
"""With fewer, a pass over the rows takes less time than the host takes to launch one kernel more (counted)."""
PRODUCT_ROWS = 2048
"""With fewer, a multiprocessor has hardly four tiles of the Hopper product; cuBLAS may cut it otherwise (H100)."""
PRODUCT_COLUMNS = 768
"""Narrower products are cuBLAS's as well: too few tiles, and nobody has measured them."""


def rows(card: Card, dtype: torch.dtype) -> Order:
    """Element-wise work on rows; Triton's computes in float32."""
    return ("triton", "eager") if card.kind == "cuda" and dtype != torch.float64 else ("eager",)


def sums(card: Card, dtype: torch.dtype, T: int) -> Order:
    return rows(card, dtype) if T >= SUMS_ROWS else ("eager",)


def float8_unmet(card: Card) -> str | None:
    """What products in float8 need and have not got; None if they have all."""
    return None if card.capability >= 90 else "float8 needs a CUDA device of compute capability 9.0"


def product_with_gelu(card: Card, dtype: torch.dtype, T: int, D: int, F: int) -> Order:
    """The product between D and F columns with GELU in its epilogue; the copy engine takes rows of 16 bytes."""
    large = T >= PRODUCT_ROWS and min(D, F) >= PRODUCT_COLUMNS and not (D % 8 or F % 8)
    return ("hopper",) * (card.capability == 90 and dtype in HALF and large) + rows(card, dtype)


# Products that do not depend on the number of rows (`batch_invariant`)


class ProductTile(NamedTuple):
    """Of the result, and how its kernel is compiled. Four warps and 64 rows at least: then every tile takes the same
    instructions of the tensor cores."""

    rows: int
    columns: int
    warps: int
    stages: int


PRODUCT_TILES = ProductTile(128, 128, 8, 3), ProductTile(64, 128, 4, 4), ProductTile(64, 64, 4, 6)
"""Each in 99 KB of shared memory."""
ROOMY_PRODUCT_TILE = ProductTile(128, 256, 8, 4)
"""In 192 KB."""


def invariant_products(card: Card, dtype: torch.dtype, D: int, F: int) -> Order:
    """Products between D and F columns; the copy engine takes rows of 16 bytes. The choice knows no number of rows."""
    if card.kind != "cuda" or dtype not in HALF:
        return ()
    return ("invariant_hopper",) * (card.capability == 90 and not (D % 8 or F % 8)) + ("invariant",)


def product_tiles(card: Card) -> tuple[ProductTile, ...]:
    return ((ROOMY_PRODUCT_TILE,) if card.capability // 10 in (9, 10) else ()) + PRODUCT_TILES


@lru_cache(maxsize=1024)
def product_tile(card: Card, T: int, F: int) -> ProductTile:
    """For a result `[T, F]`: the one with which the busiest multiprocessor is done first.

    A tile takes it, for each column of the contraction, so many clocks as it has products for the tensor cores (2048 a
    clock) or as it has numbers to bring (16 a clock, its share of what the cache gives), whichever is more. From an
    H100's figures; not measured yet.
    """

    def clocks(tile: ProductTile) -> float:
        tiles = -(-T // tile.rows) * -(-F // tile.columns)
        products, numbers = tile.rows * tile.columns / 2048, (tile.rows + tile.columns) / 16
        return -(-tiles // card.multiprocessors) * max(products, numbers)

    return min(product_tiles(card), key=clocks)


class HopperTile(NamedTuple):
    """Of the result, for one warpgroup: 128 of its numbers a thread, at most."""

    rows: int
    columns: int


HOPPER_TILES = HopperTile(64, 256), HopperTile(128, 128), HopperTile(64, 128), HopperTile(64, 64)


def hopper_tiles(card: Card) -> tuple[HopperTile, ...]:
    return HOPPER_TILES


@lru_cache(maxsize=1024)
def hopper_tile(card: Card, T: int, F: int) -> HopperTile:
    """For a result `[T, F]`: the one with which the busiest multiprocessor is done first.

    A tile takes it, for each column of the contraction, so many clocks as it has products for the tensor cores (1600 a
    clock, as far as these get) or as it has numbers to bring (30 a clock), whichever is more. Estimates, to rank tiles.
    """

    def clocks(tile: HopperTile) -> float:
        tiles = -(-T // tile.rows) * -(-F // tile.columns)
        return -(-tiles // card.multiprocessors) * max(tile.rows * tile.columns / 1600, sum(tile) / 30)

    return min(HOPPER_TILES, key=clocks)


# Training

KEPT_ROWS = 2048
"""Up to so many, attention's projected output is kept for backward, which else makes it again: a product of 6 µs at 256
rows (H200), against a tenth of what a layer keeps."""
BESIDE_ROWS = 2048
"""Up to so many, gradients of weights run on a second stream where a graph is captured. A step took 6% less at 256
rows, 1% at 2,048 and at 4,096, where that costs an eighth more memory (H200)."""

TOGETHER_ROWS = 8192
"""Up to so many, training waits for the host: three layers are one node of autograd then, which takes it a sixth less
(Python's part, counted on a CPU). Their gradients come together: more memory by two layers' gradients."""


def layers_at_once(T: int) -> int:
    return 3 if T <= TOGETHER_ROWS else 1


def keeps_projected(T: int) -> bool:
    return T <= KEPT_ROWS


def runs_beside(T: int) -> bool:
    return T <= BESIDE_ROWS


# Attention

LENGTH_CLASSES = (96, 192, 384, 768, 1536, 3584)
"""Upper bounds of the length classes that measurements are kept for; one more class lies above the last."""


class Preference(NamedTuple):
    """Backends up to a length, and above it."""

    up_to: int
    short: Order
    long: Order


_OTHERS = ("torch_varlen", "flash_attention_2", "sdpa")
_IMAGES = ("triton", *_OTHERS)
_LONG = ("flash_attention_4", "triton", *_OTHERS)
# benchmarks/results/attention_h100.csv and attention_h200.csv; key: (compute capability, head_dim, training)
MEASURED = {
    (90, 64, False): Preference(1536, _IMAGES, _LONG),
    (90, 64, True): Preference(768, _IMAGES, _LONG),
    (90, 72, False): Preference(3584, _IMAGES, _IMAGES),
    (90, 72, True): Preference(3584, _IMAGES, _IMAGES),
}


def length_class(lengths: Sequence[int]) -> int:
    """The class of a pack's typical segment: the mean length, each row counted once, as attention's work counts it."""
    total = sum(lengths)
    typical = sum([length * length for length in lengths]) / total if total else 0
    return sum([typical > bound for bound in LENGTH_CLASSES])


def attention(card: Card, K: int, length: int, training: bool) -> Order:
    """Backends worth trying for a length class; "eager" always works."""
    if card.kind != "cuda":
        return ("sdpa",)
    measured = MEASURED.get((card.capability, K, training)) or _unmeasured(card.capability)
    longest = LENGTH_CLASSES[min(length, len(LENGTH_CLASSES) - 1)] + (length == len(LENGTH_CLASSES))
    return measured.short if longest <= measured.up_to else measured.long


def _unmeasured(capability: int) -> Preference:
    """Other cards and head dims: own kernels for images, FlashAttention for long segments."""
    if capability >= 90:
        return Preference(768, _IMAGES, ("flash_attention_3", *_LONG))
    return Preference(1536, _IMAGES, ("flash_attention_2", "torch_varlen", "triton", "sdpa"))


class Needs(NamedTuple):
    """What a backend cannot do without; half precision besides."""

    capability: int
    max_head_dim: int = 256


NEEDS = {
    "triton": Needs(80, 128),
    "torch_varlen": Needs(80),
    "flash_attention_2": Needs(80),
    "flash_attention_3": Needs(90),
    "flash_attention_4": Needs(90),
}


def attention_unmet(backend: str, card: Card, dtype: torch.dtype, K: int) -> str | None:
    """What a backend needs and has not got; None if it has all."""
    needs = NEEDS.get(backend)
    if needs is None:
        return None
    if card.kind != "cuda":
        return f"needs a CUDA device, the tensors are on {card.kind}"
    if card.capability < needs.capability:
        return f"needs compute capability {needs.capability / 10}, this card has {card.capability / 10}"
    if dtype not in HALF:
        return f"needs bfloat16 or float16, the tensors are {dtype}"
    if K % 8 or needs.max_head_dim < K:
        return f"needs a head_dim that is a multiple of 8 up to {needs.max_head_dim}, got {K}"
    return None


class Tile(NamedTuple):
    """M queries and N keys of a Triton attention kernel, and how it is compiled.

    Loops need two stages or more: Triton 3.6 at one stage reads shared memory out of bounds. `registers` buys a second
    or third resident block for a few spilled ones.
    """

    M: int
    N: int
    warps: int = 4
    stages: int = 2
    registers: int | None = None
    single: bool = False
    """Whether no segment is longer than a tile."""


Launch = tuple[str, Any]
"""A kernel of our own, and how it is launched: a Tile or two, or how many warpgroups share the key tiles."""

# Tiles and warpgroups: measured on an H100 at T = 16384, 16 heads, and frozen, because autotuning would stall a
# training run at every new shape. On other cards: tiles that fit 99 KB of shared memory.


def attention_forward(card: Card, dtype: torch.dtype, T: int, H: int, K: int, max_seqlen: int) -> tuple[Launch, ...]:
    few = _few_rows(card, T, H, max_seqlen)
    tile = ("triton", _forward_tile(card, dtype, K, max_seqlen, few))
    if _hopper(card, dtype, K) and max_seqlen > 64 and not few:
        return ("hopper", 3 if 128 < max_seqlen <= 192 else 2), tile  # a third saves a second block, nearly empty
    return (tile,)


ONE_PASS_LENGTH = {64: 1536, 72: 768}
"""Mean length of segments, by head_dim, from which one pass takes less time than two (H200)."""


def attention_backward(
    card: Card, dtype: torch.dtype, T: int, S: int, H: int, K: int, max_seqlen: int
) -> tuple[Launch, ...]:
    """Up to 128 rows one Triton kernel does it all in one tile; few rows have no time for descriptors of tiles.

    Long segments on Hopper take one pass, five products: what it does before and after costs 70 µs at 16,384 rows.
    """
    if tile := _short_tile(card, dtype, K, max_seqlen):
        return (("triton_short", tile),)
    tiles = ("triton", _backward_tiles(card, dtype, K))
    counted = max(H * (T // 64 + S), T) <= 2**31 - 2**16  # items and rows, in 32 bits
    if _hopper(card, dtype, K) and max_seqlen > 128 and counted and not _few_rows(card, T, H, max_seqlen):
        two = ("hopper", 3 if max_seqlen <= 192 else 2)
        long = ONE_PASS_LENGTH[K] <= max_seqlen and ONE_PASS_LENGTH[K] * S <= T
        return (("hopper_one_pass", 2), two, tiles) if long else (two, tiles)
    return (tiles,)


def invariant_attention_forward(card: Card, dtype: torch.dtype, K: int) -> tuple[Launch, ...]:
    """One launch for every pack, whatever its rows and its longest segment."""
    return (("hopper", 2) if _hopper(card, dtype, K) else ("triton", Tile(64, 64)),)


def _hopper(card: Card, dtype: torch.dtype, K: int) -> bool:
    return card.capability == 90 and dtype in HALF and K in (64, 72)


def _few_rows(card: Card, T: int, H: int, max_seqlen: int) -> bool:
    """Whether larger blocks than of 64 queries would leave multiprocessors without work."""
    return max_seqlen <= 256 and card.multiprocessors >= T * H / 128


def _roomy(card: Card, K: int) -> bool:
    return card.capability // 10 == 9 and K <= 80


def _forward_tile(card: Card, dtype: torch.dtype, K: int, max_seqlen: int, few: bool) -> Tile:
    if dtype == torch.float32:
        return Tile(32, 32)
    if max_seqlen <= 128:
        return Tile(64, 64 if max_seqlen <= 64 else 128, stages=1, single=True)
    if not _roomy(card, K):
        return Tile(64, 64)
    return Tile(64, 64, stages=3) if few else Tile(128, 64, warps=8, stages=3, registers=128)


def _short_tile(card: Card, dtype: torch.dtype, K: int, max_seqlen: int) -> Tile | None:
    """All of a segment."""
    if max_seqlen <= 32:
        return Tile(32, 32, stages=1)
    if max_seqlen <= 64 and dtype != torch.float32:
        return Tile(64, 64, stages=1, registers=128 if _roomy(card, K) else None)
    if max_seqlen <= 128 and dtype != torch.float32 and _roomy(card, K):
        return Tile(128, 128, warps=8, stages=1)
    return None


def _backward_tiles(card: Card, dtype: torch.dtype, K: int) -> tuple[Tile, Tile]:
    """For dq, and for dk and dv."""
    if dtype == torch.float32:
        return Tile(32, 16), Tile(16, 32)
    if _roomy(card, K):
        return Tile(64, 32, stages=3, registers=104), Tile(32, 64, stages=3 if K <= 64 else 2, registers=168)
    return Tile(64, 32), Tile(32, 64)


def pool(card: Card, dtype: torch.dtype, K: int) -> Order:
    fits = card.capability >= 80 and dtype in HALF and K % 8 == 0 and K <= 128
    return ("triton", "eager") if fits else ("eager",)


# From what is worth trying to what runs


@dataclass(frozen=True, eq=False)
class Function:
    """One function of an operation, and all that is needed to take an implementation of it.

    Attributes:
        name: `norm.layer_norm`, say.
        modules: where each implementation of that name lies; "eager" is among them, and is the reference.
        compared: calls an implementation for a comparison: `compared(function, *case)` -> its results by name.
        cases: `cases(device, dtype, *sizes)` -> arguments on which implementations are compared.
        rounded: results that are rounded to another dtype than that of the call.
    """

    name: str
    modules: dict[str, str]
    compared: Callable[..., Results]
    cases: Callable[..., Iterable[tuple]]
    rounded: Mapping[str, torch.dtype] = field(default_factory=dict)

    def of(self, implementation: str) -> Callable:
        return getattr(importlib.import_module(self.modules[implementation]), self.name.split(".")[1])

    def missing(self, implementation: str) -> str | None:
        """Why it cannot be had here; None if it can."""
        return missing(self.modules[implementation], self.name.split(".")[1])

    def verdict(self, implementation: str, device: torch.device, dtype: torch.dtype, sizes: tuple) -> Verdict | None:
        """What its check says; None where nothing can be checked now. See `check.check`."""
        kernel, reference = self.of(implementation), self.of("eager")
        return check(
            f"{self.name} ({implementation})",
            (device, dtype, sizes),
            lambda *case: self.compared(kernel, *case),
            lambda *case: self.compared(reference, *case),
            lambda: self.cases(device, dtype, *sizes),
            device,
            dtype,
            self.rounded,
        )


_forced: dict[str, tuple] = {}
_pretended: list[Card] = []
_remembered: list[dict] = []


def take(function: Function, order: Order, device: torch.device, dtype: torch.dtype, *sizes: Any) -> Callable:
    """The first implementation of `order` that is present and right for these sizes.

    Where nothing can be checked (a CUDA graph is captured), one that was not checked before is passed over, this time.
    """
    key = function.name, order, device, dtype, sizes
    found = _taken.get(key)
    if found is None:
        name, known = _first_right(function, order, device, dtype, sizes)
        found = function.of(name)
        if known:
            _taken[key] = found
            say_once(f"{function.name}: {name} ({device.type}, {str(dtype).removeprefix('torch.')})")
    return found


def require(function: Function, order: Order, device: torch.device, dtype: torch.dtype, *sizes: Any) -> Callable:
    """The first of `order` that is present and right for these sizes, and nothing else, for `batch_invariant`.

    Raises:
        Refused: none is; or one that is to come first cannot be checked now, for whose results another's would not do.
    """
    key = "required", function.name, order, device, dtype, sizes
    found = _taken.get(key)
    if found is None:
        name = _required(function, order, device, dtype, sizes)
        found = _taken[key] = function.of(name)
        say_once(f"batch_invariant {function.name}: {name} ({device.type}, {str(dtype).removeprefix('torch.')})")
    return found


def _required(function: Function, order: Order, device: torch.device, dtype: torch.dtype, sizes: tuple) -> str:
    reasons = []
    for name in order:
        if _present(function, name):
            verdict = function.verdict(name, device, dtype, sizes)
            if verdict is not None and verdict.right:
                return name
            if verdict is None:
                reasons = [f"({name}) has not been checked yet: run the model once before graph capture"]
                break
            reasons.append(f"({name}) failed its self-check: {verdict}")
        else:
            reasons.append(f"({name}) {function.missing(name)}")
    said = "; ".join(reasons) or f"has no kernel for {str(dtype).removeprefix('torch.')} on {device.type}"
    raise Refused(f"batch_invariant cannot be had: {function.name} {said}")


def _first_right(
    function: Function, order: Order, device: torch.device, dtype: torch.dtype, sizes: tuple
) -> tuple[str, bool]:
    """Its name, and whether every check that it took could be made."""
    known = True
    for name in allowed(function.name, order):
        if name != "eager" and name in function.modules and _present(function, name):
            verdict = function.verdict(name, device, dtype, sizes)
            if verdict is not None and verdict.right:
                return name, known
            known &= verdict is not None
    return "eager", known


def _present(function: Function, implementation: str) -> bool:
    reason = function.missing(implementation)
    if reason:
        say_once(f"{function.name}: {reason}", logging.WARNING)
    return reason is None


@cache
def say_once(line: str, level: int = logging.INFO) -> None:
    logger.log(level, line)


@contextlib.contextmanager
def forced(card: Card | None = None, **orders: Sequence) -> Iterator[None]:
    """Within it, what is worth trying for an operation is this: `forced(norm=["triton"])`. It is checked as ever.

    Args:
        card: what rules take every device for.
        orders: by operation or function: `norm`, `norm.layer_norm`'s as `**{"norm.layer_norm": [...]}`, `attention`
            (backends), `attention_forward`, `attention_backward` (launches).
    """
    forced_before, pretended_before = dict(_forced), len(_pretended)
    _forced.update({name: tuple(order) for name, order in orders.items()})
    _pretended.extend([card] if card else [])
    forget()
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(forced_before)
        del _pretended[pretended_before:]
        forget()


def forget() -> None:
    """Lets everything be chosen anew; what was checked stays so."""
    for remembered in _remembered:
        remembered.clear()


def remember() -> dict:
    """A table of choices, emptied when they are to be made anew."""
    _remembered.append({})
    return _remembered[-1]


def allowed(operation: str, order: tuple) -> tuple:
    """The order that a rule gave, or the one that is forced upon `operation` (or, for `norm.layer_norm`, on `norm`)."""
    return _forced.get(operation, _forced.get(operation.split(".")[0], order)) if _forced else order


_taken: dict[tuple, Callable] = remember()
