"""What our model is held against: `kernels_ref` and transformers, loaded and run beside it on the same images.

Both are independent computations in float32, padded inside; a run gives the stages that ours gives, without padding.

Shapes: N images, T patches of all of them, P patch_dim, D hidden size, L layers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from PIL import Image, ImageOps
from torch import Tensor

import kernels_ref
from siglip2_packed.formats import open_image
from siglip2_packed.modeling import Siglip2PackedVisionModel
from siglip2_packed.packing import PackedPatches, convert_to_packing_format
from siglip2_packed.preprocess import Siglip2PackedImageProcessor

Stages = dict[str, Tensor]
"""What a model computed: "patches" `[T, P]`, "embeddings", "layer 1" to "layer L" and "final" `[T, D]`, and, with a
pooling head, "pooled" `[N, D]`."""

# wider than the position table, narrower, a row, a column, and smaller on both sides
GRIDS = ((13, 19), (8, 32), (1, 256), (7, 1), (5, 7), (2, 3))
MISPLACED = f"transformers {transformers.__version__} misplaces images one patch wide on CPU"


@dataclass(frozen=True)
class Case:
    """The same images in the two forms that are compared.

    `packed` is what our own code made of them; `padded` holds pixel_values `[N, max, P]`, pixel_attention_mask and
    spatial_shapes, made by `patches_by` without it.
    """

    name: str
    images: list[str]
    packed: PackedPatches
    padded: dict[str, Tensor]
    patches_by: str

    @property
    def grids(self) -> list[tuple[int, int]]:
        return [(h, w) for h, w in self.padded["spatial_shapes"].tolist()]


class Transformers(NamedTuple):
    model: Any
    not_loaded: list[str]
    """Tensors that the checkpoint did not give, which are therefore random."""

    def loaded(self, tensors: int) -> str:
        """Whether it has all of the checkpoint's `tensors`, in words."""
        if not self.not_loaded:
            return f"all {tensors} tensors loaded"
        some = ", ".join(self.not_loaded[:3]) + ", ..." * (len(self.not_loaded) > 3)
        return (
            f"{len(self.not_loaded)} tensors are not loaded but random ({some}), "
            "so nothing is compared with transformers. "
            "Siglip2PackedVisionModel.save_pretrained writes keys that it loads"
        )


class References(NamedTuple):
    """One checkpoint as others compute it: `kernels_ref` and transformers, in float32."""

    reference: kernels_ref.Siglip2Naflex
    theirs: Transformers
    low: Any
    """transformers in our model's dtype, the baseline; None where that is float32."""


def load_packed(ckpt: str, device: torch.device, dtype: torch.dtype, attention: str) -> Siglip2PackedVisionModel:
    model: Any = Siglip2PackedVisionModel.from_pretrained(ckpt, dtype=dtype, attn_implementation=attention)
    return model.to(device).eval()


def load_reference(ckpt: str, device: torch.device) -> kernels_ref.Siglip2Naflex:
    return kernels_ref.Siglip2Naflex(ckpt, device=device, dtype=torch.float32).eval()


def load_transformers(ckpt: str, device: torch.device, dtype: torch.dtype, head: bool) -> Transformers:
    """`head=False` for a checkpoint without a pooling head, for which transformers would make up a random one."""
    config = transformers.Siglip2VisionConfig.from_pretrained(ckpt)
    config.vision_use_head = head
    loaded: Any = transformers.Siglip2VisionModel.from_pretrained(
        ckpt, config=config, dtype=dtype, attn_implementation="sdpa", output_loading_info=True
    )
    model, info = loaded
    not_loaded = sorted(str(key) for key in {*info["missing_keys"], *info["mismatched_keys"]})
    return Transformers(model.to(device).eval(), not_loaded)


def load_references(ckpt: str, device: torch.device, dtype: torch.dtype) -> References:
    """`dtype` is that of our model."""
    reference = load_reference(ckpt, device)
    head = "head.probe" in reference.state
    theirs = load_transformers(ckpt, device, torch.float32, head)
    low = None if dtype == torch.float32 else load_transformers(ckpt, device, dtype, head).model
    return References(reference, theirs, low)


def run_packed(model: Siglip2PackedVisionModel, case: Case) -> Stages:
    patches = case.packed["pixel_values"]
    output = model(**{**case.packed, "pixel_values": patches.to(model.device)}, output_hidden_states=True)
    pooled = output.pooler_output if hasattr(model, "head") else None
    return {"patches": patches, **_stages(output.hidden_states, output.last_hidden_state, pooled)}


def run_reference(reference: kernels_ref.Siglip2Naflex, case: Case) -> Stages:
    state: dict[str, Tensor] = reference.state
    device = state["post_layernorm.bias"].device
    names = ("pixel_values", "pixel_attention_mask", "spatial_shapes")
    pixels, mask, shapes = (case.padded[name].to(device) for name in names)
    output = kernels_ref.padded_encoder(state, reference.config, pixels, mask, shapes, output_hidden_states=True)
    assert output.hidden_states is not None
    return _unpadded(case, output.hidden_states, output.last_hidden_state, output.pooler_output)


