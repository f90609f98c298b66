"""Two processes of one gloo group, and a task that they train, to be compared with one process that trains it alone."""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import time
import traceback
from multiprocessing.connection import wait
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import FullyShardedDataParallel

from siglip2_packed import PackedPatches, SigLip2NaflexVisionTower, Siglip2PackedVisionModel
from siglip2_packed.parallel import mean_over_ranks

SECONDS = 120
IMAGES = [(1, 13, 19), (1, 7, 1), (2, 3, 4), (1, 8, 32), (1, 2, 3)]
UNEVEN = IMAGES[:3], IMAGES[3:]  # a rank's images, then the other's
NO_IMAGES = IMAGES, []
TOKENS = dict(vision_use_head=False)


class Ranks:
    """`ranks(function, *args)` runs a module-level function on every rank -> its results, in the order of ranks."""

    def __init__(self, world_size: int = 2):
        self.world_size = world_size
        self.processes: list[Any] = []

    def __call__(self, function, *args, **kwargs) -> list[Any]:
        if not self.processes:
            self._start()
        for pipe in self.pipes:
            pipe.send((function, args, kwargs))
        results: dict[int, Any] = {}
        errors: list[str] = []
        waiting = dict(zip(self.pipes, range(self.world_size)))
        deadline = time.monotonic() + SECONDS
        while waiting and (ready := wait(list(waiting), deadline - time.monotonic())):
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    error, results[rank] = pipe.recv()
                except EOFError:
                    error = "the process died"
                if error:
                    errors.append(f"rank {rank}: {error}")
                    deadline = time.monotonic() + 2  # the other may wait for this one
        errors += [f"rank {rank} did not finish" for rank in waiting.values()]
        if errors:
            self.stop()  # the group is of no use any more
            raise AssertionError("\n".join(errors))
        return [results[rank] for rank in range(self.world_size)]

    def _start(self) -> None:
        context = mp.get_context("spawn")
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        self.pipes = []
        for rank in range(self.world_size):
            pipe, theirs = context.Pipe()
            process = context.Process(target=_work, args=(rank, self.world_size, port, theirs), daemon=True)
            process.start()
            self.pipes.append(pipe)
            self.processes.append(process)

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.processes = []


def _work(rank: int, world_size: int, port: int, pipe) -> None:
    os.environ.update({
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "localhost", "MASTER_PORT": str(port),
    })  # fmt: skip
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    while True:
        function, args, kwargs = pipe.recv()
        try:
            pipe.send((None, function(*args, **kwargs)))
        except BaseException:
            pipe.send((traceback.format_exc(), None))


class Task(torch.nn.Module):
    """A tower, called once or more a step, and a trained scale over its features: there to train if it is frozen."""

    def __init__(
        self,
        folder,
        *,
        pooled=False,
        calls=1,
        trains="all",
        checkpointing=False,
        llava=False,
        dtype=torch.float32,
        **kwargs,
    ):
        super().__init__()
        if llava:
            self.tower = SigLip2NaflexVisionTower(folder, SimpleNamespace(mm_tunable_parts="mm_vision_tower")).to(dtype)
        else:
            self.tower = Siglip2PackedVisionModel.from_pretrained(folder, dtype=dtype, **kwargs)
        self.tower.train()
        self.scale = torch.nn.Parameter(torch.linspace(-1, 1, self.tower.config.hidden_size))
        self.pooled, self.calls = pooled, calls
        last = f"layers.{len(self.model.encoder.layers) - 1}."
        for name, parameter in self.tower.named_parameters():
            parameter.requires_grad_(trains == "all" or (trains == "last layer" and last in name))
        if checkpointing:
            self.model.gradient_checkpointing_enable()

    @property
    def model(self):
        """The packed model: the tower, or what a LLaVA tower holds."""
        return getattr(self.tower, "vision_tower", self.tower)

    def features(self, packed):
        if self.model is not self.tower:
            return self.tower(packed["pixel_values"], grid_thw=packed["grid_thw"])
        out = self.tower(**packed)
        return out.pooler_output if self.pooled else out.last_hidden_state

    def forward(self, packed):
        """-> the sum of this pack's loss terms, and their number."""
        features = torch.cat([self.features(packed) for _ in range(self.calls)])
        return (features.float() * self.scale).tanh().sum(), len(features)


def pack(images):
    """An image has the same patches on whatever rank it is."""
    rows = [torch.randn(t * h * w, 48, generator=torch.Generator().manual_seed(100 * h + w)) for t, h, w in images]
    return PackedPatches(torch.cat(rows) if rows else torch.zeros(0, 48), images)


def steps(task, packed, mean):
    """Two steps of SGD -> losses, and the parameters after them, whatever shards or wraps them."""
    optimizer = torch.optim.SGD([p for p in task.parameters() if p.requires_grad], lr=0.3)
    losses = []
    for _ in range(2):
        loss = mean(*task(packed))
        loss.backward()
        # where FSDP1 keeps original parameters, those of another rank's shard are empty here
        assert all(p.grad is not None for p in task.parameters() if p.requires_grad and p.numel())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, parameters_of(task)


def parameters_of(module):
    parameters = {}
    fsdp1 = isinstance(module, FullyShardedDataParallel)
    with module.summon_full_params(module) if fsdp1 else contextlib.nullcontext():
        for name, parameter in module.named_parameters():
            full = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
            name = name.removeprefix("module.").replace("_fsdp_wrapped_module.", "")
            parameters[name] = full.detach().double().numpy().copy()
    return parameters


def train(engine, folder, images, **kwargs):
    """On a rank."""
    task = engine(Task(folder, **kwargs))
    return steps(task, pack(images[dist.get_rank()]), mean_over_ranks)


@functools.cache
def train_alone(folder, **kwargs):
    """What two ranks have to come to: float64 training of one model on the images of both."""
    task = Task(folder, dtype=torch.float64, **kwargs).double()
    start = parameters_of(task)
    packed = pack(IMAGES).to(torch.float64)
    return start, *steps(task, packed, lambda total, count: total / count)


def check(results, expected, bound=1e-5):
    """Losses and updates of both ranks against `train_alone`."""
    start, losses, parameters = expected
    np.testing.assert_allclose(np.mean([losses for losses, _ in results], axis=0), losses, rtol=bound, atol=bound)
    largest = max(np.linalg.norm(parameters[name] - start[name]) for name in parameters)
    for _, ours in results:
        assert ours.keys() == parameters.keys()
        for name, value in ours.items():
            moved = np.linalg.norm(parameters[name] - start[name])
            error = np.linalg.norm(value - parameters[name])
            # a bias of k has a gradient of rounding only; each step rounds the parameters themselves to float32
            most = bound * max(moved, 1e-2 * largest) + 1.2e-7 * np.linalg.norm(value)
            assert error <= most, f"{name}: moved {moved:.1e}, off by {error:.1e}, {most:.1e} allowed"
