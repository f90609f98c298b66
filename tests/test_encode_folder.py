"""`siglip2-packed encode --out DIR`: every row is the model's, nothing is lost or doubled, whenever it is killed."""

import csv
import io
import itertools
import json
import mmap
import multiprocessing
import os
import signal
import socket
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from siglip2_packed import Siglip2PackedImageProcessor, Siglip2PackedVisionModel, graphs
from siglip2_packed.cli import main
from siglip2_packed.collection import features, shards
from siglip2_packed.collection.decode import (
    DECODE_IN,
    IMAGES_PER_JOB,
    MOST_SHARED,
    DecodedImage,
    DecodingProcesses,
    Shelf,
    decode,
    decoding_pool,
    packs,
    read_image,
)
from siglip2_packed.collection.features import Meter, StrictError, encode, launch
from siglip2_packed.collection.sources import Input

SIZES = [(9, 20), (31, 8), (16, 16), (5, 40), (12, 13), (40, 5), (4, 4), (25, 30), (7, 7), (1, 60), (60, 1)]


def image_bytes(seed, size, fmt="PNG"):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, fmt)
    return file.getvalue()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """11 images, and in between them what is none: cut short, empty, text, a bomb."""
    folder = tmp_path_factory.mktemp("photos")
    for seed, size in enumerate(SIZES):
        (folder / f"{seed:02d}.png").write_bytes(image_bytes(seed, size))
    whole = image_bytes(99, (64, 64), "JPEG")
    (folder / "01-cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "04-zero.jpg").touch()
    (folder / "05-text.jpg").write_text("not a photograph\nnot at all")
    Image.new("1", (12000, 12000)).save(folder / "08-bomb.png")
    return folder


GOOD = [f"{seed:02d}.png" for seed in range(11)]
BAD = ["01-cut.jpg", "04-zero.jpg", "05-text.jpg", "08-bomb.png"]


@pytest.fixture(scope="module")
def expected(checkpoint, photos):
    """(tokens, pooled, grid) of each good image from the model called on it alone."""
    model = Siglip2PackedVisionModel.from_pretrained(checkpoint())
    processor = Siglip2PackedImageProcessor.from_pretrained(checkpoint())

    def alone(source):
        packed = processor([source])
        with torch.no_grad():
            output = model(**packed)
        return output.last_hidden_state, output.pooler_output[0], packed["grid_thw"][0].tolist()

    return {name: alone(photos / name) for name in GOOD}


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


@pytest.mark.parametrize("fmt", shards.FORMATS)
@pytest.mark.parametrize("kept", [("patches", "pooled"), ("patches",), ("pooled",)])
def test_every_row_is_the_models(checkpoint, photos, expected, tmp_path, capsys, fmt, kept):
    if fmt in ("parquet", "arrow"):
        pytest.importorskip("pyarrow")
    flags = ["--pooled"] * ("pooled" in kept) + ["--no-patches"] * ("patches" not in kept)
    out = tmp_path / "made" / "features"
    assert run(checkpoint, photos, out, "--format", fmt, "--shard-size", "6", "--patch-budget", "40", *flags) == 1
    check(out, expected, GOOD, fmt, kept)
    shown = capsys.readouterr()
    assert all(f"{photos / name}" in shown.err for name in BAD)
    assert "4 of 15 images could not be read" in shown.err
    patches = sum(len(tokens) for tokens, _, _ in expected.values())
    assert f"11 images, {patches} patches (float32 on cpu)" in shown.out
    assert "images/s" in shown.out


@pytest.mark.parametrize("fmt", ["safetensors", "npy"])
@pytest.mark.parametrize(("dtype", "save"), [("bfloat16", None), ("float32", "float16"), ("bfloat16", "float16")])
def test_dtypes(checkpoint, photos, expected, tmp_path, fmt, dtype, save):
    flags = ["--pooled", "--format", fmt, "--dtype", dtype, *(["--save-dtype", save] if save else [])]
    assert run(checkpoint, photos, tmp_path / "out", *flags) == 1
    check(tmp_path / "out", expected, GOOD, fmt, tolerance=2e-3 if dtype == "float32" else 0.2)
    [shard] = {row["shard"] for row in table(tmp_path / "out" / "index.csv")}
    wanted = save or ("float32" if fmt == "npy" else "bfloat16")
    tensors = load(tmp_path / "out", fmt, shard)
    assert str(tensors["patches"].dtype) == str(tensors["pooled"].dtype) == f"torch.{wanted}"


def test_half_precision_parquet(checkpoint, photos, expected, tmp_path):
    pytest.importorskip("pyarrow")
    flags = ["--pooled", "--format", "parquet", "--save-dtype", "float16"]
    assert run(checkpoint, photos, tmp_path / "out", *flags) == 1
    check(tmp_path / "out", expected, GOOD, "parquet", tolerance=2e-3)


def test_features_too_large_for_the_dtype_to_save_are_an_error(checkpoint, photos, tmp_path, monkeypatch, capsys):
    forward = Siglip2PackedVisionModel.forward

    def large(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.last_hidden_state = output.last_hidden_state * 1e6
        return output

    monkeypatch.setattr(Siglip2PackedVisionModel, "forward", large)
    assert run(checkpoint, photos, tmp_path / "out", "--save-dtype", "float16") == 2
    assert "do not fit torch.float16" in capsys.readouterr().err


def test_features_that_are_not_finite_are_named(checkpoint, photos, expected, tmp_path, monkeypatch):
    forward = Siglip2PackedVisionModel.forward

    def broken(self, pixel_values, grid_thw, **kwargs):
        output = forward(self, pixel_values, grid_thw, **kwargs)
        for image, grid in zip(output.last_hidden_state.split(grid_thw.prod(dim=1).tolist()), grid_thw.tolist()):
            if grid == expected["07.png"][2]:
                image[-1, 3] = float("nan")
        return output

    monkeypatch.setattr(Siglip2PackedVisionModel, "forward", broken)
    same = [name for name in GOOD if expected[name][2] == expected["07.png"][2]]
    assert run(checkpoint, photos, tmp_path / "out") == 1
    check(tmp_path / "out", expected, sorted({*GOOD} - {*same}), kept=["patches"], bad=sorted([*BAD, *same]))


@pytest.mark.parametrize("decode_in", DECODE_IN)
def test_collections_of_every_kind(checkpoint, photos, expected, tmp_path, decode_in):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    names = sorted([*GOOD, *BAD])
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        for name in names:
            tar.add(photos / name, name)
    files = [(photos / name).read_bytes() for name in names]
    pq.write_table(pa.table({"image": [*files, None], "name": [*names, "null"]}), tmp_path / "c.parquet")
    (tmp_path / "a.txt").write_text("".join(f"{photos / name}\n" for name in names))
    inputs = [tmp_path / name for name in ("a.txt", "b.tar", "c.parquet")]
    out = tmp_path / "out"
    flags = ["--pooled", "--shard-size", "7", "--patch-budget", "50", "--decode-in", decode_in]
    assert run(checkpoint, inputs, out, *flags) == 1
    rows = [f"{tmp_path / 'c.parquet'}#{i}" for i in range(16)]
    features = expected | {Path(row).name: expected[name] for row, name in zip(rows, names) if name in GOOD}
    members = {name: f"b.tar#{name}" for name in names}
    features |= {members[name]: expected[name] for name in GOOD}
    good = [*GOOD, *(members[n] for n in GOOD), *(Path(row).name for row, n in zip(rows, names) if n in GOOD)]
    bad = [*BAD, *(members[n] for n in BAD), *(Path(row).name for row, n in zip(rows, names) if n in BAD)]
    check(out, features, good, bad=[*bad, "c.parquet#15"])
    assert table(out / "errors.csv")[-1]["reason"] == "null: the row has no image"


def test_strict_stops(checkpoint, photos, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(checkpoint, photos, out, "--strict", "--shard-size", "1", "--patch-budget", "16") == 1
    assert f"--strict: image 1 ({photos / '01-cut.jpg'}): " in capsys.readouterr().err
    assert not (out / "index.csv").exists()
    assert not shards.shards_done(out, "safetensors", range(1, 15), [])
    good = [photos / name for name in GOOD]
    assert run(checkpoint, good, tmp_path / "good", "--strict") == 0
    assert "--strict" not in capsys.readouterr().err


def test_no_good_image_and_one_per_shard(checkpoint, photos, tmp_path):
    out = tmp_path / "out"
    assert run(checkpoint, [photos / name for name in BAD], out, "--pooled", "--shard-size", "3") == 1
    assert table(out / "index.csv") == []
    assert len(table(out / "errors.csv")) == 4
    assert load_file(out / "shard-00000.safetensors")["pooled"].shape == (0, 64)
    assert run(checkpoint, photos / "00.png", tmp_path / "one", "--pooled", "--shard-size", "1") == 0


def test_the_output_is_not_an_input(checkpoint, photos, expected, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "00.png").write_bytes((photos / "00.png").read_bytes())
    out = tmp_path / "in" / "out"
    out.mkdir()
    (out / "preview.png").write_bytes((photos / "01.png").read_bytes())
    for _ in range(2):
        assert run(checkpoint, tmp_path / "in", out, "--resume") == 0
        check(out, expected, ["00.png"], kept=["patches"], bad=[])


SETTINGS = ["--pooled", "--shard-size", "4", "--patch-budget", "40"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--dtype", "bfloat16"], "has dtype float32, this one bfloat16"),
        (["--shard-size", "5"], "has shard_size 4, this one 5"),
        (["--format", "npy"], "has format safetensors, this one npy"),
        (["--no-patches"], "has kept"),
        (["--max-num-patches", "9"], "has max_num_patches 16, this one 9"),
        (["--save-dtype", "float16"], "has save_dtype float32, this one float16"),
        (["--column", "other"], "has column None, this one other"),
        ("fewer", "has inputs 15, this one 14"),
        ("others", "has names 15 inputs, this one the same number under other names or in another order"),
        ("checkpoint", "has weights those of"),
    ],
)
def test_resuming_another_run_is_an_error(checkpoint, photos, tmp_path, capsys, finished, change, message):
    inputs, flags, ckpt = [photos], [], checkpoint
    if change == "fewer":
        inputs = sorted(photos.iterdir())[1:]
    elif change == "others":
        inputs = sorted(photos.iterdir())[::-1]
    elif change == "checkpoint":
        other = tmp_path / "other"
        assert main(["random-checkpoint", str(other), "--shape", "tiny", "--seed", "5"]) == 0
        ckpt = lambda: other  # noqa: E731
    else:
        flags = change
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    assert run(ckpt, inputs, finished, *SETTINGS, *flags, "--resume") == 2
    err = capsys.readouterr().err
    assert f"--resume: the run in '{finished}' {message}" in err
    assert before == {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def finished(checkpoint, photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "out"
    assert run(checkpoint, photos, out, *SETTINGS) == 1
    return out


def test_shards_can_be_read_by_whom_other_files_can(finished):
    modes = {path.stat().st_mode for path in finished.rglob("*") if path.is_file()}
    assert modes == {(finished / "run.json").stat().st_mode}
    assert len(list(finished.glob("shard-*"))) == 4


def test_a_decoding_process_that_dies(checkpoint, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Siglip2PackedImageProcessor, "read", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    assert run(checkpoint, photos, tmp_path / "out", "--decode-in", "processes", "--workers", "1") == 2
    assert "a decoding process was killed" in capsys.readouterr().err


def test_a_run_is_not_overwritten(checkpoint, photos, finished, capsys):
    assert run(checkpoint, photos, finished, *SETTINGS) == 2
    assert "holds a run: go on with it (--resume)" in capsys.readouterr().err


def test_resuming_a_finished_run_encodes_nothing(checkpoint, photos, expected, finished, monkeypatch):
    monkeypatch.setattr(features, "launch", None)
    times = {path: path.stat().st_mtime_ns for path in finished.glob("shard-*")}
    assert run(checkpoint, photos, finished, *SETTINGS, "--resume") == 1
    assert times == {path: path.stat().st_mtime_ns for path in finished.glob("shard-*")}
    check(finished, expected, GOOD)


def test_a_shard_that_was_removed_is_made_again(checkpoint, photos, expected, tmp_path):
    assert run(checkpoint, photos, tmp_path, *SETTINGS, "--resume") == 1
    (tmp_path / "shard-00001.safetensors").unlink()
    (tmp_path / ".parts" / "00003.csv").unlink()
    (tmp_path / "index.csv").unlink()
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("shard-0000[02]*")}
    assert run(checkpoint, photos, tmp_path, *SETTINGS, "--resume") == 1
    check(tmp_path, expected, GOOD)
    assert kept == {path: path.stat().st_mtime_ns for path in kept}


def test_errors_beyond_a_few_are_only_written(checkpoint, tmp_path, capsys):
    for count in (20, 25):
        out = tmp_path / str(count)
        assert run(checkpoint, [tmp_path / f"{i}.png" for i in range(count)], out) == 1
        said = capsys.readouterr().err
        assert said.count("FileNotFoundError") == 20
        assert said.count("further errors are not shown here") == (count > 20)
        assert len(table(out / "errors.csv")) == count


@pytest.fixture(scope="module")
def start():
    """Starts a process that has its imports behind it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["siglip2_packed.encode", __name__])

    def start_process(function, *args):
        process = context.Process(target=function, args=args)
        process.start()
        return process

    return start_process


def killed(argv, moment):
    """The command, killed before the `moment`-th step of writing a file."""
    torch.set_num_threads(1)
    steps = itertools.count()

    def step(function):
        def counted(*args):
            if next(steps) == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args)

        return counted

    os.replace, shards.save_file = step(os.replace), step(shards.save_file)
    sys.exit(main(argv))


def test_sigkill_at_every_step_of_writing(checkpoint, photos, expected, tmp_path, start):
    """run.json, twice (save, shard, part), then index.csv and errors.csv: killed before each, and not at all."""
    flags = ["--pooled", "--shard-size", "8", "--patch-budget", "40"]
    argv = ["encode", str(photos), "--ckpt", str(checkpoint()), "--device", "cpu", *flags, "--out"]
    steps = 1 + 2 * 3 + 2
    for moment in range(steps + 1):
        out = tmp_path / str(moment)
        process = start(killed, [*argv, str(out)], moment)
        process.join(120)
        assert process.exitcode == (-signal.SIGKILL if moment < steps else 1), moment
        assert len(list(out.glob("shard-*"))) == (moment // 3 if moment < 7 else 2)  # its second step renames it
        assert run(checkpoint, photos, out, *flags, "--resume") == 1
        check(out, expected, GOOD)


def command(argv, environment, output):
    os.environ.update(environment)
    torch.set_num_threads(1)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.exit(main(argv))


def ranks(start, argv, world, folder, *of_the_last):
    """What torchrun starts: the command, and the environment that tells it its rank; more flags for the last one."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    environments = [{"RANK": str(rank), "LOCAL_RANK": str(rank), **common} for rank in range(world)]
    argvs = [argv] * (world - 1) + [[*argv, *of_the_last]]
    return [start(command, *some, f"{folder}/rank{rank}.log") for rank, some in enumerate(zip(argvs, environments))]


@pytest.mark.parametrize("world", [1, 2])
def test_sigkill_from_outside(checkpoint, photos, expected, tmp_path, start, world):
    """All ranks killed as soon as one has finished a shard; another number of them goes on."""
    argv = ["encode", str(photos), "--ckpt", str(checkpoint()), "--out", str(tmp_path / "out"), "--device", "cpu"]
    processes = ranks(start, [*argv, *SETTINGS, "--decode-in", "processes"], world, tmp_path)
    end = time.monotonic() + 120
    while all(process.is_alive() for process in processes) and time.monotonic() < end:
        if list((tmp_path / "out" / ".parts").glob("*.csv")):
            break
        time.sleep(0.001)
    for process in processes:
        process.kill()
    for process in processes:
        process.join(60)
        assert process.exitcode in (-signal.SIGKILL, 1)
    assert run(checkpoint, photos, tmp_path / "out", *SETTINGS, "--resume") == 1
    check(tmp_path / "out", expected, GOOD)


def test_torchrun(checkpoint, photos, expected, tmp_path, finished, start):
    """Two ranks write what one process writes, and one goes on with what they began."""
    argv = ["encode", str(photos), "--ckpt", str(checkpoint()), "--device", "cpu", *SETTINGS, "--out", str(tmp_path)]
    processes = ranks(start, argv, 2, tmp_path)
    for process in processes:
        process.join(120)
    said = [(tmp_path / f"rank{rank}.log").read_text() for rank in range(2)]
    assert [process.exitcode for process in processes] == [1, 1], said  # images could not be read, on whichever rank
    assert "4 of 15 images could not be read" in said[0]
    assert ["11 images" in text for text in said] == [True, False]
    check(tmp_path, expected, GOOD)
    for name in ("index.csv", "errors.csv"):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()
    (tmp_path / ".parts" / "00002.csv").unlink()
    assert run(checkpoint, photos, tmp_path, *SETTINGS, "--resume") == 1
    check(tmp_path, expected, GOOD)


def test_ranks_that_disagree(checkpoint, photos, tmp_path, start):
    argv = ["encode", str(photos), "--ckpt", str(checkpoint()), "--device", "cpu", "--out", str(tmp_path / "out")]
    processes = ranks(start, argv, 2, tmp_path, "--shard-size", "3")
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [2, 2]
    assert "error: rank 1 has shard_size 3, rank 0 1024" in (tmp_path / "rank0.log").read_text()
    assert not (tmp_path / "out").exists()


def decode_and_wait(held):
    pool = decoding_pool(torch.device("cpu"), Siglip2PackedImageProcessor(), 2, "processes")
    assert pool.submit(os.getpid).result() != os.getpid()
    held.send("ready")
    time.sleep(600)


def test_decoding_processes_end_with_their_parent(start):
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = start(decode_and_wait, theirs)
    theirs.close()
    assert ours.poll(60)
    assert ours.recv() == "ready"
    process.kill()
    assert ours.poll(30)
    with pytest.raises(EOFError):  # the end that all of them held is closed
        ours.recv()


def inputs(*sources):
    return [Input(i, f"image {i}", source) for i, source in enumerate(sources)]


@pytest.fixture
def tower(checkpoint):
    model = Siglip2PackedVisionModel.from_pretrained(checkpoint()).eval()
    return model, Siglip2PackedImageProcessor.from_pretrained(checkpoint())


@pytest.fixture
def pool():
    with decoding_pool(torch.device("cpu"), Siglip2PackedImageProcessor(), 2) as threads:
        yield threads


def test_packs_hold_every_image_once_and_their_own_rows():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 18, 3000).tolist()
    images = [DecodedImage(i, "", (1, n), np.full((n, 3), i % 256, np.uint8)) for i, n in enumerate(lengths)]
    images[100:100] = [DecodedImage(3000, "", error="broken")]
    images.append(DecodedImage(3001, "", error="broken"))
    found = list(packs(images, 40, 64))
    assert sorted(image.ordinal for pack in found for image in (*pack.images, *pack.failed)) == list(range(3002))
    for pack in found:
        rows = [image.ordinal % 256 for image in pack.images for _ in range(image.length)]
        assert pack.patches[:, :1].flatten().tolist() == rows
        assert len(rows) <= 40
        assert all(image.patches is None for image in pack.images)
    assert sum(lengths) / (40 * len(found)) > 0.97
    assert [[image.ordinal for image in pack.failed] for pack in packs(images[-1:], 40, 64)] == [[3001]]
    assert list(packs([], 40, 64)) == []


def test_images_are_decoded_no_further_ahead_than_the_window():
    asked = itertools.count()
    images = (DecodedImage(next(asked), "", (1, 10), np.zeros((10, 3), np.uint8)) for _ in range(1000))
    next(packs(images, 40, 64))
    assert next(asked) <= 64 + 4


def test_the_meter(tower, pool):
    model, processor = tower
    meter = Meter(20)
    sources = [image_bytes(i, (8, 8)) for i in range(5)]
    flags = {"pooled": True, "patches": False, "patch_budget": 20, "workers": 2}
    rows = list(encode(model, processor, inputs(*sources, b"", *sources), pool, **flags, meter=meter))
    assert [row.ordinal for row in rows if row.error] == [5]
    assert (meter.images, meter.patches, meter.packs) == (10, 160, 10)
    assert 0 < meter.busy <= meter.seconds
    assert "packs 80% full" in str(meter)


def test_features_can_be_trained_on(tower, pool):
    model, processor = tower
    [row] = encode(model, processor, inputs(image_bytes(0, (9, 20))), pool)
    weights = torch.ones(64, requires_grad=True)
    (row.patches @ weights).sum().backward()
    torch.testing.assert_close(weights.grad, row.patches.sum(dim=0))


def test_whatever_an_image_provokes_is_its_error(tower, monkeypatch):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(tower[1], "read", fail)
    assert read_image(tower[1], 3, "a", "a.png").error == "MemoryError"


@pytest.mark.parametrize("decode_in", DECODE_IN)
def test_images_are_decoded_in_their_order(tower, decode_in):
    sources = [image_bytes(0, (400, 300) if i % 8 == 0 else (4, 4)) for i in range(40)]
    with decoding_pool(torch.device("cpu"), tower[1], 2, decode_in) as pool:
        assert [image.ordinal for image in decode(inputs(*sources), tower[1], pool, 1)] == list(range(40))


@pytest.mark.parametrize("places", [0, 1, 3, 24])
@pytest.mark.parametrize("kept", [0, 1000])
def test_patches_come_by_shared_memory_while_there_is_room(tower, places, kept):
    """Each image's own, whether a consumer drops them or keeps views of all; a place is free when nobody has it."""
    _, processor = tower
    job = IMAGES_PER_JOB * processor.max_num_patches * 3 * processor.patch_size**2
    sources = [b"" if i % 10 == 3 else image_bytes(i, (8 + i % 5, 9)) for i in range(60)]
    expected = [read_image(processor, *item) for item in inputs(*sources)]
    with DecodingProcesses(2, Shelf(places, job)) as pool:
        memory, found, shared = np.frombuffer(pool.shelf.memory, np.uint8), [], 0
        for image in decode(inputs(*sources), processor, pool, 1):
            assert image._replace(patches=None) == expected[image.ordinal]._replace(patches=None)
            if image.patches is not None:
                shared += np.shares_memory(image.patches, memory)
                found.append((image.ordinal, image.patches[:, :]))
            del found[: len(found) - kept], image
        del memory
        assert all(np.array_equal(patches, expected[i].patches) for i, patches in found)
        good, in_jobs = 54, sum(1 for i in range(min(60, 8 * places)) if i % 10 != 3)
        assert len(found) == min(kept, good)
        assert shared == in_jobs if kept else (shared > 0) == (places > 0)
        found.clear()
        assert sorted(pool.shelf.free) == list(range(places))


def test_patches_larger_than_a_place_come_all_the_same(tower):
    _, processor = tower
    sources = [image_bytes(i, (8, 9)) for i in range(20)]
    expected = [read_image(processor, *item).patches for item in inputs(*sources)]
    with DecodingProcesses(1, Shelf(2, sum(map(np.size, expected[:3])))) as pool:
        memory = np.frombuffer(pool.shelf.memory, np.uint8)
        images = list(decode(inputs(*sources), processor, pool, 1))
        assert [np.shares_memory(image.patches, memory) for image in images[:8]] == [True] * 3 + [False] * 5
        assert all(np.array_equal(image.patches, patches) for image, patches in zip(images, expected, strict=True))


def test_the_shelf_has_room_for_all_that_wait(tower):
    _, processor = tower
    sources = [image_bytes(i, (16, 16)) for i in range(200)]
    with decoding_pool(torch.device("cpu"), processor, 2, "processes", patch_budget=640) as pool:
        assert pool.shelf.size == IMAGES_PER_JOB * processor.max_num_patches * 3 * processor.patch_size**2
        memory = np.frombuffer(pool.shelf.memory, np.uint8)
        images = list(decode(inputs(*sources), processor, pool, 2))
        assert all(np.shares_memory(image.patches, memory) for image in images)
        del images
        filled = packs(decode(inputs(*sources), processor, pool, 2), 640, 80)
        ends = [len(next(filled).images) for _ in range(5)]
        assert sum(ends) == 200 and len(pool.shelf.free) == len(memory) // pool.shelf.size


@pytest.mark.parametrize("how", ["closed", "strict", "model"])
def test_places_come_back_from_a_run_that_stops_early(tower, monkeypatch, how):
    def refuse(**_):
        raise ValueError

    model, processor = tower
    sources = [b"" if i == 150 else image_bytes(i, (40, 40)) for i in range(300)]
    with decoding_pool(torch.device("cpu"), processor, 2, "processes") as pool:
        places = len(pool.shelf.free)
        if how == "closed":
            images = decode(inputs(*sources), processor, pool, 2)
            next(images)
            images.close()
        else:
            error = StrictError if how == "strict" else ValueError
            if how == "model":
                monkeypatch.setattr(model, "forward", refuse)
            with pytest.raises(error):
                list(encode(model, processor, inputs(*sources), pool, patch_budget=160, workers=2, strict=True))
        pool.submit(os.getpid).result()
        begin = time.monotonic()
        while len(pool.shelf.free) < places and time.monotonic() < begin + 30:
            time.sleep(0.05)
        assert sorted(pool.shelf.free) == list(range(places))


def test_a_shelf_takes_no_more_than_is_to_be_had(monkeypatch):
    def map_at_most(bytes_):
        def mapped(_, size):
            if size > bytes_:
                raise OSError(12, "Cannot allocate memory")
            return bytearray(1)

        monkeypatch.setattr(mmap, "mmap", mapped)

    map_at_most(MOST_SHARED)
    assert len(Shelf(10**9, 3 << 20).free) == MOST_SHARED // (3 << 20)
    map_at_most(999)
    assert len(Shelf(9, 100).free) == 9
    assert not Shelf(10, 100).free


def test_normalize_is_the_processors_arithmetic(photos):
    for settings in ({}, {"image_mean": (0.1, 0.2, 0.3), "image_std": (0.9, 0.8, 0.7)}, {"do_normalize": False}):
        processor = Siglip2PackedImageProcessor(patch_size=4, max_num_patches=30, **settings)
        patches, (h, w) = processor.read(photos / "07.png")
        packed = processor([photos / "07.png"])
        assert [1, h, w] == packed["grid_thw"][0].tolist()
        assert torch.equal(processor.normalize(torch.from_numpy(patches)), packed["pixel_values"])


def test_encode_refuses_processors_that_do_not_resize(tower, pool):
    model, processor = tower
    processor.do_resize = False
    with pytest.raises(ValueError, match="encode resizes and rescales"):
        list(encode(model, processor, inputs(image_bytes(0, (8, 8))), pool))


@pytest.mark.parametrize("decode_in", DECODE_IN)
def test_a_consumer_that_stops_early_leaves_no_thread_and_no_process(tower, decode_in):
    model, processor = tower
    before = threading.active_count()
    with decoding_pool(model.device, processor, 2, decode_in) as pool:
        rows = encode(model, processor, inputs(*[image_bytes(0, (8, 8))] * 300), pool, patch_budget=16, workers=2)
        next(rows)
        rows.close()
    assert threading.active_count() <= before
    assert not multiprocessing.active_children()


@pytest.mark.gpu
@pytest.mark.parametrize("kept", [["pooled"], ["pooled", "patches"]])
def test_packs_are_launched_without_a_sync(checkpoint, kept):
    """Nothing waits for the device but the fetch of the pack before."""
    model = Siglip2PackedVisionModel.from_pretrained(checkpoint("base"), dtype=torch.bfloat16).to("cuda").eval()
    processor = Siglip2PackedImageProcessor.from_pretrained(checkpoint("base"))
    images = [read_image(processor, i, "", image_bytes(i, (40, 30 + i))) for i in range(4)]
    with torch.no_grad():
        for attempt in range(2):
            pack = next(packs(images, 16384, 64, pin_memory=True))
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error" if attempt else "default")
            try:
                finish = launch(model, processor, pack, "pooled" in kept, "patches" in kept, Meter(16384))
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert len(finish()) == 4


@pytest.mark.gpu
@pytest.mark.parametrize("budget", [40, 16384])
def test_cuda(checkpoint, photos, expected, tmp_path, budget):
    """Page-locked copies beside the next forward bring back the features of the right pack."""
    flags = ["--device", "cuda", "--pooled", "--patch-budget", str(budget), "--shard-size", "6"]
    assert run(checkpoint, [photos] * 5, tmp_path / "out", *flags) == 1
    check(tmp_path / "out", expected, GOOD * 5, tolerance=1e-4, bad=BAD * 5)


@pytest.mark.gpu
@pytest.mark.parametrize("budget", [40, 300])
def test_half_precision_is_replayed_from_cuda_graphs(checkpoint, photos, expected, tmp_path, monkeypatch, budget):
    """Of packs whose features are fetched while the next is replayed, each row of the right image; the last, a small
    one, is not worth a graph."""
    replays, replay = [], graphs._Graph.replay
    monkeypatch.setattr(
        graphs._Graph, "replay", lambda self, *args: (replays.append(self.bucket), replay(self, *args))[1]
    )
    flags = ["--device", "cuda", "--dtype", "float16", "--pooled", "--patch-budget", str(budget), "--shard-size", "6"]
    assert run(checkpoint, [photos] * 5, tmp_path / "out", *flags) == 1
    check(tmp_path / "out", expected, GOOD * 5, tolerance=2e-2, bad=BAD * 5)
    assert len(replays) > 1 and {bucket.patches for bucket in replays} == {budget}


def test_run_json_says_what_was_asked_for(finished, checkpoint):
    settings = json.loads((finished / "run.json").read_text())
    assert settings["checkpoint"] == str(checkpoint())
    assert (settings["inputs"], settings["shard_size"], settings["kept"]) == (15, 4, ["patches", "pooled"])
