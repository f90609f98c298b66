"""Encoder layers with their element-wise work fused into fewer passes over memory.

The same computation as the modules of `encoder`, on their parameters, where nothing has been hung on those modules
(hooks, adapters, quantised weights, compilation): `applies` tells. `infer` runs all layers for inference; `layer` runs
one with gradients, its backward written out, so that outputs of LayerNorm and GELU and the sum before layer_norm2 are
made again in backward instead of being kept.

Shapes: T rows, D hidden size, F MLP width, H heads, K head_dim.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.module import _has_any_global_hook
from transformers.activations import ACT2FN

from siglip2_packed.attention import Siglip2PackedAttention
from siglip2_packed.ops.attention import varlen_attention_qkvpacked
from siglip2_packed.ops.columns import column_sums, product_over_rows
from siglip2_packed.ops.gelu import linear_gelu, linear_gelu_backward, linear_gelu_keep
from siglip2_packed.ops.layer_norm import add_layer_norm, layer_norm, layer_norm_backward_
from siglip2_packed.ops.segments import Segments
from siglip2_packed.ops.tracing import traced

GELU_TANH = type(ACT2FN["gelu_pytorch_tanh"])
PLAIN = (nn.Parameter, Tensor)
Norm = tuple[Tensor, Tensor, float]


@torch.no_grad()
def infer(layers, hidden_states: Tensor, segments: Segments, backend: str, norm: nn.LayerNorm | None = None) -> Tensor:
    """`[T, D]` -> `[T, D]` after all layers and `norm`, an unchanged module, without gradients.

    Both residual sums of a layer are products that add to the stream in place. Their biases wait: the stream lacks
    the sum of the biases so far, which each LayerNorm adds in float32.
    """
    waiting = bias = None  # the sum `[D]` of the biases before the last one, and the last
    x = hidden_states.clone()
    for block in layers:
        norm1, norm2, weights, biases = _parameters(block)
        normed, waiting = layer_norm(x, *norm1, waiting, bias)
        qkv = F.linear(normed, _cat(*weights[:3]), _cat(*biases[:3])).unflatten(1, (3, -1, _head_dim(block)))
        _add_product(x, _attend(qkv, segments, backend).flatten(1), weights[3])
        normed, waiting = layer_norm(x, *norm2, waiting, biases[3])
        _add_product(x, linear_gelu(normed, weights[4], biases[4]), weights[5])
        bias = biases[5]
    if norm is not None:
        return layer_norm(x, *_norm(norm), waiting, bias)[0]
    return x if bias is None else x.add_(waiting + bias)


def layer(block, hidden_states: Tensor, segments: Segments, backend: str) -> Tensor:
    """`[T, D]` -> `[T, D]` after one layer, differentiable once."""
    norm1, norm2, weights, biases = _parameters(block)
    first = *norm1, *weights[:3], *biases[:3]
    second = *norm2, *weights[3:], *biases[3:]
    head_dim = _head_dim(block)
    if backend == "triton" and len(hidden_states):
        return _Layer.apply(hidden_states, segments.cu_seqlens, segments.max_seqlen, head_dim, *first, *second)
    x, qkv = _NormQKV.apply(hidden_states, *first)
    attended = varlen_attention_qkvpacked(qkv.unflatten(1, (3, -1, head_dim)), segments, backend).flatten(1)
    return _ProjectMLP.apply(x, attended, *second)


def _leaves(block) -> list[nn.Module]:
    """layer_norm1, layer_norm2, q_proj, k_proj, v_proj, out_proj, fc1 and fc2, without nn.Module's slow lookup."""
    modules = block._modules
    attention, mlp = modules["self_attn"]._modules, modules["mlp"]._modules
    return [
        modules["layer_norm1"],
        modules["layer_norm2"],
        *(attention[name] for name in ("q_proj", "k_proj", "v_proj", "out_proj")),
        mlp["fc1"],
        mlp["fc2"],
    ]


def _parameters(block) -> tuple[Norm, Norm, list, list]:
    """weight, bias and eps of both norms; weights, and biases, of q_proj, k_proj, v_proj, out_proj, fc1 and fc2."""
    norm1, norm2, *linears = _leaves(block)
    weights, biases = ([module._parameters[name] for module in linears] for name in ("weight", "bias"))
    return _norm(norm1), _norm(norm2), weights, biases


