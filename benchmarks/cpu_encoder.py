"""Packed encoder beside padded transformers on the CPU, and the position resize beside a loop of F.interpolate.

    python benchmarks/cpu_encoder.py            # about five minutes on two cores

base shape, float32, the workloads with a fraction of their images; and the packed encoder in bfloat16 beside float32,
if the CPU has instructions for it (--only bfloat16: this alone). Answers are compared before anything is timed.
"""

import argparse
import os
import tempfile
from functools import partial
from pathlib import Path

# huge pages for large tensors, for every provider: page faults would be most of what the position resize is timed at
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import torch
import torch.nn.functional as F
from transformers import Siglip2VisionModel

from siglip2_packed import PackedPatches, Siglip2PackedVisionModel, pad
from siglip2_packed.measure import Rows, cpu_bfloat16, cpu_name, in_turn, relative_error
from siglip2_packed.ops.positions.eager import resize_positions
from siglip2_packed.random_checkpoint import save_random_checkpoint
from siglip2_packed.workloads import forward_flops, grids

IMAGES = {"uniform256": 4, "naflex256": 4, "mixed": 12, "single256": 1}
OURS, PADDED = "siglip2_packed", "transformers_sdpa_padded"


def encoder(rows: Rows, folder: Path, repeats: int) -> None:
    ours = Siglip2PackedVisionModel.from_pretrained(folder)
    reference = Siglip2VisionModel.from_pretrained(folder, attn_implementation="sdpa")
    for workload, images in IMAGES.items():
        sizes = grids(workload, images=images)
        patches = sum(t * h * w for t, h, w in sizes)
        packed = PackedPatches(torch.randn(patches, 768), sizes)
        padded = pad(packed)
        real = padded["pixel_attention_mask"].bool()
        with torch.no_grad():
            error = relative_error(ours(**packed).last_hidden_state, reference(**padded).last_hidden_state[real])
        if not error < 1e-5:
            raise SystemExit(f"{workload}: relative error {error:.1e} against transformers, nothing timed")
        rows.add(OURS, workload, "forward", "float32", "relative_error", error, "")

        def forward(model, batch):
            with torch.no_grad():
                model(**batch)

        def train(model, batch):
            model.zero_grad()
            model(**batch).last_hidden_state.square().mean().backward()

        for mode, run in (("forward", forward), ("train", train)):
            if mode == "train" and workload != "uniform256":
                continue
            functions = {OURS: lambda run=run: run(ours, packed), PADDED: lambda run=run: run(reference, padded)}
            times = in_turn(functions, repeats)
            for provider, ms in times.items():
                rows.add(provider, workload, mode, "float32", "time", ms, "ms")
                rows.add(provider, workload, mode, "float32", "patches_per_s", [patches / x * 1e3 for x in ms], "1/s")
            speedup = sorted(theirs / mine for mine, theirs in zip(times[OURS], times[PADDED]))
            rows.add(OURS, workload, mode, "float32", "speedup_over_padded", speedup, "x")
            gflops = forward_flops(ours.config, sizes) * (3 if mode == "train" else 1) / 1e9
            rate = gflops / sorted(times[OURS])[len(times[OURS]) // 2] * 1e3
            share = 1 - patches / real.numel()
            print(
                f"{workload:12} {mode:8} {patches:6} patches, {share:4.0%} padding elsewhere, {rate:4.0f} GFLOP/s, "
                f"{speedup[len(speedup) // 2]:5.2f}x",
                flush=True,
            )


def bfloat16(rows: Rows, folder: Path, repeats: int) -> None:
    dtypes = ("float32", "bfloat16")
    models = {dtype: Siglip2PackedVisionModel.from_pretrained(folder, dtype=dtype) for dtype in dtypes}
    sizes = grids("uniform256", images=IMAGES["uniform256"])
    patches = sum(t * h * w for t, h, w in sizes)
    pixels = torch.randn(patches, 768)

    def forward(dtype):
        with torch.no_grad():
            return models[dtype](**PackedPatches(pixels.to(models[dtype].dtype), sizes)).last_hidden_state

    error = relative_error(forward("bfloat16").float(), forward("float32"))
    if not error < 2e-2:
        raise SystemExit(f"bfloat16: relative error {error:.1e} against float32, nothing timed")
    times = in_turn({dtype: lambda dtype=dtype: forward(dtype) for dtype in dtypes}, repeats)
    speedup = sorted(single / half for single, half in zip(*times.values()))
    add = partial(rows.add, OURS, "uniform256", "forward", "bfloat16")
    add("relative_error", error, "")
    add("time", times["bfloat16"], "ms")
    add("patches_per_s", [patches / x * 1e3 for x in times["bfloat16"]], "1/s")
    add("speedup_over_float32", speedup, "x")
    print(f"bfloat16 by {cpu_bfloat16()}: {speedup[len(speedup) // 2]:.2f}x float32, relative error {error:.1e}")


def positions(rows: Rows, repeats: int) -> None:
    table = torch.randn(256, 768)
    sizes = [(1, h, w) for h in range(5, 21) for w in range(4, 20)]  # 256 distinct grids around the table's 16x16
    square = table.view(1, 16, 16, -1).permute(0, 3, 1, 2)

    def loop():
        resize = dict(mode="bilinear", align_corners=False, antialias=True)
        images = (F.interpolate(square, size=(h, w), **resize) for _, h, w in sizes)
        return torch.cat([image[0].permute(1, 2, 0).flatten(0, 1) for image in images])

    error = (resize_positions(table, sizes) - loop()).abs().max().item()
    if not error < 1e-5:
        raise SystemExit(f"positions differ by {error:.1e}, nothing timed")
    providers = {OURS: lambda: resize_positions(table, sizes), "interpolate_loop": loop}
    times = in_turn(providers, 5 * repeats, warmup=2)
    for provider, ms in times.items():
        rows.add(provider, "positions256", "forward", "float32", "time", ms, "ms")
    speedup = sorted(theirs / mine for mine, theirs in zip(times[OURS], times["interpolate_loop"]))
    rows.add(OURS, "positions256", "forward", "float32", "speedup_over_loop", speedup, "x")
    print(f"positions of 256 distinct grids: {speedup[len(speedup) // 2]:.1f}x a loop of F.interpolate")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds; every provider runs once a round")
    parser.add_argument("--only", choices=["bfloat16"], help="this part alone")
    parser.add_argument("--out", type=Path, help="CSV file (default: results/cpu_encoder_<cpu>.csv beside this script)")
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = Rows("cpu_encoder", cpu_name())
    with tempfile.TemporaryDirectory() as folder:
        ckpt = save_random_checkpoint(folder, "base")
        if not args.only:
            positions(rows, args.repeats)
            encoder(rows, ckpt, args.repeats)
        if cpu_bfloat16():
            bfloat16(rows, ckpt, args.repeats)
    path = args.out or Path(__file__).parent / "results" / f"cpu_encoder_{cpu_name()}.csv"
    rows.write(path, replacing=["workload", "dtype"])
    print(f"{len(rows.rows)} rows -> {path}")


if __name__ == "__main__":
    main()
