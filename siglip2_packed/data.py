"""Training batches by patch budget: every batch is a pack of about as many patches as fit, whatever its images' sizes.

    grids = image_grids(files, processor)                                # [N, 3], from the files' headers
    sampler = PatchBudgetBatchSampler(grids, budget=16384, seed=0)       # rank and world size of torch.distributed
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, num_workers=8, pin_memory=True)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for packed in loader:                                            # dataset[i] is processor(files[i])
            output = model(**packed.to("cuda", non_blocking=True))

N images (rows of grid_thw), T patches of a pack, P patch_dim, D hidden size, F MLP width.
"""

from __future__ import annotations

import warnings
import zlib
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Sampler, default_collate

from siglip2_packed.images import Source, source_name, upright_size
from siglip2_packed.packing import KEYS, Grid, PackedPatches, check_patches, make_layout
from siglip2_packed.preprocess import Siglip2PackedImageProcessor

SO400M_COST = (2 * 1152 + 4304, 1)
IMAGES_PER_JOB = 64


def image_grid(source: Source, processor: Siglip2PackedImageProcessor) -> Grid:
    """The (t, h, w) that `processor` gives one image (path, bytes, ...), from its header: nothing is decoded.

    JPEG, PNG, WebP, GIF and BMP; files of other formats are decoded, as their size may change as they load. EXIF
    orientation counts as in the processor. Pixels are not read, so a file with damaged ones still has a grid.
    """
    return (1, *processor.grid(*upright_size(source)))


def image_grids(
    sources: Sequence[Source],
    processor: Siglip2PackedImageProcessor,
    *,
    on_error: str = "raise",
    num_threads: int = 16,
) -> Tensor:
    """`image_grid` of many images, by threads.

    Args:
        on_error: `"raise"`, or `"skip"`: the row of an image that cannot be used is (0, 0, 0), with one warning.

    Returns:
        `grid_thw [N, 3]` int64, on the host.

    Raises:
        ValueError: naming the image's index, and its file where there is one, and the reason.
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error must be 'raise' or 'skip', got {on_error!r}")
    skipped: dict[int, str] = {}

    def read(start: int) -> list[Grid]:
        grids: list[Grid] = []
        for i in range(start, min(start + IMAGES_PER_JOB, len(sources))):
            try:
                grids.append(image_grid(sources[i], processor))
            except ValueError as error:
                reason = f"image {i} ({source_name(sources[i])!r}): {error}"
                if on_error == "raise":
                    raise ValueError(reason) from error
                skipped[i] = reason
                grids.append((0, 0, 0))
        return grids

    with ThreadPoolExecutor(num_threads) as pool:
        jobs = [pool.submit(read, start) for start in range(0, len(sources), IMAGES_PER_JOB)]
        try:
            grids = [grid for job in jobs for grid in job.result()]
        finally:
            pool.shutdown(cancel_futures=True)
    if skipped:
        warnings.warn(f"{len(skipped)} of {len(sources)} images have no grid; the first is {skipped[min(skipped)]}")
    return torch.tensor(grids, dtype=torch.int64, device="cpu").reshape(-1, 3)


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
    """
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


