"""What only a CUDA device shows: half precision at the so400m shape, the flash backends, syncs, memory."""

import copy
import time
import warnings

import pytest
import torch
from transformers import Siglip2VisionConfig, Siglip2VisionModel

from siglip2_packed import PackedPatches, Siglip2PackedVisionModel, fused, pad
from siglip2_packed.measure import relative_error
from siglip2_packed.ops import pool
from siglip2_packed.ops.attention import VarlenAttention
from siglip2_packed.ops.attention.backends import BACKENDS, refusal, why_not
from siglip2_packed.ops.runtime import choice
from siglip2_packed.ops.runtime.transfer import STAGED
from siglip2_packed.ops.segments import Segments
from siglip2_packed.random_checkpoint import SHAPES

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
GRIDS = [(1, 13, 19), (1, 8, 32), (1, 16, 16), (1, 1, 1), (1, 5, 7), (1, 24, 42)]


@pytest.fixture
def packed():
    rows = sum(t * h * w for t, h, w in GRIDS)
    return PackedPatches(torch.randn(rows, 768, generator=torch.Generator().manual_seed(0)), GRIDS)


def padded_features(model, packed):
    batch = pad(packed)
    out = model(**{name: tensor.to(CUDA) for name, tensor in batch.items()})
    return out.last_hidden_state[batch["pixel_attention_mask"].bool().to(CUDA)], out.pooler_output


@pytest.mark.parametrize("way", ["fused", "modules"])
def test_bf16_is_as_close_to_fp32_as_padded_transformers(checkpoint, packed, forced, monkeypatch, way):
    hopper = torch.cuda.get_device_capability() == (9, 0)
    forced(mlp=["hopper", "triton"] if hopper else ["triton"])  # also of so few rows
    ran, train = [], fused.train
    monkeypatch.setattr(fused, "train", lambda *args: (ran.append(1), train(*args))[1])
    folder = checkpoint("so400m")
    reference = Siglip2VisionModel.from_pretrained(folder).to(CUDA)
    weights = torch.randn(1, 1152, generator=torch.Generator().manual_seed(2)).to(CUDA)

    def run(model, features):
        model.zero_grad()
        tokens, pooled = features()
        ((tokens * weights).float().mean() + (pooled * weights).float().mean()).backward()
        gradients = {name.removeprefix("vision_model."): p.grad for name, p in model.named_parameters()}
        return tokens.detach(), pooled.detach(), gradients

    exact = run(reference, lambda: padded_features(reference, packed))
    half = Siglip2VisionModel.from_pretrained(folder, dtype=torch.bfloat16).to(CUDA)
    theirs = run(half, lambda: padded_features(half, packed))
    model = Siglip2PackedVisionModel.from_pretrained(folder, dtype=torch.bfloat16).to(CUDA)
    for module in model.modules() if way == "modules" else ():
        module.register_forward_hook(lambda *_: None)

    def features():
        out = model(**packed.to(CUDA))
        return out.last_hidden_state, out.pooler_output

    ours = run(model, features)
    assert len(ran) == (0 if way == "modules" else 1)
    with torch.no_grad():
        inferred = features()
    for x, inferred_, y, ref in zip(ours[:2], inferred, theirs[:2], exact[:2]):
        assert relative_error(x, ref) <= 1.1 * relative_error(y, ref)
        assert relative_error(inferred_, ref) <= 1.1 * relative_error(y, ref)
    mine, padded = (
        torch.stack([(grads[name].double() - exact[2][name].double()).norm() for name in exact[2]])
        for grads in (ours[2], theirs[2])
    )
    scale = torch.stack([gradient.double().norm() for gradient in exact[2].values()])
    assert mine.isfinite().all()
    assert mine.norm() <= 1.2 * padded.norm()
    assert (mine / scale).median() <= 1.2 * (padded / scale).median()


@pytest.mark.parametrize(
    "grids", [[(1, 4, 4)], [(1, 13, 19), (1, 8, 32), (1, 5, 7)], [(1, 16, 16)] * 8], ids=lambda grids: str(len(grids))
)
def test_the_probe_learns_as_exactly_as_padded_transformers(grids):
    """Its gradient is a small difference: keys after post_layernorm have a large mean in common."""
    torch.manual_seed(0)
    config = Siglip2VisionConfig(**SHAPES["so400m"] | {"num_hidden_layers": 4})
    reference = Siglip2VisionModel(config).to(CUDA)
    state = {name.removeprefix("vision_model."): x for name, x in reference.state_dict().items()}
    packed = PackedPatches(torch.randn(sum(t * h * w for t, h, w in grids), 768), grids)

    def probe_gradient(model, pooled):
        pooled().float().sin().mean().backward()
        (grad,) = (p.grad for name, p in model.named_parameters() if name.endswith("head.probe"))
        return grad

    exact = probe_gradient(reference, lambda: padded_features(reference, packed)[1])
    half = copy.deepcopy(reference).bfloat16()
    half.zero_grad()
    theirs = probe_gradient(half, lambda: padded_features(half, packed)[1])
    model = Siglip2PackedVisionModel(copy.deepcopy(config))
    model.load_state_dict(state)
    model.to(CUDA, torch.bfloat16)
    ours = probe_gradient(model, lambda: model(**packed.to(CUDA)).pooler_output)
    assert relative_error(ours, exact) <= 1.2 * relative_error(theirs, exact)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "eager"])
