"""A layer's arithmetic on its weights, the element-wise work fused into fewer passes over memory.

The same computation as the modules of `encoder`, which say when their weights tell all (`plain_weights`); no module is
known here. `infer` runs all layers for inference; `train` runs them with gradients, backward written out, so that
outputs of LayerNorm and GELU and, of many rows, the sum before layer_norm2 are made again in backward instead of being
kept.

Shapes: T rows, D hidden size, F MLP width, H heads, K head_dim.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import operator
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from siglip2_packed.ops.attention import VarlenAttention
from siglip2_packed.ops.layer import Training, for_gradient, for_inference, for_training
from siglip2_packed.ops.runtime import choice
from siglip2_packed.ops.runtime.aside import Aside, beside, is_beside, product_over_rows
from siglip2_packed.ops.runtime.function import Function
from siglip2_packed.ops.runtime.memory import alias, shared
from siglip2_packed.ops.runtime.once import once_differentiable
from siglip2_packed.ops.runtime.tracing import alive

_weight_gradients: ContextVar[Aside | None] = ContextVar("weight_gradients", default=None)


@contextlib.contextmanager
def weight_gradients(aside: Aside | None) -> Iterator[None]:
    """Layers that run within it make the gradients of their weights there, in backward; who runs it has to `join`."""
    before = _weight_gradients.set(aside)
    try:
        yield
    finally:
        _weight_gradients.reset(before)


class NormQKV(NamedTuple):
    """Weights of a layer's first part, their gradients, or whether they want one."""

    norm_weight: Any = None
    norm_bias: Any = None
    q_weight: Any = None
    q_bias: Any = None
    k_weight: Any = None
    k_bias: Any = None
    v_weight: Any = None
    v_bias: Any = None


class ProjectMLP(NamedTuple):
    """The same of its second part, behind attention."""

    out_weight: Any = None
    out_bias: Any = None
    norm_weight: Any = None
    norm_bias: Any = None
    fc1_weight: Any = None
    fc1_bias: Any = None
    fc2_weight: Any = None
    fc2_bias: Any = None


class LayerWeights(NamedTuple):
    """All that a layer computes with."""

    first: NormQKV
    second: ProjectMLP
    eps: tuple[float, float]
    """Of both norms."""
    head_dim: int


class Norm(NamedTuple):
    weight: Tensor
    bias: Tensor
    eps: float


@torch.no_grad()
def infer(
    layers: Sequence[LayerWeights], hidden_states: Tensor, attention: VarlenAttention, norm: Norm | None = None
) -> Tensor:
    """`[T, D]` -> `[T, D]` after all layers and `norm`, without gradients.

    Both residual sums of a layer are products that add to the stream in place. Their biases wait: the stream lacks
    the sum of the biases so far, which each LayerNorm adds in float32.
    """
    x = hidden_states.clone()
    by = for_inference(x, len(layers[0].second.fc1_bias), attention.invariant)
    waiting, late = _infer_layers(layers, x, attention, by)
    if norm is not None:
        return by.layer_norm(x, *norm, waiting, late)[0]
    return x.add_(waiting + late)


def _infer_layers(layers, x, attention, by):
    """x after all layers, but for the sum `[D]` of the biases before the last one, and the last."""
    waiting = late = shape = None
    for first, second, (eps1, eps2), head_dim in layers:
        if shape != (3 * first.q_weight.shape[0], second.fc1_bias.shape[0], head_dim):
            shape = 3 * first.q_weight.shape[0], second.fc1_bias.shape[0], head_dim
            space = _Workspace.of(x, *shape, first.q_weight.data_ptr() in _joined_memory)
            attend = attention.over(space.heads, space.attended)
        weight, bias = _joined(first, space.joined)
        normed, waiting = by.layer_norm(x, first.norm_weight, first.norm_bias, eps1, waiting, late, space.norm1)
        by.linear(normed, weight, bias, space.qkv)
        by.add_product_(x, attend().flatten(1), second.out_weight)
        normed, waiting = by.layer_norm(
            x, second.norm_weight, second.norm_bias, eps2, waiting, second.out_bias, space.norm2
        )
        by.add_product_(x, by.linear_gelu(normed, second.fc1_weight, second.fc1_bias, space.wide), second.fc2_weight)
        late = second.fc2_bias
    return waiting, late