class PatchBudgetBatchSampler(Sampler[list[int]]):
    """Batches of indices for `DataLoader(batch_sampler=...)`: packs of at most `budget` patches, as full as they get.

    Every rank has the same number of batches. The images of step k cost about the same on every rank, by the cost
    a·n + b·n² of an image of n patches. An epoch's batches follow from (seed, epoch) and the arguments alone.

    All images are in exactly one batch of one rank. Only if there are fewer images than batches on all ranks together
    (images near the budget, or fewer than ranks) some are repeated, or left out with `drop_last`: less than one a rank,
    so never more than with `DistributedSampler`. Otherwise the batches of one step are smaller, to come out even.

    Resuming: `state_dict()` holds the batches handed out. A DataLoader with workers asks for batches ahead of those it
    has delivered, so give the number of batches trained on in this epoch: `sampler.state_dict(batch=step)`. torchdata's
    `StatefulDataLoader` keeps the state of the batch it delivered and needs no such thing. After `load_state_dict`, the
    next iteration goes on behind that batch, `set_epoch` of the same epoch included; the state is the same on every
    rank, and the other arguments must be as they were. A state at the end of an epoch leaves nothing of that epoch.

    Args:
        lengths: `[N]` patches of each image, or `grid_thw [N, 3]`: then the frames of a video count as segments.
        budget: patches of a batch at most.
        max_images: images of a batch at most.
        num_replicas, rank: those of `torch.distributed` where it runs, else 1 and 0.
        shuffle: off: packs follow the order of the data set, as far as filling them well and even cost allow.
        seed: of the shuffle; the same on every rank.
        drop_last: see above.
        cost: (a, b). FLOPs of a layer are n·(8D² + 4DF) + n²·4D, in proportion (2D + F, 1): the default is so400m's.
        window: how many images ahead may fill a gap, see `fill_packs`.

    Attributes:
        utilisation: patches of this epoch's batches, all ranks, over what their budgets hold.

    Raises:
        ValueError: an image larger than the budget, or without patches; a state of other arguments.
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
        running = dist.is_available() and dist.is_initialized()
        self.num_replicas = (dist.get_world_size() if running else 1) if num_replicas is None else num_replicas
        self.rank = (dist.get_rank() if running else 0) if rank is None else rank
        self.budget, self.max_images, self.window = budget, max_images, window
        self.shuffle, self.seed, self.drop_last = shuffle, seed, drop_last
        if not 0 <= self.rank < self.num_replicas:
            raise ValueError(f"rank must be within 0..{self.num_replicas - 1}, got {self.rank}")
        for name, value in {"budget": budget, "max_images": max_images, "window": window}.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if min(cost) < 0 or max(cost) <= 0:
            raise ValueError(f"cost must be two numbers (a, b) of a·n + b·n², not negative nor both 0, got {cost}")

        sizes = np.asarray(lengths)
        sizes = sizes.reshape(0).astype(np.int64) if sizes.size == 0 else sizes
        if sizes.dtype.kind not in "iu" or not (sizes.ndim == 1 or (sizes.ndim == 2 and sizes.shape[1] == 3)):
            raise ValueError(f"lengths must be integers [N] or [N, 3], got {sizes.dtype} {list(sizes.shape)}")
        sizes = sizes.astype(np.int64)  # products of h and w do not fit 8 or 16 bits
        frames, frame = (sizes[:, 0], sizes[:, 1] * sizes[:, 2]) if sizes.ndim == 2 else (np.ones_like(sizes), sizes)
        patches = frames * frame
        for i in np.flatnonzero((patches < 1) | (frames < 1))[:1]:
            raise ValueError(f"image {i} has {patches[i]} patches: leave it out")
        for i in np.flatnonzero(patches > budget)[:1]:
            raise ValueError(f"image {i} has {patches[i]} patches, the budget of a batch is {budget}")
        self._lengths: list[int] = patches.tolist()
        self._costs: list[float] = (cost[0] * patches + cost[1] * frames * frame.astype(np.float64) ** 2).tolist()
        self._settings = {
            "images": len(patches),
            "lengths_crc32": zlib.crc32(sizes.astype("<i8").tobytes()),
            "num_replicas": self.num_replicas,
            "budget": budget,
            "max_images": max_images,
            "shuffle": shuffle,
            "seed": seed,
            "drop_last": drop_last,
            "cost": tuple(cost),
            "window": window,
        }
        self.epoch = 0
        self._batch = self._start = 0  # batches handed out in this epoch; where the next iteration begins
        self._planned: tuple[int, list[list[int]], float] | None = None

    def __iter__(self) -> Iterator[list[int]]:
        batches = self._plan()[0]
        start, self._start = self._start, 0
        for batch in range(start, len(batches)):
            self._batch = batch + 1
            yield list(batches[batch])

    def __len__(self) -> int:
        """Batches of the whole epoch, on each rank. Another epoch's may be one or a few more or less."""
        return len(self._plan()[0])

    @property
    def utilisation(self) -> float:
        return self._plan()[1]

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch, self._batch, self._start = epoch, 0, 0

    def state_dict(self, batch: int | None = None) -> dict[str, Any]:
        """The state after `batch` batches of this epoch; after those handed out, when left out."""
        batch = self._batch if batch is None else batch
        if not 0 <= batch <= len(self):
            raise ValueError(f"batch is {batch}, epoch {self.epoch} has {len(self)} batches")
        return {"epoch": self.epoch, "batch": batch, "batches": len(self), **self._settings}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, ours in self._settings.items():
            theirs = state.get(name)
            theirs = tuple(theirs) if isinstance(theirs, list) else theirs
            if theirs != ours:
                raise ValueError(f"the state is of a sampler with {name} {theirs}, this one has {ours}")
        if state["batch"] == state["batches"] and self.epoch > state["epoch"]:
            return  # StatefulDataLoader loads late: what is over does not undo set_epoch
        self.epoch, self._batch, self._start = state["epoch"], state["batch"], state["batch"]

    def _plan(self) -> tuple[list[list[int]], float]:
        """This rank's batches of the epoch, and the utilisation over all ranks."""
        if self._planned is None or self._planned[0] != self.epoch:
            steps = self._steps()
            filled = sum(self._lengths[i] for step in steps for pack in step for i in pack)
            held = self.budget * self.num_replicas * len(steps)
            self._planned = self.epoch, [step[self.rank] for step in steps], filled / held if held else 1.0
        return self._planned[1:]

    def _steps(self) -> list[list[list[int]]]:
        """The epoch: for each step, a pack for each rank."""
        ranks, count = self.num_replicas, len(self._lengths)
        rng = np.random.default_rng([self.seed, self.epoch])
        order = (rng.permutation(count) if self.shuffle else np.arange(count)).tolist()
        lengths = [self._lengths[i] for i in order]
        fill = fill_packs(lengths, self.budget, max_images=self.max_images, window=self.window)
        packs = [[order[place] for place in pack] for pack in fill]
        wanted = -(-len(packs) // ranks) * ranks
        if wanted > count and self.drop_last:
            wanted = len(packs) // ranks * ranks
            packs = sorted(packs, key=len, reverse=True)[:wanted]  # what goes are packs of one image
        elif wanted > count:
            packs += [[int(i)] for i in np.resize(order, wanted - count)]

        if not packs:
            return []

        # Packs of like cost make a step. The cheapest, too few for a step or not full, are spread over two.
        packs.sort(key=self._cost)
        missing, few = wanted - len(packs), min(len(packs) % ranks + ranks, len(packs))
        while sum(map(len, packs[:few])) < few + missing:
            few += ranks
        packs = sorted(self._spread(packs[:few], missing) + packs[few:], key=self._cost)
        steps = [packs[i : i + ranks] for i in range(0, len(packs), ranks)]
        if not self.shuffle:
            return sorted(steps, key=lambda step: min(map(min, step)))
        return [[steps[k][r] for r in rng.permutation(ranks)] for k in rng.permutation(len(steps))]

    def _cost(self, pack: list[int]) -> float:
        return sum(self._costs[i] for i in pack)

    def _spread(self, packs: list[list[int]], missing: int) -> list[list[int]]:
        """Adds `missing` packs and evens the cost: from the costliest to the cheapest an image moves while it helps.

        None stays empty: an empty one is the cheapest, and then some pack has two images to give one from.
        """
        packs = [list(pack) for pack in packs] + [[] for _ in range(missing)]
        counts, costs = np.array([len(pack) for pack in packs]), np.array([self._cost(pack) for pack in packs])
        while True:
            high, low = int(np.where(counts > 1, costs, -1).argmax()), int(costs.argmin())
            gap = costs[high] - costs[low]
            room = self.budget - sum(self._lengths[i] for i in packs[low])
            movable = [i for i in packs[high] if self._costs[i] < gap and self._lengths[i] <= room]
            if not movable or counts[low] == self.max_images:
                return packs
            image = min(movable, key=lambda i: abs(self._costs[i] - gap / 2))
            packs[high].remove(image)
            packs[low].append(image)
            counts[[high, low]] += (-1, 1)
            costs[[high, low]] += (-self._costs[image], self._costs[image])


def collate(items: Sequence[Any], temporal: str = "frames") -> PackedPatches:
    """Items of a data set, an image each -> one pack: `DataLoader(collate_fn=collate)`.

    Args:
        items: each `(pixel_values [h·w, P], grid)`, with grid (t, h, w) or rows of it; or a mapping with `pixel_values`
            and `grid_thw`, such as what the processor returns for one image. A mapping's other fields become keys of
            the pack, collated as DataLoader does (`default_collate`: equal shapes are stacked), a value for each item.
        temporal: `"frames"` or `"joint"`, see `PackedPatches`; joint: `functools.partial(collate, temporal="joint")`.

    Returns:
        `PackedPatches`, equal to what the processor gives for all images at once. `kept` lists the item of each row.

    Raises:
        ValueError: naming the item, and what does not fit.
    """
    if not items:
        raise ValueError("an empty list has no patch_dim: an empty pack is PackedPatches(torch.zeros(0, P), [])")
    rows: list[Tensor] = []
    grids: list[Grid] = []
    fields: list[dict[str, Any]] = []
    kept: list[int] = []
    for i, item in enumerate(items):
        try:
            named = item if isinstance(item, Mapping) else dict(zip(("pixel_values", "grid_thw"), item, strict=True))
            if not {"pixel_values", "grid_thw"} <= named.keys():
                raise ValueError(f"pixel_values and grid_thw are needed, got {list(named)}")
            pixel_values, grid = named["pixel_values"], np.asarray(named["grid_thw"])
            check_patches(pixel_values, rows[0].shape[1] if rows else None)
            layout = make_layout(
                grid[None] if grid.shape == (3,) else grid, total_patches=pixel_values.shape[0], temporal=temporal
            )
            if "cu_seqlens" in named and np.diff(named["cu_seqlens"]).tolist() != layout.lengths:
                raise ValueError(f"its cu_seqlens are not those of temporal={temporal!r}")
            fields.append({name: value for name, value in named.items() if name not in KEYS})
            if fields[i].keys() != fields[0].keys():
                raise ValueError(f"its fields are {list(fields[i])}, those of item 0 {list(fields[0])}")
        except (TypeError, ValueError) as error:
            raise ValueError(f"item {i}: {error}") from error
        rows.append(pixel_values)
        grids += layout.grids
        kept += [i] * len(layout.grids)
    packed = PackedPatches(torch.cat(rows), grids, temporal)
    packed.update(default_collate(fields))
    packed.kept = kept
    return packed
