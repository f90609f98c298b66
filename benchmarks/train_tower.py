r"""Tower, projector and a small causal LM trained on captioned images, on one device or several.

    torchrun --nproc-per-node 1 benchmarks/train_tower.py       # so400m, bfloat16, on one GPU
    torchrun --nproc-per-node 2 benchmarks/train_tower.py       # then on two: prints the scaling efficiency too
    torchrun --nproc-per-node 2 benchmarks/train_tower.py --budget 65536 --workers 14   # work enough for a slow host
    torchrun --nproc-per-node 2 benchmarks/train_tower.py --budget 4096 --engine ddp --cuda-graphs   # LLaVA's shape

    export OMP_NUM_THREADS=1                                    # on a CPU, with one rank and then two, a minute each
    torchrun --nproc-per-node 2 benchmarks/train_tower.py --shape tiny --dtype float32 --lr 5e-3 \
        --max-num-patches 64 --budget 512 --steps 200 --workers 0

Images are crops of scikit-image's photographs, captions say what a crop shows. The loss falls far before anything is
seen: spelling the names takes no images. What was learnt of images is the share of crops not trained on whose name
greedy decoding gets right, beside chance (one name for all): up to twice chance, nothing was in that time. Also
printed: the captions' entropy, below which no loss falls without images, and the losses of new crops, with their own
captions and with those of other images.

Scaling is weak: every rank has the same budget of patches, so two ranks train on twice as many a step. Rows go to
results/train_tower_<card>.csv, in place of those of an earlier run of the same kind.

Shapes: C caption tokens of a pack.
"""

import argparse
import contextlib
import copy
import csv
import functools
import itertools
import math
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from captioned_crops import VOCABULARY, CaptionedCrops, packs_of
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging

from siglip2_packed.bench import PEAK_TFLOPS
from siglip2_packed.llava import SigLip2NaflexVisionTower, encode_images
from siglip2_packed.measure import Rows, card_name, cpu_name
from siglip2_packed.parallel import apply_fsdp, mean_over_ranks
from siglip2_packed.random_checkpoint import save_random_checkpoint
from siglip2_packed.workloads import forward_flops

LM = {"tiny": (64, 2, 4), "base": (512, 4, 8), "so400m": (1024, 4, 16)}  # hidden size, layers, heads
COUNTED = "steps", "patches", "tokens", "images", "flops"


class Captioner(nn.Module):
    """LLaVA in small: tower, a projector of two layers, causal LM."""

    def __init__(self, ckpt, shape: str, cuda_graphs: bool = False):
        super().__init__()
        width, layers, heads = LM[shape]
        self.tower = SigLip2NaflexVisionTower(ckpt, cuda_graphs=cuda_graphs)
        self.projector = nn.Sequential(nn.Linear(self.tower.hidden_size, width), nn.GELU(), nn.Linear(width, width))
        size = dict(hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers, vocab_size=VOCABULARY)
        heads = dict(num_attention_heads=heads, num_key_value_heads=heads)
        self.lm = Qwen2ForCausalLM(Qwen2Config(**size, **heads, tie_word_embeddings=False, use_cache=False))

    def forward(self, packed) -> torch.Tensor:
        """-> `[C, vocabulary]`, logits of `targets`."""
        images = encode_images(self.tower, self.projector, packed)
        texts = self.lm.get_input_embeddings()(packed["inputs"]).split(packed["lengths"])
        rows = [torch.cat(row) for row in zip(images, texts)]
        longest = max(map(len, rows))
        tokens = torch.stack([F.pad(row, (0, 0, 0, longest - len(row))) for row in rows])
        # no mask but the causal one: padding comes last, where no token sees it
        states = self.lm.model(inputs_embeds=tokens, attention_mask={"full_attention": None}).last_hidden_state
        return self.lm.lm_head(states.flatten(0, 1)[packed["places"]])

    def training_flops(self, packed) -> int:
        """Three forwards over real patches and tokens; neither padding nor what is recomputed counts."""
        tower, lm, lengths = copy.copy(self.tower.config), self.lm.config, packed["lengths"]
        tower.num_hidden_layers = len(self.tower.vision_tower.encoder.layers)
        grids = [tuple(grid) for grid in packed["grid_thw"].tolist()]
        rows = [h * w + length for (_, h, w), length in zip(grids, lengths)]
        linear = (
            (self.projector, sum(rows) - sum(lengths)),
            (self.lm.model.layers, sum(rows)),
            (self.lm.lm_head, sum(lengths)),
        )
        products = sum(2 * n * p.numel() for module, n in linear for p in module.parameters() if p.ndim == 2)
        attention = 2 * lm.num_hidden_layers * lm.hidden_size * sum(n * n for n in rows)
        return 3 * (forward_flops(tower, grids) + products + attention)


