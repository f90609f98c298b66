"""A model as pieces between hidden states, and backward piece by piece, as graphs of several layers are made of it.

Shapes: T patches, P patch_dim, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from siglip2_packed.buckets import Metadata
from siglip2_packed.ops.attention import VarlenAttention
from siglip2_packed.ops.runtime.aside import Aside, Room


class Piece(NamedTuple):
    """A part of the model that makes one hidden state of another."""

    run: Callable[[Tensor], Tensor]
    module: nn.Module
    again: bool = False
    """Whether it runs once more in backward, instead of keeping its activations."""

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those that want a gradient."""
        return [p for p in self.module.parameters() if p.requires_grad]


def pieces_of(model: Any, metadata: Metadata, attention: VarlenAttention) -> list[Piece]:
    """From patches `[T, P]` to `last_hidden_state`."""
    embed = partial(model.embeddings, places=metadata.places, invariant=attention.invariant)
    pieces = [Piece(as_now(embed), model.embeddings)]
    for layer in model.encoder.layers:
        again = layer.gradient_checkpointing and layer.training
        pieces.append(Piece(as_now(partial(layer.forward, attention=attention)), layer, again))
    norm = getattr(model, "post_layernorm", None)
    return pieces if norm is None else [*pieces, Piece(as_now(norm), norm)]


def as_now(function: Callable) -> Callable:
    """A function under the autocast of now, without its memory of weights, which graphs cast with every replay."""
    if not torch.is_autocast_enabled("cuda"):
        return function
    return torch.autocast("cuda", torch.get_autocast_dtype("cuda"), cache_enabled=False)(function)


class Run(NamedTuple):
    """What a piece has left for its backward."""

    piece: Piece
    x: Tensor
    out: Tensor


def forward(pieces: Sequence[Piece], x: Tensor, learns: bool = False) -> tuple[list[Run], Tensor]:
    """learns: whether x wants a gradient."""
    runs: list[Run] = []
    for piece in pieces:
        x = x.detach().requires_grad_(learns)
        learns = learns or bool(piece.parameters)
        with torch.set_grad_enabled(learns and not piece.again):
            out = piece.run(x)
        if learns:
            runs.append(Run(piece, x, out))
        x = out
    return runs, x.detach()


class Found(NamedTuple):
    """Gradients of a piece's parameters, and where most of them are."""

    gradients: list[tuple[nn.Parameter, Tensor]]
    room: Room


def backward(
    runs: list[Run], grad: Tensor, aside: Aside, check: Callable[[Tensor], None] = lambda out: None
) -> tuple[Tensor | None, list[Found]]:
    """From the gradient of the last run's result: that of the first one's x, if it wants one, and of all parameters.

    Empties `runs`, whose activations are not kept longer than they are needed. `check` sees each result.
    """
    found: list[Found] = []
    dx: Tensor | None = grad
    while runs:
        piece, x, out = runs.pop()
        parameters = piece.parameters
        if piece.again:
            with torch.enable_grad():
                out = piece.run(x)
        check(out)
        wanted = [x, *parameters] if x.requires_grad else parameters
        room = Room(parameters, grad)
        with aside.gradients_in(room):
            gradients = torch.autograd.grad(out, wanted, dx, allow_unused=True)
        dx, *rest = gradients if x.requires_grad else (None, *gradients)
        found.append(Found([(p, g) for p, g in zip(parameters, rest) if g is not None], room))
    return dx, found