class _Workspace(NamedTuple):
    """Memory for what lies between a layer's products, made once for all layers; results share it by turns."""

    norm1: tuple[Tensor, Tensor]  # [T, D], and [D] in float32 for the biases that wait
    qkv: Tensor  # [T, 3 H K]
    heads: Tensor  # [T, 3, H, K], the same
    attended: Tensor  # [T, H, K]
    norm2: tuple[Tensor, Tensor]
    wide: Tensor  # [T, F]
    joined: tuple[Tensor | None, Tensor | None]  # [3 H K, D], [3 H K]: for projections that do not lie side by side

    @classmethod
    def of(cls, x: Tensor, width: int, F: int, head_dim: int, are_joined: bool) -> _Workspace:
        """For x `[T, D]`; width: that of q, k and v together."""
        (T, D), H = x.shape, width // 3 // head_dim
        narrow, wide = x.new_empty(T * max(D, H * head_dim)), x.new_empty(T * max(width, F))
        sums = torch.empty((2, D), dtype=torch.float32, device=x.device)
        normed, qkv = _within(narrow, (T, D)), _within(wide, (T, width))
        heads, attended = qkv.view(T, 3, H, head_dim), _within(narrow, (T, H, head_dim))
        joined = (None, None) if are_joined else (x.new_empty(width, D), x.new_empty(width))
        return cls((normed, sums[0]), qkv, heads, attended, (normed, sums[1]), _within(wide, (T, F)), joined)


def layer(weights: LayerWeights, hidden_states: Tensor, attention: VarlenAttention) -> Tensor:
    """`[T, D]` -> `[T, D]` after one layer, differentiable once."""
    return train([weights], hidden_states, attention)


def train(layers: Sequence[LayerWeights], hidden_states: Tensor, attention: VarlenAttention) -> Tensor:
    """`[T, D]` -> `[T, D]` after all layers, of one width, differentiable once."""
    x, T = hidden_states, hidden_states.shape[0]
    by = for_training(x, len(layers[0].second.fc1_bias), torch.is_grad_enabled(), attention.invariant)
    if attention.written_out and T:
        for some in _at_once(layers, choice.layers_at_once(T)):
            weights = [weight for first, second, _, _ in some for weight in (*first, *second)]
            x = _Layers.apply(alive(x), attention, by, [layer[2:] for layer in some], *weights)
        return x
    for first, second, (eps1, eps2), head_dim in layers:
        x, qkv = _NormQKV.apply(x, by, eps1, *first)
        attended = attention.qkvpacked(qkv.unflatten(1, (3, -1, head_dim))).flatten(1)
        x = _ProjectMLP.apply(x, attended, by, eps2, *second)
    return x


def _at_once(layers: Sequence[LayerWeights], most: int) -> Iterator[Sequence[LayerWeights]]:
    return (layers[first : first + most] for first in range(0, len(layers), most))


def _without_autocast(backward: Any) -> Any:
    """Backward in the dtypes of forward, which ran without autocast, also where somebody calls it within autocast."""

    @functools.wraps(backward)
    def run(ctx, grad, *grads):
        device = grad.device.type
        if not (torch._C._is_autocast_available(device) and torch.is_autocast_enabled(device)):
            return backward(ctx, grad, *grads)
        with torch.autocast(device, enabled=False):
            return backward(ctx, grad, *grads)

    return run


