"""Where tests of CUDA graphs run: on a GPU, or on the CPU with graphs that are recorded (`recorded_graphs`)."""

from types import SimpleNamespace

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from siglip2_packed import PackedPatches, Siglip2PackedVisionModel, graphs
from siglip2_packed.buckets import Metadata, bucket_of
from siglip2_packed.configuration import patch_dim
from siglip2_packed.graphs import CUDAGraphs

BUDGETS = [64, 300, 600]
GRIDS = [(1, 13, 19), (1, 7, 1), (2, 3, 4), (1, 2, 3)]
"""Five segments in the bucket of 300."""
LARGE = [(1, 20, 20), (1, 3, 5), (1, 13, 10)]
OTHERS = [[(1, 8, 32)], [(1, 1, 256), (1, 5, 1)], [(1, 1, 1)], [(3, 4, 5)], LARGE, GRIDS]


class World:
    """Models and packs in one dtype on one device."""

    def __init__(self, checkpoint, device: str, dtype: torch.dtype, shape: str):
        self.checkpoint, self.device, self.dtype, self.shape = checkpoint, device, dtype, shape
        self.noise = 1e-4 if dtype is torch.float32 else 0.03
        """Relative difference of two ways to compute the same."""

    def model(self, **kwargs) -> Siglip2PackedVisionModel:
        model = Siglip2PackedVisionModel.from_pretrained(self.checkpoint(self.shape), dtype=self.dtype, **kwargs)
        return model.to(self.device).train()

    def pack(self, grids=GRIDS, seed: int = 0, patches: int = 48) -> PackedPatches:
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(sum(t * h * w for t, h, w in grids), patches, generator=generator)
        return PackedPatches(rows, grids).to(self.device)


class AtBucketRows:
    """The model without graphs, at the rows of a pack's bucket: what a graph has to give to the bit."""

    def __init__(self, model: Siglip2PackedVisionModel, budgets=BUDGETS):
        self.model, self.budgets = model, budgets

    def __call__(self, pixel_values, grid_thw, cu_seqlens=None, max_seqlen=None):
        model, learns = self.model, torch.is_grad_enabled()
        layout = model._layout(pixel_values, grid_thw, cu_seqlens, max_seqlen, None)
        bucket = bucket_of(layout, self.budgets)
        metadata = Metadata(bucket, model.device)
        metadata.fill(layout)
        rows = torch.zeros(bucket.patches, patch_dim(model.config), dtype=model.dtype, device=model.device)
        rows[: len(pixel_values)] = pixel_values
        attention = graphs.attention_in_buckets(model, metadata.segments, bucket.patches, gradients=learns)
        hidden_states = model._features(rows, metadata.places, attention, None).last_hidden_state
        found = {"last_hidden_state": hidden_states[: len(pixel_values)]}
        if hasattr(model, "head"):  # behind a node of its own, where the gradients of its own parts meet first
            pooled = model.head(hidden_states.view_as(hidden_states), metadata.images)
            found["pooler_output"] = pooled[: len(layout.grids)]
        return SimpleNamespace(**found)


def on_tokens(out) -> Tensor:
    return weighted(out.last_hidden_state)


def on_pooled(out) -> Tensor:
    return weighted(out.pooler_output)


def on_both(out) -> Tensor:
    return on_tokens(out) + 10 * on_pooled(out)


def weighted(x: Tensor) -> Tensor:
    weights = torch.linspace(-1, 1, x.numel(), device=x.device).view_as(x).sin()
    return (x.float() * weights).square().mean() + (x.float() * weights).sum() / len(x)


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """Copies."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def step(run, model, packed, loss=on_tokens) -> tuple[Tensor, dict[str, Tensor]]:
    """Features and gradients of one step, from no gradients."""
    model.zero_grad()
    out = run(**packed)
    loss(out).backward()
    return out.last_hidden_state.detach(), gradients(model)


def same(found: tuple, expected: tuple) -> None:
    (features, grads), (e_features, e_grads) = found, expected
    assert features.isfinite().all() and torch.equal(features, e_features)
    same_gradients(grads, e_grads)


def same_gradients(grads: dict, expected: dict) -> None:
    assert grads.keys() == expected.keys() and grads
    assert not [name for name in expected if not grads[name].isfinite().all()]
    assert not [name for name in expected if not torch.equal(grads[name], expected[name])]


def near(found: tuple, expected: tuple, bound: float) -> None:
    (features, grads), (e_features, e_grads) = found, expected
    assert relative(features, e_features) < bound
    assert grads.keys() == e_grads.keys() and grads
    assert relative(flat(grads), flat(e_grads)) < bound


def relative(x: Tensor, expected: Tensor) -> float:
    """NaN is not below any bound."""
    return ((x.double() - expected.double()).norm() / expected.double().norm()).item()


def flat(grads: dict) -> Tensor:
    return torch.cat([g.double().flatten() for g in grads.values()])


def graphs_of(graphed) -> list:
    """Those of a model, or of a CUDAGraphs, that are none of the reasons why there is none."""
    return [graph for graph in graphed.graphs._graphs.values() if not isinstance(graph, str)]


BUSY = "a forward whose backward is still to come has the graphs' memory"
HOOKED = "hooks on saved tensors, as checkpoint's and save_on_cpu's, have to see what each operation keeps"
LENT = "another thread, or more than .grad, holds an earlier step's gradients in the graphs' memory"


def freeze(model, learning):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(learning(name))


def check(world, model, loss=on_tokens, packs=(GRIDS,), count=1, compare=same):
    """Each pack's step, twice in graphs, against the model's at the bucket's rows and at the pack's own."""
    graphs = CUDAGraphs(model, BUDGETS)
    for seed, grids in enumerate(packs):
        packed = world.pack(grids, seed)
        expected = step(AtBucketRows(model), model, packed, loss)
        for _ in range(2):
            compare(step(graphs, model, packed, loss), expected)
        near(step(model, model, packed, loss), expected, world.noise)
    assert len(graphs_of(graphs)) == count
    return graphs


LEARNING = {
    "the last layer": lambda name: "layers.1." in name,
    "the first layer": lambda name: "layers.0." in name,
    "the norm at the end": lambda name: "post_layernorm" in name,
    "the head": lambda name: name.startswith("head"),
    "the embeddings": lambda name: name.startswith("embeddings"),
    "biases": lambda name: name.endswith("bias"),
    "one weight": lambda name: name == "encoder.layers.0.self_attn.k_proj.weight",
}


def adapted(model, **kwargs):
    config = LoraConfig(target_modules=["q_proj", "v_proj", "fc1"], r=4, init_lora_weights="gaussian", **kwargs)
    wrapped = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:  # else zeros, and nothing of A learns
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return wrapped
