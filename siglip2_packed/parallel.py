"""Recipes for training on several devices, outside the model.

DDP, DeepSpeed, Trainer and PEFT take the model as it is and need nothing from here.

Shapes: T patches of a rank, N images of a rank, H heads.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from siglip2_packed.batch_sampler import whole
from siglip2_packed.modeling import Siglip2PackedVisionModel

TENSOR_PARALLEL = {
    "self_attn.q_proj": ColwiseParallel(),
    "self_attn.k_proj": ColwiseParallel(),
    "self_attn.v_proj": ColwiseParallel(),
    "self_attn.out_proj": RowwiseParallel(),
    "mlp.fc1": ColwiseParallel(),
    "mlp.fc2": RowwiseParallel(),
}


def encoder_layers(model: torch.nn.Module) -> torch.nn.ModuleList:
    layers = getattr(getattr(model, "encoder", None), "layers", None)
    if not isinstance(layers, torch.nn.ModuleList):
        name = type(model).__name__
        raise ValueError(f"{name} has no encoder.layers: give the packed model (vlm.vision_tower.vision_tower)")
    return layers


def apply_fsdp(
    model: Siglip2PackedVisionModel,
    mesh: DeviceMesh | None = None,
    *,
    param_dtype: torch.dtype | None = torch.bfloat16,
    reduce_dtype: torch.dtype | None = torch.float32,
    reshard_after_forward: bool = True,
    layers_per_unit: int = 1,
) -> Siglip2PackedVisionModel:
    """Shards a model over ranks in place (FSDP2): a unit for every encoder layer, or few, and one for all the rest.

    Frozen parameters, a tower whose last layers alone are trained, `gradient_checkpointing_enable()`, two calls a
    step, and ranks with an empty pack all work; every rank has to call the model equally often. Make the optimizer
    after this. In a larger model, call it on the tower first, then `fully_shard` the model.

    Args:
        mesh: the ranks to shard over; all, when left out. Two dimensions: replicated over the first (HSDP).
        param_dtype: dtype to compute in; None: the parameters' own.
        reduce_dtype: dtype to reduce gradients in; likewise.
        reshard_after_forward: frees a layer's parameters until backward; False keeps them, for speed. CUDA graphs run
            with neither: each step gathers them at another address (five steps, five addresses, torch 2.11).
        layers_per_unit: encoder layers that are gathered and reduced together, the last unit of what is left. More are
            fewer and larger transfers, and less work for the host; so many layers are whole at once, twice over.

    Returns:
        `model`, its parameters now DTensors of their own dtype (float32 to train in mixed precision).

    Raises:
        ValueError: a model without encoder layers of its own, a dtype that is none for gradients, less than a layer.
    """
    layers, size = encoder_layers(model), whole("layers_per_unit", layers_per_unit)
    for name, dtype in {"param_dtype": param_dtype, "reduce_dtype": reduce_dtype}.items():
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"{name} must be a floating torch.dtype or None, got {dtype!r}")
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype)
    shard: Any = partial(fully_shard, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    for first in range(0, len(layers), size):
        shard(list(layers[first : first + size]))
    shard(model)
    return model


def apply_tensor_parallel(model: Siglip2PackedVisionModel, mesh: DeviceMesh) -> Siglip2PackedVisionModel:
    """Splits heads and MLP width of every encoder layer over a one-dimensional mesh, in place.

    All ranks of the mesh take the same pack and return the same features; norms, embeddings and the pooling head stay
    whole on each. Before `apply_fsdp` over another dimension of the mesh, where both are used.

    Raises:
        ValueError: heads or MLP width that the mesh does not divide; a mesh of more dimensions.
    """
    layers = encoder_layers(model)
    if mesh.ndim != 1:
        raise ValueError(f"tensor parallelism takes a mesh of one dimension, got {mesh.ndim}: give one of them")
    config, size = model.config, mesh.size()
    for name, value in {"heads": config.num_attention_heads, "intermediate_size": config.intermediate_size}.items():
        if value % size:
            raise ValueError(f"{value} {name} cannot be split over {size} ranks")
    for layer in layers:
        parallelize_module(layer, mesh, TENSOR_PARALLEL)
    return model


def mean_over_ranks(total: Tensor, count: int, group: dist.ProcessGroup | None = None) -> Tensor:
    """A loss for ranks that hold unequal numbers of patches or images.

    DDP, FSDP and ZeRO average gradients over ranks. Averages of a rank's own mean would weigh a patch of a short pack
    more; gradients of this value, averaged, are those of the mean over the terms of all ranks.

    Args:
        total: `[]`, the sum of this rank's loss terms; 0 of an empty pack, still attached to its graph.
        count: how many terms that is.
        group: the ranks that gradients are averaged over; all, when left out.

    Returns:
        `[]` total · ranks / (count of all ranks). Averaged over ranks, it is the loss to log. Without a process group
        it is total / count.

    Raises:
        ValueError: `total` is no scalar, `count` no number of terms.
    """
    if total.ndim or not total.is_floating_point():
        raise ValueError(
            f"total must be the sum of the terms, a floating scalar, got {total.dtype} {list(total.shape)}"
        )
    count = whole("count", count, 0)
    if not dist.is_initialized():
        return total / max(count, 1)
    counts = torch.full((), count, dtype=torch.int64, device=total.device)  # no copy to the device, which would wait
    dist.all_reduce(counts, group=group)
    return total * (dist.get_world_size(group) / counts.clamp(min=1))


__all__ = ["apply_fsdp", "apply_tensor_parallel", "mean_over_ranks"]
