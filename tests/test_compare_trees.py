"""One tree's side of compare_trees.py: the steps that it times are those of their names."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import tree_worker

GRIDS = [(1, 13, 19), (1, 8, 32), (1, 7, 1)]


class Graphs:
    """The model, and that it was called."""

    calls = 0

    def __init__(self, model):
        self.model = model

    def __call__(self, **inputs):
        Graphs.calls += 1
        return self.model(**inputs)


@pytest.mark.parametrize("mode", ["forward", "train"])
def test_steps_in_graphs_are_those_of_the_model(checkpoint, monkeypatch, mode):
    monkeypatch.setattr(tree_worker, "CUDAGraphs", Graphs)
    monkeypatch.setattr(tree_worker, "step", tree_worker.Step())
    tree_worker.load(str(checkpoint("tiny")), "cpu", "float32")
    tree_worker.prepare(GRIDS, mode)
    expected, calls = tree_worker.results(), Graphs.calls
    assert len(expected) == (1 if mode == "forward" else 1 + len(list(tree_worker.step.model.parameters())))
    tree_worker.prepare(GRIDS, {"forward": "cudagraph", "train": "cudagraph_train"}[mode])
    found = tree_worker.results()
    assert Graphs.calls == calls + 1 and found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert tree_worker.step().requires_grad == (mode == "train")
    tree_worker.prepare(GRIDS, mode)
    tree_worker.step()
    assert Graphs.calls == calls + 2