def _head_dim(block) -> int:
    return block._modules["self_attn"].head_dim


def _attend(qkv: Tensor, segments: Segments, backend: str) -> Tensor:
    """varlen_attention_qkvpacked without gradients."""
    if backend != "triton" or not len(qkv):
        return varlen_attention_qkvpacked(qkv, segments, backend)
    from siglip2_packed.ops.triton import attention  # spares the checks, for which the dispatch has stood

    q, k, v = qkv.unbind(1)
    return attention.forward(q, k, v, segments.cu_seqlens, segments.max_seqlen, qkv.shape[3] ** -0.5)[0]


def _without_autocast(backward: Any) -> Any:
    """Backward in the dtypes of forward, which ran without autocast, also where somebody calls it within autocast."""

    @functools.wraps(backward)
    def run(ctx, grad, *grads):
        device = grad.device.type
        if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
            return backward(ctx, grad, *grads)
        with torch.autocast(device, enabled=False):
            return backward(ctx, grad, *grads)

    return run


class _Layer(torch.autograd.Function):
    """All of a layer around our own attention: one function costs the host less than three."""

    @staticmethod
    def forward(ctx, x, cu_seqlens, max_seqlen, head_dim, *parameters):
        from siglip2_packed.ops.triton import attention

        norm1, projections, norm2, linears = parameters[:3], parameters[3:9], parameters[9:12], parameters[12:]
        qkv = _norm_qkv(x, norm1, projections).view(len(x), 3, -1, head_dim)
        q, k, v = qkv.unbind(1)
        out, lse = attention.forward(q, k, v, cu_seqlens, max_seqlen, head_dim**-0.5)
        result, wide = _project_mlp(x, out.view(x.shape), norm2, linears)
        ctx.save_for_backward(
            x, qkv, out, lse, wide, cu_seqlens, *norm1[:2], *norm2[:2], *projections[:3], *linears[:4]
        )
        ctx.max_seqlen, ctx.eps = max_seqlen, (norm1[2], norm2[2])
        return result

    @staticmethod
    @_without_autocast
    @once_differentiable
    def backward(ctx, dout):
        from siglip2_packed.ops.triton import attention

        x, qkv, out, lse, wide, cu_seqlens, weight1, bias1, weight2, bias2, *linears = ctx.saved_tensors
        norm1, norm2 = (weight1, bias1, ctx.eps[0]), (weight2, bias2, ctx.eps[1])
        needs = ctx.needs_input_grad
        attended, spare = out.view(x.shape), _spare(wide)
        dh, dattended, *second = _project_mlp_backward(needs[16:], dout, x, attended, wide, spare, norm2, linears[3:])
        dqkv, scale = _within(spare, qkv.shape), out.shape[2] ** -0.5
        attention.write_gradients_qkvpacked(
            dqkv, dattended.view(out.shape), qkv, out, lse, cu_seqlens, ctx.max_seqlen, scale
        )
        dx, *first = _norm_qkv_backward(needs[7:13], dh, dqkv.view(len(x), -1), x, norm1, linears[:3], dattended)
        return dx, None, None, None, *first, *second


class _NormQKV(torch.autograd.Function):
    """x -> x itself, for the residual sum, and `[T, 3D]` = LayerNorm(x) Wᵀ + b.

    Passing x on saves a pass: the gradients of its two uses meet in the norm's backward.
    """

    @staticmethod
    def forward(ctx, x, norm_weight, norm_bias, eps, *projections):
        ctx.save_for_backward(x, norm_weight, norm_bias, *projections[:3])
        ctx.eps = eps
        return x, _norm_qkv(x, (norm_weight, norm_bias, eps), projections)

    @staticmethod
    @_without_autocast
    @once_differentiable
    def backward(ctx, dx, dqkv):
        x, norm_weight, norm_bias, *weights = ctx.saved_tensors
        norm = norm_weight, norm_bias, ctx.eps
        return _norm_qkv_backward(ctx.needs_input_grad[4:], dx, dqkv, x, norm, weights)


