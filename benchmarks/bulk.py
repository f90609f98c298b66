"""Embedding a folder of JPEGs: `encode` beside decoding alone, the model alone and a plain loop of transformers.

    python benchmarks/bulk.py                   # CPU, tiny model: decode-bound; about twelve minutes on two cores
    python benchmarks/bulk.py --device cuda     # so400m in bfloat16; with --max-num-patches 1024 device-bound
    python benchmarks/bulk.py --photos --images 200 --max-num-patches 256 --decode scaled gpu    # 12-megapixel photos
    python benchmarks/bulk.py --before cfe958a  # and encode of an older tree, a commit or a folder, on the same files
    python benchmarks/bulk.py --quick           # does it run?

Crops of scikit-image's photographs, 0.05 to 2 megapixels, sides 1:2 to 2:1, all drawn from a seed. Every provider runs
once a round over all files (transformers' over every n-th, with --every n), in a process of its own that has run them
before, over the first WARM files, when all providers did so at once. What comes before the first file does not count:
reading the checkpoint, beside which decoding processes begin and pages are locked, a full pack, with the capture of a
CUDA graph. The model alone computes as many packs as the files fill, 60 at least: a card at its limit of power slows
down. What encode wrote in each round is compared with transformers' model in float32, called on each image alone,
before anything is reported: float32 within 1e-4 and twice the error of the padded batches, half precision within 1.1
times.

    pillow:decode              JPEG -> RGB, in a thread a core
    pillow:decode_resize       and resized to the grid and cut: all that a model's input needs of the CPU
    siglip2_packed             encode to shards of pooled vectors: the above, packs, model, index
    siglip2_packed:scaled, :gpu     the same with --decode; vectors within 2e-2 of encode's exact ones
    siglip2_packed:TREE        encode of the tree that --before names, as its own bulk.py runs it; vectors likewise
    torchvision:nvjpeg         with --decode gpu, nvJPEG alone, of all files: in memory -> pixels on the card
    siglip2_packed:forward     the model alone, on a pack that is there already
    transformers_sdpa_padded   for each 64 files: Image.open, Siglip2ImageProcessor, Siglip2VisionModel
"""

import argparse
import itertools
import math
import os
import random
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack
from functools import lru_cache, partial
from pathlib import Path

# For every provider. The cores decode; a model's threads that spin while they wait would take them away.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import numpy as np
import torch
import transformers
from compare_trees import ROOT, Tree, Worker, old_tree
from PIL import Image
from safetensors.torch import load_file

from siglip2_packed import Siglip2PackedImageProcessor, Siglip2PackedVisionModel, card
from siglip2_packed.collection.decode import cores, decoding_pool
from siglip2_packed.collection.features import Meter, clock, encode
from siglip2_packed.collection.run import to_folder
from siglip2_packed.collection.sources import find_inputs
from siglip2_packed.encode import shard_size
from siglip2_packed.flags import DTYPES
from siglip2_packed.graphs import replayed
from siglip2_packed.measure import Rows, card_name, cpu_name, relative_error
from siglip2_packed.random_checkpoint import SHAPES, save_random_checkpoint

PHOTOGRAPHS = "astronaut chelsea coffee hubble_deep_field immunohistochemistry retina rocket".split()
SCALED, GPU, NVJPEG = "siglip2_packed:scaled", "siglip2_packed:gpu", "torchvision:nvjpeg"
OURS, FORWARD, PADDED = "siglip2_packed", "siglip2_packed:forward", "transformers_sdpa_padded"
DECODE, RESIZE, ONE_BY_ONE = "pillow:decode", "pillow:decode_resize", "transformers:one_by_one"
BATCH, BUDGET, WARM = 64, 16384, 256


@lru_cache
def photograph_of(name: str) -> Image.Image:
    from skimage import data

    return Image.fromarray(getattr(data, name)()).convert("RGB")


