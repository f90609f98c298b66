"""The vision tower and image processor that LLaVA-style training builds and calls, on the packed encoder.

Every form in which a caller holds images becomes one pack, goes through the model, and comes back in the caller's form.
Shapes: B, N images (rows of grid_thw), T patches of all images, P patch_dim, D hidden size.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Siglip2VisionConfig
from transformers.feature_extraction_utils import BatchFeature

from siglip2_packed import invariance, weights
from siglip2_packed.configuration import layer_index, patch_dim, read_config
from siglip2_packed.files import find_file
from siglip2_packed.graphs import Graphs
from siglip2_packed.kinds import position_mode
from siglip2_packed.llava_inputs import ImagePack, pack_images
from siglip2_packed.modeling import Siglip2PackedVisionModel
from siglip2_packed.ops.positions import ANTIALIASED
from siglip2_packed.ops.runtime.transfer import to_device
from siglip2_packed.packing import pad
from siglip2_packed.preprocess import Siglip2PackedImageProcessor
from siglip2_packed.processor_files import CONFIG_FILES
from siglip2_packed.quantized import FLOATING

logger = logging.getLogger("siglip2_packed")


class SigLip2NaflexImageProcessor(Siglip2PackedImageProcessor):
    """Calling it packs, as `Siglip2PackedImageProcessor` does; `preprocess` pads, as LLaVA's data code expects.

    Raises:
        ValueError: as `Siglip2PackedImageProcessor`.

    Examples:
        >>> import numpy as np
        >>> from siglip2_packed import SigLip2NaflexImageProcessor
        >>> processor = SigLip2NaflexImageProcessor(patch_size=16, max_num_patches=256)
        >>> batch = processor.preprocess(np.zeros((480, 640, 3), np.uint8))
        >>> batch["pixel_values"].shape, batch["spatial_shapes"].tolist()
        (torch.Size([1, 256, 768]), [[14, 18]])
    """

    def preprocess(self, images: Any = None, **settings: Any) -> BatchFeature:  # type: ignore[override]
        """Images -> a padded batch, as transformers' `Siglip2ImageProcessor` makes it.

        Args:
            settings: those of a call. `do_resize=False` keeps every patch of an image, also beyond `max_num_patches`.

        Returns:
            `pixel_values [B, N, P]`, zeros beyond an image's own patches, N the larger of `max_num_patches` and the
            longest image; `pixel_attention_mask [B, N]` and `spatial_shapes [B, 2]` (h, w).
        """
        packed = self(images, **settings)
        budget = settings.get("max_num_patches") or self.max_num_patches
        return pad(packed, max_num_patches=max(budget, packed["max_seqlen"]))


class SigLip2NaflexVisionTower(nn.Module):
    """SigLIP2 NaFlex as LLaVA's `build_vision_tower` makes it: `tower(images, grid_thw=grid_thw)`.

    Features are `hidden_states[mm_vision_select_layer]` (default -2), before post_layernorm; layers above are neither
    built nor loaded. `requires_grad`, train/eval mode, dtype and device are the caller's: the tower changes none.

    Args:
        vision_tower: checkpoint, a local folder or hub id.
        vision_tower_cfg: LLaVA's model arguments or config, or a mapping. Read are `mm_vision_select_layer`,
            `mm_vision_select_feature` (only `"patch"`), and, as a tower that is trained is never delayed,
            `unfreeze_mm_vision_tower` and `mm_tunable_parts`.
        delay_load: read the configuration only; weights come with `load_model()` or a state dict that holds them.
        cuda_graphs: have packs run in CUDA graphs, forward and backward, where that is possible; see
            `graphs.CUDAGraphs`. Also read from `vision_tower_cfg`, as `mm_vision_cuda_graphs`.
        batch_invariant: an image's features are the same to the bit whatever images it is encoded with, or a
            ValueError; see `Siglip2PackedVisionModel`. Also `mm_vision_batch_invariant`. Of a tower with weights it is
            `vision_tower.config.batch_invariant` that counts.

    Built inside a VLM's `from_pretrained`, delayed or not, the tower has its weights from the VLM's checkpoint; only
    those that are not in there begin as `vision_tower`'s.

    Raises:
        FileNotFoundError, ValueError: no usable checkpoint, a layer out of range, another `mm_vision_select_feature`.

    Examples:
        >>> import torch
        >>> from siglip2_packed import SigLip2NaflexVisionTower
        >>> tower = SigLip2NaflexVisionTower("google/siglip2-so400m-patch16-naflex", {"mm_vision_select_layer": -2})
        >>> features = tower([torch.zeros(1, 6, 768), torch.zeros(1, 20, 768)], grid_thw=[[1, 2, 3], [1, 4, 5]])
        >>> [x.shape == (1, n, tower.hidden_size) for x, n in zip(features, (6, 20))]
        [True, True]
    """

    def __init__(
        self,
        vision_tower: str | os.PathLike,
        vision_tower_cfg: Any = None,
        delay_load: bool = False,
        cuda_graphs: bool = False,
        batch_invariant: bool = False,
    ):
        super().__init__()
        if isinstance(vision_tower_cfg, Mapping):
            vision_tower_cfg = SimpleNamespace(**vision_tower_cfg)
        feature = getattr(vision_tower_cfg, "mm_vision_select_feature", None) or "patch"
        if feature != "patch":
            raise ValueError(
                f"mm_vision_select_feature {feature!r}: SigLIP2 has no CLS token, only 'patch' is possible"
            )
        select_layer = getattr(vision_tower_cfg, "mm_vision_select_layer", None)
        self.select_layer: int = -2 if select_layer is None else select_layer
        self.vision_tower_name = vision_tower
        self.config, source = read_config(vision_tower)
        if position_mode(self.config) != ANTIALIASED:
            raise ValueError(f"{source}: position_mode is {position_mode(self.config)}, this tower is NaFlex's")
        layer_index(self.select_layer, self.config.num_hidden_layers)
        self.image_processor = _read_processor(vision_tower, self.config)
        self.register_load_state_dict_pre_hook(_receive_weights)
        self._requires_grad: bool | None = None
        self.cuda_graphs = cuda_graphs or bool(getattr(vision_tower_cfg, "mm_vision_cuda_graphs", False))
        if batch_invariant or getattr(vision_tower_cfg, "mm_vision_batch_invariant", False):
            self.config.batch_invariant = True

        tunable_parts = getattr(vision_tower_cfg, "mm_tunable_parts", None) or ""
        trained = getattr(vision_tower_cfg, "unfreeze_mm_vision_tower", False) or "mm_vision_tower" in tunable_parts
        # Within `from_pretrained` of a VLM, weights of modules that do not exist yet would be dropped: never delayed.
        built_here = nn.LayerNorm(1).weight
        if built_here.is_meta:
            config = Siglip2VisionConfig.from_dict({**self.config.to_dict(), "select_layer": self.select_layer})
            self.vision_tower: nn.Module = _AwaitingWeights(config, vision_tower)
            self.vision_tower.graphs = Graphs() if self.cuda_graphs else None
        elif trained or not delay_load or hasattr(built_here, "ds_id"):  # the latter: DeepSpeed's zero.Init
            self.load_model()

    @property
    def is_loaded(self) -> bool:
        return "vision_tower" in self._modules

    def load_model(self, device_map: Any = None) -> None:
        """Reads the weights of `vision_tower`, unless the tower has weights already, from wherever they came."""
        if self.is_loaded:
            return
        ckpt, select_layer = self.vision_tower_name, self.select_layer
        model = Siglip2PackedVisionModel.from_pretrained(
            ckpt,
            select_layer=select_layer,
            device_map=device_map,
            cuda_graphs=self.cuda_graphs,
            batch_invariant=invariance.asked(self.config),
        )
        if self._requires_grad is not None:
            model.requires_grad_(self._requires_grad)
        self.vision_tower = model.train(self.training)

    def requires_grad_(self, requires_grad: bool = True) -> SigLip2NaflexVisionTower:
        self._requires_grad = requires_grad  # holds for weights yet to come as well
        return super().requires_grad_(requires_grad)

    @torch.compiler.disable(recursive=False)  # the model's parts are compiled, not the host work on metadata
    def forward(
        self, images: Any, grid_thw: Any = None, patch_positions: Any = None, return_spatial_dims: bool = False
    ) -> Any:
        """Encodes images and returns features in the form the images came in.

        | images | features |
        |---|---|
        | `[B, N, P]` patches, those of image i in its first t·h·w rows | `[B, N, D]`, zeros in the rows beyond |
        | list of `[N_i, P]` or `[k, N_i, P]` patches, likewise | list of `[N_i, D]` or `[k, N_i, D]` |
        | mapping: `pixel_values [B, N, P]`, `spatial_shapes [B, 2]`, `pixel_attention_mask` if any | `[B, N, D]` |
        | `[B, C, H, W]` raw images, which `image_processor` resizes to its budget | `[B, h·w, D]` |
        | `[T, P]` patches end to end; or a `PackedPatches` | `[T, D]` |

        Args:
            images: see above. Only rows that the grid names are computed.
            grid_thw: `[B, 3]` integers (t, h, w) in patches. Without it, images of patches have to be square and
                unpadded.
            patch_positions: `[1, T, 3]` integers, (t, h, w) of every patch, or a list of such entries: one an image
                (which may then have fewer than t·h·w patches: a sparse video), or each for as many whole images as it
                has rows for. A patch has the position of its (h, w) in its image's grid, and attends to the patches of
                the same t in its image; in its entry, where no two patches of that have the same (t, h, w), as those
                of a video packed into several images. None as an entry: all patches of one image, in order.
            return_spatial_dims: return `(features, h, w)`; h and w are integers, or lists if the images differ.

        Returns:
            Features in the weights' dtype. A batch without images gives `[0, N, D]` or `[0, D]`, attached to the graph;
            a list without images gives an empty list, so a rank that holds one calls with `torch.zeros(0, P)`.

        Raises:
            RuntimeError: no weights yet, or built on the meta device and never given any.
            ValueError: images, grid and positions that do not fit each other.
        """
        packed = isinstance(images, ImagePack)
        pack = images if packed else self.pack(images, grid_thw, patch_positions)
        features = self._encode(pack) if packed else pack.restore(self._encode(pack))
        if not return_spatial_dims:
            return features
        sizes = [(h, w) for _, h, w in pack.grids]
        h, w = sizes[0] if len(set(sizes)) == 1 else ([h for h, _ in sizes], [w for _, w in sizes])
        return features, h, w

    @torch.compiler.disable
    def pack(self, images: Any, grid_thw: Any = None, patch_positions: Any = None) -> ImagePack:
        """What `forward` takes, as the one pack that it makes of it; `tower(pack)` gives `[T, D]`."""
        if isinstance(images, Tensor) and images.ndim == 4:
            packed = self.image_processor(images)
            rows = packed["pixel_values"]
            rows = rows.reshape(len(images), len(rows) // max(len(images), 1), rows.shape[1])
            images = {"pixel_values": rows, "grid_thw": packed["grid_thw"]}
        return pack_images(images, grid_thw, patch_positions, patch_dim(self.config))

    @torch.compiler.disable(recursive=False)  # as the forward
    def _encode(self, pack: ImagePack) -> Tensor:
        """`[T, D]`, images end to end."""
        pixel_values, device = pack.pixel_values, self.device
        if device.type != "meta":
            pixel_values = pixel_values.to(device, non_blocking=True)
        elif not any(hasattr(module, "_hf_hook") for module in self.vision_tower.modules()):
            raise RuntimeError(
                f"vision tower {str(self.vision_tower_name)!r} was built on the meta device and no weights came: load "
                "a state dict with assign=True, or build it on another device"
            )  # with hooks, weights were offloaded by accelerate, and the hooks move inputs
        features = self.vision_tower(
            pixel_values, pack.grids, cu_seqlens=pack.cu_seqlens, position_ids=pack.position_ids, return_dict=True
        ).last_hidden_state
        if pack.order is None:
            return features
        return features[to_device(torch.argsort(pack.order), features.device)]

    def _parameter(self) -> nn.Parameter:
        if not self.is_loaded:
            raise RuntimeError(f"vision tower {str(self.vision_tower_name)!r} has no weights yet: call load_model()")
        return next(self.vision_tower.parameters())

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in: quantised weights are of another."""
        return next(p.dtype for p in (self._parameter(), *self.vision_tower.parameters()) if p.dtype in FLOATING)

    @property
    def device(self) -> torch.device:
        return self._parameter().device

    @property
    def dummy_feature(self) -> Tensor:
        """`[1, D]` zeros."""
        return torch.zeros(1, self.hidden_size, device=self.device, dtype=self.dtype)

    @property
    def hidden_size(self) -> int:
        return int(self.config.hidden_size)

    @property
    def num_patches(self) -> int:
        """The most patches `image_processor` resizes an image to. Images have h·w each: see `resized_grid`."""
        return self.image_processor.max_num_patches

    @property
    def num_patches_per_side(self) -> int:
        """Of a square image that fills the budget.

        Raises:
            ValueError: the budget is no square, so no image has that many patches on both sides.
        """
        side = math.isqrt(self.num_patches)
        if side * side != self.num_patches:
            raise ValueError(
                f"the budget of {self.num_patches} patches is not a square, so there is no number of patches per side; "
                "images have their own h and w: take them from grid_thw"
            )
        return side

    @property
    def image_size(self) -> int:
        """Pixels a side of a square image that fills the budget; ValueError as for `num_patches_per_side`."""
        return self.num_patches_per_side * self.image_processor.patch_size


