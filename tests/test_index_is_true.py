"""An index never names a row that was not computed from that input, those settings and those weights.

What a run leaves that is killed before a step (an open for writing, a rename, an unlink, ...) is what is there at that
moment. Each of these states is brought back, something is changed, and the run is resumed: right rows, or a refusal
that names the change. The model is a stand-in whose features say what they were computed from; `test_encode_resume.py`
kills a real one.
"""

import contextlib
import csv
import gc
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from siglip2_packed.collection import shards
from siglip2_packed.collection.decode import read_image
from siglip2_packed.collection.features import EncodedImage
from siglip2_packed.collection.lock import Lock, lock_of
from siglip2_packed.collection.run import to_folder
from siglip2_packed.collection.sources import find_inputs

SETTINGS = {"shard_size": 3, "format": "safetensors", "dtype": "float32", "checkpoint": "c", "weights": "1"}
SETTINGS |= {"versions": {"pillow": "11"}}
EMPTY = {"pooled": torch.zeros(0, 2)}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
STEPS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate"}


def write(folder, name, number):
    """An "image" whose feature is this number; none without one."""
    (folder / name).write_text("broken" if number is None else str(number))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_sync", lambda path: None)
    made = tmp_path / "in"
    made.mkdir()
    for number in range(8):
        write(made, f"{number}0.png", None if number == 4 else 100 + number)
    return made


class Numbers:
    """A processor to whom a number is an image, and any other text the reason why it is none."""

    decode = "exact"

    @staticmethod
    def read(source):
        text = source.decode() if isinstance(source, bytes) else Path(source).read_text()
        if not text.isdecimal():
            raise ValueError(text)
        return np.full((1, 1), float(text)), (1, int(text) % 7 + 1)


def encode(folder, out, resume=True, paths=None, retry_errors=False, **changed):
    settings = SETTINGS | changed
    inputs = find_inputs(paths or [folder])

    def encoded(ranges, done):
        for start, stop in ranges:
            for item in inputs.read(start, stop):
                image = read_image(Numbers, *item)
                feature = None if image.error else torch.tensor([image.patches[0, 0], float(settings["weights"])])
                yield EncodedImage(
                    image.ordinal, image.name, image.grid, pooled=feature, error=image.error, stamp=image.stamp
                )

    lock = Lock(lock_of(out, False))
    lock.take()
    try:
        how = {"resume": resume, "retry_errors": retry_errors, "held": lock.held}
        return to_folder(out, inputs, settings, encoded, EMPTY, **how)
    finally:
        lock.release()


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def rows(out):
    """{name of the input: (its feature, weights)} by index.csv and the shards."""
    found, loaded = {}, {}
    for row in table(out / "index.csv"):
        shard = loaded.setdefault(row["shard"], load_file(out / row["shard"]))
        number, weights = shard["pooled"][int(row["row"])].tolist()
        assert shard["grid_thw"][int(row["row"])].tolist() == [1, 1, int(number) % 7 + 1]
        assert row["grid"] == f"1x1x{int(number) % 7 + 1}"
        found[os.path.basename(row["input"])] = number, weights
    return found


def check(folder, out, weights=1.0):
    """All that is in the folder now is in the index, in order, with what it says now."""
    files = {path.name: path.read_text() for path in sorted(folder.iterdir())}
    found = rows(out)
    assert list(found) == [name for name, text in files.items() if text != "broken"]
    assert found == {name: (float(text), weights) for name, text in files.items() if text != "broken"}
    errors = [os.path.basename(row["input"]) for row in table(out / "errors.csv")]
    assert errors == [name for name, text in files.items() if text == "broken"]
    assert not list(out.rglob("*.tmp")) and not (out / ".run.lock").exists()


def tree(folder):
    """{path below the folder: its bytes, or None of a folder}."""
    return {
        path.relative_to(folder): None if path.is_dir() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.exists()
    }


def restore(folder, files):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for path, data in files.items():
        if data is None:
            (folder / path).mkdir()
        else:
            (folder / path).write_bytes(data)


watching = None
"""A function called before every step, while it is not at work itself. An audit hook cannot be taken away."""


def before_step(event, args):
    global watching
    if watching and (event in STEPS or (event == "open" and isinstance(args[2], int) and args[2] & WRITING)):
        look, watching = watching, None
        look()
        watching = look


sys.addaudithook(before_step)


