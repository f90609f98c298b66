"""Runs of `siglip2-packed encode` over a folder of photographs: what they read, and what they have to write.

A folder of them (`photos`), what the model says of each (`expected`) and a run over it (`finished`) are fixtures.
"""

import csv
import io
import multiprocessing
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from siglip2_packed import Siglip2PackedImageProcessor, Siglip2PackedVisionModel
from siglip2_packed.cli import main
from siglip2_packed.collection.sources import Input

SIZES = [(9, 20), (31, 8), (16, 16), (5, 40), (12, 13), (40, 5), (4, 4), (25, 30), (7, 7), (1, 60), (60, 1)]
GOOD = [f"{seed:02d}.png" for seed in range(11)]
BAD = ["01-cut.jpg", "04-zero.jpg", "05-text.jpg", "08-bomb.png"]
SETTINGS = ["--pooled", "--shard-size", "4", "--patch-budget", "40"]


def image_bytes(seed, size, fmt="PNG"):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, fmt)
    return file.getvalue()


def make_photos(folder):
    """11 images, and in between them what is none: cut short, empty, text, a bomb."""
    for seed, size in enumerate(SIZES):
        (folder / f"{seed:02d}.png").write_bytes(image_bytes(seed, size))
    whole = image_bytes(99, (64, 64), "JPEG")
    (folder / "01-cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "04-zero.jpg").touch()
    (folder / "05-text.jpg").write_text("not a photograph\nnot at all")
    Image.new("1", (12000, 12000)).save(folder / "08-bomb.png")
    return folder


def alone(ckpt, photos):
    """(tokens, pooled, grid) of each good image from the model called on it alone."""
    model = Siglip2PackedVisionModel.from_pretrained(ckpt)
    processor = Siglip2PackedImageProcessor.from_pretrained(ckpt)

    def encoded(source):
        packed = processor([source])
        with torch.no_grad():
            output = model(**packed)
        return output.last_hidden_state, output.pooler_output[0], packed["grid_thw"][0].tolist()

    return {name: encoded(photos / name) for name in GOOD}


def inputs(*sources):
    return [Input(i, f"image {i}", source) for i, source in enumerate(sources)]


def run(checkpoint, inputs, out, *flags):
    inputs = [inputs] if isinstance(inputs, (str, Path)) else inputs
    argv = ["encode", *map(str, inputs), "--out", str(out), "--ckpt", str(checkpoint()), "--device", "cpu", *flags]
    return main(argv)


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def load(folder, fmt, shard):
    """tensors of a shard by name, whatever the format."""
    if fmt == "safetensors":
        return load_file(folder / shard)
    if fmt == "npy":
        return {p.name.split(".")[1]: torch.from_numpy(np.load(p)) for p in folder.glob(f"{shard}.*.npy")}
    import pyarrow as pa
    import pyarrow.parquet as pq

    if fmt == "parquet":
        columns = pq.read_table(folder / shard)
    else:
        columns = pa.ipc.open_file(folder / shard).read_all()
    tensors = {}
    for name in set(columns.column_names) - {"input"}:
        rows = [np.asarray(row, dtype=np.float32) for row in columns[name].to_pylist()]
        if name == "patches":
            tensors[name] = torch.from_numpy(np.concatenate(rows))
        else:
            tensors[name] = torch.from_numpy(np.stack(rows))
    if "patches" in tensors:
        lengths = torch.tensor([len(row) for row in columns["patches"].to_pylist()])
        tensors["offsets"] = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    assert pa.types.is_fixed_size_list(columns.schema.field("grid_thw").type)
    assert "pooled" not in tensors or columns.schema.field("pooled").type.list_size == 64
    return tensors


def check(folder, expected, names, fmt="safetensors", kept=("patches", "pooled"), tolerance=1e-5, bad=BAD):
    """index.csv lists the good names in order, and each one's rows are what the model says of that image alone."""
    index, loaded = table(folder / "index.csv"), {}
    assert list(index[0]) == ["input", "shard", "row", "grid"]
    assert [Path(row["input"]).name for row in index] == list(names)
    for row in index:
        shard = loaded.setdefault(row["shard"], load(folder, fmt, row["shard"]))
        tokens, pooled, grid = expected[Path(row["input"]).name]
        i = int(row["row"])
        assert row["grid"] == "x".join(map(str, grid))
        assert shard["grid_thw"][i].int().tolist() == grid
        assert set(shard) == {"grid_thw", *kept, *(["offsets"] if "patches" in kept else [])}
        if "patches" in kept:
            start, stop = shard["offsets"][i : i + 2].tolist()
            found = shard["patches"][start:stop].float()
            torch.testing.assert_close(found, tokens, rtol=tolerance, atol=tolerance)
        if "pooled" in kept:
            torch.testing.assert_close(shard["pooled"][i].float(), pooled, rtol=tolerance, atol=tolerance)
    for shard, tensors in loaded.items():  # and nothing else is in the shards
        assert len(tensors["grid_thw"]) == sum(row["shard"] == shard for row in index)
        assert "patches" not in kept or len(tensors["patches"]) == tensors["grid_thw"].prod(dim=1).sum()
    errors = table(folder / "errors.csv")
    assert [Path(row["input"]).name for row in errors] == list(bad)
    assert all(row["reason"] and "\n" not in row["reason"] for row in errors)
    leftovers = [path for path in folder.rglob("*") if path.name.endswith(".tmp")]
    assert not leftovers


def start(function, *args):
    """Starts a process that has its imports behind it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["siglip2_packed.encode", __name__])
    process = context.Process(target=function, args=args)
    process.start()
    return process
