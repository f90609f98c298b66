"""Batches of images by patch budget, as index lists: for every rank and step a pack of like cost.

N images.
"""

from __future__ import annotations

import itertools
import math
import operator
import sys
import zlib
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from heapq import heapify, heappop, heappush
from itertools import islice
from operator import itemgetter
from types import FrameType
from typing import Any

import numpy as np
import torch.distributed as dist
from torch.utils.data import Sampler

SO400M_COST = (2 * 1152 + 4304, 1)
ORDERS = 8  # of an epoch, until one fits its steps
Priced = tuple[int, int, int]
"""Cost, turn and index of an image in a pack."""


def whole(name: str, value: Any, least: int = 1) -> int:
    """`value` as an int.

    Raises:
        ValueError: no whole number (a bool is none), or less than `least`.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool | np.bool_):
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    return number


def fill_packs(
    lengths: Iterable[int], budget: int, *, max_images: int | None = None, window: int = 1024
) -> Iterator[list[int]]:
    """Packs of at most `budget` patches and `max_images` images: lists of places in `lengths`, each in exactly one.

    A pack takes the next images in order until one does not fit, then fills what is left with the largest that fit of
    the `window` images ahead. So packs are random mixtures of a shuffled order, no image waits for long, and with the
    package's `mixed` sizes under 1% of a pack stays empty.

    Args:
        lengths: patches of each image, all of them within 1..budget. Read no further than the window reaches, so it
            may be a stream.

    Raises:
        ValueError: a length that fits no pack; numbers that are none or below 1.
    """
    whole("budget", budget), whole("window", window)
    if max_images is not None:
        whole("max_images", max_images)
    coming = enumerate(lengths)
    queue: deque[tuple[int, int]] = deque()  # (place, length) of the window, in order
    ahead: list[tuple[int, int]] = []  # sorted (length, place) of those in the window that are in no pack
    taken: set[int] = set()  # places in the window that are
    while True:
        pack: list[int] = []
        room = budget
        while max_images is None or len(pack) < max_images:
            while queue and queue[0][0] in taken:
                taken.remove(queue.popleft()[0])
            for place, length in islice(coming, window - len(queue)):  # the window moves with its head
                if not 1 <= length <= budget:
                    raise ValueError(f"image {place} has {length} patches, a pack holds 1 to {budget}")
                queue.append((place, length))
                insort(ahead, (length, place))
            if not queue or queue[0][1] > room:
                break
            place, length = queue.popleft()
            del ahead[bisect_left(ahead, (length, place))]
            room -= length
            pack.append(place)
        while max_images is None or len(pack) < max_images:
            fits = bisect_left(ahead, (room + 1,))
            if not fits:
                break
            length, place = ahead.pop(fits - 1)
            taken.add(place)
            room -= length
            pack.append(place)
        if not pack:
            return
        yield pack


def image_sizes(lengths: Any, budget: int) -> np.ndarray:
    """`[N]` patches or `[N, 3]` grids as int64.

    Raises:
        ValueError: other shapes or types; an image without patches, or with more than the budget.
    """
    sizes = np.asarray(lengths)
    sizes = sizes.reshape(0).astype(np.int64) if sizes.size == 0 else sizes
    if sizes.dtype.kind not in "iu" or not (sizes.ndim == 1 or (sizes.ndim == 2 and sizes.shape[1] == 3)):
        raise ValueError(f"lengths must be integers [N] or [N, 3], got {sizes.dtype} {list(sizes.shape)}")
    sides = sizes[:, None] if sizes.ndim == 1 else sizes
    wrong = (sides < 1).any(1) | (sides.astype(np.float64).prod(1) > budget)
    for i in np.flatnonzero(wrong)[:1].tolist():
        grid = sides[i].tolist()
        patches = math.prod(grid)  # of Python's integers, which do not overflow
        if min(grid) < 1:
            got = f"the grid {tuple(grid)}" if patches else "0 patches"
            raise ValueError(f"image {i} has {got}: leave it out")
        raise ValueError(f"image {i} has {patches} patches, the budget of a batch is {budget}")
    return sizes.astype(np.int64)


def cost_terms(cost: Any) -> tuple[float, float]:
    """(a, b) of the cost a·n + b·n², checked."""
    try:
        a, b = (float("nan") if isinstance(x, str | bool | np.bool_) else float(x) for x in cost)
    except (TypeError, ValueError):
        a = b = math.nan
    if not (a >= 0 and b >= 0 and 0 < a + b < math.inf):
        raise ValueError(f"cost must be two numbers (a, b) of a·n + b·n², not negative nor both 0, got {cost!r}")
    return a, b


def whole_costs(frames: np.ndarray, frame: np.ndarray, a: float, b: float) -> list[int]:
    """a·n + b·n² of each image, whole numbers in proportion: their sums are exact, so what evens them comes to an end.

    Args:
        frames, frame: `[N]` frames of an image, and patches of each.
    """
    if not (a.is_integer() and b.is_integer() and a + b <= 2**32):
        a, b = (x / (a + b) * 2**32 for x in (a, b))
    return list(map(int, np.rint(a * frames * frame + b * frames * frame.astype(np.float64) ** 2).tolist()))


def accelerate_asks(sampler: PatchBudgetBatchSampler) -> bool:
    """Whether accelerate's BatchSamplerShard asks `sampler` for its batches just now.

    A loader that `Accelerator.prepare` got gives rank r every n-th batch of what its batch sampler yields. Nothing but
    the call itself tells a batch sampler that it was wrapped so.

    Raises:
        ValueError: accelerate deals out batches in another way, which packs for ranks do not go with.
    """
    asking: dict[str, Any] = {}
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == "accelerate.data_loader":
            owner = frame.f_locals.get("self")
            asking.setdefault(type(owner).__name__, owner)
        frame = frame.f_back
    shard, ranks = asking.get("BatchSamplerShard"), sampler.num_replicas
    if "DataLoaderDispatcher" in asking:
        raise ValueError("accelerate's dispatch_batches cuts batches up, and packs cannot be cut: set it to False")
    if shard is None:
        return False
    if shard.batch_sampler is not sampler:
        between = type(shard.batch_sampler).__name__
        raise ValueError(f"{between} hides the sampler from accelerate: wrap, or skip batches of, the prepared loader")
    if shard.num_processes != ranks:
        raise ValueError(
            f"accelerate deals out batches to {shard.num_processes} processes, the sampler has num_replicas {ranks}: "
            f"give it num_replicas={shard.num_processes}"
        )
    if "SkipBatchSampler" in asking and "DataLoaderShard" in asking:  # which otherwise sets the epoch itself
        sampler.set_epoch(asking["DataLoaderShard"].iteration)
    return True


class PatchBudgetBatchSampler(Sampler[list[int]]):
    """Batches of indices for `DataLoader(batch_sampler=...)`: packs of at most `budget` patches, as full as they get.

    Every rank and every epoch has the same number of batches. The images of step k cost about the same on every rank,
    by the cost a·n + b·n² of an image of n patches. An epoch's batches follow from (seed, epoch) and the arguments
    alone.

    All images are in exactly one batch of one rank. Only if there are fewer images than batches on all ranks together
    (images near the budget, or fewer than ranks) some are repeated, or left out with `drop_last`: less than one a rank,
    so never more than with `DistributedSampler`. Otherwise the batches of one step are smaller, to come out even.

    Resuming: `state_dict()` holds the batches handed out. A DataLoader with workers, or one that accelerate prepared,
    asks for batches ahead of those it has delivered, so give the number of batches trained on in this epoch:
    `sampler.state_dict(batch=step)`. torchdata's `StatefulDataLoader` keeps the state of the batch it delivered and
    needs no such thing. After `load_state_dict`, the next iteration goes on behind that batch, `set_epoch` of the same
    epoch included; the state is the same on every rank, and the other arguments must be as they were. A state at the
    end of an epoch leaves nothing of that epoch.

    Engines: each rank takes its own batches, so a loader needs nobody who shards it (Lightning:
    `use_distributed_sampler=False`). One that accelerate prepared does so all the same, and gets the batches of all
    ranks in turn, of which it gives each rank its own; it sets the epoch, too (`loader.set_epoch`).

    Args:
        lengths: `[N]` patches of each image, or `grid_thw [N, 3]`: then the frames of a video count as segments.
        budget: patches of a batch at most.
        max_images: images of a batch at most.
        num_replicas: how many ranks; those of `torch.distributed`, where it runs when batches are asked for, else 1.
        rank: which of them; likewise, else 0.
        shuffle: off: packs follow the order of the data set, as far as filling them well and even cost allow.
        seed: of the shuffle; the same on every rank.
        drop_last: see above.
        cost: (a, b). FLOPs of a layer are n·(8D² + 4DF) + n²·4D, in proportion (2D + F, 1): the default is so400m's.
        window: how many images ahead may fill a gap, see `fill_packs`.

    Attributes:
        utilisation: patches of this epoch's batches, all ranks, over what their budgets hold.

    Raises:
        ValueError: an argument of another kind; an image larger than the budget, or without patches; a state of other
            arguments.
    """

    def __init__(
        self,
        lengths: Any,
        budget: int,
        *,
        max_images: int | None = None,
        num_replicas: int | None = None,
        rank: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        cost: tuple[float, float] = SO400M_COST,
        window: int = 1024,
    ):
        self.budget, self.window, self.seed = whole("budget", budget), whole("window", window), whole("seed", seed, 0)
        self.max_images = None if max_images is None else whole("max_images", max_images)
        self._num_replicas = None if num_replicas is None else whole("num_replicas", num_replicas)
        self._rank = None if rank is None else whole("rank", rank, 0)
        if rank is not None:
            self._check_rank()
        for name, value in {"shuffle": shuffle, "drop_last": drop_last}.items():
            if not isinstance(value, bool | np.bool_):
                raise ValueError(f"{name} must be True or False, got {value!r}")
        self.shuffle, self.drop_last = bool(shuffle), bool(drop_last)
        self._cost = cost_terms(cost)
        sizes = image_sizes(lengths, self.budget)
        frames, frame = (sizes[:, 0], sizes[:, 1] * sizes[:, 2]) if sizes.ndim == 2 else (np.ones_like(sizes), sizes)
        self._lengths: list[int] = (frames * frame).tolist()
        self._costs = whole_costs(frames, frame, *self._cost)
        self._crc32 = zlib.crc32(sizes.astype("<i8").tobytes())
        self.epoch = 0
        self._batch = self._start = 0  # batches handed out in this epoch; where the next iteration begins
        self._packs: int | None = None  # of epoch 0: from them follow the steps of every epoch
        self._planned: tuple[tuple[int, int], list[list[list[int]]]] | None = None

    @property
    def num_replicas(self) -> int:
        running = dist.is_available() and dist.is_initialized()
        return self._num_replicas or (dist.get_world_size() if running else 1)

    @property
    def rank(self) -> int:
        if self._rank is None and not (dist.is_available() and dist.is_initialized()):
            if self.num_replicas > 1:
                raise ValueError(f"num_replicas is {self.num_replicas} and torch.distributed does not run: give a rank")
            return 0
        return self._check_rank()

    def _check_rank(self) -> int:
        rank = dist.get_rank() if self._rank is None else self._rank
        if rank >= self.num_replicas:
            raise ValueError(f"rank must be within 0..{self.num_replicas - 1}, got {rank}")
        return rank

    @property
    def sampler(self) -> PatchBudgetBatchSampler:
        """Itself: Lightning and accelerate look for `set_epoch` at a batch sampler's sampler."""
        return self

    def __iter__(self) -> Iterator[list[int]]:
        ranks = range(self.num_replicas) if accelerate_asks(self) else [self.rank]
        steps = self._plan()
        start, self._start = self._start, 0
        for step in range(start, len(steps)):
            self._batch = step + 1
            for rank in ranks:
                yield list(steps[step][rank])

    def __len__(self) -> int:
        """Batches of an epoch, on each rank."""
        return len(self._plan()) * (self.num_replicas if accelerate_asks(self) else 1)

    @property
    def utilisation(self) -> float:
        steps = self._plan()
        filled = sum(self._lengths[i] for step in steps for pack in step for i in pack)
        return filled / (self.budget * self.num_replicas * len(steps)) if steps else 1.0

    def set_epoch(self, epoch: int) -> None:
        """Another epoch's order; no change within the same epoch.

        Raises:
            ValueError: an earlier epoch than that of a state which was loaded and not gone on with.
        """
        epoch = whole("epoch", epoch, 0)
        if epoch < self.epoch and self._start:
            raise ValueError(
                f"set_epoch({epoch}) would lose the state that was loaded, batch {self._start} of epoch {self.epoch}: "
                f"begin with set_epoch({self.epoch}), of the loader if accelerate prepared it"
            )
        if epoch != self.epoch:
            self.epoch, self._batch, self._start = epoch, 0, 0

    @property
    def _settings(self) -> dict[str, Any]:
        return {
            "images": len(self._lengths),
            "lengths_crc32": self._crc32,
            "num_replicas": self.num_replicas,
            "budget": self.budget,
            "max_images": self.max_images,
            "shuffle": self.shuffle,
            "seed": self.seed,
            "drop_last": self.drop_last,
            "cost": self._cost,
            "window": self.window,
        }

    def state_dict(self, batch: int | None = None) -> dict[str, Any]:
        """The state after `batch` batches of this epoch; after those handed out, when left out."""
        batch, batches = self._batch if batch is None else whole("batch", batch, 0), len(self._plan())
        if batch > batches:
            raise ValueError(f"batch is {batch}, epoch {self.epoch} has {batches} batches")
        return {"epoch": self.epoch, "batch": batch, "batches": batches, **self._settings}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        settings = self._settings
        if missing := {"epoch", "batch", "batches", *settings} - state.keys():
            raise ValueError(f"no state of a PatchBudgetBatchSampler: without {', '.join(sorted(missing))}")
        for name, ours in settings.items():
            theirs = tuple(state[name]) if isinstance(state[name], list) else state[name]
            if theirs != ours:
                raise ValueError(f"the state is of a sampler with {name} {theirs}, this one has {ours}")
        epoch, batch, batches = (whole(name, state[name], 0) for name in ("epoch", "batch", "batches"))
        if batch > batches:
            raise ValueError(f"the state's batch is {batch}, its epoch has {batches} batches")
        if batch == batches and self.epoch > epoch:
            return  # StatefulDataLoader loads late: what is over does not undo set_epoch
        before, self.epoch = self.epoch, epoch
        if (here := len(self._plan())) != batches:
            self.epoch = before
            raise ValueError(f"epoch {epoch} of the state has {batches} batches, here {here}: another version made it")
        self._batch = self._start = batch

    def _plan(self) -> list[list[list[int]]]:
        """The epoch: for each step, a pack for each rank."""
        key = self.epoch, self.num_replicas
        if self._planned is None or self._planned[0] != key:
            self._planned = key, self._steps()
        return self._planned[1]

    def _order(self, rng: np.random.Generator) -> tuple[list[int], list[list[int]]]:
        """An order of the images, and the packs they come to in it."""
        count = len(self._lengths)
        order = (rng.permutation(count) if self.shuffle else np.arange(count)).tolist()
        lengths = [self._lengths[i] for i in order]
        fill = fill_packs(lengths, self.budget, max_images=self.max_images, window=self.window)
        return order, [[order[place] for place in pack] for pack in fill]

    def _wanted(self, packs: int) -> int:
        """Batches on all ranks together, where so many packs hold all images."""
        ranks = self.num_replicas
        wanted = -(-packs // ranks) * ranks
        return packs // ranks * ranks if wanted > len(self._lengths) and self.drop_last else wanted

    def _steps(self) -> list[list[list[int]]]:
        ranks, count = self.num_replicas, len(self._lengths)
        rng = np.random.default_rng([self.seed, self.epoch])
        order, packs = self._order(rng)
        if self._packs is None:
            self._packs = len(packs) if self.epoch == 0 else len(self._order(np.random.default_rng([self.seed, 0]))[1])
        # Schedules, and engines that resume by counting steps, need epochs of one length: an order that does not fit
        # gives way to another, the last of them that of epoch 0.
        wanted = self._wanted(self._packs)
        for left in reversed(range(ORDERS)):
            if self._wanted(len(packs)) <= wanted:
                break
            order, packs = self._order(rng if left else np.random.default_rng([self.seed, 0]))
        if len(packs) > wanted:
            packs = sorted(packs, key=len, reverse=True)[:wanted]  # what goes are packs of one image
        elif wanted > count:
            packs += [[int(i)] for i in np.resize(order, wanted - count)]

        if not packs:
            return []

        # Packs of like cost make a step. The cheapest, too few for a step or not full, are spread over two.
        packs.sort(key=self._cost_of)
        missing, few = wanted - len(packs), min(len(packs) % ranks + ranks, len(packs))
        while sum(map(len, packs[:few])) < few + missing:
            few += ranks
        packs = sorted(self._spread(packs[:few], missing) + packs[few:], key=self._cost_of)
        steps = [packs[i : i + ranks] for i in range(0, len(packs), ranks)]
        if not self.shuffle:
            return sorted(steps, key=lambda step: min(map(min, step)))
        return [[steps[k][r] for r in rng.permutation(ranks)] for k in rng.permutation(len(steps))]

    def _cost_of(self, pack: list[int]) -> int:
        return sum(self._costs[i] for i in pack)

    def _spread(self, packs: list[list[int]], missing: int) -> list[list[int]]:
        """Adds `missing` packs and evens the cost: from the costliest to the cheapest an image moves while it helps.

        None stays empty: an empty one is the cheapest, and then some pack has two images to give one from.
        """
        packs = packs + [[] for _ in range(missing)]
        turns = itertools.count(len(self._lengths))  # an image that moved comes after those that were there before
        pools = [sorted([(self._costs[i], turn, i) for turn, i in enumerate(pack)]) for pack in packs]
        costs = [self._cost_of(pack) for pack in packs]
        rooms = [self.budget - sum([self._lengths[i] for i in pack]) for pack in packs]
        costly = [(-cost, place) for place, cost in enumerate(costs)]
        cheap = [(cost, place) for place, cost in enumerate(costs)]
        heapify(costly)
        heapify(cheap)
        while True:
            while costly and (len(pools[costly[0][1]]) < 2 or -costly[0][0] != costs[costly[0][1]]):
                heappop(costly)
            while cheap[0][0] != costs[cheap[0][1]]:
                heappop(cheap)
            if not costly:
                break
            high, low = costly[0][1], cheap[0][1]
            moved = self._nearest_half(pools[high], costs[high] - costs[low], rooms[low])
            if moved is None or len(pools[low]) == self.max_images:
                break
            cost, _, image = moved
            del pools[high][bisect_left(pools[high], moved)]
            insort(pools[low], (cost, next(turns), image))
            for place, sign in ((high, -1), (low, 1)):
                costs[place] += sign * cost
                rooms[place] -= sign * self._lengths[image]
                heappush(costly, (-costs[place], place))
                heappush(cheap, (costs[place], place))
        return [[i for _, _, i in sorted(pool, key=itemgetter(1))] for pool in pools]

    def _nearest_half(self, pool: list[Priced], gap: int, room: int) -> Priced | None:
        """Of a pool in order: what costs less than the gap, fits, and comes nearest to half; the first of equals."""
        middle = bisect_left(pool, (gap / 2,))
        fits = [
            next((x for x in some if self._lengths[x[2]] <= room), None)
            for some in (reversed(pool[:middle]), pool[middle : bisect_left(pool, (gap,))])
        ]
        near = [cost for cost, _, _ in filter(None, fits)]
        if not near:
            return None
        distance = min(abs(2 * cost - gap) for cost in near)
        equal = [
            x
            for cost in near
            if abs(2 * cost - gap) == distance
            for x in pool[bisect_left(pool, (cost,)) : bisect_left(pool, (cost + 1,))]
            if self._lengths[x[2]] <= room
        ]
        return min(equal, key=itemgetter(1))