def encode_images(
    tower: SigLip2NaflexVisionTower,
    projector: nn.Module,
    images: Any,
    grid_thw: Any = None,
    patch_positions: Any = None,
) -> list[Tensor]:
    """Images of any sizes, packed once, through tower and projector: a list of `[h·w, D_llm]`, one an image.

    Args:
        tower: a tower of this package.
        projector: maps every row for itself, `[T, D]` -> `[T, D_llm]`.
        images: in any form that the tower takes; padding is left out here.
        grid_thw: as the tower takes it.
        patch_positions: likewise.

    A rank without images gets an empty list, which gives nothing a gradient, and ranks that train together then wait
    for each other. It adds `0 * projector(tower(torch.zeros(0, P), [])).sum()` to its loss.

    Raises:
        ValueError: what the tower raises; a projector that changes the number of rows.

    Examples:
        >>> import torch
        >>> from siglip2_packed import SigLip2NaflexVisionTower, encode_images
        >>> tower = SigLip2NaflexVisionTower("google/siglip2-so400m-patch16-naflex")
        >>> projector = torch.nn.Linear(tower.hidden_size, 32)
        >>> images = [torch.zeros(1, 6, 768), torch.zeros(1, 20, 768)]
        >>> [x.shape for x in encode_images(tower, projector, images, [[1, 2, 3], [1, 4, 5]])]
        [torch.Size([6, 32]), torch.Size([20, 32])]
    """
    pack = tower.pack(images, grid_thw, patch_positions)
    features = projector(tower(pack))
    if len(features) != len(pack.pixel_values):
        raise ValueError(f"the projector made {len(features)} rows of {len(pack.pixel_values)}; it has to keep them")
    return list(features.split(pack.counts))


