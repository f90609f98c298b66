"""`siglip2-packed encode --resume`: nothing is lost, doubled or made twice, whenever the run before was killed."""

import itertools
import json
import os
import shutil
import signal
import sys
import tarfile
from pathlib import Path

import PIL
import pytest
import torch
from encode_runs import BAD, GOOD, SETTINGS, check, load, run, start

from siglip2_packed import Siglip2PackedImageProcessor, Siglip2PackedVisionModel, invariance
from siglip2_packed.cli import main
from siglip2_packed.collection import features, shards
from siglip2_packed.collection.lock import Lock, lock_of


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
        (["--save-dtype", "float16", "--format", "npy"], "has format safetensors, this one npy; save_dtype float32"),
        ("fewer", "has inputs 15, this one 14; not among the inputs any more: {photos}/00.png"),
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
    assert f"--resume: the run in '{finished}' {message.format(photos=photos)}" in err
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
    """run.json, twice (save, shard, part), then index.csv, errors.csv and skipped.csv: killed before each, or not."""
    flags = ["--pooled", "--shard-size", "8", "--patch-budget", "40"]
    argv = ["encode", str(photos), "--ckpt", str(checkpoint()), "--device", "cpu", *flags, "--out"]
    steps = 1 + 2 * 3 + 3
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
    assert set(settings["versions"]) == {"siglip2_packed", "pillow", "torch", "transformers"}
    assert settings["tower"]["num_attention_heads"] == 4


def test_a_run_goes_on_in_the_dtype_it_was_begun_in(checkpoint, photos, expected, tmp_path, capsys):
    """Whatever the device would have chosen, and whatever else is asked for is refused."""
    flags = [*SETTINGS, "--resume"]
    assert run(checkpoint, photos, tmp_path, *flags, "--dtype", "bfloat16", "--save-dtype", "float16") == 0
    (tmp_path / "shard-00002.safetensors").unlink()
    assert run(checkpoint, photos, tmp_path, *flags) == 0
    check(tmp_path, expected, GOOD, tolerance=0.2)
    assert {str(x.dtype) for x in load(tmp_path, "safetensors", "shard-00002.safetensors").values()} == {
        "torch.int64",
        "torch.float16",
    }
    assert run(checkpoint, photos, tmp_path, *flags, "--dtype", "float32") == 2
    assert "has dtype bfloat16, this one float32" in capsys.readouterr().err


def test_any_weight_counts(checkpoint, photos, tmp_path, capsys):
    """Not only the first of a tensor: one in the middle of the largest, and what is not a weight, a norm's epsilon."""
    model = Siglip2PackedVisionModel.from_pretrained(checkpoint())
    assert run(checkpoint, photos, tmp_path / "out", *SETTINGS) == 0
    with torch.no_grad():
        model.encoder.layers[1].mlp.fc2.weight[-1, -1] += 1
    for change, message in (("weight", "has weights those of"), ("eps", "tower.layer_norm_eps 1e-06, this one 1e-05")):
        model.save_pretrained(tmp_path / change)
        Siglip2PackedImageProcessor.from_pretrained(checkpoint()).save_pretrained(tmp_path / change)
        assert run(lambda: tmp_path / change, photos, tmp_path / "out", *SETTINGS, "--resume") == 2
        assert message in capsys.readouterr().err
        model.config.layer_norm_eps = 1e-5


def test_versions_count(checkpoint, photos, finished, monkeypatch, capsys):
    monkeypatch.setattr(PIL, "__version__", "999")
    monkeypatch.setattr(Siglip2PackedVisionModel, "from_pretrained", None)  # said before it is loaded
    assert run(checkpoint, photos, finished, *SETTINGS, "--resume") == 2
    assert "versions.pillow" in capsys.readouterr().err


def test_a_folder_of_a_version_that_recorded_less(checkpoint, photos, expected, tmp_path, capsys):
    """It stays as it is, and says what it lacks."""
    assert run(checkpoint, photos, tmp_path, *SETTINGS) == 0
    settings = json.loads((tmp_path / "run.json").read_text())
    for name in ("record", "versions", "tower"):
        del settings[name]
    (tmp_path / "run.json").write_text(json.dumps(settings))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert run(checkpoint, photos, tmp_path, *SETTINGS, "--resume") == 2
    assert "does not record the size and modification time of its inputs" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    check(tmp_path, expected, GOOD)


def test_a_second_run_says_who_is_at_work(checkpoint, photos, finished, tmp_path, capsys):
    for out, flags in ((finished, ["--resume"]), (finished, []), (tmp_path / "x.safetensors", [])):
        lock = Lock(lock_of(out, out.suffix == ".safetensors"))
        lock.take()
        assert run(checkpoint, photos, out, *flags) == 2
        assert f"process {os.getpid()} on " in capsys.readouterr().err
        lock.held()
        lock.release()