def make_jpeg(folder: Path, number: int, seed: int) -> None:
    rng = random.Random(f"{seed} {number}")
    photograph = photograph_of(rng.choice(PHOTOGRAPHS))
    area = math.exp(rng.uniform(math.log(0.05e6), math.log(2e6)))
    aspect = math.exp(rng.uniform(-math.log(2), math.log(2)))
    width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    scale = min(1, photograph.width / width, photograph.height / height) * rng.uniform(0.7, 1)
    left, top = (rng.uniform(0, side - scale * crop) for side, crop in zip(photograph.size, (width, height)))
    box = (left, top, left + scale * width, top + scale * height)
    image = photograph.resize((width, height), Image.Resampling.BICUBIC, box)
    image.save(folder / f"{number:05d}.jpg", quality=rng.choice((75, 85, 92)))


def make_photo(folder: Path, number: int, seed: int) -> None:
    """One of scikit-image's photographs at 12 megapixels, as it would be on its side or not."""
    photograph = photograph_of(PHOTOGRAPHS[number % len(PHOTOGRAPHS)])
    size = (4032, 3024) if (number + seed) % 3 else (3024, 4032)
    photograph.resize(size, Image.Resampling.BICUBIC).save(folder / f"{number:05d}.jpg", quality=92)


def make_folder(folder: Path, images: int, seed: int, make=make_jpeg) -> list[str]:
    """`images` JPEGs, those made that are not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{number:05d}.jpg" for number in range(images)]
    missing = [number for number, file in enumerate(files) if not file.exists()]
    with ProcessPoolExecutor() as pool:
        list(pool.map(make, itertools.repeat(folder), missing, itertools.repeat(seed), chunksize=4))
    return [str(file) for file in files]


def decode_only(files, ckpt, device, dtype):
    def decode(file):
        with Image.open(file) as image:
            image.load()

    return in_threads(decode, files)


def decode_resize(files, ckpt, device, dtype):
    return in_threads(Siglip2PackedImageProcessor.from_pretrained(ckpt).read, files)


def in_threads(function, files):
    with ThreadPoolExecutor(cores()) as pool:
        start = time.perf_counter()
        for _ in pool.map(function, files):
            pass
        return {"seconds": time.perf_counter() - start}


def nvjpeg_only(files, ckpt, device, dtype):
    decode = card.nvjpeg(torch.device(device))
    card.LARGE = 0  # small files, too
    with ThreadPoolExecutor(cores()) as pool:
        read = list(pool.map(card.plain_jpeg, files))
    start = time.perf_counter()
    for batch in card.batches(read, lambda file: file.pixels):
        decode([torch.frombuffer(file.data, dtype=torch.uint8) for file in batch])
    torch.cuda.synchronize()
    return {"seconds": time.perf_counter() - start}


def ours(files, ckpt, device, dtype, decode="exact"):
    processor = Siglip2PackedImageProcessor.from_pretrained(ckpt, decode=decode)
    workers = cores()
    pool = decoding_pool(torch.device(device), processor, workers, patch_budget=BUDGET)
    locked = pool.shelf.lock_pages(torch.device(device)) if device == "cuda" else None
    model = load(Siglip2PackedVisionModel, ckpt, device, dtype, attn_implementation="auto")
    forward = replayed(model, BUDGET)
    warm_up(forward, processor)
    on_card = processor.on_card(model.device)
    if locked is not None:
        locked.result()
    inputs = find_inputs(files)
    settings = {"shard_size": shard_size(False, len(files), 1), "format": "safetensors"}
    empty = {"pooled": torch.zeros(0, model.config.hidden_size, dtype=dtype)}
    meter = Meter(BUDGET)

    def encoded(ranges, done):
        wanted = itertools.chain.from_iterable(inputs.read(*some) for some in ranges)
        yield from encode(
            forward,
            processor,
            wanted,
            pool,
            pooled=True,
            patches=False,
            patch_budget=BUDGET,
            workers=workers,
            meter=meter,
            card=on_card,
        )

    with pool, tempfile.TemporaryDirectory() as own:
        folder = Path(own)
        start = time.perf_counter()
        failed, _, patches = to_folder(folder, inputs, settings, encoded, empty)
        seconds = time.perf_counter() - start
        assert failed == 0
        shards = [load_file(shard)["pooled"] for shard in sorted(folder.glob("shard-*"))]
    found = {"seconds": seconds, "patches": patches, "wait": max(0.0, 1 - meter.busy / seconds)}
    return found | {"full": meter.patches / (meter.packs * BUDGET), "pooled": torch.cat(shards).float().numpy()}


def forward_only(files, ckpt, device, dtype):
    processor = Siglip2PackedImageProcessor.from_pretrained(ckpt)
    model = load(Siglip2PackedVisionModel, ckpt, device, dtype, attn_implementation="auto")
    packed = processor(files[: BUDGET // processor.max_num_patches]).to(device, dtype)
    seconds, packs = [], len(files) * processor.max_num_patches // BUDGET
    with torch.no_grad():
        for _ in range(max(60, packs) if device == "cuda" else 12):
            stop = clock(torch.device(device))
            model(**packed)
            seconds.append(stop())
    if device == "cuda":
        torch.cuda.synchronize()
    patches = len(packed["pixel_values"])
    return {"seconds": float(np.median([x() for x in seconds[2:]])), "patches": patches, "images": packed.num_images}


def padded(files, ckpt, device, dtype):
    processor = transformers_processor(ckpt)
    model = load(transformers.Siglip2VisionModel, ckpt, device, dtype, attn_implementation="sdpa")

    def features(batch):
        inputs = processor(images=[Image.open(file).convert("RGB") for file in batch], return_tensors="pt")
        with torch.no_grad():
            pooled = model(**inputs.to(device, dtype)).pooler_output.float().cpu()
        return pooled, int(inputs["pixel_attention_mask"].sum())

    features(files[:BATCH])  # warms up
    start = time.perf_counter()
    found = [features(files[i : i + BATCH]) for i in range(0, len(files), BATCH)]
    seconds = time.perf_counter() - start
    pooled = torch.cat([pooled for pooled, _ in found])
    return {"seconds": seconds, "patches": sum(patches for _, patches in found), "pooled": pooled.numpy()}


def one_by_one(files, ckpt, device, dtype):
    """The reference: the model in float32 on each image alone."""
    processor = transformers_processor(ckpt)
    model = load(transformers.Siglip2VisionModel, ckpt, device, torch.float32, attn_implementation="sdpa")

    def read(file):
        return processor(images=[Image.open(file).convert("RGB")], return_tensors="pt")

    with ThreadPoolExecutor(cores()) as pool, torch.no_grad():
        vectors = [
            model(**inputs.to(device)).pooler_output.cpu()
            for i in range(0, len(files), BATCH)
            for inputs in pool.map(read, files[i : i + BATCH])
        ]
    return {"pooled": torch.cat(vectors).numpy()}


def transformers_processor(ckpt):
    kind = getattr(transformers, "Siglip2ImageProcessorPil", None) or transformers.Siglip2ImageProcessor
    return kind.from_pretrained(ckpt)


@lru_cache
def load(cls, ckpt, device, dtype, **kwargs):
    return cls.from_pretrained(ckpt, dtype=dtype, **kwargs).to(device).eval()


def warm_up(model, processor):
    side = processor.patch_size * math.isqrt(processor.max_num_patches)
    packed = processor([np.zeros((side, side, 3), np.uint8)] * (BUDGET // processor.max_num_patches))
    with torch.no_grad():
        model(**packed.to(model.device))


TIMED = {DECODE: decode_only, RESIZE: decode_resize, OURS: ours, FORWARD: forward_only, PADDED: padded}
DECODED = {"scaled": {SCALED: partial(ours, decode="scaled")}}
DECODED["gpu"] = {GPU: partial(ours, decode="gpu"), NVJPEG: nvjpeg_only}
PROVIDERS = {**TIMED, ONE_BY_ONE: one_by_one, **DECODED["scaled"], **DECODED["gpu"]}


def measured(provider, files, ckpt, device, dtype):
    transformers.utils.logging.disable_progress_bar()
    found = {"images": len(files)} | PROVIDERS[provider](files, ckpt, device, DTYPES[dtype])
    status = Path("/proc/self/status").read_text()
    found["host"] = int(status.partition("VmHWM:")[2].split()[0]) / 2**20
    if device == "cuda":
        found["memory"] = torch.cuda.max_memory_allocated() / 2**30
    return found


def check(found, reference, every, dtype):
    """(max abs, relative error) of ours and of the padded batches. Stops where ours are beyond design section 6."""
    errors = {}
    for name, step in ((OURS, every), (PADDED, 1)):
        vectors = torch.from_numpy(found[name]["pooled"][::step])
        assert vectors.shape == reference.shape
        errors[name] = float((vectors - reference).abs().max()), relative_error(vectors, reference)
    (worst, relative), (their_worst, their_relative) = errors[OURS], errors[PADDED]
    good = worst <= min(1e-4, 2 * their_worst) if dtype == "float32" else relative <= 1.1 * their_relative
    if not good:
        raise SystemExit(f"(max abs, relative error) {errors}: not transformers' vectors, nothing is reported")
    exact = torch.from_numpy(found[OURS]["pooled"])
    for name in others(found):
        vectors = torch.from_numpy(found[name]["pooled"])
        errors[name] = float((vectors - exact).abs().max()), relative_error(vectors, exact)
        if not errors[name][1] <= 2e-2:
            raise SystemExit(f"{name} (max abs, relative error) {errors[name]}: other vectors, nothing is reported")
    return errors


def others(names):
    """Those of the providers that are `encode` in another way than exactly by this tree."""
    known = {*PROVIDERS} - {SCALED, GPU}
    return [name for name in names if name not in known]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000, help="JPEGs in the folder (5000)")
    parser.add_argument("--repeat", type=int, default=1, help="each is encoded so many times a round (1)")
    parser.add_argument("--photos", action="store_true", help="12-megapixel photos instead")
    parser.add_argument("--decode", nargs="+", choices=list(DECODED), default=[], help="time these as well")
    parser.add_argument("--before", help="time encode of this tree as well, a folder or a commit")
    parser.add_argument("--every", type=int, default=1, help="transformers takes every n-th of them (1)")
    parser.add_argument("--folder", type=Path, help="where they are kept (a temporary folder)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where the model runs (cpu)")
    parser.add_argument("--shape", choices=list(SHAPES), help="model (tiny; so400m on cuda)")
    parser.add_argument("--max-num-patches", type=int, help="patches of an image (the model's: 256, tiny's 16)")
    parser.add_argument("--dtype", choices=list(DTYPES), help="its dtype (float32; bfloat16 on cuda)")
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds; every provider runs once a round (3)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the JPEGs (0)")
    parser.add_argument("--quick", action="store_true", help="200 images, one round, no CSV file unless --out")
    parser.add_argument("--out", type=Path, help="CSV file (results/bulk_<card>.csv beside this script)")
    args = parser.parse_args()
    if args.every < 1:
        parser.error(f"--every must be at least 1, got {args.every}")
    cuda = args.device == "cuda"
    shape, dtype = args.shape or ("so400m" if cuda else "tiny"), args.dtype or ("bfloat16" if cuda else "float32")
    timed = {name: run for how in args.decode for name, run in DECODED[how].items()} | TIMED
    images, repeats = (min(200, args.images), 1) if args.quick else (args.images, args.repeats)
    machine = card_name() if cuda else cpu_name()
    rows, workload = (
        Rows("bulk", torch.cuda.get_device_name() if cuda else machine),
        f"{'photos12mp' if args.photos else 'jpegs'}{images}" + (f"x{args.repeat}" if args.repeat > 1 else ""),
    )

    with ExitStack() as stack:
        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        start = time.perf_counter()
        make = make_photo if args.photos else make_jpeg
        files = make_folder(args.folder or temporary / "jpegs", images, args.seed, make)
        made = time.perf_counter() - start
        ckpt = str(save_random_checkpoint(temporary / "ckpt", shape))
        if args.max_num_patches:
            workload += f"_max{args.max_num_patches}"
            processor = Siglip2PackedImageProcessor.from_pretrained(ckpt)
            processor.max_num_patches = args.max_num_patches
            processor.save_pretrained(ckpt)
        size = sum(map(os.path.getsize, files)) / 2**20
        print(f"{workload}, {size:.0f} MiB, made in {made:.1f} s; {shape} in {dtype} on {machine}, {cores()} cores")
        trees = dict.fromkeys((*timed, ONE_BY_ONE), Tree("", ROOT))
        if args.before:
            tree = stack.enter_context(old_tree(args.before))
            trees[f"{OURS}:{tree.name}"] = tree
        with ThreadPoolExecutor() as pool:
            workers = dict(zip(trees, pool.map(Worker, trees.values())))
        for worker in workers.values():
            stack.enter_context(worker)

        def begin(name, files):
            flags = {"ckpt": ckpt, "device": args.device, "dtype": dtype}
            workers[name].send("bulk", provider=name if name in PROVIDERS else OURS, files=files, **flags)

        files *= args.repeat
        for name in workers:
            begin(name, files[:: args.every] if name == ONE_BY_ONE else files[:WARM])
        warm = {name: worker.receive() for name, worker in workers.items()}
        reference = torch.from_numpy(warm[ONE_BY_ONE]["pooled"])
        print(f"warm after {time.perf_counter() - start:.0f} s", flush=True)
        timed = [name for name in workers if name != ONE_BY_ONE]
        rounds, errors = [], []
        for _ in range(repeats):
            found = {}
            for name in timed:
                begin(name, files[:: args.every] if name == PADDED else files)
                found[name] = workers[name].receive()
            errors.append(check(found, reference, args.every, dtype))
            rounds.append(found)
            print("   ".join(f"{name} {x['images'] / x['seconds']:.1f}/s" for name, x in found.items()), flush=True)
        print(f"timed after {time.perf_counter() - start:.0f} s", flush=True)

    for name in (OURS, PADDED, *others(timed)):
        for i, metric in enumerate(("max_abs_error", "relative_error")):
            rows.add(name, workload, "encode", dtype, metric, [found[name][i] for found in errors], "")

    def add(provider, metric, unit, value):
        mode = {DECODE: "preprocess", RESIZE: "preprocess", NVJPEG: "preprocess", FORWARD: "forward"}.get(
            provider, "encode"
        )
        rows.add(provider, workload, mode, dtype, metric, [value(round_) for round_ in rounds], unit)

    for name in timed:
        add(name, "images_per_s", "1/s", lambda r: r[name]["images"] / r[name]["seconds"])
        if "patches" in rounds[0][name]:
            add(name, "patches_per_s", "1/s", lambda r: r[name]["patches"] / r[name]["seconds"])
        add(name, "peak_host_memory", "GiB", lambda r: r[name]["host"])
        if "memory" in rounds[0][name]:
            add(name, "peak_memory", "GiB", lambda r: r[name]["memory"])
    for name in (OURS, *others(timed)):
        add(name, "device_wait", "share", lambda r: r[name]["wait"])
    add(OURS, "pack_utilisation", "share", lambda r: r[OURS]["full"])

    def rate(found, what="images"):
        return found[what] / found["seconds"]

    for name, metric in ((DECODE, "share_of_decode"), (RESIZE, "share_of_decode_resize")):
        add(OURS, metric, "share", lambda r: rate(r[OURS]) / rate(r[name]))
    for name in others(timed):
        add(name, "share_of_forward", "share", lambda r: rate(r[name], "patches") / rate(r[FORWARD], "patches"))
        if name in PROVIDERS:
            add(name, "speedup_over_exact", "x", lambda r: rate(r[name]) / rate(r[OURS]))
        else:  # of an older tree
            for way in {OURS, SCALED, GPU} & {*timed}:
                add(way, f"speedup_over_{name.partition(':')[2]}", "x", lambda r: rate(r[way]) / rate(r[name]))
    if NVJPEG in timed:
        add(GPU, "share_of_nvjpeg", "share", lambda r: rate(r[GPU]) / rate(r[NVJPEG]))
    add(OURS, "share_of_forward", "share", lambda r: rate(r[OURS], "patches") / rate(r[FORWARD], "patches"))
    add(OURS, "speedup_over_padded", "x", lambda r: rate(r[OURS]) / rate(r[PADDED]))
    for row in rows.rows:
        print(f"{row['provider']:26} {row['metric']:22} {row['p50']:>10} {row['unit']}")
    path = args.out or (None if args.quick else Path(__file__).parent / "results" / f"bulk_{machine}.csv")
    if path:
        rows.write(path, replacing=["workload", "dtype"])
        print(f"{len(rows.rows)} rows -> {path}")


if __name__ == "__main__":
    main()
