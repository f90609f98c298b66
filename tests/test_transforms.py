"""torch.compile, selective checkpointing and FSDP2 see through the model and its attention."""

import contextlib
import itertools
import random
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from siglip2_packed import PackedPatches, Siglip2PackedVisionModel, pad
from siglip2_packed.measure import relative_error
from siglip2_packed.ops.attention import VarlenAttention, eager
from siglip2_packed.ops.attention.compiled import RUN, attention_by_segments
from siglip2_packed.ops.attention.operators import varlen_attention
from siglip2_packed.ops.segments import Segments

PACKS = [[(1, 5, 7), (1, 3, 4), (1, 16, 2)], [(1, 4, 4), (2, 3, 5)]]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_model_gives_the_same_features(checkpoint, patches, device):
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny"), dtype=dtype).to(device)
    compiled = torch.compile(model, backend="aot_eager" if device == "cpu" else "inductor")
    for grids in PACKS:
        packed = PackedPatches(patches(grids), grids).to(device)
        expected, out = model(**packed), compiled(**packed)
        bound = 1e-5 if device == "cpu" else 0.05
        torch.testing.assert_close(out.last_hidden_state, expected.last_hidden_state, atol=bound, rtol=0)
        torch.testing.assert_close(out.pooler_output, expected.pooler_output, atol=bound, rtol=0)
        out.last_hidden_state.sum().backward()
    assert all(p.grad.isfinite().all() for name, p in model.named_parameters() if not name.startswith("head."))


@pytest.mark.parametrize("device", DEVICES)
def test_twenty_packs_take_two_graphs(checkpoint, patches, device, monkeypatch):
    """One for the first pack, one with dynamic sizes for all others, without a break in the loop over layers."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    own = torch.compiler.disable(lambda model, segments: VarlenAttention(segments, "triton"))  # interpreted on CPU
    monkeypatch.setattr(Siglip2PackedVisionModel, "_attention", own)
    model = Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny"), dtype=dtype).to(device)
    torch._dynamo.reset()
    counters.clear()
    counter = CompileCounterWithBackend("aot_eager" if device == "cpu" else "inductor")
    compiled = torch.compile(model, backend=counter)
    for grids in packs_of(20 if device == "cuda" else 6):  # interpreted
        packed = PackedPatches(patches(grids), grids).to(device)
        with torch.no_grad():
            expected = model(**packed).last_hidden_state
        out = compiled(**packed).last_hidden_state
        assert relative_error(out, expected) <= (1e-5 if device == "cpu" else 1e-2)
    assert counter.frame_count <= 2
    assert not counters["graph_break"]


def packs_of(count, seed=0):
    """Grids of so many packs, no two alike."""
    rng = random.Random(seed)
    for _ in range(count):
        yield [(1, rng.randint(1, 6), rng.randint(1, 6)) for _ in range(rng.randint(2, 5))]


@contextlib.contextmanager
def two_graphs():
    """A backend under which no more than two graphs are made, without a break."""
    torch._dynamo.reset()
    counters.clear()
    counter = CompileCounterWithBackend("eager")
    yield counter
    assert 1 <= counter.frame_count <= 2
    assert not counters["graph_break"] and not counters["recompile_limit"]


@pytest.mark.parametrize(("backend", "gradients"), [("auto", False), ("sdpa", True), ("eager", False)])
def test_twenty_packs_take_two_graphs_on_the_cpu_too(checkpoint, patches, backend, gradients):
    model = Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny"), attn_implementation=backend)
    parameters = list(model.encoder.parameters())
    with two_graphs() as counter, torch.set_grad_enabled(gradients):
        compiled = torch.compile(model, backend=counter)
        for grids in packs_of(20):
            expected, out = (run(patches(grids), grids).last_hidden_state for run in (model, compiled))
            torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
            if gradients:
                found = torch.autograd.grad(out.square().mean(), parameters)
                for a, b in zip(found, torch.autograd.grad(expected.square().mean(), parameters), strict=True):
                    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


FORMS = {
    "list": lambda x, grids: list(x.split([h * w for _, h, w in grids])),
    "packed": lambda x, grids: x,
    "padded": lambda x, grids: pad(x, grids)["pixel_values"],
    "mapping": lambda x, grids: dict(pad(x, grids)),
}


def test_so_does_a_llava_tower_in_any_form(tower, patches):
    with two_graphs() as counter:
        compiled = torch.compile(tower, backend=counter)
        for (form, make), grids in zip(itertools.cycle(FORMS.items()), packs_of(20)):
            images, grid = make(patches(grids), grids), torch.tensor(grids)
            expected, out = tower(images, grid), compiled(images, grid)
            for a, b in zip(out, expected, strict=True):
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5, msg=form)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_attention_as_one_operator(dtype, backend):
    """Its result is that of the loop it stands for, its backward that of torch's."""
    torch.manual_seed(0)
    qkv = torch.randn(41, 3, 2, 72, dtype=dtype).requires_grad_()
    segments = Segments([5, 35, 1])
    exact = qkv.detach().double().requires_grad_()
    expected = eager.attention(*exact.unbind(1), segments)
    out = attention_by_segments(*qkv.unbind(1), segments.offsets, backend)
    assert torch.equal(out, RUN[backend](*qkv.unbind(1), segments))
    grad = torch.randn(41, 2, 72, dtype=dtype)
    bound = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 1e-2}[dtype]
    (gradient,) = torch.autograd.grad(out, qkv, grad)
    assert relative_error(gradient, torch.autograd.grad(expected, exact, grad.double())[0]) <= bound
    if dtype == torch.float64:
        torch.library.opcheck(
            torch.ops.siglip2_packed.attention_by_segments, (*qkv.unbind(1), segments.offsets, backend)
        )