def test_collections_that_grow(checkpoint, photos, expected, tmp_path, capsys):
    """A tar file that is written again is encoded again; the files beside it are left alone, where they are."""
    out, tar = tmp_path / "out", tmp_path / "b.tar"
    files, flags = [photos / name for name in GOOD[:4]], [*SETTINGS, "--resume"]

    def write(names):
        with tarfile.open(tar, "w") as opened:
            for name in names:
                opened.add(photos / name, name)

    write(GOOD[4:6])
    assert run(checkpoint, [*files, tar], out, *flags) == 0
    kept = (out / "shard-00000.safetensors").stat().st_mtime_ns
    write(GOOD[4:9])
    assert run(checkpoint, [photos / GOOD[9], *files, tar], out, *flags) == 0
    assert (
        f"changed since they were encoded, encoded again: {tar}#{GOOD[4]}, {tar}#{GOOD[5]}\n" in capsys.readouterr().err
    )
    features = expected | {f"b.tar#{name}": expected[name] for name in GOOD[4:9]}
    check(out, features, [GOOD[9], *GOOD[:4], *(f"b.tar#{name}" for name in GOOD[4:9])], bad=[])
    assert kept == (out / "shard-00000.safetensors").stat().st_mtime_ns


def test_photos_that_are_added(checkpoint, photos, expected, tmp_path, monkeypatch):
    """In the middle of the order, one of them broken, by a run over more of them; only they are encoded."""
    some, out = tmp_path / "in", tmp_path / "out"
    some.mkdir()
    late = ["01.png", "04-zero.jpg", "06.png", "10.png"]
    for name in [*GOOD, *BAD]:
        if name not in late:
            shutil.copy2(photos / name, some / name)
    assert run(checkpoint, some, out, *SETTINGS) == 0
    check(out, expected, [name for name in GOOD if name not in late], bad=[name for name in BAD if name not in late])
    for name in late:
        shutil.copy2(photos / name, some / name)
    read, original = [], Siglip2PackedImageProcessor.read
    monkeypatch.setattr(
        Siglip2PackedImageProcessor, "read", lambda self, file: (read.append(Path(file).name), original(self, file))[1]
    )
    assert run(checkpoint, some, out, *SETTINGS, "--resume") == 0
    assert sorted(read) == late
    check(out, expected, GOOD)


def test_batch_invariant_is_recorded(checkpoint, photos, tmp_path, monkeypatch, capsys):
    """A run goes on with the same setting only. Where it cannot be had (here, on the CPU), nothing is written."""
    out = tmp_path / "out"
    assert run(checkpoint, photos, out, *SETTINGS, "--batch-invariant") == 2
    assert "batch_invariant attention cannot be had: needs a CUDA device" in capsys.readouterr().err
    assert not (out / "run.json").exists()
    monkeypatch.setattr(invariance, "asked", lambda config: False)  # of the model, not of the command
    assert run(checkpoint, photos, out, *SETTINGS, "--batch-invariant") == 0
    assert json.loads((out / "run.json").read_text())["batch_invariant"] is True
    assert run(checkpoint, photos, out, *SETTINGS, "--resume") == 2
    assert "batch_invariant True, this one False" in capsys.readouterr().err
    assert run(checkpoint, photos, out, *SETTINGS, "--resume", "--batch-invariant") == 0


@pytest.mark.parametrize("away", [["02.png"], GOOD])
@pytest.mark.parametrize("share", [[], ["--shard", "0/1"], ["--shard", "1/2"]], ids=" ".join)
def test_features_of_files_that_are_away_are_not_given_up(checkpoint, photos, tmp_path, capsys, share, away):
    """An unmounted disk. Named by a list, they still are inputs; one that never could be read is no loss."""
    folder, out, names = tmp_path / "photos", tmp_path / "out", [*GOOD, BAD[0], "never.png"]
    shutil.copytree(photos, folder)
    (tmp_path / "list.txt").write_text("".join(f"{folder / name}\n" for name in names))
    arguments = checkpoint, tmp_path / "list.txt", out, *SETTINGS, *share
    assert run(*arguments) == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    (folder / BAD[0]).unlink()
    for name in away:
        (folder / name).rename(tmp_path / name)
    capsys.readouterr()
    lacking = [name for name in away if share != ["--shard", "1/2"] or GOOD.index(name) // 4 == 1]
    if lacking:
        assert run(*arguments, "--resume") == 2
        said = capsys.readouterr().err
        assert "it has features of" in said and f"{lacking[0]}" in said and "which cannot be found now" in said
        assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for name in away:
        (tmp_path / name).rename(folder / name)
    assert run(*arguments, "--resume") == 0
    assert all(path.read_bytes() == data for path, data in before.items() if path.name.startswith("shard-00001"))
