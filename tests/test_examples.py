"""The programs of examples/ do what they say, on a small checkpoint."""

import argparse
import os
import runpy
import subprocess
import sys

import pytest
import torch
from documents import ROOT, furnish
from PIL import Image

from siglip2_packed import cli

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
CKPT = ("--ckpt", "CKPT")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reader")
    furnish(folder)
    return folder


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """`run(name, *argv)` -> the lines that it prints."""
    monkeypatch.chdir(folder)

    def run(name, *argv):
        monkeypatch.setattr(sys, "argv", [name, *map(str, argv), *CKPT])
        runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return run


def test_each_is_short_and_has_a_test():
    tests = (ROOT / "tests" / "test_examples.py").read_text()
    assert [file.name for file in EXAMPLES if len(file.read_text().splitlines()) >= 80] == []
    assert [file.stem for file in EXAMPLES if f'"{file.stem}' not in tests] == []
    assert len(EXAMPLES) >= 5


@pytest.fixture(scope="module")
def features(folder):
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        assert cli.main(["encode", "photos", *CKPT, "--out", "features", "--pooled", "--no-patches"]) == 0
    return "features"


def test_a_photograph_is_most_like_itself(run, features):
    lines = run("search_photos", features, "--like", "photos/b.jpg")
    assert lines[0] == "1.000  photos/b.jpg"
    assert len(lines) == 2 and lines[1].endswith("photos/a.jpg")


def test_a_query_that_cannot_be_read_is_named(run, features):
    with pytest.raises(ValueError, match=r"nope\.jpg"):
        run("search_photos", features, "--like", "nope.jpg")


def test_words_find_photographs(run, features):
    (line,) = run("search_photos", features, "--text", "a cat", "--top", "1")
    assert -1 <= float(line.split()[0]) <= 1


def test_a_projector_learns_from_frozen_features(run, folder, tmp_path):
    for name, colours in (("red", ("red", "tomato")), ("blue", ("blue", "navy"))):
        (tmp_path / name).mkdir()
        for i, colour in enumerate(colours):
            Image.new("RGB", (40 + 20 * i, 50), colour).save(tmp_path / name / f"{i}.png")
    first, last, wrote = run("train_projector", tmp_path, "--steps", "60", "--width", "16")
    assert "4 of 4 training photographs right" in last
    assert float(last.split("loss ")[1].split(",")[0]) < float(first.split("loss ")[1].split(",")[0]) / 2
    saved = torch.load(folder / wrote.removeprefix("wrote "))
    assert saved["classes"] == ["blue", "red"]
    assert saved["state"]["2.weight"].shape == (2, 16)


def test_a_swapped_tower_says_the_same(run):
    lines = run("swap_tower", "cat.jpg", "receipt.png")
    assert lines[0].endswith(" is a Siglip2PackedVisionTower now")
    assert float(lines[-2].removeprefix("largest difference: ")) < 1e-4
    assert lines[-1] == "put back: True"


def test_patches_are_drawn_in_colours(run, folder):
    lines = run("patch_colours", "cat.jpg", "receipt.png", "--max-num-patches", "60")
    assert [line.split(": ")[1] for line in lines] == ["6x9 patches", "13x4 patches"]
    with Image.open(folder / "colours" / "receipt.png") as picture:
        assert picture.size == (4 * 16, 13 * 16)
        assert len(picture.getcolors()) > 10


def test_no_photographs_is_no_training(tmp_path):
    program = runpy.run_path(str(ROOT / "examples" / "packed_training.py"))
    with pytest.raises(SystemExit, match=r"no \.jpg files in"):
        program["train"](argparse.Namespace(folder=tmp_path, ckpt="CKPT", budget=256, epochs=1), torch.device("cpu"))


def test_two_ranks_train_on_packs(folder):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    program = ROOT / "examples" / "packed_training.py"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*torchrun, str(program), "photos", *CKPT, "--budget", "256", "--epochs", "2"]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("rank ")]
    assert len(lines) == 4  # two photographs, two ranks, two epochs
    losses = {tuple(line.split(", ")[0:2]): line.split("loss ")[1] for line in lines}
    assert losses["rank 0", "epoch 0"] != losses["rank 0", "epoch 1"]
    assert "nan" not in "".join(losses.values())