def parallelize(captioner: Captioner, engine: str, dtype: torch.dtype, checkpointing: bool = False, **sharding):
    """-> what to call with a pack; it computes in `dtype`, parameters stay float32. `sharding` is for `apply_fsdp`."""
    if checkpointing:
        captioner.tower.vision_tower.gradient_checkpointing_enable()
        captioner.lm.gradient_checkpointing_enable({"use_reentrant": False})
    if engine == "ddp":
        autocast = torch.autocast(captioner.tower.device.type, dtype, enabled=dtype != torch.float32)
        return autocast(DistributedDataParallel(captioner))
    mixed = dict(param_dtype=dtype, reduce_dtype=torch.float32)
    apply_fsdp(captioner.tower.vision_tower, **mixed, **sharding)
    for unit in (*captioner.lm.model.layers, captioner):
        fully_shard(unit, mp_policy=MixedPrecisionPolicy(**mixed))
    return captioner


def loss_sum(logits: torch.Tensor, packed) -> torch.Tensor:
    return F.cross_entropy(logits.float(), packed["targets"], reduction="sum")


def mean_loss(model, packed) -> torch.Tensor:
    """Its gradients, averaged over ranks, are those of the mean over the caption tokens of all ranks."""
    return mean_over_ranks(loss_sum(model(packed), packed), len(packed["targets"]))


def update(loss: torch.Tensor, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad()


def train(model, captioner: Captioner, args, packs, device: torch.device, peak: float | None):
    """-> losses of all steps, and `COUNTED` of all ranks a second: a sample for every `--every` steps after warm-up."""
    ranks = dist.get_world_size()
    tower, fresh = list(captioner.tower.parameters()), [*captioner.projector.parameters(), *captioner.lm.parameters()]
    groups = [{"params": tower, "lr": args.lr / 10}, {"params": fresh, "lr": args.lr}]
    optimizer = torch.optim.AdamW(groups, fused=device.type == "cuda")
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: min(1, (k + 1) / 20) * (1 + math.cos(math.pi * k / args.steps)) / 2
    )
    curve, rates, losses, done, start = [], [], [], np.zeros(len(COUNTED)), time.perf_counter()
    for step, packed in zip(range(1, args.steps + 1), packs):
        packed = packed.to(device, non_blocking=True)
        loss = mean_loss(model, packed)
        update(loss, tower + fresh, optimizer)
        schedule.step()

        losses.append(loss.detach())
        patches, images = len(packed["pixel_values"]), len(packed["grid_thw"])
        done += 1 / ranks, patches, patches + len(packed["inputs"]), images, captioner.training_flops(packed)
        if step % args.every == 0:
            sums = torch.cat([torch.stack(losses).double() / ranks, torch.tensor(done, device=device)])
            dist.all_reduce(sums)
            curve += sums[: args.every].tolist()  # waits for the device
            now = time.perf_counter()
            rate = sums[args.every :].cpu().numpy() / (now - start)
            if step - args.every >= args.warmup:
                rates.append(rate)
            mfu = f"  MFU {rate[-1] / ranks / peak:.3f}" if peak else ""
            say(f"step {step:5}  loss {np.mean(curve[-args.every :]):.4f}  {rate[1]:9.0f} patches/s{mfu}")
            losses, done, start = [], np.zeros(len(COUNTED)), now
    return curve, dict(zip(COUNTED, np.array(rates).T))


