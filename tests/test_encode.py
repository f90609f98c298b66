"""`siglip2-packed encode --out FILE`: features that are the model's, whatever the files are."""

import io
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from siglip2_packed import Siglip2PackedImageProcessor, Siglip2PackedVisionModel
from siglip2_packed.cli import main
from siglip2_packed.collection import shards

SIZES = [(9, 20), (31, 8), (16, 16), (5, 40), (12, 13)]


def picture(seed, size):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path):
    """Five images in two folders, two of them of one name, and a file that is none."""
    (tmp_path / "in" / "deeper").mkdir(parents=True)
    names = ["a.png", "b.PNG", "deeper/a.png", "deeper/c.webp", "e.jpg"]
    for seed, (name, size) in enumerate(zip(names, SIZES)):
        picture(seed, size).save(tmp_path / "in" / name, lossless=True)
    (tmp_path / "in" / "notes.txt").write_text("not an image")
    return tmp_path / "in"


def read(path):
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, {name: json.loads(value) for name, value in file.metadata().items()}


def run(checkpoint, images, out, *flags):
    argv = ["encode", *map(str, images), "--out", str(out), "--ckpt", str(checkpoint), "--device", "cpu", *flags]
    return main(argv)


@pytest.mark.parametrize("budget", [16, 33, 16384])
def test_equals_the_model_called_per_image(checkpoint, folder, tmp_path, budget):
    ckpt = checkpoint("tiny72")
    out = tmp_path / "made" / "features.safetensors"
    assert run(ckpt, [folder], out, "--pooled", "--patch_budget", str(budget)) == 0
    tensors, metadata = read(out)

    model = Siglip2PackedVisionModel.from_pretrained(ckpt).eval()
    processor = Siglip2PackedImageProcessor.from_pretrained(ckpt)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".txt")
    assert len(files) == 5
    assert [metadata["images"][f"{i:05d}"]["file"] for i in range(5)] == [str(file) for file in files]
    assert set(tensors) == {*metadata["images"], "grid_thw", "pooled"}
    for i, file in enumerate(files):
        packed = processor([file])
        with torch.no_grad():
            expected = model(**packed)
        key = f"{i:05d}"
        assert metadata["images"][key]["grid_thw"] == tensors["grid_thw"][i].tolist() == packed["grid_thw"][0].tolist()
        torch.testing.assert_close(tensors[key], expected.last_hidden_state, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(tensors["pooled"][i], expected.pooler_output[0], rtol=1e-5, atol=1e-5)
    assert metadata["failed"] == {}


def test_packs_stay_within_the_budget(checkpoint, folder, tmp_path, monkeypatch):
    packs = []
    forward = Siglip2PackedVisionModel.forward

    def counted(self, pixel_values, *args, **kwargs):
        packs.append(len(pixel_values))
        return forward(self, pixel_values, *args, **kwargs)

    monkeypatch.setattr(Siglip2PackedVisionModel, "forward", counted)
    flags = ["--patch-budget", "33", "--max-num-patches", "11"]
    assert run(checkpoint(), [folder], tmp_path / "f.safetensors", *flags) == 0
    assert len(packs) == 2
    assert max(packs) <= 33
    assert read(tmp_path / "f.safetensors")[0]["grid_thw"].prod(dim=1).max() <= 11


def bad_files(folder):
    whole = io.BytesIO()
    picture(9, (64, 64)).save(whole, "JPEG")
    (folder / "cut.jpg").write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    (folder / "text.jpg").write_text("not a photograph")
    (folder / "zero.jpg").write_bytes(b"")
    return [folder / "cut.jpg", folder / "text.jpg", folder / "zero.jpg", folder / "absent.jpg"]


@pytest.mark.parametrize("budget", [16, 48, 16384])
def test_bad_files_are_named_and_leave_rows_aligned(checkpoint, folder, tmp_path, capsys, budget):
    cut, text, zero, absent = bad_files(folder)
    good = [folder / "a.png", folder / "b.PNG", folder / "deeper" / "a.png"]
    files = [good[0], cut, text, good[1], zero, absent, good[2]]
    (tmp_path / "list.txt").write_text("".join(f"{file}\n" for file in files))
    out = tmp_path / "features.safetensors"
    assert run(checkpoint(), [tmp_path / "list.txt"], out, "--patch-budget", str(budget), "--pooled") == 0
    err = capsys.readouterr().err
    for index in (1, 2, 4, 5):
        assert f"image {index} ({files[index]}): " in err
    assert "4 of 7 images could not be read" in err

    tensors, metadata = read(out)
    assert list(metadata["images"]) == ["00000", "00003", "00006"]
    assert list(metadata["failed"]) == ["00001", "00002", "00004", "00005"]
    assert all(entry["reason"] for entry in metadata["failed"].values())
    alone = tmp_path / "alone.safetensors"
    for row, (key, file) in enumerate(zip(metadata["images"], good)):
        assert metadata["images"][key]["file"] == str(file)
        assert run(checkpoint(), [file], alone, "--pooled") == 0
        expected = read(alone)[0]
        assert torch.equal(tensors["grid_thw"][row], expected["grid_thw"][0])
        torch.testing.assert_close(tensors[key], expected["00000"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(tensors["pooled"][row], expected["pooled"][0], rtol=1e-5, atol=1e-5)


def test_no_good_file_at_all(checkpoint, folder, tmp_path, capsys):
    out = tmp_path / "features.safetensors"
    assert run(checkpoint(), bad_files(folder)[:3], out, "--pooled") == 1
    tensors, metadata = read(out)
    assert metadata["images"] == {}
    assert {name: list(x.shape) for name, x in tensors.items()} == {"grid_thw": [0, 3], "pooled": [0, 64]}


def test_the_same_file_twice(checkpoint, folder, tmp_path, capsys):
    out = tmp_path / "features.safetensors"
    assert run(checkpoint(), [folder / "a.png", folder / "b.PNG", folder / "a.png"], out) == 0
    assert "3 images, 46 patches (float32 on cpu)" in capsys.readouterr().out
    tensors, metadata = read(out)
    assert metadata["images"]["00000"] == metadata["images"]["00002"]
    torch.testing.assert_close(tensors["00000"], tensors["00002"], rtol=1e-5, atol=1e-5)
    assert "pooled" not in tensors


def test_dtype(checkpoint, folder, tmp_path):
    out = tmp_path / "features.safetensors"
    assert run(checkpoint(), [folder], out, "--dtype", "bfloat16", "--pooled") == 0
    tensors, metadata = read(out)
    assert {x.dtype for name, x in tensors.items() if name != "grid_thw"} == {torch.bfloat16}
    assert metadata["model"]["dtype"] == "bfloat16"
    assert all(x.isfinite().all() for x in tensors.values())


def test_the_old_file_stays_whole_when_writing_fails(checkpoint, folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "features.safetensors"
    assert run(checkpoint(), [folder / "a.png"], out) == 0
    before = out.read_bytes()

    def full_disk(tensors, path, metadata):
        path.write_bytes(b"half of it")
        raise OSError("No space left on device")

    monkeypatch.setattr(shards, "save_file", full_disk)
    assert run(checkpoint(), [folder], out) == 2
    assert out.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["features.safetensors"]
    assert "No space left" in capsys.readouterr().err


def test_the_new_file_takes_the_old_ones_place_at_once(checkpoint, folder, tmp_path):
    out, reader = tmp_path / "features.safetensors", tmp_path / "reader"
    assert run(checkpoint(), [folder / "a.png"], out) == 0
    before = out.read_bytes()
    reader.hardlink_to(out)  # as somebody who has the old file open sees it
    assert run(checkpoint(), [folder], out) == 0
    assert reader.read_bytes() == before
    assert "00004" in read(out)[0]


def test_a_file_of_somebody_else_is_not_replaced(checkpoint, folder, finished, tmp_path, capsys):
    ckpt = checkpoint()
    notes = tmp_path / "notes.safetensors"
    notes.write_text("no tensors at all")
    for file in (ckpt / "model.safetensors", finished / "shard-00000.safetensors", notes):
        before = file.read_bytes()
        assert run(ckpt, [folder], file) == 2
        assert f"{str(file)!r} is there, and no file of this command" in capsys.readouterr().err
        assert file.read_bytes() == before


def test_a_folder_that_could_not_be_read_again(checkpoint, folder, tmp_path, capsys):
    assert run(checkpoint(), [folder], tmp_path / os.fsdecode(b"\xff")) == 2
    assert "is not UTF-8" in capsys.readouterr().err and [*tmp_path.iterdir()] == [folder]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--patch-budget", "15"], "--patch-budget 15 is less than the 16 patches"),
        (["--max-num-patches", "0"], "max_num_patches must be a positive integer, got 0"),
        (["--out", "{tmp}/f.parquet"], "give a folder, and --format"),
        (["--out", "{tmp}/in/notes.txt"], "is a file, not a folder"),
        (["--resume"], "--resume needs a folder"),
        (["--format", "npy"], "give a folder"),
        (["--no-patches"], "nothing to write"),
        (["--workers", "0"], "--workers must be at least 1, got 0"),
        (["{tmp}/empty"], "no images in"),
        (["--ckpt", "{tmp}/nowhere"], "nowhere"),
        (["--attn-implementation", "torch_varlen"], "needs a CUDA device"),
    ],
)
def test_user_errors_are_one_line(checkpoint, folder, tmp_path, capsys, flags, message):
    (tmp_path / "empty").mkdir()
    flags = [flag.replace("{tmp}", str(tmp_path)) for flag in flags]
    paths = [flags.pop()] if not flags[0].startswith("--") else [folder]
    ckpt = checkpoint()
    capsys.readouterr()  # what making it printed
    assert run(ckpt, paths, tmp_path / "f.safetensors", *flags) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert message in lines[0]
    assert not (tmp_path / "f.safetensors").exists()


def test_pooled_needs_a_head(checkpoint, folder, tmp_path, capsys):
    headless = tmp_path / "headless"
    Siglip2PackedVisionModel.from_pretrained(checkpoint(), vision_use_head=False).save_pretrained(headless)
    Siglip2PackedImageProcessor.from_pretrained(checkpoint()).save_pretrained(headless)
    capsys.readouterr()
    assert run(headless, [folder], tmp_path / "f.safetensors", "--pooled") == 2
    assert "no pooling head" in capsys.readouterr().err
    assert run(headless, [folder], tmp_path / "f.safetensors") == 0