class _ProjectMLP(torch.autograd.Function):
    """h = x + attended W_oᵀ + b_o; h + fc2(gelu(fc1(LayerNorm(h))))."""

    @staticmethod
    def forward(ctx, x, attended, norm_weight, norm_bias, eps, *linears):
        out, wide = _project_mlp(x, attended, (norm_weight, norm_bias, eps), linears)
        ctx.save_for_backward(x, attended, wide, norm_weight, norm_bias, *linears[:4])
        ctx.eps = eps
        return out

    @staticmethod
    @_without_autocast
    @once_differentiable
    def backward(ctx, dout):
        x, attended, wide, norm_weight, norm_bias, *linears = ctx.saved_tensors
        norm = norm_weight, norm_bias, ctx.eps
        return _project_mlp_backward(ctx.needs_input_grad[5:], dout, x, attended, wide, _spare(wide), norm, linears)


# norm: weight, bias, eps. projections: weights, then biases, of q, k and v; linears: those of out, fc1 and fc2, of
# which backward needs the weights and the first bias. needs: which of the six want a gradient. place, spare: memory
# that nobody needs any longer. It is in the last layer's backward that training takes the most.


def _spare(wide):
    """`wide` itself, unless backward may be asked for once more; else as much memory."""
    return torch.empty_like(wide) if torch._C._autograd._get_current_graph_task_keep_graph() else wide


def _within(spare, shape):
    """A contiguous tensor in spare memory, if there is enough."""
    size = math.prod(shape)
    return spare.view(-1)[:size].view(shape) if size <= spare.numel() else spare.new_empty(shape)


def _norm_qkv(x, norm, projections):
    normed, _ = layer_norm(x, *norm)
    return F.linear(normed, _cat(*projections[:3]), _cat(*projections[3:]))


def _norm_qkv_backward(needs, dx, dqkv, x, norm, weights, place=None):
    """dx: the gradient that reaches x past the norm."""
    grad = dqkv @ _cat(*weights)  # of the norm, then of x
    weight, bias, eps = norm
    normed, sums = layer_norm_backward_(grad, dx, x, None, weight, bias, eps, place)
    dweights = (dqkv.t() @ normed).chunk(3) if any(needs[:3]) else [None] * 3
    dbiases = column_sums(dqkv).chunk(3) if any(needs[3:]) else [None] * 3
    return grad, *sums, None, *dweights, *dbiases


def _project_mlp(x, attended, norm, linears):
    """The sum after the layer, and what goes into GELU."""
    w_out, w_fc1, w_fc2, b_out, b_fc1, b_fc2 = linears
    update = F.linear(attended, w_out, b_out)
    weight, bias, eps = norm
    normed, out = add_layer_norm(x, update, weight, bias, eps, b_fc2)
    wide, active = linear_gelu_keep(normed, w_fc1, b_fc1)
    del update, normed
    return _add_product(out, active, w_fc2), wide


def _project_mlp_backward(needs, dout, x, attended, wide, spare, norm, linears):
    """spare: of the size of wide, or wide itself."""
    w_out, w_fc1, w_fc2, b_out = linears
    needs_w_out, needs_w_fc1, needs_w_fc2, *_ = needs
    active = spare
    dwide, db_fc1 = linear_gelu_backward(dout, w_fc2, wide, active)
    dw_fc2 = dout.t() @ active if needs_w_fc2 else None
    update = torch.addmm(b_out, attended, w_out.t(), out=_within(spare, x.shape))  # active is gone
    dh = dwide @ w_fc1  # after the norm, then before
    weight, bias, eps = norm
    normed, sums = layer_norm_backward_(dh, dout, x, update, weight, bias, eps, place=update)
    dw_fc1 = product_over_rows(dwide, normed) if needs_w_fc1 else None
    del normed, dwide
    dw_out = dh.t() @ attended if needs_w_out else None
    dattended = dh @ w_out
    dweight, dbias, db_out, db_fc2 = sums
    return dh, dattended, dweight, dbias, None, dw_out, dw_fc1, dw_fc2, db_out, db_fc1, db_fc2


def applies(block, hidden_states: Tensor) -> bool:
    """Whether a layer is what `encoder` built, so that its parameters say all that it computes."""
    return not _watched(hidden_states) and _pristine(block, hidden_states.dtype)


