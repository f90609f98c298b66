"""`encode --shard 3/64` and `merge`: shares become what one run writes: the same tables, and features to rounding."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from encode_runs import GOOD, SETTINGS, check, image_bytes, run
from test_index_is_true import restore, states, tree

from siglip2_packed import load_features
from siglip2_packed.cli import main

OF = 3


def shares(checkpoint, photos, out, *flags, of=OF, only=None):
    """Writes them, the last first."""
    for place in reversed(range(of) if only is None else only):
        assert run(checkpoint, photos, out, *SETTINGS, *flags, "--shard", f"{place}/{of}") == 0
    return out


def merged(*argv):
    return main(["merge", *map(str, argv)])


def files(folder):
    """All that belongs to the whole."""
    return {path: data for path, data in tree(folder).items() if not path.parts[0].startswith("share-")}


@pytest.fixture(scope="module")
def three(checkpoint, photos, tmp_path_factory):
    return shares(checkpoint, photos, tmp_path_factory.mktemp("three") / "out")


@pytest.fixture
def apart(three, tmp_path):
    """A copy of the shares, to be spoilt."""
    return shutil.copytree(three, tmp_path / "out")


def share(out, place, of=OF):
    return out / f"share-{place:05d}-of-{of:05d}"


def test_merged_is_what_one_run_writes(apart, finished, expected, capsys):
    before = tree(apart)
    made = [sorted(path.stem for path in share(apart, place).glob(".parts/*.csv")) for place in range(OF)]
    assert made == [["00000", "00003"], ["00001"], ["00002"]]
    assert merged(apart) == 0
    assert "11 images" in capsys.readouterr().out
    check_whole(apart, finished)
    check(apart, expected, GOOD)
    assert {path: data for path, data in tree(apart).items() if path in before} == before  # shares stay as they are
    here = tree(apart)
    times = {path: os.stat(apart / path).st_mtime_ns for path in here if path.name.startswith("shard-")}
    assert merged(apart) == 0 and tree(apart) == here  # twice is once
    assert times == {path: os.stat(apart / path).st_mtime_ns for path in times}


def check_whole(out, finished):
    """The same files; those that packs do not round, to the byte."""
    ours, theirs = files(out), files(finished)
    assert ours.keys() == theirs.keys()
    exact = [path for path in theirs if path.name.startswith(("index", "errors", "skipped", "run", ".columns."))]
    assert len(exact) >= 4 and [str(path) for path in exact if ours[path] != theirs[path]] == []
    one, other = load_features(out), load_features(finished)
    torch.testing.assert_close(one.pooled, other.pooled, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fmt", ["npy"])
def test_every_format_more_shares_than_shards_and_folders_of_their_own(checkpoint, photos, tmp_path, fmt):
    whole, outs = tmp_path / "whole", [tmp_path / f"out{i}" for i in range(3)]
    assert run(checkpoint, photos, whole, *SETTINGS, "--format", fmt) == 0
    for place in range(5):  # one of them without a shard
        shares(checkpoint, photos, outs[place % 3], "--format", fmt, of=5, only=[place])
    assert merged(*outs) == 2  # --out
    assert merged(*outs, "--out", tmp_path / "all") == 0
    check_whole(tmp_path / "all", whole)


def test_columns_are_merged(checkpoint, tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    columns = {"image": [image_bytes(i, (20, 20)) for i in range(5)], "tags": [["a"], None, [], ["b"], ["c"]]}
    pq.write_table(pa.table(columns), path)
    argv = ["--pooled", "--no-patches", "--shard-size", "2", "--keep", "tags"]
    for place in range(2):
        assert run(checkpoint, path, tmp_path / "out", *argv, "--shard", f"{place}/2") == 0
    assert run(checkpoint, path, tmp_path / "whole", *argv) == 0
    assert merged(tmp_path / "out") == 0
    check_whole(tmp_path / "out", tmp_path / "whole")
    assert load_features(tmp_path / "out").columns["tags"].to_pylist() == columns["tags"]


def test_a_share_goes_on(checkpoint, photos, apart, finished, capsys):
    """What was lost of it is made again; it alone is no collection."""
    (share(apart, 1) / ".parts" / "00001.csv").unlink()
    (share(apart, 2) / "shard-00002.safetensors").write_bytes(b"torn")
    assert merged(apart) == 2
    assert "not finished: 1/3 (1 shards), 2/3 (1 shards)" in capsys.readouterr().err
    assert not (apart / "run.json").exists() and not (apart / ".parts").exists()
    with pytest.raises(FileNotFoundError, match="holds shares, which `siglip2-packed merge"):
        load_features(apart)
    with pytest.raises(ValueError, match="is share 1/3 of a run"):
        load_features(share(apart, 1))
    shares(checkpoint, photos, apart, "--resume", only=[1, 2])
    assert merged(apart) == 0
    check_whole(apart, finished)


@pytest.mark.parametrize("lost", [[0], [1, 2]])
def test_missing_shares_are_named(apart, capsys, lost):
    for place in lost:
        shutil.rmtree(share(apart, place))
    share(apart, lost[0]).mkdir()  # begun, and nothing in it
    assert merged(apart) == 2
    named = ", ".join(f"{place}/3" for place in lost)
    assert f"{len(lost)} of 3 shares are missing: {named}" in capsys.readouterr().err
    assert merged(apart / "nowhere") == 2
    assert not (apart / "nowhere").exists()


def spoil_run(folder, **changed):
    file = folder / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))


def test_shares_that_do_not_belong_together(apart, tmp_path, capsys, checkpoint, photos):
    def said():
        assert merged(apart) == 2
        return capsys.readouterr().err

    spoil_run(share(apart, 1), dtype="bfloat16")
    assert "share 1/3 has dtype bfloat16, which is float32 in share 0/3" in said()
    spoil_run(share(apart, 1), dtype="float32")
    for place in range(OF):
        spoil_run(share(apart, place), names="0" * 32)
    assert "the shares' inputs are not those" in said()
    shutil.copytree(share(apart, 0), apart / "more" / share(apart, 0).name)
    assert merged(apart, apart / "more", "--out", tmp_path / "all") == 2
    assert "share 0/3 is there twice" in capsys.readouterr().err
    shutil.copytree(share(apart, 0), share(apart, 0, of=4))
    assert "shares of different runs" in said()
    assert not (tmp_path / "all").exists() and not (apart / "run.json").exists()


def test_what_is_there_already(apart, finished, tmp_path, checkpoint, photos, capsys):
    """Another run, or a file of a name of ours, is left alone; the merged run goes on, and takes no share any more."""
    (apart / "index.csv").write_text("mine")
    assert merged(apart) == 2 and (apart / "index.csv").read_text() == "mine"
    (apart / "index.csv").unlink()
    other = shutil.copytree(finished, tmp_path / "other")
    spoil_run(other, decode="scaled")
    assert merged(apart, "--out", other) == 2
    assert "holds another run, with decode scaled, which is exact" in capsys.readouterr().err
    assert merged(apart) == 0
    assert run(checkpoint, photos, apart, *SETTINGS, "--shard", "0/4") == 2
    assert "holds a whole run" in capsys.readouterr().err
    extra = tmp_path / "z.png"
    extra.write_bytes((photos / GOOD[0]).read_bytes())
    assert run(checkpoint, [photos, extra], apart, *SETTINGS, "--resume") == 0
    assert len(load_features(apart)) == 12
    assert merged(apart) == 2  # the whole has more by now
    assert "holds another run, with inputs 16, which is 15" in capsys.readouterr().err
    assert len(load_features(apart)) == 12


def test_a_share_is_of_the_inputs_it_was_begun_with(checkpoint, photos, apart, tmp_path, capsys):
    extra = tmp_path / "z.png"
    extra.write_bytes((photos / GOOD[0]).read_bytes())
    assert run(checkpoint, [photos, extra], apart, *SETTINGS, "--resume", "--shard", "0/3") == 2
    assert "is share 0/3 of 15 inputs, these are 16" in capsys.readouterr().err
    assert run(checkpoint, photos, share(apart, 0), *SETTINGS, "--resume") == 2
    assert "share 0/3, this one None" in capsys.readouterr().err


def test_a_share_that_was_made_again_replaces_the_first(checkpoint, photos, apart, tmp_path):
    """After its index is gone: a kill leaves none that is not true."""
    here = shutil.copytree(photos, tmp_path / "photos")
    out = shares(checkpoint, here, tmp_path / "changing", of=2)
    assert merged(out) == 0
    (here / GOOD[0]).write_bytes((here / GOOD[3]).read_bytes())
    shares(checkpoint, here, out, "--resume", of=2)
    parts = {Path(".parts") / f"{number:05d}.csv" for number in range(4)}
    for state in states(out, lambda: merged(out)):
        assert Path("index.csv") not in state or parts <= state.keys()
    features = load_features(out)
    assert features.pooled[0].allclose(features.pooled[3], atol=1e-5)


def test_a_kill_at_any_step_of_a_merge(apart, finished, monkeypatch):
    """Each state is no collection, or a true one; merge goes on from it."""
    from siglip2_packed.collection import shards

    monkeypatch.setattr(shards, "_sync", lambda path: None)
    found = states(apart, lambda: merged(apart))
    assert len(found) > 30
    for state in found[:: max(1, len(found) // 12)]:
        restore(apart, state)
        if (apart / "index.csv").exists():
            load_features(apart)
        assert merged(apart) == 0
        check_whole(apart, finished)
        assert not list(apart.rglob("*.tmp"))


def test_a_share_that_was_killed_behind_its_last_shard(apart, finished, capsys):
    (share(apart, 0) / "skipped.csv").unlink()
    assert merged(apart) == 0
    assert load_features(apart).names == load_features(finished).names


@pytest.mark.parametrize("given", ["3/3", "64/64", "-1/3", "1", "1/0", "a/b", "1/3/5", "1.0/3"])
def test_shares_count_from_0(checkpoint, photos, tmp_path, capsys, given):
    with pytest.raises(SystemExit):
        run(checkpoint, photos, tmp_path / "out", f"--shard={given}")
    err = capsys.readouterr().err
    assert ("shares count from 0" if given in ("3/3", "64/64") else "is not a share such as 3/64") in err
    assert not (tmp_path / "out").exists()


def test_a_share_tries_errors_again(checkpoint, photos, tmp_path):
    here = shutil.copytree(photos, tmp_path / "photos")
    out = shares(checkpoint, here, tmp_path / "out", of=2)
    (here / "05-text.jpg").write_bytes((here / GOOD[3]).read_bytes())
    shares(checkpoint, here, out, "--resume", "--retry-errors", of=2)
    assert merged(out) == 0 and len(load_features(out)) == 12


def test_shares_keep_their_modes(apart, tmp_path):
    """They may be somebody else's, whose modes nobody may change."""
    shard = share(apart, 1) / "shard-00001.safetensors"
    shard.chmod(0o440)
    assert merged(apart, "--out", tmp_path / "all") == 0
    assert shard.samefile(tmp_path / "all" / shard.name) and shard.stat().st_mode & 0o777 == 0o440


def test_shares_on_another_file_system_are_copied(three, finished, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    assert merged(three, "--out", tmp_path / "all") == 0
    check_whole(tmp_path / "all", finished)
    shard = "shard-00001.safetensors"
    assert not (tmp_path / "all" / shard).samefile(share(three, 1) / shard)
