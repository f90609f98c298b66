"""One source tree's side of `compare_trees.py`: computes what the parent asks for, with the package on PYTHONPATH.

Imports public names only, those that trees of any age have. Answers are digests and numbers; tensors go by file.
"""

import collections
import contextlib
import gc
import hashlib
import itertools
import re
import sys
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers.utils import logging

import siglip2_packed
from siglip2_packed import (
    PackedPatches,
    Siglip2PackedImageProcessor,
    Siglip2PackedVisionModel,
    convert_to_packing_format,
    pack,
    unpack,
)
from siglip2_packed.graphs import CUDAGraphs

WARM_UP = 0.25
"""Seconds; see `siglip2_packed.bench.steady_milliseconds`."""


# bits ----------------------------------------------------------------------------------------------------------------


def digests(values) -> dict[str, str | None]:
    """SHA-256 of every tensor's dtype, shape and bytes; None of what is None; lists and mappings item by item."""
    if values is None or isinstance(values, torch.Tensor):
        return {"": values if values is None else digest(values)}
    if isinstance(values, int):
        return digests(torch.tensor(values))
    pairs = values.items() if hasattr(values, "items") else enumerate(values)
    found = [(key, digests(value)) for key, value in pairs]
    return {f"{key}.{name}".rstrip("."): x for key, parts in found for name, x in parts.items()}


def digest(tensor: torch.Tensor) -> str:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode() + data.tobytes()).hexdigest()


def model_bits(case: str, ckpt: str, grids: list, threads: int) -> dict[str, str | None]:
    """Weights, features and gradients of one case of `compare_trees.CASES`, float32 on the CPU."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    choices: dict[str, dict] = {"token features": {"vision_use_head": False}, "select_layer=-2": {"select_layer": -2}}
    arguments = choices.get(case, {})
    model = Siglip2PackedVisionModel.from_pretrained(ckpt, dtype="float32", **arguments).train()
    packed = make_pack(model, grids)
    found = {"weights": model.state_dict(), "pack": packed}
    if case in ("inference", "token features", "select_layer=-2"):
        with torch.no_grad():
            found["inference"] = model(**packed)
    if case == "inference":
        with torch.no_grad():
            found["with hidden_states"] = model(**packed, output_hidden_states=True)
        return digests(found)
    if case == "checkpointing":
        model.gradient_checkpointing_enable()
    if case == "last layer trained":
        model.requires_grad_(False)
        model.encoder.layers[-1].requires_grad_()
    out = model(**packed)
    torch.autograd.backward(list(out.values()), [normal(x.shape, seed) for seed, x in enumerate(out.values(), 1)])
    found |= {"training": out, "gradient": {name: x.grad for name, x in model.named_parameters()}}
    return digests(found)


def pixel_bits(threads: int) -> dict[str, str | None]:
    """The processor's pixels, and what packs, unpacks and cuts them."""
    torch.set_num_threads(threads)
    rng = np.random.default_rng(0)
    images = {}
    for mode in ("RGB", "L", "1", "RGBA", "LA", "P", "CMYK", "I;16"):
        for width, height in ((641, 427), (31, 639), (1200, 800), (20, 33)):
            noise = rng.integers(0, 256, (height, width, 4), dtype=np.uint8)
            if mode == "I;16":
                images[mode, width] = Image.fromarray(noise.view(np.uint16)[..., 0])
            else:
                images[mode, width] = Image.fromarray(noise if "A" in mode else noise[..., :3].copy()).convert(mode)
    settings: dict[str, dict] = {
        "as it is": {},
        "1024 patches": {"max_num_patches": 1024},
        "over white": {"do_convert_rgb": True, "patch_size": 14},
        "bicubic": {"resample": Image.Resampling.BICUBIC, "max_num_patches": 64},
        "not normalised": {"do_normalize": False},
    }
    found: dict = {}
    for name, arguments in settings.items():
        found[name] = Siglip2PackedImageProcessor(**arguments)(list(images.values()))
    some = [image for (mode, _), image in images.items() if mode == "RGB"]
    batch = found["video"] = Siglip2PackedImageProcessor()(some, videos=[some[:1] * 2], temporal="joint")

    grids, rows = batch["grid_thw"], batch["pixel_values"]
    found["unpack"] = alone = unpack(rows, grids)
    found["unpack padded"] = padded, mask = unpack(rows, grids, padded=True)
    found["pack"] = pack(alone, grids)
    found["pack joint"] = pack(alone, grids, temporal="joint")
    found["pack padded"] = pack(padded, grids, pixel_attention_mask=mask)
    found["pack spatial_shapes"] = pack(padded[:-1], pixel_attention_mask=mask[:-1], spatial_shapes=grids[:-1, 1:])
    found["convert_to_packing_format"] = convert_to_packing_format(normal((3, 3, 64, 48), 0), 16)
    return digests(found)