def may_infer(layers, hidden_states: Tensor) -> bool:
    """Whether `infer` computes what calling these layers one by one would."""
    if torch.is_grad_enabled() and (hidden_states.requires_grad or any(map(_trained, layers))):
        return False
    from siglip2_packed.encoder import Siglip2PackedEncoderLayer

    return not _watched(hidden_states) and all(
        type(block) is Siglip2PackedEncoderLayer and _pristine(block, hidden_states.dtype) and not _hooked(block)
        for block in layers
    )


def may_infer_with(norm, encoder, hidden_states: Tensor) -> bool:
    """Whether `infer` with this norm at the end computes what calling the encoder, and then the norm, would."""
    from siglip2_packed.encoder import Siglip2PackedEncoder

    return (
        not traced()
        and type(encoder) is Siglip2PackedEncoder
        and not _hooked(encoder)
        and norm is not None
        and _plain(norm, nn.LayerNorm, hidden_states.dtype)
        and not (torch.is_grad_enabled() and _trained(norm))
        and may_infer(encoder.layers, hidden_states)
    )


def _trained(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def _pristine(block, dtype: torch.dtype) -> bool:
    from siglip2_packed.encoder import Siglip2PackedMLP

    attention, mlp = block._modules["self_attn"], block._modules["mlp"]
    if type(attention) is not Siglip2PackedAttention or type(mlp) is not Siglip2PackedMLP:
        return False
    activation: Any = mlp._modules["activation_fn"]
    norm1, norm2, *linears = _leaves(block)
    return (
        type(activation) is GELU_TANH
        and all(_plain(x, nn.Linear, dtype) for x in linears)
        and _plain(norm1, nn.LayerNorm, dtype)
        and _plain(norm2, nn.LayerNorm, dtype)
        and not (_hooked(attention) or _hooked(mlp) or _hooked(activation))
    )


def _plain(module: nn.Module, kind: type, dtype: torch.dtype) -> bool:
    """An unchanged module whose weight and bias are plain tensors of the stream's dtype."""
    # FSDP1 lays views over the parameters; in a checkpoint's recomputation it takes the parameters away as well
    if type(module) is not kind or _hooked(module) or "weight" in module.__dict__:
        return False
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    return (
        type(weight) in PLAIN and type(bias) in PLAIN and weight.dtype is dtype and bias.dtype is dtype  # type: ignore
    )


def _hooked(module: nn.Module) -> bool:
    """Whether calling a module does more than its class's forward."""
    state = module.__dict__
    return bool(
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state
        or module._compiled_call_impl is not None
    )


def _watched(x: Tensor) -> bool:
    """Whether somebody follows the calls, or autocast or hooks of all modules change what they compute."""
    device = x.device.type
    return (
        traced()
        or (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device))
        or _has_any_global_hook()
    )


@torch.no_grad()
def join_projections(layers) -> None:
    """Moves q_proj, k_proj and v_proj of each layer side by side in memory, where one product reads all three.

    They stay three parameters with their names and values. Moving the model (`.to`) separates them again, which costs
    one copy of them a forward and no more.
    """
    for block in layers:
        projections = _projections(block.self_attn)
        if all(type(x) is nn.Linear for x in projections):
            for parameters in zip(*((x.weight, x.bias) for x in projections)):
                for parameter, part in zip(parameters, torch.cat(parameters).chunk(3)):
                    parameter.data = part


def _projections(attention) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    return attention.q_proj, attention.k_proj, attention.v_proj


def _cat(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Weights `[3D, D]` or biases `[3D]` of the three projections as one: themselves if they lie side by side."""
    step = q.numel() * q.element_size()
    side_by_side = k.data_ptr() == q.data_ptr() + step and v.data_ptr() == k.data_ptr() + step
    if side_by_side and q.untyped_storage().data_ptr() == v.untyped_storage().data_ptr() and q.is_contiguous():
        return q.detach().as_strided((3 * q.shape[0], *q.shape[1:]), q.stride())
    return torch.cat((q, k, v))


def _add_product(x: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    """x += rows Wᵀ, in place.

    On the CPU in two steps: its BLAS would add the product in parts, rounding each to the size of x.
    """
    return x.addmm_(rows, weight.t()) if x.is_cuda else x.add_(F.linear(rows, weight))


def _norm(norm) -> Norm:
    return norm._parameters["weight"], norm._parameters["bias"], norm.eps
