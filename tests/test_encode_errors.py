"""`siglip2-packed encode` over what cannot be encoded: named, at no cost to the rest; or the run says why it ends."""

import errno
import os
import re
import resource
import shutil
import signal
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from encode_runs import BAD, GOOD, check, run, table
from safetensors.torch import load_file

from siglip2_packed import Siglip2PackedImageProcessor, Siglip2PackedVisionModel
from siglip2_packed import encode as command
from siglip2_packed.collection import FORMATS
from siglip2_packed.collection import run as collection_run
from siglip2_packed.collection.features import Meter


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
    assert run(checkpoint, photos, tmp_path / "out") == 0
    check(tmp_path / "out", expected, sorted({*GOOD} - {*same}), kept=["patches"], bad=sorted([*BAD, *same]))


def test_strict_stops(checkpoint, photos, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(checkpoint, photos, out, "--strict", "--shard-size", "1", "--patch-budget", "16") == 1
    assert f"--strict: image 1 ({photos / '01-cut.jpg'}): " in capsys.readouterr().err
    assert not (out / "index.csv").exists()
    assert not list((out / ".parts").glob("*.csv"))[1:]
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


def test_errors_beyond_a_few_are_only_written(checkpoint, tmp_path, capsys):
    for count in (20, 25):
        out = tmp_path / str(count)
        (tmp_path / "list.txt").write_text("".join(f"{tmp_path / str(i)}.png\n" for i in range(count)))
        assert run(checkpoint, tmp_path / "list.txt", out) == 1
        said = capsys.readouterr().err
        assert said.count("FileNotFoundError") == 20
        assert said.count("further errors are not shown here") == (count > 20)
        assert len(table(out / "errors.csv")) == count


def test_a_decoding_process_that_dies(checkpoint, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Siglip2PackedImageProcessor, "read", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    assert run(checkpoint, photos, tmp_path / "out", "--decode-in", "processes", "--workers", "1") == 2
    assert "a decoding process was killed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "code"),
    [
        ([], 0),
        (["--max-errors", "4"], 0),
        (["--max-errors", "3"], 1),
        (["--max-errors", "0"], 1),
        (["--max-errors", "27%"], 0),
        (["--max-errors", "26%"], 1),
        (["--max-errors", "0.27"], 0),
    ],
)
def test_how_many_errors_are_too_many(checkpoint, photos, expected, tmp_path, capsys, flags, code):
    """4 of 15. The run comes to its end all the same, and going on with it says the same."""
    for resume in ([], ["--resume"]):
        assert run(checkpoint, photos, tmp_path, *flags, *resume) == code
        assert capsys.readouterr().err.splitlines()[-1].startswith("4 of 15 images could not be read")
    check(tmp_path, expected, GOOD, kept=["patches"])


@pytest.mark.parametrize("text", ["-1", "1.5", "many", "101%", "nan", ""])
def test_what_is_no_number_of_errors(checkpoint, photos, tmp_path, capsys, text):
    with pytest.raises(SystemExit):
        run(checkpoint, photos, tmp_path, f"--max-errors={text}")
    assert "neither a count (10) nor a share (1%)" in capsys.readouterr().err


def test_names_that_are_not_there_come_before_all_else(photos, tmp_path, capsys):
    """All of them, and neither a model nor the folder is touched."""
    named = [photos / "00.png", tmp_path / "a.jpg", tmp_path / "b.tar", tmp_path / "c", tmp_path / "d.txt"]
    assert run(lambda: tmp_path / "nowhere", named, tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert f"no such file or folder: {', '.join(map(str, named[1:]))}\n" in said
    assert "00.png" not in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fmt", ["parquet", "arrow"])
def test_what_a_format_needs_is_looked_for_first(photos, tmp_path, monkeypatch, capsys, fmt):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert run(lambda: tmp_path / "nowhere", photos, tmp_path / "out", "--format", fmt) == 2
    assert "pip install 'siglip2-packed[parquet]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_memory_decoding_takes_and_which_dtype_is_faster(checkpoint, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "cpu_bfloat16", lambda: "amx")
    flags = ["--workers", "2", "--patch-budget", "1024"]
    for out, more, told in (("a", [], True), ("a", ["--resume"], False), ("b", ["--dtype", "float32"], False)):
        assert run(checkpoint, photos, tmp_path / out, *flags, *more) == 0
        said = capsys.readouterr().err
        # (2 workers x 3 jobs + 2) x 8 images and the window's 64, of 16 patches, and 6 packs: 48 bytes a patch
        assert "ahead of the model: up to 393.2 kB of patches, and 2 images being decoded" in said
        assert ("this CPU has amx: --dtype bfloat16 is about twice as fast as float32" in said) == told


def test_how_much_it_will_write(checkpoint, photos, tmp_path, monkeypatch, capsys):
    """15 images of at most 16 patches and a pooled vector, 64 numbers each, of 2 and of 4 bytes; then nothing more."""
    flags = ["--pooled", "--dtype", "bfloat16"]
    assert run(checkpoint, photos, tmp_path / "a", *flags) == 0
    said = capsys.readouterr().err
    assert "to write: up to 32.6 kB of bfloat16; free there: " in said and "may not fit" not in said
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=65e3))
    fits_not = "up to 65.3 kB of float32 (npy has no bfloat16); free there: 65.0 kB: this may not fit"
    for out, asked in (("b", flags), ("c", ["--pooled", "--save-dtype", "bfloat16"])):
        assert run(checkpoint, photos, tmp_path / out, *asked, "--format", "npy") == 0
        assert fits_not in capsys.readouterr().err
    assert run(checkpoint, photos, tmp_path / "a", *flags, "--resume") == 0
    assert "up to 0 bytes" in capsys.readouterr().err


