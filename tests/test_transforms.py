"""torch.compile, selective checkpointing and FSDP2 see through the model and its attention."""

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

from siglip2_packed import PackedPatches, Siglip2PackedVisionModel
from siglip2_packed.measure import relative_error
from siglip2_packed.ops.attention import VarlenAttention
from siglip2_packed.ops.attention.operators import varlen_attention

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
    rng = random.Random(0)
    for _ in range(20):
        grids = [(1, rng.randint(1, 6), rng.randint(1, 6)) for _ in range(rng.randint(2, 5))]
        packed = PackedPatches(patches(grids), grids).to(device)
        with torch.no_grad():
            expected = model(**packed).last_hidden_state
        out = compiled(**packed).last_hidden_state
        assert relative_error(out, expected) <= (1e-5 if device == "cpu" else 1e-2)
    assert counter.frame_count <= 2
    assert not counters["graph_break"]


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