def run_transformers(model: Any, case: Case) -> Stages:
    parameter = next(model.parameters())
    padded = {name: tensor.to(parameter.device) for name, tensor in case.padded.items()}
    padded["pixel_values"] = padded["pixel_values"].to(parameter.dtype)
    output = model(**padded, output_hidden_states=True)
    return _unpadded(case, output.hidden_states, output.last_hidden_state, output.pooler_output)


def run_references(references: References, case: Case) -> tuple[dict[str, Stages], Stages | None]:
    """-> stages of each reference, by its name, and those of the baseline. Random weights are no reference."""
    found = {"kernels_ref": run_reference(references.reference, case)}
    if references.theirs.not_loaded:
        return found, None
    found["transformers"] = run_transformers(references.theirs.model, case)
    return found, None if references.low is None else run_transformers(references.low, case)


def _unpadded(case: Case, hidden_states: Sequence[Tensor], final: Tensor, pooled: Tensor | None) -> Stages:
    mask = case.padded["pixel_attention_mask"].bool()
    rows = [state[mask.to(state.device)] for state in (*hidden_states, final)]
    return {"patches": case.padded["pixel_values"][mask], **_stages(rows[:-1], rows[-1], pooled)}


def _stages(hidden_states: Sequence[Tensor], final: Tensor, pooled: Tensor | None) -> Stages:
    layers = {f"layer {k}": state for k, state in enumerate(hidden_states) if k}
    stages = {"embeddings": hidden_states[0], **layers, "final": final}
    return stages if pooled is None else {**stages, "pooled": pooled}


def wrong_positions(model: Any, grids: Sequence[tuple[int, int]]) -> list[int]:
    """Images with one patch a row or column whose positions transformers gets wrong.

    4.57 resizes the table with torch's antialiased interpolate, which is off on CPU where the output is one wide.
    What it makes of such a size is asked of the model itself.
    """
    embeddings = getattr(model, "vision_model", model).embeddings
    table = embeddings.position_embedding.weight.float()
    side = embeddings.position_embedding_size
    wrong = []
    for index, (h, w) in enumerate(grids):
        if 1 in (h, w):
            theirs = embeddings.resize_positional_embeddings(
                table.reshape(side, side, -1), torch.tensor([[h, w]], device=table.device), max_length=h * w
            )[0]
            right = kernels_ref.resize_positions(table, h, w)
            if float((theirs - right).norm()) > 1e-4 * float(right.norm()):
                wrong.append(index)
    return wrong


def random_case(name: str, images: Sequence[Tensor], patch_size: int) -> Case:
    """Images `[C, H, W]` of any sizes."""
    packs = [convert_to_packing_format(image[None], patch_size) for image in images]
    packed = PackedPatches(torch.cat([patches for patches, _ in packs]), torch.cat([grid for _, grid in packs]))
    rows = [kernels_ref.patchify(image[None], patch_size)[0] for image in images]
    shapes = [[image.shape[1] // patch_size, image.shape[2] // patch_size] for image in images]
    padded = {
        "pixel_values": torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
        "pixel_attention_mask": torch.nn.utils.rnn.pad_sequence([torch.ones(len(row)) for row in rows], True).int(),
        "spatial_shapes": torch.tensor(shapes),
    }
    return Case(name, [f"{h}x{w}" for h, w in shapes], packed, padded, "kernels_ref")


def random_cases(config: Any, batch_size: int, size: tuple[int, int], seed: int) -> Iterator[Case]:
    """A batch of one size, as the seed's script has it, and a pack of grids that show wrong positions."""
    generator = torch.Generator().manual_seed(seed)
    patch, channels = config.patch_size, config.num_channels
    height, width = size
    batch = [torch.randn(channels, height, width, generator=generator) for _ in range(batch_size)]
    yield random_case(f"{batch_size} random images of {height}x{width}", batch, patch)
    mixed = [torch.randn(channels, h * patch, w * patch, generator=generator) for h, w in GRIDS]
    yield random_case(f"{len(mixed)} random images of different shapes", mixed, patch)


def image_case(name: str, files: Sequence[Path], ckpt: str, max_num_patches: int | None) -> Case:
    """Images from files, at their own sizes, through our processor and through transformers'."""
    ours = Siglip2PackedImageProcessor.from_pretrained(ckpt)
    # transformers' other processor resizes with torchvision, whose pixels differ from those of the checkpoints
    kind = getattr(transformers, "Siglip2ImageProcessorPil", None) or transformers.Siglip2ImageProcessor
    limit: Any = {} if max_num_patches is None else {"max_num_patches": max_num_patches}
    packed = ours([str(file) for file in files], **limit)
    padded = kind.from_pretrained(ckpt)([_open(file) for file in files], return_tensors="pt", **limit)
    return Case(name, [file.name for file in files], packed, dict(padded), "transformers")


def _open(file: Path) -> Image.Image:
    with open_image(file) as image:
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"{file}: mode {image.mode}, which transformers reads differently; align takes 8 bits")
        return ImageOps.exif_transpose(image).convert("RGB")


@contextlib.contextmanager
def full_precision() -> Iterator[str]:
    """float32 in full: turns TF32 off for matmuls and cuDNN, afterwards as it was. Yields their state in words."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        yield f"matmul {'on' if matmul else 'off'}, cudnn {'on' if cudnn else 'off'}"
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