@pytest.mark.parametrize(("flags", "budget"), [([], 2048), (["--max-num-patches", "3000"], 3000)])
def test_packs_are_smaller_on_a_cpu(checkpoint, photos, tmp_path, monkeypatch, flags, budget):
    budgets = []
    monkeypatch.setattr(command, "Meter", lambda budget: budgets.append(budget) or Meter(budget))
    assert run(checkpoint, photos / "00.png", tmp_path, *flags) == 0
    assert budgets == [budget]


@pytest.mark.parametrize("bf16", [True, False])
def test_the_dtype_a_device_gets(monkeypatch, bf16):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: bf16)
    assert command.default_dtype(torch.device("cuda")) == ("bfloat16" if bf16 else "float32")
    assert command.default_dtype(torch.device("cpu")) == "float32"


def test_one_file_clears_what_a_killed_run_left(checkpoint, photos, tmp_path):
    ours = [tmp_path / ".x.safetensors.17.tmp", tmp_path / ".x.safetensors.18.tmp"]
    theirs = [tmp_path / ".y.safetensors.17.tmp", tmp_path / ".x.safetensors.tmp", tmp_path / ".x.safetensors.bak"]
    ours[0].touch()
    ours[1].mkdir()
    for path in theirs:
        path.touch()
    assert run(checkpoint, photos, tmp_path / "x.safetensors") == 0
    assert sorted(tmp_path.iterdir()) == sorted([*theirs, tmp_path / "x.safetensors"])


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_file_that_cannot_grow_says_why(checkpoint, photos, tmp_path, capsys, fmt):
    ckpt, before = checkpoint(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, before[1]))
    try:
        assert run(lambda: ckpt, photos, tmp_path, "--format", fmt) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "file too large" in capsys.readouterr().err.lower()


def test_a_shard_that_cannot_be_written_ends_all_that_works_for_it(checkpoint, photos, tmp_path, monkeypatch, capsys):
    """The bar first, so that the error has a line of its own, and every thread."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    before = {*threading.enumerate()}
    monkeypatch.setattr(collection_run, "write_part", full)
    assert run(checkpoint, photos, tmp_path, "--shard-size", "1", "--patch-budget", "1024") == 2
    assert re.search(r"^siglip2-packed encode: error: .*No space left", capsys.readouterr().err, re.MULTILINE)
    made = {*threading.enumerate()} - before
    assert [thread.name for thread in made if thread.name.startswith("ThreadPool")] == []
