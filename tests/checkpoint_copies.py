"""Copies of a checkpoint with other keys, another config.json, or in shards."""

import json
import shutil

import torch
from safetensors.torch import save_file

from siglip2_packed.weights import read_state_dict


def bare(folder):
    return read_state_dict(folder)


def copy_with(folder, target, state=None, config=None, shards=1):
    """A copy of a checkpoint with other keys or another config.json."""
    shutil.copytree(folder, target)
    if config is not None:
        (target / "config.json").write_text(json.dumps(config))
    if state is None:
        return target
    (target / "model.safetensors").unlink()
    if shards == 1:
        save_file(state, target / "model.safetensors")
        return target
    names = sorted(state)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = names[i::shards]
        save_file({name: state[name] for name in part}, target / file)
        weight_map |= dict.fromkeys(part, file)
    (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return target


def read_json(folder):
    return json.loads((folder / "config.json").read_text())


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