class Count(TorchDispatchMode):
    def __init__(self, op):
        super().__init__()
        self.op, self.calls = op, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func is self.op
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", DEVICES)
def test_selective_checkpointing_keeps_what_attention_computed(device):
    """The operator is one the policy can name: saved, it runs once; not saved, twice."""
    op = torch.ops.siglip2_packed.varlen_attention.default
    cu_seqlens = torch.tensor([0, 5, 21], dtype=torch.int32, device=device)
    qkv = torch.randn(21, 3, 2, 72, device=device, dtype=torch.float16)
    grads = []
    for policy, runs in ((CheckpointPolicy.MUST_SAVE, 1), (CheckpointPolicy.PREFER_RECOMPUTE, 2)):

        def choose(context, function, *args, **kwargs):
            return policy if function is op else CheckpointPolicy.PREFER_RECOMPUTE

        inputs = [x.clone().requires_grad_() for x in qkv.unbind(1)]
        with Count(op) as count:
            out = checkpoint(
                lambda q, k, v: varlen_attention(q, k, v, cu_seqlens, 16).square(),
                *inputs,
                use_reentrant=False,
                context_fn=partial(create_selective_checkpoint_contexts, choose),
            )
            out.sum().backward()
        assert count.calls == runs
        grads.append([x.grad for x in inputs])
    for a, b in zip(*grads):
        assert torch.equal(a, b)


@pytest.mark.parametrize("device", DEVICES)
def test_fsdp2_shards_every_layer(checkpoint, patches, device, tmp_path):
    """One process: what is tested is that wrapped layers run and give the gradients of the plain model."""
    dist.init_process_group(
        "gloo" if device == "cpu" else "nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        models = [Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny")).to(device).train() for _ in range(2)]
        mesh = dist.init_device_mesh(device, (1,))
        for layer in models[1].encoder.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(models[1], mesh=mesh)
        gradients = []
        for model in models:
            for grids in (PACKS[0], []):  # a rank without images takes part all the same
                packed = PackedPatches(patches(grids), grids).to(device)
                out = model(**packed)
                (out.last_hidden_state.square().sum() + out.pooler_output.sum()).backward()
            grads = [parameter.grad for parameter in model.parameters()]
            gradients.append([grad.full_tensor() if isinstance(grad, DTensor) else grad for grad in grads])
        for a, b in zip(*gradients):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    finally:
        dist.destroy_process_group()