def states(out, function):
    """All that a kill before a step of the function can leave in the folder, and what it leaves itself at the end."""
    global watching
    found = []

    def look():
        now = tree(out)
        if not found or now != found[-1]:
            found.append(now)

    save = shards.save_file  # it is not Python that writes there

    def watched(*args):
        look()
        save(*args)
        look()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "save_file", watched)
        watching = look
        try:
            function()
        finally:
            watching = None
    look()
    return found


def halve(path):
    os.truncate(path, path.stat().st_size // 2)


def each(pattern, function):
    """Every file of this kind in turn, as it was before a kill."""
    return lambda folder, out: [function(path) for path in sorted(out.glob(pattern))]


def remove_what_is_seen(folder, out):
    for path in [path for path in out.glob("*") if not path.name.startswith(".")]:
        path.unlink()


CHANGES = {
    "nothing": (None, {}, None),
    "rewritten": (lambda folder, out: write(folder, "10.png", 555), {}, None),
    "added": (lambda folder, out: (write(folder, "15.png", 200), write(folder, "99.png", None)), {}, None),
    "mended": (lambda folder, out: write(folder, "40.png", 321), {}, None),
    "removed": (lambda folder, out: (folder / "10.png").unlink(), {}, "has inputs 6, this one 5"),
    "renamed": (
        lambda folder, out: (folder / "10.png").rename(folder / "11.png"),
        {},
        "under other names or in",
    ),
    "exchanged": (
        lambda folder, out: ((folder / "10.png").unlink(), write(folder, "11.png", 7), write(folder, "12.png", 8)),
        {},
        "10.png, which the inputs do not name",
    ),
    "weights": (None, {"weights": "2"}, "weights those of c, this one others"),
    "versions": (None, {"versions": {"pillow": "12"}}, "versions.pillow 11, this one 12"),
    "settings": (None, {"dtype": "bfloat16"}, "dtype float32, this one bfloat16"),
    "torn shards": (each("shard-*", halve), {}, None),
    "empty shards": (each("shard-*", lambda path: os.truncate(path, 0)), {}, None),
    "torn parts": (each(".parts/*.csv", halve), {}, None),
    "empty parts": (each(".parts/*.csv", lambda path: os.truncate(path, 0)), {}, None),
    "empty run.json": (each("run.json", lambda path: os.truncate(path, 0)), {}, "is not a run.json"),
    "no run.json": (each("run.json", lambda path: path.unlink()), {"weights": "2"}, "but no run.json"),
    "rm": (remove_what_is_seen, {"weights": "2"}, None),
}


def changed_and_resumed(folder, out, change):
    """Right rows, or a refusal, which leaves no index or the one there was."""
    function, settings, refusal = CHANGES[change]
    if function:
        function(folder, out)
    try:
        encode(folder, out, **settings)
    except ValueError as error:
        if refusal is None or refusal not in str(error):
            raise
    else:
        check(folder, out, float(settings.get("weights", 1)))


@pytest.fixture
def killed(folder, tmp_path):
    for name in ("60.png", "70.png"):  # two shards will do
        (folder / name).unlink()
    return states(tmp_path / "out", lambda: encode(folder, tmp_path / "out"))


@pytest.mark.parametrize("change", CHANGES)
def test_killed_at_every_step_changed_and_resumed(folder, tmp_path, killed, change):
    out = tmp_path / "out"
    kept = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    assert len(killed) > 25
    for state in killed:
        restore(out, state)
        changed_and_resumed(folder, out, change)
        for path in folder.iterdir():
            if path not in kept:
                path.unlink()
        for path, (data, mtime) in kept.items():
            path.write_bytes(data)
            os.utime(path, ns=(mtime, mtime))


def test_a_finished_run_that_goes_on_and_is_killed(folder, tmp_path):
    """With a shard torn, an input changed and others new: what index there is stays true at every step."""
    out = tmp_path / "out"
    encode(folder, out)
    torn = out / "shard-00001.safetensors"
    halve(torn)
    old = rows_of_folder(folder)
    write(folder, "70.png", 999)
    write(folder, "05.png", 300)
    write(folder, "45.png", 301)
    new, damaged = rows_of_folder(folder), torn.stat().st_size
    killed = states(out, lambda: encode(folder, out))
    assert len(killed) > 25
    for state in killed:
        restore(out, state)
        if (out / "index.csv").exists() and (not torn.exists() or torn.stat().st_size != damaged):
            assert all(row in (old.get(name), new[name]) for name, row in rows(out).items())
        encode(folder, out)
        check(folder, out)


def rows_of_folder(folder):
    return {path.name: (float(path.read_text()), 1.0) for path in folder.iterdir() if path.read_text() != "broken"}


def test_what_is_added_leaves_the_rest_alone(folder, tmp_path):
    out = tmp_path / "out"
    encode(folder, out)
    kept = {path: path.read_bytes() for path in out.glob("shard-*")}
    index = (out / "index.csv").read_bytes()
    for number in (5, 15, 95):
        write(folder, f"{number:02d}.png", 200 + number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "save_file", None)
        with pytest.raises(TypeError):
            encode(folder, out)
    assert (out / "index.csv").read_bytes() == index  # still true, still there
    times = {path: path.stat().st_mtime_ns for path in kept}
    assert encode(folder, out) == (1, 10, sum(int(x[0]) % 7 + 1 for x in rows(out).values()))
    check(folder, out)
    assert {path: path.read_bytes() for path in kept} == kept
    assert times == {path: path.stat().st_mtime_ns for path in kept}


def test_parts_of_another_run_are_not_trusted(folder, tmp_path):
    """Its run.json was put in the place of theirs, as copying folders over each other does."""
    for weights in ("1", "2"):
        encode(folder, tmp_path / weights, weights=weights)
    shutil.copy(tmp_path / "2" / "run.json", tmp_path / "1" / "run.json")
    encode(folder, tmp_path / "1", weights="2")
    check(folder, tmp_path / "1", weights=2.0)


def test_the_same_input_more_than_once(folder, tmp_path):
    out = tmp_path / "out"
    twice = [folder / "00.png", folder / "10.png", folder / "00.png", folder / "20.png"]
    encode(folder, out, paths=twice)
    (out / ".parts" / "00000.csv").unlink()
    more = [*twice, folder / "00.png", folder / "30.png"]
    encode(folder, out, paths=more)
    assert [os.path.basename(row["input"]) for row in table(out / "index.csv")] == [path.name for path in more]
    assert rows(out) == {name: row for name, row in rows_of_folder(folder).items() if name < "40"}


def test_changed_inputs_are_named(folder, tmp_path, capsys):
    out = tmp_path / "out"
    encode(folder, out)
    write(folder, "10.png", 777)
    os.utime(folder / "60.png")  # the same bytes, but who knows
    encode(folder, out)
    said = capsys.readouterr().err
    assert f"changed since they were encoded, encoded again: {folder / '10.png'}, {folder / '60.png'}\n" in said
    check(folder, out)


@pytest.mark.parametrize("name", ["index.csv", "errors.csv", "shard-00007.safetensors", "shard-00001.pooled.npy"])
def test_files_of_others_stay(folder, tmp_path, name):
    out = tmp_path / "out"
    out.mkdir()
    mine = [out / name, out / ".mine.tmp", out / ".index.csv.mine.tmp", out / "notes.txt"]
    for path in mine:
        path.write_text("mine")
    for resume in (False, True):
        with pytest.raises(ValueError, match=f"holds {name}, but no run.json"):
            encode(folder, out, resume)
    mine[0].unlink()
    encode(folder, out)
    assert [path.read_text() for path in mine[1:]] == ["mine"] * 3


def test_leftovers_of_killed_runs_go(folder, tmp_path):
    out = tmp_path / "out"
    (out / ".parts").mkdir(parents=True)
    (out / ".shard-00000.safetensors.17.tmp").touch()  # as the released version wrote
    (out / ".parts" / ".00000.csv.17.tmp").mkdir()
    encode(folder, out)
    check(folder, out)


def test_shards_are_numbered_from_the_first_that_is_free(folder, tmp_path):
    out = tmp_path / "out"
    encode(folder, out)
    (out / "shard-00001.safetensors").unlink()
    write(folder, "05.png", 1)
    encode(folder, out)
    check(folder, out)
    assert sorted(path.name for path in out.glob("shard-*")) == [f"shard-0000{i}.safetensors" for i in range(4)]
    assert np.unique([row["shard"] for row in table(out / "index.csv")]).size == 4


@pytest.mark.parametrize("ends", [(), KeyboardInterrupt])
def test_garbage_is_not_looked_for_among_what_was_imported(folder, tmp_path, monkeypatch, ends):
    spared = []

    def read(source):
        spared.append(gc.get_freeze_count())
        if ends:
            raise ends
        raise ValueError

    monkeypatch.setattr(Numbers, "read", read)
    with pytest.raises(ends) if ends else contextlib.nullcontext():
        encode(folder, tmp_path / "out")
    assert min(spared) > 10_000
    assert gc.get_freeze_count() == 0