def normal(shape, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_pack(model, grids: list) -> PackedPatches:
    """Patches from a seed, in the model's dtype, on its device."""
    config = model.config
    patches = normal((sum(t * h * w for t, h, w in grids), config.patch_size**2 * config.num_channels), 0)
    return PackedPatches(patches.to(model.dtype), grids).to(model.device)


# speed, host, start --------------------------------------------------------------------------------------------------


class Step:
    """The loaded model and the step to run: `mode` is forward, train (forward and backward) or either in CUDA graphs,
    cudagraph and cudagraph_train."""

    model: Siglip2PackedVisionModel
    mode: str
    device: torch.device

    def load(self, ckpt: str, device: str, dtype: str) -> None:
        self.device = torch.device(device)
        model = Siglip2PackedVisionModel.from_pretrained(ckpt, dtype=dtype, vision_use_head=False)
        self.model = model.to(self.device).train()
        self.wait()

    def prepare(self, grids: list, mode: str) -> None:
        self.drop_gradients()
        self.mode = mode
        self.call = CUDAGraphs(self.model) if mode.startswith("cudagraph") else self.model
        packed = make_pack(self.model, grids)
        self.grad = normal((len(packed["pixel_values"]), self.model.config.hidden_size), 1).to(packed["pixel_values"])
        self.inputs = dict(packed)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def __call__(self) -> torch.Tensor:
        """Token features."""
        if self.mode in ("forward", "cudagraph"):
            with torch.no_grad():
                return self.call(**self.inputs)["last_hidden_state"]
        self.drop_gradients()
        out = self.call(**self.inputs)["last_hidden_state"]
        out.backward(self.grad)
        return out

    def drop_gradients(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = None

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


step = Step()


def load(ckpt: str, device: str, dtype: str) -> None:
    step.load(ckpt, device, dtype)


def prepare(grids: list, mode: str) -> None:
    step.prepare(grids, mode)


def results() -> dict[str, torch.Tensor]:
    features = step().detach()
    gradients = {name: x.grad for name, x in step.model.named_parameters() if x.grad is not None}
    return {"features": features} | gradients


def keep(path: str) -> None:
    """Writes features and gradients of a step."""
    torch.save({name: x.cpu() for name, x in results().items()}, path)


def compare(path: str) -> dict:
    """Relative errors of features and of all gradients together, against those that the other tree kept."""
    theirs, ours = torch.load(path, map_location=step.device), results()
    if theirs.keys() != ours.keys():
        raise ValueError(f"tensors of one tree only: {sorted(theirs.keys() ^ ours.keys())}")
    same = sum(torch.equal(ours[name], theirs[name]) for name in ours)
    errors = {}
    for kind, names in (("features", ["features"]), ("gradients", [x for x in ours if x != "features"])):
        if names:  # together: the keys' biases have gradients of rounding alone
            squares = [((ours[x].double() - theirs[x].double()).square().sum(), theirs[x].double().square().sum())
                       for x in names]  # fmt: skip
            difference, whole = (sum(x).item() for x in zip(*squares))
            errors[kind] = (difference / whole) ** 0.5
    return {"same": same, "tensors": len(ours), "errors": errors}


def settle() -> None:
    """Gives the memory back that comparing took, so that both trees begin alike."""
    step.drop_gradients()
    gc.collect()
    if step.device.type == "cuda":
        torch.cuda.empty_cache()


def sample() -> list[float]:
    """Milliseconds of a block of steps, after a block to warm up; see `siglip2_packed.bench.steady_milliseconds`."""
    milliseconds(1)
    return milliseconds(3)


def milliseconds(samples: int) -> list[float]:
    """Of at least so many steps, and of those of `WARM_UP` seconds; the host is at most two ahead of the device."""
    begin = time.perf_counter()
    if step.device.type != "cuda":
        stamps = [begin]
        while len(stamps) <= samples or stamps[-1] - begin < WARM_UP:
            step()
            stamps.append(time.perf_counter())
        return [(after - before) * 1e3 for before, after in itertools.pairwise(stamps)]
    events = [torch.cuda.Event(enable_timing=True)]
    events[0].record()
    while len(events) <= samples or time.perf_counter() - begin < WARM_UP:
        step()
        events.append(torch.cuda.Event(enable_timing=True))
        events[-1].record()
        events[max(0, len(events) - 3)].synchronize()
    step.wait()
    return [before.elapsed_time(after) for before, after in itertools.pairwise(events)]


def host() -> dict[str, int]:
    """What the host does for one warm step: the least of three counts, as a collection of garbage may come between."""
    for _ in range(3):
        step()
    step.wait()
    counts = [python_calls() for _ in range(3)]
    found = {"Python calls": min(x["call"] for x in counts), "calls into C": min(x["c_call"] for x in counts)}
    if step.device.type == "cuda":
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        step()
        found["allocations"] = torch.cuda.memory_stats()["allocation.all.allocated"] - before
        step.wait()
        found |= launches()
    return found


def python_calls() -> collections.Counter:
    """Backward on CUDA runs in autograd's own thread: that is counted too, or else backward runs in this one."""
    counts: collections.Counter = collections.Counter()

    def count(frame, event, argument):
        counts[event] += 1

    profile = getattr(threading, "setprofile_all_threads", None)  # Python 3.12
    one_thread = contextlib.nullcontext() if profile else torch.autograd.set_multithreading_enabled(False)
    profile = profile or sys.setprofile
    gc.collect()
    gc.disable()
    try:
        with one_thread:
            profile(count)
            step()
            profile(None)
    finally:
        gc.enable()
    step.wait()
    return counts


def launches() -> dict[str, int]:
    """By the runtime's and the driver's calls, and by what then ran on the device."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    for _ in range(2):  # the profiler sets itself up in the first
        with torch.profiler.profile(activities=activities) as profile:
            step()
            step.wait()
    events = [(event.name, event.device_type == torch.autograd.DeviceType.CUDA) for event in profile.events()]
    calls = [name for name, on_device in events if not on_device]
    return {
        "kernel launches": sum(bool(re.match(r"cu(da)?Launch\w*Kernel", name)) for name in calls),
        "copies and fills": sum(bool(re.match(r"cu(da)?Mem(cpy|set)", name)) for name in calls),
        "kernels run": sum(on_device and not re.match("Mem(cpy|set)", name) for name, on_device in events),
    }


def start(grids: list) -> dict[str, float]:
    """Seconds, in a process that has computed nothing yet, to the end of the first forward and of the first training
    step after it."""
    step.prepare(grids, "forward")
    step.wait()
    seconds, begin = {}, time.perf_counter()
    for mode in ("forward", "train"):
        step.mode = mode
        step()
        step.wait()
        seconds[mode] = time.perf_counter() - begin
    return seconds


def bulk(provider: str, device: str, **arguments) -> dict:
    """What the tree's own bulk.py measures of one of its providers."""
    sys.path.insert(0, str(Path(where()).parent / "benchmarks"))
    from bulk import measured

    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return measured(provider, device=device, **arguments)


def where() -> str:
    return str(Path(siglip2_packed.__file__).parent)


COMMANDS = {
    x.__name__: x
    for x in (where, model_bits, pixel_bits, load, prepare, keep, compare, settle, sample, host, start, bulk)
}


def main() -> None:
    logging.disable_progress_bar()
    connection = Connection(int(sys.argv[1]))
    with contextlib.suppress(EOFError):  # the parent is done
        while True:
            command, arguments = connection.recv()
            connection.send(COMMANDS[command](**arguments))


if __name__ == "__main__":
    main()
