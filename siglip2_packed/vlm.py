"""The packed tower in the place of transformers' own, inside any model, and back.

    replace_vision_tower(model)     # LFM2-VL, Siglip2Model, PaliGemma, Gemma 3, Idefics2 and 3, SmolVLM, ...
    restore_vision_tower(model)

The model around it stays as it is, and calls the tower as ever.
"""

from __future__ import annotations

from torch import nn
from transformers.models.siglip2 import modeling_siglip2

from siglip2_packed.handover import check_whole
from siglip2_packed.image_towers import IMAGE_TOWERS
from siglip2_packed.modeling import Siglip2PackedVisionModel
from siglip2_packed.towers import PackedTower, Siglip2PackedVisionTower

_SIGLIP2 = getattr(modeling_siglip2, "Siglip2VisionTransformer", modeling_siglip2.Siglip2VisionModel)  # 4.57: inside
TOWERS: dict[type[nn.Module], type[PackedTower]] = {_SIGLIP2: Siglip2PackedVisionTower, **IMAGE_TOWERS}
"""What stands in the place of which class of transformers."""


def replace_vision_tower(model: nn.Module, *, cuda_graphs: bool = False) -> dict[str, PackedTower]:
    """Puts the packed tower in the place of transformers' in a model: of SigLIP2 NaFlex, of SigLIP at a fixed size (in
    PaliGemma, Gemma 3, LLaVA-OneVision), of Idefics2 and 3, of SmolVLM. Of every one, if there are several.

    Parameters are moved, not copied: the same objects under the same names, in the same order, with the same dtype,
    device and `requires_grad`, so that optimisers, adapters, quantised weights, device maps and files go on as before.
    Where attention is transformers' default, `"sdpa"`, it now runs on what is fastest here; `set_attn_implementation`,
    the model's or the tower's, has it run on another backend.

    Hooks on the tower stay; so do those on linear layers and norms, which see packed rows. Shard it (FSDP, tensor
    parallel, ZeRO-3's engine) and compile it later.

    Args:
        cuda_graphs: have packs run in CUDA graphs; see `Siglip2PackedVisionModel.cuda_graphs_enable`.

    Returns:
        The new towers by their names in the model; `""` where the model is a tower itself: use what is returned.

    Raises:
        ValueError: no such tower, or one that cannot be carried over, by name. Nothing has changed then.

    Examples:
        >>> from transformers import AutoModel
        >>> from siglip2_packed import replace_vision_tower
        >>> model = AutoModel.from_pretrained("google/siglip2-so400m-patch16-naflex")
        >>> for name, tower in replace_vision_tower(model).items():
        ...     print(type(tower).__name__)
        Siglip2PackedVisionTower
    """
    found = {name: module for name, module in model.named_modules() if type(module) in TOWERS}
    if not found:
        raise ValueError(_what_else(model))
    towers = {}
    for name, original in found.items():
        check_whole(model, original, name)
        _check_wrapper(model, original, name)
        towers[name] = TOWERS[type(original)].of(original, name)
    for name, tower in towers.items():
        tower.take_place()
        _put(model, found[name], tower)
        if cuda_graphs:
            tower.cuda_graphs_enable()
    return towers


def restore_vision_tower(model: nn.Module) -> dict[str, nn.Module]:
    """Puts the modules back that `replace_vision_tower` has replaced, with the weights of now.

    Returns:
        Them, by their names in the model.

    Raises:
        ValueError: no replaced tower; weights that have been sharded, or modules that have been wrapped, since. Nothing
            has changed then.

    Examples:
        >>> from transformers import AutoModel
        >>> from siglip2_packed import replace_vision_tower, restore_vision_tower
        >>> model = AutoModel.from_pretrained("google/siglip2-so400m-patch16-naflex")
        >>> before = list(model.modules())
        >>> towers, originals = replace_vision_tower(model), restore_vision_tower(model)
        >>> list(model.modules()) == before
        True
    """
    found = {name: m for name, m in model.named_modules() if isinstance(m, PackedTower) and m.original}
    if not found:
        raise ValueError(f"no tower of this {type(model).__name__} was replaced")
    for name, tower in found.items():
        check_whole(model, tower, name)
        _check_wrapper(model, tower, name)
    originals = {name: tower.give_back(name) for name, tower in found.items()}
    for name, tower in found.items():
        tower.leave_place()
        _put(model, tower, originals[name])
    return originals


def _put(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Wherever the old one is."""
    before, after = (set(getattr(tower, "_no_split_modules", None) or ()) for tower in (old, new))
    for module in list(model.modules()):
        places = [key for key, child in module._modules.items() if child is old]
        module._modules.update(dict.fromkeys(places, new))
        names = vars(module).get("_no_split_modules")  # those of all that is inside, in transformers 5
        if isinstance(names, set) and names >= before:
            names |= after


def _check_wrapper(model: nn.Module, tower: nn.Module, name: str) -> None:
    if any(module._modules.get("_orig_mod") is tower for module in model.modules()):
        raise ValueError(f"{name} is compiled by itself, and what was compiled would run on: compile it later")


def _what_else(model: nn.Module) -> str:
    """Why there is nothing to replace."""
    if packed := [name or "the model" for name, m in model.named_modules() if isinstance(m, Siglip2PackedVisionModel)]:
        return f"{', '.join(packed)} is packed already"
    *most, last = (kind.__name__ for kind in TOWERS)
    wanted = f"{', '.join(most)} or {last}"
    vision = {
        name: type(m).__name__
        for name, m in model.named_modules()
        if "vision" in type(m).__name__.lower() or isinstance(m, tuple(TOWERS))
    }
    seen = [
        f"{name or 'it'} is a {kind}"
        for name, kind in vision.items()
        if not any(name != other and name.startswith(other and f"{other}.") for other in vision)
    ]
    others = f"but {', '.join(seen)}" if seen else "nor any other module that is called vision"
    return f"{type(model).__name__} has no {wanted} of transformers, {others}"
