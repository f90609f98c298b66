"""What the attention tests share: random rows, the formula in float64, comparisons in which NaN fails.

On a machine with a CUDA device everything is on it; elsewhere kernels run in Triton's interpreter, in float32 and
float16 (its bfloat16 products are wrong).
"""

import contextlib
import itertools

import torch
import triton

from siglip2_packed.ops.attention import VarlenAttention, kernels
from siglip2_packed.ops.runtime import check, choice
from siglip2_packed.ops.segments import Segments

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
EXACT = 5e-6  # float32 against float64
PACKS = [[1, 15, 16], [17, 40, 3]]  # in float32, one tile a segment up to 32 rows, loops beyond
NAMES = "out", "dq", "dk", "dv"


def offsets(lengths, device=DEVICE):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def random_qkv(rows, H, K, dtype=torch.float32, seed=0, device=DEVICE):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 3, H, K, generator=generator).to(device, dtype)


def own(cu_seqlens, max_seqlen):
    """Our own attention of segments that only the device knows."""
    return VarlenAttention(Segments.on_device(cu_seqlens, max_seqlen), "triton")


def own_launches(qkv, cu_seqlens, max_seqlen, packed=False, gradients=True):
    """The names of our own kernels that run such a pack. Raises where none may."""
    T, _, H, K = qkv.shape
    S = len(cu_seqlens) - 1
    found = kernels.kernels(qkv.device, qkv.dtype, (T, H, K), S, max_seqlen, packed=packed, gradients=gradients)
    return [name for name, _ in found.launches]


@contextlib.contextmanager
def few_tiles(longest):
    """Tiles of half a segment, if there is more than one: Triton's interpreter takes its time for each."""
    tile = choice.Tile(*[triton.next_power_of_2(longest) // 2] * 2)
    launches = dict(attention_forward=[("triton", tile)], attention_backward=[("triton", (tile, tile))])
    with choice.forced(**launches) if longest > 64 and not CUDA else contextlib.nullcontext():
        yield


def loop(q, k, v, lengths, scale=None):
    """One segment after another in float64; rows beyond the last segment are zeros."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    outputs = []
    for q_s, k_s, v_s in zip(*(x[: sum(lengths)].double().split(lengths) for x in (q, k, v))):
        weights = torch.softmax(torch.einsum("qhk,shk->hqs", q_s, k_s) * scale, -1)
        outputs.append(torch.einsum("hqs,shk->qhk", weights, v_s))
    return torch.cat([*outputs, q[sum(lengths) :].double() * 0])


def pool_loop(q, k, v, lengths):
    outputs = []
    for k_s, v_s in zip(*(x[: sum(lengths)].double().split(lengths) for x in (k, v))):
        weights = torch.softmax(torch.einsum("hk,shk->hs", q.double(), k_s) * q.shape[-1] ** -0.5, -1)
        outputs.append(torch.einsum("hs,shk->hk", weights, v_s))
    return torch.stack(outputs)


def with_gradients(function, inputs, grad):
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(out.dtype))]


def written_out(attention, qkv, grad):
    """`[out, lse, dqkv]` of a fused projection, from `forward` and `backward`, without autograd."""
    dqkv = torch.full_like(qkv, float("nan"), memory_format=torch.contiguous_format)
    with torch.no_grad():
        out, low, lse = attention.forward(qkv, gradients=True)
        if len(qkv):
            attention.backward(grad, qkv, out, low, lse, dqkv)
    return [out, lse, dqkv]


def assert_close(actual, expected, bound):
    """In norm, each for itself. Where all of the expected is zero, nothing but zero is close."""
    for name, a, e in zip(NAMES[: len(actual)], actual, expected, strict=True):
        assert a.shape == e.shape, f"{name}: {list(a.shape)}, not {list(e.shape)}"
        error, size = (a.double() - e.double()).norm(), e.double().norm()
        assert error <= bound * size, f"{name}: error {error:.2e} > {bound:.2e} of {size:.2e}"  # NaN fails


def assert_as_good_as_torch(actual, expected, inputs, grad, lengths):
    """At most twice the error of the same loop in torch in the same dtype, for each of out, dq, dk, dv."""
    assert sum(lengths) > 0
    for begin, end in itertools.pairwise(itertools.accumulate(lengths, initial=0)):
        if begin == end:
            continue
        plain = with_gradients(
            lambda q, k, v: ((q @ k.mT) * q.shape[-1] ** -0.5).softmax(-1) @ v,
            [x[begin:end].transpose(0, 1) for x in inputs],
            grad[begin:end].transpose(0, 1),
        )
        for name, ours, theirs, e in zip(NAMES, actual, plain, expected, strict=True):
            e = e[begin:end]
            error = (ours[begin:end] - e).norm() / e.norm()
            bound = 2 * (theirs.transpose(0, 1) - e).norm() / e.norm() + 1e-3
            if end - begin > 1 or name in ("out", "dv"):  # dq and dk of one row are zero
                assert error <= bound, f"{name} of {end - begin} rows: {error:.2e} > {bound:.2e}"


def assert_same(actual, expected):
    """To the bit, each of several tensors."""
    assert len(actual) == len(expected) > 0
    for i, (a, e) in enumerate(zip(actual, expected)):
        assert torch.equal(a, e), f"result {i} differs by up to {(a.double() - e.double()).abs().max():.2e}"


def poison(*shapes, dtype):
    """Leaves NaN in the memory that the next allocations get."""
    if CUDA:
        tensors = [torch.full(shape, float("nan"), dtype=dtype, device=DEVICE) for shape in shapes for _ in range(8)]
        del tensors


@contextlib.contextmanager
def forgotten():
    """What was imported and said is forgotten, before and after."""
    forget_imports()
    try:
        yield
    finally:
        forget_imports()


def forget_imports():
    check.import_error.cache_clear()
    choice.say_once.cache_clear()


def pretend_to_capture(monkeypatch):
    """`capture(True)`: all believe that a CUDA graph is captured."""
    now = [False]
    monkeypatch.setattr(check, "capturing", lambda device: now[0])
    return lambda whether: now.__setitem__(0, whether)


def warnings(caplog):
    return [x.getMessage() for x in caplog.records if x.name == "siglip2_packed" and x.levelname == "WARNING"]