class _Layers(Function):
    """All of some layers around our own attention: one function costs the host less than one a layer, or three."""

    @staticmethod
    def forward(ctx, x, attention, by, kinds, *weights):
        """kinds: eps of both norms, and head_dim, of each."""
        of_x, _, _, _, *needed = ctx.needs_input_grad
        lowest = 0 if of_x else [*needed, True].index(True) // PER_LAYER
        recorded = by.layer_norm_backward_ is not None
        ctx.lowest = lowest if recorded else len(kinds)  # that takes part in backward
        saved: list[Any] = []
        for number, (eps, head_dim) in enumerate(kinds):
            first, second = parts(weights[number * PER_LAYER :][:PER_LAYER])
            qkv = _norm_qkv(by, x, first, eps[0]).view(x.shape[0], 3, -1, head_dim)
            out, low, lse = attention.forward(qkv, gradients=number >= ctx.lowest)
            result, wide, update = _project_mlp(by, x, out.flatten(1), second, eps[1])
            if number >= ctx.lowest:
                saved += x, qkv, out, low, lse, wide, update, *_used_backward(first), *_used_backward(second)
            x = result
        ctx.save_for_backward(*saved)
        ctx.attention, ctx.by, ctx.kinds, ctx.aside = attention, by, kinds, _weight_gradients.get()
        return x

    @staticmethod
    @_without_autocast
    @once_differentiable
    def backward(ctx, dout):
        saved, by = list(ctx.saved_tensors), for_gradient(ctx.by, dout)
        _, _, _, _, *needed = ctx.needs_input_grad
        gradients: list[Tensor | None] = [None] * len(needed)
        for number in reversed(range(ctx.lowest, len(ctx.kinds))):
            own = slice(number * PER_LAYER, (number + 1) * PER_LAYER)
            saved, of_layer = saved[:-SAVED], saved[-SAVED:]
            with contextlib.nullcontext() if ctx.aside is None else ctx.aside.layer():
                eps, _ = ctx.kinds[number]
                dout, gradients[own] = _layer_backward(ctx.attention, by, eps, dout, needed[own], *of_layer)
        return dout, None, None, None, *gradients


PER_LAYER = len(NormQKV._fields) + len(ProjectMLP._fields)
SAVED = 7 + PER_LAYER


def _layer_backward(attention, by, eps, dout, needed, x, qkv, out, low, lse, wide, update, *weights):
    """The gradient of x, and those of the weights."""
    (first, second), (needs_first, needs_second) = parts(weights), parts(needed)
    spare, (eps1, eps2), attended = _spare(wide), eps, out.flatten(1)
    dh, dattended, dsecond = _project_mlp_backward(
        by, needs_second, dout, x, attended, wide, update, spare, second, eps2
    )
    dqkv = torch.empty_like(qkv) if is_beside() else _within(spare, qkv.shape)
    attention.backward(dattended.view(out.shape), qkv, out, low, lse, dqkv)
    place = dattended if dattended.shape == x.shape else None  # heads may have been pruned
    dx, dfirst = _norm_qkv_backward(by, needs_first, dh, dqkv.flatten(1), x, first, eps1, place)
    return dx, (*dfirst, *dsecond)


class _NormQKV(torch.autograd.Function):
    """x -> x itself, for the residual sum, and `[T, 3D]` = LayerNorm(x) Wᵀ + b.

    Passing x on saves a pass: the gradients of its two uses meet in the norm's backward.
    """

    @staticmethod
    def forward(ctx, x, by, eps, *weights):
        first = NormQKV(*weights)
        ctx.save_for_backward(x, *_used_backward(first))
        ctx.by, ctx.eps = by, eps
        return x, _norm_qkv(by, x, first, eps)

    @staticmethod
    @_without_autocast
    @once_differentiable
    def backward(ctx, dx, dqkv):
        x, *weights = ctx.saved_tensors
        _, _, _, *needed = ctx.needs_input_grad
        by = for_gradient(ctx.by, dqkv)
        dx, dfirst = _norm_qkv_backward(by, NormQKV(*needed), dx, dqkv, x, NormQKV(*weights), ctx.eps)
        return dx, None, None, *dfirst