@torch.no_grad()
def evaluate(model, packs, device: torch.device) -> tuple[float, float]:
    """-> loss, and the share of images whose caption greedy decoding writes: each of its bytes is the likeliest."""
    sums = torch.zeros(4, device=device)
    for packed in packs:
        packed = packed.to(device)
        logits = model(packed)
        right = (logits.argmax(-1) == packed["targets"]).split(packed["lengths"])
        named = sum(r.all().item() for r in right)
        sums += torch.tensor([loss_sum(logits, packed).item(), len(logits), named, len(right)], device=device)
    dist.all_reduce(sums)
    return (sums[0] / sums[1]).item(), (sums[2] / sums[3]).item()


def learnt(accuracy: float, chance: float) -> str:
    """What a share of right names says: nothing, unless it is above twice that of one name for all."""
    return f"{accuracy:.0%} right" if accuracy > 2 * chance else f"nothing learnt beyond chance ({chance:.0%})"


def save(rows: Rows, path: Path, ranks: int) -> None:
    """Replaces an earlier run of the same kind in the file; compares a run on several ranks with that on one."""
    columns = ["provider", "workload", "dtype"]
    provider, workload, dtype = (rows.rows[0][name] for name in columns)
    earlier = list(csv.DictReader(path.open())) if path.exists() else []
    measured = [row for row in (*earlier, *rows.rows) if row["metric"] == "patches_per_s"]
    rate = {tuple(row[name] for name in columns): float(row["p50"]) for row in measured}
    alone = rate.get((provider, workload.replace(f"_ranks{ranks}", "_ranks1"), dtype))
    if ranks > 1 and alone:
        together = rate[provider, workload, dtype]
        rows.add(provider, workload, "train", dtype, "scaling_efficiency", together / ranks / alone, "")
        say(f"{together:.0f} patches/s on {ranks} ranks, {alone:.0f} on one: efficiency {together / ranks / alone:.3f}")
    rows.write(path, replacing=columns)
    say(f"{len(rows.rows)} rows -> {path}")


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


def join() -> torch.device:
    """Joins torchrun's ranks, or a group of one: NCCL with a GPU a rank, else gloo."""
    cuda, alone = torch.cuda.is_available(), dict(store=dist.HashStore(), rank=0, world_size=1)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = dict(backend="nccl", device_id=device) if cuda else dict(backend="gloo")
        dist.init_process_group(**backend, **({} if "RANK" in os.environ else alone))
    return device