@pytest.mark.parametrize("head_dim", [64, 72])
def test_every_backend_present_is_right_or_refused(backend, head_dim):
    reason = why_not(backend, CUDA, torch.bfloat16, head_dim)
    if reason is not None:
        pytest.skip(reason)
    lengths = [64, 24, 256]
    for gradients in (False, True):
        segments = Segments(lengths, CUDA)
        assert refusal(backend, segments, sum(lengths), torch.bfloat16, 4, head_dim, gradients) is None

    q, k, v = torch.randn(3, sum(lengths), 4, head_dim, device=CUDA, dtype=torch.bfloat16)
    changed = [x.clone() for x in (q, k, v)]
    for x in changed:
        x[64:88] = 100 * torch.randn_like(x[64:88])
    attention = VarlenAttention(Segments(lengths, CUDA), backend)
    a, b = attention(q, k, v), attention(*changed)
    assert torch.equal(a[:64], b[:64])
    assert torch.equal(a[88:], b[88:])


@pytest.mark.parametrize("head_dim", [64, 72])
@pytest.mark.parametrize("gradients", [False, True])
def test_pooling_runs_on_its_kernel(head_dim, gradients):
    for dtype, name in ((torch.bfloat16, "triton"), (torch.float32, "eager")):
        order = choice.pool(choice.card(CUDA), dtype, head_dim)
        chosen = choice.take(pool.ATTENTION_POOL, order, CUDA, dtype, 4, head_dim, gradients)
        assert chosen is pool.ATTENTION_POOL.of(name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_forward_syncs_never_or_once(checkpoint, packed, dtype):
    model = Siglip2PackedVisionModel.from_pretrained(checkpoint("base"), dtype=dtype).to(CUDA)
    packed.to(CUDA)
    model(**packed)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad():
            model(**packed)
        torch.cuda.set_sync_debug_mode("warn")
        on_device = packed["grid_thw"].to(CUDA)
        with warnings.catch_warnings(record=True) as caught, torch.no_grad():
            warnings.simplefilter("always")
            model(packed["pixel_values"], on_device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in caught if "synchronizing" in str(w.message)]) == 1


@pytest.mark.parametrize("training", [False, True])
def test_the_host_runs_ahead_of_a_busy_device(checkpoint, training):
    """Also where the metadata of a pack are more than CUDA takes from pageable memory without waiting."""
    model = Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny"), dtype=torch.bfloat16).to(CUDA)
    packs = []
    for i in range(3):  # new grids every time: nothing is remembered
        grids = [(1, 13, 19 + i), (1, 8, 32 + i), *[(1, 16, 16)] * 70]
        packs.append(PackedPatches(torch.randn(sum(h * w for _, h, w in grids), 48).bfloat16(), grids).to(CUDA))
    assert all(4 * len(pack["pixel_values"]) > STAGED for pack in packs)

    def seconds(cycles):
        """Of the host, and of all."""
        torch.cuda.synchronize()
        start = time.perf_counter()
        torch.cuda._sleep(cycles)
        for pack in packs:
            model(**pack)
        launched = time.perf_counter() - start
        torch.cuda.synchronize()
        return launched, time.perf_counter() - start

    with torch.set_grad_enabled(training):
        seconds(1)  # compiles kernels
        seconds(2**30)  # takes page-locked memory for three packs
        launched, in_all = seconds(3 * 2**30)  # a second and a half
    assert launched < 0.5 * in_all


def test_peak_memory_is_that_of_the_images_alone(checkpoint, packed):
    model = Siglip2PackedVisionModel.from_pretrained(checkpoint("base"), dtype=torch.bfloat16).to(CUDA)

    def peak(pixel_values, grids):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.no_grad():
            model(pixel_values, grids)
        return torch.cuda.max_memory_allocated() - before

    pixel_values = packed["pixel_values"].to(CUDA)
    peak(pixel_values, GRIDS)
    alone = sum(peak(x, [grid]) for x, grid in zip(pixel_values.split([h * w for _, h, w in GRIDS]), GRIDS))
    assert peak(pixel_values, GRIDS) <= 1.1 * alone