class _AwaitingWeights(Siglip2PackedVisionModel):
    """A model on the meta device that a VLM's `from_pretrained` fills from the VLM's checkpoint.

    transformers asks `_init_weights` for what is not in there, which here means the base's weights, not random ones.
    (What is read now would be overwritten or lost.)
    """

    def __init__(self, config: Siglip2VisionConfig, base: str | os.PathLike):
        super().__init__(config)
        self.base = base

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        missing = {name: p for name, p in self.named_parameters() if not getattr(p, "_is_hf_initialized", False)}
        if not missing or any(p.is_meta for p in missing.values()):
            return
        logger.warning(
            "%d of %d weights of the vision tower are not in the checkpoint that is loaded: they begin as those of %s. "
            "If it has the original tower's names, vision_tower.vision_tower.vision_model.*, pass from_pretrained "
            "key_mapping={'vision_tower.vision_tower.vision_model.': 'vision_tower.vision_tower.'}",
            len(missing),
            len(self.state_dict()),
            self.base,
        )
        state = weights.read_state_dict(self.base)
        weights.check_state_dict(state, {name: p.shape for name, p in missing.items()}, str(self.base), True)
        for name, parameter in missing.items():
            parameter.copy_(state[name])
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]


def _receive_weights(tower: SigLip2NaflexVisionTower, state: dict, prefix: str, *_: Any) -> None:
    """Before `load_state_dict`: a delayed tower gets a model for the weights in `state`.

    Names as the original tower has them (`vision_tower.vision_model.`) become this one's; what lies above the selected
    layer is left out.
    """
    inner, num_layers = f"{prefix}vision_tower.", tower.config.num_hidden_layers
    above = [f"encoder.layers.{i}." for i in range(layer_index(tower.select_layer, num_layers), num_layers)]
    given = [key for key in state if key.startswith(inner)]
    for key in given:
        name, tensor = key.removeprefix(inner).removeprefix("vision_model."), state.pop(key)
        if not name.startswith((*above, "post_layernorm.", "head.")):
            state[inner + name] = tensor
    if given:
        tower.load_model()


def _read_processor(ckpt: str | os.PathLike, config: Any) -> Siglip2PackedImageProcessor:
    if any(find_file(ckpt, name) for name in CONFIG_FILES):
        return SigLip2NaflexImageProcessor.from_pretrained(ckpt, patch_size=config.patch_size)
    return SigLip2NaflexImageProcessor(patch_size=config.patch_size, max_num_patches=config.num_patches)
