"""`siglip2-packed align`: does this model compute what the checkpoint means, stage by stage?

Compared with two independent computations of the same images in float32: `kernels_ref`, and
`transformers.Siglip2VisionModel`, both padded. A stage passes only if the largest absolute difference, the relative
error and the worst token's cosine are all within their bounds; a cosine alone would pass wrong positions.

Shapes: N images, T patches of all of them, D hidden size, L layers.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from PIL import Image, ImageOps
from torch import Tensor

import kernels_ref
from siglip2_packed.attention import head_dim
from siglip2_packed.compare import Row, compare, measure
from siglip2_packed.doctor import environment
from siglip2_packed.flags import DTYPES, add_model_flags, pick_device, write_json
from siglip2_packed.modeling import Siglip2PackedVisionModel
from siglip2_packed.ops.dispatch import length_class, resolve_backend
from siglip2_packed.packing import PackedPatches, convert_to_packing_format
from siglip2_packed.preprocess import Siglip2PackedImageProcessor
from siglip2_packed.sources import image_files

Stages = dict[str, Tensor]
"""What a model computed: "patches" `[T, P]`, "embeddings", "layer 1" to "layer L" and "final" `[T, D]`, and, with a
pooling head, "pooled" `[N, D]`."""

# wider than the position table, narrower, a row, a column, and smaller on both sides
GRIDS = ((13, 19), (8, 32), (1, 256), (7, 1), (5, 7), (2, 3))
MISPLACED = f"transformers {transformers.__version__} misplaces images one patch wide on CPU"
# colour, grey, alpha, text, a palette; landscape and portrait
PHOTOGRAPHS = (
    "astronaut.png chelsea.png coffee.png rocket.jpg camera.png logo.png page.png motorcycle_left.png "
    "no_time_for_that_tiny.gif"
).split()


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
    with Image.open(file) as image:
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"{file}: mode {image.mode}, which transformers reads differently; align takes 8 bits")
        return ImageOps.exif_transpose(image).convert("RGB")


def photographs() -> list[Path]:
    """Photographs of different shapes and modes that come with scikit-image."""
    try:
        import skimage
    except ImportError as error:
        raise ImportError("--use-real-images needs scikit-image: pip install 'siglip2-packed[demo]'") from error
    return [Path(skimage.__file__).parent / "data" / name for name in PHOTOGRAPHS]


def configure(parser: argparse.ArgumentParser) -> None:
    add_model_flags(parser, dtype="dtype of our model")
    parser.add_argument("--batch-size", type=int, default=2, metavar="N", help="random images of one size (2)")
    parser.add_argument("--image-size", type=image_size, default="224", metavar="SIZE", help="224 or 208x304 (224)")
    parser.add_argument("--threshold", type=float, default=0.99, help="smallest cosine of any token (0.99)")
    parser.add_argument("--use-real-images", action="store_true", help="photographs that come with scikit-image")
    parser.add_argument("--images", nargs="+", metavar="PATH", help="your own images or folders of them")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random images (0)")
    parser.add_argument("--json", metavar="FILE", help="also write everything to this file")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {args.batch_size}")
    files = (photographs() if args.use_real_images else []) + image_files(args.images or [])
    device, dtype = pick_device(args.device), DTYPES[args.dtype]

    with full_precision() as tf32:
        ours = load_packed(args.ckpt, device, dtype, args.attn_implementation)
        settings = (args.attn_implementation, device, dtype, head_dim(ours.config), False)
        resolve_backend(
            *settings
        )  # a backend that was asked for and cannot run is refused before anything else is loaded
        backends: dict[str, str] = {}
        found = environment(device) | {
            "checkpoint": args.ckpt,
            "dtype": args.dtype if dtype == torch.float32 else f"{args.dtype}, against float32",
            "tf32": tf32,
            "attention": args.attn_implementation,
        }
        for name, value in found.items():
            if value != "absent":
                print(f"{name:<15} {value}")

        reference = load_reference(args.ckpt, device)
        head = "head.probe" in reference.state
        theirs = load_transformers(args.ckpt, device, torch.float32, head)
        low = None if dtype == torch.float32 else load_transformers(args.ckpt, device, dtype, head).model
        rows = [loading(theirs, len(reference.state))]
        print(f"{'weights':<15} {'PASS' if rows[0].passed else 'FAIL'}: {rows[0].note}")

        @torch.inference_mode()
        def compare_case(case: Case) -> list[Row]:
            backends[case.name] = resolve_backend(*settings, length_class([h * w for h, w in case.grids]))
            packed = run_packed(ours, case)
            references = {"kernels_ref": run_reference(reference, case)}
            if not theirs.not_loaded:
                references["transformers"] = run_transformers(theirs.model, case)
            baseline = None if low is None or theirs.not_loaded else run_transformers(low, case)
            wrong = wrong_positions(theirs.model, case.grids)
            if len(wrong) == len(case.images):
                print(f"  {case.name}: with kernels_ref only, {MISPLACED}")
            compared: list[Row] = []
            for name, stages in references.items():
                compared += compare_stages(
                    case, name, packed, stages, dtype=dtype, threshold=args.threshold, baseline=baseline, wrong=wrong
                )
            return compared

        if files:
            print(f"\n{'each image alone':<28} {'against':<13} {NUMBERS}          worst stage (attention)")
            for file in files:
                case = image_case(file.name, [file], args.ckpt, args.max_num_patches)
                rows += (section := compare_case(case))
                print_alone(case, section, backends[case.name])
            together = f"{len(files)} images in one pack"
            cases = iter([image_case(together, files, args.ckpt, args.max_num_patches)])
        else:
            cases = random_cases(ours.config, args.batch_size, args.image_size, args.seed)
        for case in cases:
            rows += (section := compare_case(case))
            print_stages(case, section, backends[case.name])

    failed = sum(not row.passed for row in rows)
    summary = f"{failed} of {len(rows)} FAILED" if failed else f"ALL TESTS PASSED ({len(rows)} comparisons)"
    print(f"\n{summary}")
    if args.json:
        listed = [asdict(row) | {"attention": backends.get(row.case, "")} for row in rows]
        write_json(args.json, {"passed": not failed, "summary": summary, "environment": found, "rows": listed})
    return 1 if failed else 0


def compare_stages(
    case: Case,
    against: str,
    ours: Stages,
    reference: Stages,
    *,
    dtype: torch.dtype = torch.float32,
    threshold: float = 0.99,
    baseline: Stages | None = None,
    wrong: Sequence[int] = (),
) -> list[Row]:
    """The rows of a case against one reference.

    Args:
        baseline: what transformers computes in `dtype`; see `compare.bounds`.
        wrong: images whose positions transformers gets wrong: neither compared with it nor part of the baseline.
    """
    everyone = range(len(case.images))
    right = [index for index in everyone if index not in wrong]
    chosen = right if against == "transformers" else list(everyone)
    if wrong and not chosen:
        return []
    note = ""
    if len(chosen) < len(case.images):
        note = f"without {', '.join(case.images[index] for index in wrong)}: {MISPLACED}"

    def row(stage: str, depth: int, dtype: torch.dtype) -> Row:
        x, ref, low = (stages.get(stage) for stages in (ours, reference, baseline or {}))
        errors = None
        if ref is not None and low is not None and right:
            errors = measure(_rows_of(low, case, right, stage), _rows_of(ref, case, right, stage))
        return compare(
            _rows_of(x, case, chosen, stage),
            _rows_of(ref, case, chosen, stage),
            [case.images[index] for index in chosen],
            [case.grids[index] for index in chosen],
            case=case.name,
            stage=stage,
            against=against,
            dtype=dtype,
            depth=depth,
            threshold=threshold,
            baseline=errors,
            note=note,
        )

    rows = [row(stage, k, dtype) for k, stage in enumerate(name for name in ours | reference if name != "patches")]
    # patches are float32 whatever the model's dtype, and the references that were given them have nothing to add
    return [row("patches", 0, torch.float32), *rows] if against == case.patches_by else rows


def _rows_of(rows: Tensor | None, case: Case, images: Sequence[int], stage: str) -> Any:
    """The rows of some images; as they are, if all are wanted or if they do not fit the grids."""
    lengths = [1 if stage == "pooled" else h * w for h, w in case.grids]
    if rows is None or len(images) == len(lengths) or len(rows) != sum(lengths):
        return rows
    return torch.cat([rows.split(lengths)[index] for index in images])


def loading(theirs: Transformers, tensors: int) -> Row:
    missing = theirs.not_loaded
    note = f"all {tensors} tensors loaded"
    if missing:
        some = ", ".join(missing[:3]) + ", ..." * (len(missing) > 3)
        note = (
            f"{len(missing)} tensors are not loaded but random ({some}), so nothing is compared with transformers. "
            "Siglip2PackedVisionModel.save_pretrained writes keys that it loads"
        )
    return Row("weights", "transformers", "transformers", not missing, note=note)


NUMBERS = f"{'max abs':>8} {'relative':>9} {'bound':>8} {'min cosine':>11} {'mean cosine':>12}"


def print_alone(case: Case, rows: Sequence[Row], backend: str) -> None:
    """One image: a line for each reference, with the stage that came closest to its bounds."""
    for against in dict.fromkeys(row.reference for row in rows):
        worst = max((row for row in rows if row.reference == against), key=lambda row: row.severity)
        token = "" if worst.token is None else f", token {worst.token} {worst.position}"
        print(f"  {case.name:<26} {against:<13} {worst.numbers}   {worst.stage}{token} ({backend})")
    if not all(row.passed for row in rows):
        print_stages(case, rows, backend)


def print_stages(case: Case, rows: Sequence[Row], backend: str) -> None:
    """A line for each stage and reference."""
    patches = sum(h * w for h, w in case.grids)
    for against in dict.fromkeys(row.reference for row in rows):
        print(f"\n{case.name}, {patches} patches, attention {backend}, against {against}")
        print(f"  {'stage':<14} {NUMBERS}          worst")
        for row in rows:
            if row.reference == against:
                print(f"  {row.stage:<14} {row.numbers}   {': '.join(filter(None, (row.where, row.note)))}")


def image_size(text: str) -> tuple[int, int]:
    """`224` or `208x304` (height x width) -> (height, width)."""
    sides = [int(side) for side in text.lower().split("x")]
    if len(sides) > 2 or min(sides) < 1:
        raise ValueError(text)
    return sides[0], sides[-1]


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