class _ProjectMLP(torch.autograd.Function):
    """h = x + attended W_oᵀ + b_o; h + fc2(gelu(fc1(LayerNorm(h))))."""

    @staticmethod
    def forward(ctx, x, attended, by, eps, *weights):
        second = ProjectMLP(*weights)
        out, wide, update = _project_mlp(by, x, attended, second, eps)
        ctx.save_for_backward(x, attended, wide, update, *_used_backward(second))
        ctx.by, ctx.eps = by, eps
        return out

    @staticmethod
    @_without_autocast
    @once_differentiable
    def backward(ctx, dout):
        x, attended, wide, update, *weights = ctx.saved_tensors
        _, _, _, _, *needed = ctx.needs_input_grad
        by, second = for_gradient(ctx.by, dout), ProjectMLP(*weights)
        dx, dattended, dsecond = _project_mlp_backward(
            by, ProjectMLP(*needed), dout, x, attended, wide, update, _spare(wide), second, ctx.eps
        )
        return dx, dattended, None, None, *dsecond


def parts(values: Sequence) -> tuple[NormQKV, ProjectMLP]:
    """What belongs to the first and to the second part, of values that were given one after another."""
    end = len(NormQKV._fields)
    return NormQKV(*values[:end]), ProjectMLP(*values[end:])


def _used_backward(weights: NormQKV | ProjectMLP) -> NormQKV | ProjectMLP:
    """Backward needs no biases of products, but for out_proj's, whose product it makes again."""
    w: Any = weights
    if type(weights) is NormQKV:
        return NormQKV(w.norm_weight, w.norm_bias, w.q_weight, None, w.k_weight, None, w.v_weight)
    return ProjectMLP(w.out_weight, w.out_bias, w.norm_weight, w.norm_bias, w.fc1_weight, None, w.fc2_weight)


# by: who computes. needs: which weights want a gradient. place, spare: memory that nobody needs any longer; it is in
# the last layer's backward that training takes the most.


def _spare(wide):
    """`wide` itself, unless backward may be asked for once more; else as much memory."""
    return torch.empty_like(wide) if torch._C._autograd._get_current_graph_task_keep_graph() else wide


def _within(spare, shape):
    """A contiguous tensor in spare memory, if there is enough."""
    if math.prod(shape) > spare.numel():
        return spare.new_empty(shape)
    strides = [*itertools.accumulate(shape[:0:-1], operator.mul, initial=1)][::-1]
    return spare.as_strided(shape, strides)  # one step; by slices and views it is three


def _norm_qkv(by: Training, x, first: NormQKV, eps):
    normed, _ = by.layer_norm(x, first.norm_weight, first.norm_bias, eps)
    return by.linear(normed, *_joined(first))


def _norm_qkv_backward(by, needs: NormQKV, dx, dqkv, x, first: NormQKV, eps, place=None) -> tuple[Tensor, NormQKV]:
    """dx: the gradient that reaches x past the norm."""
    grad = dqkv @ _side_by_side(first.q_weight, first.k_weight, first.v_weight)  # of the norm, then of x
    normed, sums = by.layer_norm_backward_(grad, dx, x, None, first.norm_weight, first.norm_bias, eps, place)
    dnorm_weight, dnorm_bias = sums.unbind()
    weights: Sequence[Tensor | None]
    biases: Sequence[Tensor | None]
    weights = biases = None, None, None
    with beside(dqkv, normed):
        if needs.q_weight or needs.k_weight or needs.v_weight:
            weights = product_over_rows(dqkv, normed).chunk(3)
        if needs.q_bias or needs.k_bias or needs.v_bias:
            biases = by.column_sums(dqkv).chunk(3)
    (q_weight, k_weight, v_weight), (q_bias, k_bias, v_bias) = weights, biases
    return grad, NormQKV(dnorm_weight, dnorm_bias, q_weight, q_bias, k_weight, k_bias, v_weight, v_bias)


def _project_mlp(by: Training, x, attended, second: ProjectMLP, eps):
    """The sum after the layer, what goes into GELU, and, of few rows, what was added before."""
    update: Tensor | None = by.linear(attended, second.out_weight, second.out_bias)
    normed, out = by.add_layer_norm(x, update, second.norm_weight, second.norm_bias, eps, second.fc2_bias)
    wide, active = by.linear_gelu_keep(normed, second.fc1_weight, second.fc1_bias)
    del normed
    if not choice.keeps_projected(x.shape[0]):
        update = None
    return by.add_product_(out, active, second.fc2_weight), wide, update


