"""`siglip2-packed encode --resume`: nothing is lost, doubled or made twice, whenever the run before was killed."""

import itertools
import json
import os
import signal
import sys

import pytest
import torch
from encode_runs import GOOD, SETTINGS, check, run, start

from siglip2_packed.cli import main
from siglip2_packed.collection import features, shards


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


def test_a_run_is_not_overwritten(checkpoint, photos, finished, capsys):
    assert run(checkpoint, photos, finished, *SETTINGS) == 2
    assert "holds a run: go on with it (--resume)" in capsys.readouterr().err


def test_resuming_a_finished_run_encodes_nothing(checkpoint, photos, expected, finished, monkeypatch):
    monkeypatch.setattr(features, "launch", None)
    times = {path: path.stat().st_mtime_ns for path in finished.glob("shard-*")}
    assert run(checkpoint, photos, finished, *SETTINGS, "--resume") == 0
    assert times == {path: path.stat().st_mtime_ns for path in finished.glob("shard-*")}
    check(finished, expected, GOOD)


def test_a_shard_that_was_removed_is_made_again(checkpoint, photos, expected, tmp_path):
    assert run(checkpoint, photos, tmp_path, *SETTINGS, "--resume") == 0
    (tmp_path / "shard-00001.safetensors").unlink()
    (tmp_path / ".parts" / "00003.csv").unlink()
    (tmp_path / "index.csv").unlink()
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("shard-0000[02]*")}
    assert run(checkpoint, photos, tmp_path, *SETTINGS, "--resume") == 0
    check(tmp_path, expected, GOOD)
    assert kept == {path: path.stat().st_mtime_ns for path in kept}


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


def test_sigkill_at_every_step_of_writing(checkpoint, photos, expected, tmp_path):
    """run.json, twice (save, shard, part), then index.csv and errors.csv: killed before each, and not at all."""
    flags = ["--pooled", "--shard-size", "8", "--patch-budget", "40"]
    argv = ["encode", str(photos), "--ckpt", str(checkpoint()), "--device", "cpu", *flags, "--out"]
    steps = 1 + 2 * 3 + 2
    for moment in range(steps + 1):
        out = tmp_path / str(moment)
        process = start(killed, [*argv, str(out)], moment)
        process.join(120)
        assert process.exitcode == (-signal.SIGKILL if moment < steps else 0), moment
        assert len(list(out.glob("shard-*"))) == (moment // 3 if moment < 7 else 2)  # its second step renames it
        assert run(checkpoint, photos, out, *flags, "--resume") == 0
        check(out, expected, GOOD)


def test_run_json_says_what_was_asked_for(finished, checkpoint):
    settings = json.loads((finished / "run.json").read_text())
    assert settings["checkpoint"] == str(checkpoint())
    assert (settings["inputs"], settings["shard_size"], settings["kept"]) == (15, 4, ["patches", "pooled"])
