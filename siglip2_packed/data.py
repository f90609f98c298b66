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
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from siglip2_packed.batch_sampler import SO400M_COST, PatchBudgetBatchSampler, fill_packs, whole
from siglip2_packed.images import Source, source_name, upright_size
from siglip2_packed.packing import KEYS, Grid, PackedPatches, check_patches, make_layout
from siglip2_packed.preprocess import Siglip2PackedImageProcessor

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
        ValueError: naming the image's index, and its file where there is one, and the reason; one image, not a list.
    """
    if isinstance(sources, str | bytes | PathLike):
        raise ValueError(f"sources must be a list of images, got one: {source_name(sources)!r}")
    whole("num_threads", num_threads)
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


__all__ = ["SO400M_COST", "PatchBudgetBatchSampler", "collate", "fill_packs", "image_grid", "image_grids"]