def _project_mlp_backward(
    by, needs: ProjectMLP, dout, x, attended, wide, update, spare, second: ProjectMLP, eps
) -> tuple[Tensor, Tensor, ProjectMLP]:
    """spare: of the size of wide, or wide itself. update: attended's projection; None: it is made again."""
    active = spare
    dwide, dfc1_bias = by.linear_gelu_backward(dout, second.fc2_weight, wide, active)
    with beside(dout, active):
        dfc2_weight = product_over_rows(dout, active) if needs.fc2_weight else None
    place = torch.empty_like(x) if is_beside() else _within(spare, x.shape)  # active is gone
    if update is None:
        update = by.linear(attended, second.out_weight, second.out_bias, place)
    dh = dwide @ second.fc1_weight  # after the norm, then before
    normed, sums = by.layer_norm_backward_(dh, dout, x, update, second.norm_weight, second.norm_bias, eps, place)
    dnorm_weight, dnorm_bias, dout_bias, dfc2_bias = sums.unbind()
    with beside(dwide, normed, dh, attended):
        dfc1_weight = by.product_over_rows(dwide, normed) if needs.fc1_weight else None
        del normed, dwide
        dout_weight = product_over_rows(dh, attended) if needs.out_weight else None
    gradients = ProjectMLP(
        out_weight=dout_weight,
        out_bias=dout_bias,
        norm_weight=dnorm_weight,
        norm_bias=dnorm_bias,
        fc1_weight=dfc1_weight,
        fc1_bias=dfc1_bias,
        fc2_weight=dfc2_weight,
        fc2_bias=dfc2_bias,
    )
    return dh, dh @ second.out_weight, gradients


_joined_memory: WeakValueDictionary[int, Tensor] = WeakValueDictionary()
"""Three projections side by side, by where they begin. They hold it: while it is there, so are they."""


@torch.inference_mode(False)
@torch.no_grad()
def join(*parameters: Tensor) -> None:
    """Moves three parameters of one shape side by side in memory, where one product reads all three.

    Each has a storage of its own: of tensors that share one, accelerate saves the first only. Nothing is moved that
    lies side by side, or whose memory others have as well: they (DeepSpeed, FSDP) write parameters there.
    """
    if not all(map(_movable, parameters)):
        return
    joined = _side_by_side(*parameters)
    if joined.data_ptr() == parameters[0].data_ptr():
        return
    _joined_memory[joined.data_ptr()] = joined
    before = [x.detach() for x in parameters]
    for parameter, part in zip(parameters, joined.chunk(len(parameters))):
        parameter.data = alias(part, holds=joined)
    if joined.is_cuda:
        torch.cuda.synchronize(joined.device)  # other streams may still read where they lay
    del before


def _movable(x: Tensor) -> bool:
    if x.device.type not in ("cpu", "cuda") or x.is_inference():
        return False
    return x.is_contiguous() and x.untyped_storage().nbytes() == x.nbytes > 0 and not shared(x)


def _joined(first: NormQKV, place: tuple[Tensor | None, Tensor | None] = (None, None)) -> tuple[Tensor, Tensor]:
    """Weight `[3D, D]` and bias `[3D]` of the three projections as one."""
    weight = _side_by_side(first.q_weight, first.k_weight, first.v_weight, place[0])
    return weight, _side_by_side(first.q_bias, first.k_bias, first.v_bias, place[1])


def _side_by_side(q: Tensor, k: Tensor, v: Tensor, place: Tensor | None = None) -> Tensor:
    """Three as one: themselves if they were joined, and are not seen another way since (`weight.data.t()`).

    Else a copy, in its place if it has one.
    """
    first = q.data_ptr()
    joined = _joined_memory.get(first)
    follow = joined is not None and k.data_ptr() == first + q.nbytes and v.data_ptr() == first + 2 * q.nbytes
    if follow and q.is_contiguous() and k.is_contiguous() and v.is_contiguous():
        return joined  # type: ignore[return-value]
    return torch.cat((q, k, v)) if place is None else torch.cat((q, k, v), out=place)
