"""Layers of few rows are one node of autograd by threes, and compute what they do one by one."""

import pytest
import torch
from implementations import DEVICES
from torch import nn
from transformers import Siglip2VisionConfig

from siglip2_packed import Siglip2PackedVisionModel
from siglip2_packed.ops.attention import VarlenAttention, eager, operators
from siglip2_packed.ops.attention.kernels import Kernels
from siglip2_packed.ops.runtime import choice
from siglip2_packed.ops.segments import Segments
from siglip2_packed.workloads import SHAPES


def attention_within(lengths, backend, device="cpu"):
    return VarlenAttention(Segments(lengths, device), backend)


@pytest.fixture
def formulas(monkeypatch):
    """On the CPU own attention is computed by formulas: kernels would be interpreted."""
    kernels, found = Kernels(eager.forward, eager.backward, ()), operators.for_tensors
    monkeypatch.setattr(operators, "for_tensors", lambda q, *more: found(q, *more) if q.is_cuda else kernels)


@pytest.fixture
def tower(formulas):
    """Seven layers, all parameters at random."""
    config = Siglip2VisionConfig(**SHAPES["tiny"] | {"num_hidden_layers": 7})
    torch.manual_seed(0)
    encoder = Siglip2PackedVisionModel(config).encoder
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.1)
    return encoder


LEARNING = {
    "all": lambda name: True,
    "the last four": lambda name: int(name.split(".")[1]) >= 3,
    "two within a node": lambda name: int(name.split(".")[1]) == 4 and "fc1" in name,
    "biases": lambda name: name.endswith("bias"),
    "none": lambda name: False,
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("learning", LEARNING)
@pytest.mark.parametrize("needs_x", [True, False])
def test_layers_at_once_are_layers_one_by_one(tower, monkeypatch, device, learning, needs_x):
    """To the bit, whichever weights learn; a second time where the graph is kept."""
    tower.to(device)
    for name, parameter in tower.named_parameters():
        parameter.requires_grad_(LEARNING[learning](name))
    wanted = [p for p in tower.parameters() if p.requires_grad]
    x, grad = (torch.randn(26, 64, generator=torch.Generator().manual_seed(i)).to(device) for i in range(2))
    found = []
    for most in (1, 2, 3, 100):
        monkeypatch.setattr(choice, "layers_at_once", lambda T, most=most: most)
        leaf = x.clone().requires_grad_(needs_x)
        out, _ = tower(leaf, attention_within([5, 1, 20], "triton", device))
        found.append([out])
        if inputs := [*wanted, *[leaf] * needs_x]:
            found[-1] += torch.autograd.grad(out, inputs, grad, retain_graph=True)
            again = torch.autograd.grad(out, inputs, grad)
            assert all(map(torch.equal, again, found[-1][1:]))
    assert all(len(one) == len(found[0]) and all(map(torch.equal, one, found[0])) for one in found)
    assert all(x.isfinite().all() for x in found[0])


def test_layers_whose_heads_were_pruned_learn(tower):
    attention = tower.layers[4].self_attn
    narrow = 64 - attention.head_dim
    attention.q_proj, attention.k_proj, attention.v_proj = (nn.Linear(64, narrow) for _ in range(3))
    attention.out_proj = nn.Linear(narrow, 64)
    x, found = torch.randn(26, 64), []
    for backend in ("triton", "sdpa"):
        out, _ = tower(x, attention_within([5, 1, 20], backend))
        found.append([out, *torch.autograd.grad(out.square().sum(), list(tower.parameters()))])
    for one, other in zip(*found):
        assert (one - other).norm() <= 1e-5 * other.norm() + 1e-4 * found[0][-1].norm()


@pytest.mark.parametrize(("rows", "nodes"), [(9, 3), (10, 7)])
def test_layers_of_few_rows_are_few_nodes(tower, monkeypatch, rows, nodes):
    monkeypatch.setattr(choice, "TOGETHER_ROWS", 9)
    out, _ = tower(torch.randn(rows, 64), attention_within([rows], "triton"))
    node, found = out.grad_fn, 0
    while node is not None:
        assert node.name() == "_LayersBackward"
        found, node = found + 1, node.next_functions[0][0]
    assert found == nodes


def test_frozen_layers_below_those_that_learn_keep_nothing(tower):
    """Of the three that share a node with them, too."""
    for block in tower.layers[:5]:
        block.requires_grad_(False)
    parameters, kept = {p.data_ptr() for p in tower.parameters()}, []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.data_ptr()) or x, lambda x: x):
        tower(torch.randn(9, 64), attention_within([9], "triton"))
    assert len([x for x in kept if x not in parameters]) == 2 * 6
