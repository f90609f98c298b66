"""The encoder as an actor of Ray Data's `map_batches`, for collections that a cluster reads and writes.

    ds = ray.data.read_binary_files("s3://bucket/photos/", include_paths=True)  # columns: bytes, path
    ds = ds.map_batches(
        Siglip2PackedEncoder,
        fn_constructor_kwargs={"ckpt": "google/siglip2-so400m-patch16-naflex", "dtype": "bfloat16", "workers": 12},
        batch_size=1024,
        compute=ray.data.ActorPoolStrategy(size=8),
        num_gpus=1,
        num_cpus=12,
    )
    ds.write_parquet("s3://bucket/features/")

Ray does what the command line does with shards, ranks and `--resume`; decoding, packing and the model are the same.
N rows of a batch, D hidden size.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch

from siglip2_packed.collection.decode import decoding_pool
from siglip2_packed.collection.features import encode
from siglip2_packed.collection.parquet import entry_of
from siglip2_packed.collection.sources import Input
from siglip2_packed.flags import DTYPES, pick_device
from siglip2_packed.graphs import replayed
from siglip2_packed.modeling import Siglip2PackedVisionModel
from siglip2_packed.preprocess import Siglip2PackedImageProcessor

NO_ZEROS_AT_END = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8")
"""How JPEG, PNG and GIF files begin."""


class Siglip2PackedEncoder:
    """A batch with a column of images -> the same rows with their features in place of it.

    Args:
        ckpt: a folder that every node has, or a hub id.
        column: of bytes, paths, {bytes, path}, or pixels, as `ray.data.read_images` gives them.
        pooled: add the pooling head's vector.
        patches: add the features of all patches.
        device: CUDA if the actor has one (`num_gpus=1`), else the CPU.
        dtype: to compute; features come as float32.
        max_num_patches: patches an image; as the checkpoint says when left out.
        patch_budget: patches a pack.
        workers: of this actor, that decode; one a core of the node when left out.
        decode: how JPEG files become pixels, "exact", "scaled" or "gpu", see `Siglip2PackedImageProcessor`.
        decode_in: "threads" or "processes"; processes beside a GPU when left out.
    """

    def __init__(
        self,
        ckpt: str | os.PathLike,
        *,
        column: str = "bytes",
        pooled: bool = True,
        patches: bool = False,
        device: str | None = None,
        dtype: str = "float32",
        max_num_patches: int | None = None,
        patch_budget: int = 16384,
        workers: int | None = None,
        decode: str = "exact",
        decode_in: str | None = None,
        attn_implementation: str = "auto",
    ):
        if not (pooled or patches):
            raise ValueError("pooled=False, patches=False: nothing to add")
        limit = {} if max_num_patches is None else {"max_num_patches": max_num_patches}
        self.processor = Siglip2PackedImageProcessor.from_pretrained(ckpt, decode=decode, **limit)
        if patch_budget < self.processor.max_num_patches:
            raise ValueError(
                f"patch_budget {patch_budget} is less than the {self.processor.max_num_patches} of an image"
            )
        head: Any = {} if pooled else {"vision_use_head": False}
        model: Any = Siglip2PackedVisionModel.from_pretrained(
            ckpt, dtype=DTYPES[dtype], attn_implementation=attn_implementation, **head
        )
        if pooled and not hasattr(model, "head"):
            raise ValueError(f"pooled=True: {str(ckpt)!r} has no pooling head")
        self.model = replayed(model.to(pick_device(device)).eval(), patch_budget)
        self.card = self.processor.on_card(self.model.device)
        self.width = model.config.hidden_size
        self.column, self.pooled, self.patches, self.patch_budget = column, pooled, patches, patch_budget
        self.pool = decoding_pool(self.model.device, self.processor, workers, decode_in, patch_budget)
        if self.card is not None:
            self.pool.shelf.lock_pages(self.card.device)
        self.workers = workers

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """Adds grid_thw `[N, 3]`, pooled `[N, D]`, patches (N of `[h·w, D]`) and error `[N]`, "" where all is well.

        A row that failed has a grid of zeros, a pooled vector of NaN and no patches. Raises ValueError for a batch of
        another format than NumPy's or pandas', or that has columns of these names itself.
        """
        if not hasattr(batch, "items"):
            raise ValueError(f"a batch of {type(batch)}: call map_batches with batch_format='numpy'")
        if self.column not in batch:
            raise ValueError(f"no column {self.column!r} in the batch; it has {', '.join(batch)}")
        added = ["grid_thw", *["pooled"] * self.pooled, *["patches"] * self.patches, "error"]
        if lost := [name for name in added if name in batch and name != self.column]:
            raise ValueError(f"the batch has columns that are called as those added: {', '.join(lost)}: rename them")
        inputs = [Input(i, "", entry_of(value)) for i, value in enumerate(cells(batch[self.column]))]
        found = encode(
            self.model,
            self.processor,
            inputs,
            self.pool,
            pooled=self.pooled,
            patches=self.patches,
            patch_budget=self.patch_budget,
            workers=self.workers,
            card=self.card,
        )
        rows = sorted(found, key=lambda row: row.ordinal)
        result: dict[str, Any] = {name: values for name, values in batch.items() if name != self.column}
        result["grid_thw"] = np.array([(0, 0, 0) if row.error else (1, *row.grid) for row in rows]).reshape(-1, 3)
        width = self.width
        if self.pooled:
            nothing = torch.full((width,), torch.nan)
            vectors = [nothing if row.pooled is None else row.pooled.float() for row in rows]
            result["pooled"] = torch.stack(vectors).numpy() if vectors else np.zeros((0, width), np.float32)
        if self.patches:
            ragged = np.empty(len(rows), dtype=object)
            for i, row in enumerate(rows):
                ragged[i] = np.zeros((0, width), np.float32) if row.patches is None else row.patches.float().numpy()
            result["patches"] = ragged
        result["error"] = np.array([row.error for row in rows], dtype=object)
        return result


def cells(column: Any) -> list[Any]:
    """What each row holds. Ray stacks arrays of one shape: images of one size come as `[N, h, w, c]`.

    NumPy takes zeros at the end of bytes for padding; they are put back, up to the longest of the batch. Not behind
    files that end in something else: one cut short would be read as if it were whole.
    """
    if getattr(column, "ndim", 1) > 1:
        return list(column)
    values = column.tolist()
    if getattr(column.dtype, "kind", "") == "S":
        values = [v if v.startswith(NO_ZEROS_AT_END) else v.ljust(column.dtype.itemsize, b"\0") for v in values]
    return values
