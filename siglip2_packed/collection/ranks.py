"""The processes of one run, as torchrun starts them: what one of them decides, all hear."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist

T = TypeVar("T")


@contextmanager
def together() -> Iterator[None]:
    """Raises OSError if another process ends instead: with a full disk, with --strict at a broken image."""
    try:
        yield
    except RuntimeError as error:
        raise OSError("another process of this run has ended, and says why; --resume goes on") from error


class Ranks(NamedTuple):
    rank: int = 0
    world: int = 1

    @classmethod
    def of_torchrun(cls) -> Ranks:
        return cls(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))

    def join(self) -> None:
        if self.world > 1:
            dist.init_process_group("gloo", timeout=datetime.timedelta(days=30))

    def leave(self) -> None:
        """Returns once all ranks are here: the first to exit with 1 has torchrun end the others."""
        if self.world > 1:
            self.wait()
            dist.destroy_process_group()

    def wait(self) -> None:
        if self.world > 1:
            with together():
                dist.barrier()

    def first(self, function: Callable[[], T]) -> T:
        """What the function returns on rank 0, or the error it raises there, on every rank."""
        if self.world == 1:
            return function()
        told: list[Any] = [None, None]
        if self.rank == 0:
            try:
                told[0] = function()
            except (ValueError, OSError) as error:
                told[1] = error
        with together():
            dist.broadcast_object_list(told)
        if told[1] is not None:
            self.wait()  # nobody leaves before all have heard
            raise told[1]
        return told[0]

    def agree(self, settings: dict[str, Any]) -> None:
        """Raises ValueError if ranks were asked for different things."""
        if self.world == 1:
            return
        everyone: list[Any] = [None] * self.world
        with together():
            dist.all_gather_object(everyone, settings)
        for other, theirs in enumerate(everyone):
            for name in (name for name in settings if settings[name] != theirs[name]):
                raise ValueError(f"rank {other} has {name} {theirs[name]}, rank {self.rank} {settings[name]}")