@contextlib.contextmanager
def shared_folder():
    """A temporary folder of rank 0, for all ranks of the host."""
    with tempfile.TemporaryDirectory() as own:
        folder = [own]
        dist.broadcast_object_list(folder)
        yield folder[0]
        dist.barrier()


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(LM), default="so400m", help="of the tower; the LM's follows (so400m)")
    parser.add_argument("--engine", choices=["fsdp", "ddp"], default="fsdp", help="FSDP2, or DDP and autocast (fsdp)")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="to compute in (bfloat16)")
    parser.add_argument("--checkpointing", action="store_true", help="recompute layers in backward")
    parser.add_argument("--cuda-graphs", action="store_true", help="the tower in CUDA graphs, forward and backward")
    parser.add_argument("--steps", type=int, default=300, help="training steps (300)")
    parser.add_argument("--warmup", type=int, default=20, help="first steps, left out of the timings (20)")
    parser.add_argument("--every", type=int, default=10, help="steps between two lines, each a sample (10)")
    parser.add_argument("--budget", type=int, default=16384, help="patches of a rank in a step (16384)")
    parser.add_argument("--max-num-patches", type=int, default=256, help="patches of an image (256)")
    parser.add_argument("--images", type=int, default=4096, help="images of a rank in an epoch (4096)")
    parser.add_argument("--unseen", type=int, default=240, help="other crops, for the losses at the end (240)")
    parser.add_argument("--lr", type=float, default=1e-3, help="highest learning rate; the tower's is a tenth (1e-3)")
    parser.add_argument("--workers", type=int, default=8, help="processes of a rank that prepare images (8)")
    parser.add_argument("--out", type=Path, help="CSV file (results/train_tower_<card>.csv beside this script)")
    args = parser.parse_args(argv)
    if args.steps % args.every or args.steps < args.warmup + args.every:
        parser.error(
            f"--steps {args.steps}: a multiple of {args.every}, at least {args.warmup + args.every}, is needed"
        )

    joined = dist.is_initialized()
    device, ranks, cuda = join(), dist.get_world_size(), torch.cuda.is_available()
    rows = Rows("train_tower", torch.cuda.get_device_name() if cuda else cpu_name())
    peaks = [x * 1e12 for card, x in PEAK_TFLOPS.items() if card in rows.common["card"] and args.dtype == "bfloat16"]
    peak = peaks[0] if peaks else None
    say(f"{rows.common['card']}, {ranks} ranks, {args.engine}, {args.dtype}, torch {torch.__version__}")

    logging.disable_progress_bar()
    with shared_folder() as folder:
        if dist.get_rank() == 0:  # transformers saves on no other
            save_random_checkpoint(folder, args.shape)
        dist.barrier()
        torch.manual_seed(0)
        captioner = Captioner(folder, args.shape, args.cuda_graphs).to(device).train()
    model = parallelize(captioner, args.engine, getattr(torch, args.dtype), args.checkpointing)
    processor = captioner.tower.image_processor
    processor.max_num_patches = args.max_num_patches
    crops, unseen = CaptionedCrops(args.images * ranks, 0, processor), CaptionedCrops(args.unseen, 1, processor)

    packs = packs_of(crops, args.budget, args.workers, itertools.count())
    curve, rates = train(model, captioner, args, packs, device, peak)
    new, names = evaluate(model, packs_of(unseen, 16 * args.max_num_patches), device)
    mixed_up, _ = evaluate(model, packs_of(unseen.mixed_up(), 16 * args.max_num_patches), device)
    first, last, entropy = np.mean(curve[:5]), np.mean(curve[-10:]), crops.entropy()
    say(f"loss {first:.3f} -> {last:.3f}, without images at least {entropy:.3f}")
    say(f"crops not trained on: loss {new:.3f}, with captions mixed up {mixed_up:.3f}")
    say(f"names of crops not trained on: {learnt(names, unseen.chance())}")

    if dist.get_rank() == 0:
        extra = "_checkpointing" * args.checkpointing + "_graphs" * args.cuda_graphs
        workload = f"{args.shape}_max{args.max_num_patches}_budget{args.budget}{extra}_ranks{ranks}"
        add = functools.partial(rows.add, f"siglip2_packed:{args.engine}", workload, "train", args.dtype)
        add("time", 1e3 / rates["steps"], "ms")
        for name in ("patches", "tokens", "images"):
            add(f"{name}_per_s", rates[name], "1/s")
        add("tflops_per_rank", rates["flops"] / ranks / 1e12, "TFLOP/s")
        if peak:
            add("mfu", rates["flops"] / ranks / peak, "")
        if cuda:
            add("peak_memory", torch.cuda.max_memory_allocated() / 2**30, "GiB")
        losses = {"first": first, "last": last, "without_images": entropy, "new_crops": new, "mixed_up": mixed_up}
        for name, value in losses.items():
            add(f"loss_{name}", value, "")
        add("name_accuracy", names, "")
        add("chance", unseen.chance(), "")
        card = card_name() if cuda else cpu_name()
        save(rows, args.out or Path(__file__).parent / "results" / f"train_tower_{card}.csv", ranks)
    if not joined:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
