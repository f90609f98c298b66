"""Collections whose JPEG files are decoded on the card, or at a scale: every row of its image, recorded as such."""

import io
import itertools
import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from encode_runs import run, start, table
from jpeg_files import BROKEN, ODD, OTHER, PLAIN, inputs, jpeg, photograph, turned
from PIL import Image
from safetensors.torch import load_file
from test_card import CPU, decode_jpegs

from siglip2_packed import Siglip2PackedImageProcessor, Siglip2PackedVisionModel, card, encode, images
from siglip2_packed.card import Card
from siglip2_packed.cli import main
from siglip2_packed.collection import DECODE_IN, features, identity
from siglip2_packed.collection import decode as decoding
from siglip2_packed.collection.cut import cut
from siglip2_packed.collection.decode import (
    DecodingProcesses,
    DecodingThreads,
    decode,
    decoded,
    decoding_pool,
)
from siglip2_packed.collection.shelf import Shelf
from siglip2_packed.formats import DECODE
from siglip2_packed.inspection.decoding import jpegs
from siglip2_packed.ray_data import Siglip2PackedEncoder

FILES = {**PLAIN, **BROKEN, **OTHER, **ODD}
SETTINGS = {"patch_size": 4, "max_num_patches": 20}


@pytest.fixture(autouse=True)
def _small_files_by_nvjpeg(monkeypatch):
    monkeypatch.setattr(card, "LARGE", 0)


def refuse_progressive(files):
    """Its pixels are inverted: what came by the card is told apart."""
    if any(file.numpy().tobytes() == PLAIN["progressive"] for file in files):
        raise RuntimeError("Error while decoding JPEG images: 3")
    return [255 - pixels for pixels in decode_jpegs(files)]


@pytest.mark.parametrize("decode_in", DECODE_IN)
@pytest.mark.parametrize("at_once", [1, 3, 64])
def test_images_are_cut_in_their_order(monkeypatch, decode_in, at_once):
    monkeypatch.setattr(card, "FILES_AT_ONCE", at_once)
    processor = Siglip2PackedImageProcessor(**SETTINGS, decode="gpu")
    found_card = Card(CPU, 4, processor.resample, refuse_progressive)
    with decoding_pool(CPU, processor, 2, decode_in) as pool:
        found = list(cut(decode(inputs(FILES), processor, pool, 2, by_card=True), processor, found_card))
    assert [(image.ordinal, image.name) for image in found] == list(enumerate(FILES))
    exact = Siglip2PackedImageProcessor(**SETTINGS)
    by_card = 0
    for image, data in zip(found, FILES.values()):
        assert image.stored is None
        if image.name in BROKEN:
            assert image.patches is None and image.error
            continue
        patches, grid = exact.read(data)
        assert image.error == "" and image.grid == grid
        assert isinstance(image.patches, torch.Tensor) and image.patches.dtype == torch.uint8
        if image.name in ("hole", *PLAIN) and image.name != "progressive":
            by_card += 1
            patches = 255 - patches
        assert np.abs(image.patches.numpy().astype(int) - patches).max() <= 1
    assert by_card == found_card.decoded == len(PLAIN)  # less one, and the one with a hole
    assert found_card.refused == 1


@pytest.mark.parametrize("room", [4 << 20, 100_000, 1])
@pytest.mark.parametrize("decode_in", DECODE_IN)
@pytest.mark.parametrize("how", ["exact", "scaled"])
def test_pixels_are_resized_by_the_card_to_what_the_host_makes(monkeypatch, how, decode_in, room):
    """Those for which there is room; patches of the others come as they did."""
    monkeypatch.setattr(decoding.JobSizes, "__next__", lambda self: 8)
    files = {**FILES, "large": jpeg(photograph((640, 480))), "tall": jpeg(photograph((30, 700)))}
    files |= {f"turned {tag}": turned(tag, photograph((323, 245))) for tag in range(2, 9)}
    processor = Siglip2PackedImageProcessor(**SETTINGS, decode=how)
    found_card = Card(CPU, 4, processor.resample)
    cuts, resized = [], found_card.resized
    found_card.resized = lambda images, *rest: cuts.extend(images) or resized(images, *rest)
    kind = DecodingProcesses if decode_in == "processes" else DecodingThreads
    with kind(2, Shelf(9, room)) as pool:
        found = list(cut(decode(inputs(files), processor, pool, 2, by_card=True), processor, found_card))
        assert sorted(pool.shelf.free) == list(range(9))
    assert [(image.ordinal, image.name) for image in found] == list(enumerate(files))
    for image, data in zip(found, files.values()):
        if image.name in BROKEN:
            assert image.patches is None and image.error == decoded(processor, 0, "", data).error != ""
            continue
        patches, grid = processor.read(data)
        assert image.error == "" and image.grid == grid
        assert isinstance(image.patches, torch.Tensor) and np.array_equal(image.patches.numpy(), patches)
    roomy = room > 1e6
    assert (len(cuts) == len(files) - len(BROKEN)) == roomy
    assert (len(cuts) > 0) == (roomy or room > 1)
    assert (found_card.decoded, found_card.refused) == (0, 0)


def test_pixels_that_the_card_has_no_room_for_are_resized_on_the_host(caplog):
    processor = Siglip2PackedImageProcessor(**SETTINGS)
    found_card = Card(CPU, 4, processor.resample)
    resized = found_card.resized

    def no_large(images, *rest):
        if any(image.shape[1] > 100 for image in images):
            raise torch.OutOfMemoryError("out of memory")
        return resized(images, *rest)

    found_card.resized = no_large
    with DecodingThreads(2, Shelf(40, 1 << 20)) as pool:
        found = list(cut(decode(inputs(PLAIN), processor, pool, 2, by_card=True), processor, found_card))
    assert all(np.array_equal(image.patches, processor.read(PLAIN[image.name])[0]) for image in found)
    assert found_card.refused == len(PLAIN) - 1  # "small"
    assert caplog.text.count("read the exact way") == 1


def test_files_keep_the_state_that_was_read(tmp_path):
    processor = Siglip2PackedImageProcessor(**SETTINGS, decode="gpu")
    paths = []
    for kind in ("grey", "progressive", "cut"):
        paths.append(tmp_path / f"{kind}.jpg")
        paths[-1].write_bytes(FILES[kind])
    some = [item._replace(entry=str(path)) for item, path in zip(inputs(dict.fromkeys(map(str, paths))), paths)]
    with decoding_pool(CPU, processor, 2) as pool:
        found = list(cut(decode(some, processor, pool, 2, True), processor, Card(CPU, 4, 2, refuse_progressive)))
    for image, path in zip(found, paths):
        assert image.stamp == f"{path.stat().st_size}:{path.stat().st_mtime_ns}"
    assert [bool(image.error) for image in found] == [False, False, True]


@pytest.mark.parametrize("how", ["paths", "bytes"])
def test_files_for_the_card_come_by_shared_memory(monkeypatch, tmp_path, how):
    """Those for which there is room; the others come all the same."""
    monkeypatch.setattr(decoding.JobSizes, "__next__", lambda self: 8)
    processor = Siglip2PackedImageProcessor(**SETTINGS, decode="gpu")
    given = inputs(FILES)
    if how == "paths":
        for i, data in enumerate(FILES.values()):
            (tmp_path / f"{i}").write_bytes(data)
        given = [item._replace(entry=str(tmp_path / f"{item.ordinal}")) for item in given]
    sizes = list(map(len, PLAIN.values()))
    for job in (1 << 20, sum(sizes[:3])):
        with DecodingProcesses(2, Shelf(9, job)) as pool:
            memory = np.frombuffer(pool.shelf.memory, np.uint8)
            found = [
                image
                for image in decode(given, processor, pool, 2, by_card=True)
                if image.stored and not image.stored.decoded
            ]
            assert [image.name for image in found] == [name for name in FILES if name in ("hole", *PLAIN)]
            assert all(bytes(image.stored.data) == FILES[image.name] for image in found)
            shared = [np.shares_memory(image.stored.data, memory) for image in found]
            assert all(shared) if job > sum(sizes) else shared[:4] == [True] * 3 + [False]
            del found
            assert sorted(pool.shelf.free) == list(range(9))


def test_jobs_for_a_card_are_small_at_first_and_of_large_images():
    sizes = decoding.JobSizes(2, 40 << 20)
    assert list(itertools.islice(sizes, 20)) == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, *[8] * 6]
    for count, wanted, most in (
        (8, 8 * 36_578_304, 1),
        (1, 36_578_304, 1),
        (1, 9 << 20, 4),
        (4, 4 << 20, 8),
        (1, 0, 8),
    ):
        sizes.saw(count, wanted)
        assert list(itertools.islice(sizes, 3)) == [most] * 3
    sizes.saw(1, 50 << 20)
    assert next(sizes) == 1


def test_large_images_of_a_long_collection_are_all_resized_by_the_card(monkeypatch):
    """Each wants a job's whole room: jobs are made of one, once that is seen. Beside 6 jobs two batches have places."""
    monkeypatch.setattr(card, "PIXELS_AT_ONCE", 4 * 3 * 160 * 120)
    files = {str(i): jpeg(photograph((160, 120), seed=i), quality=30) for i in range(120)}
    processor = Siglip2PackedImageProcessor(**SETTINGS)
    found_card, by_card = Card(CPU, 4, processor.resample), []
    whole = found_card.decode
    found_card.decode = lambda files, grids: by_card.append(len(files)) or whole(files, grids)
    with DecodingProcesses(2, Shelf(6 + 2 * 4 + 4, 60_000)) as pool:
        images = decode(inputs(files), processor, pool, 2, by_card=True)
        found = list(cut(images, processor, found_card))
    assert [image.name for image in found] == list(files)
    assert max(by_card) == 4 and sum(by_card) > 95
    assert all(np.array_equal(image.patches, processor.read(files[image.name])[0]) for image in found)


@pytest.mark.parametrize("how", DECODE)
def test_beside_a_gpu_processes_read(how):
    with decoding_pool(torch.device("cuda"), Siglip2PackedImageProcessor(decode=how), 1) as pool:
        assert type(pool) is DecodingProcesses


def test_a_card_goes_with_its_processor(checkpoint):
    model = Siglip2PackedVisionModel.from_pretrained(checkpoint()).eval()
    processor = Siglip2PackedImageProcessor.from_pretrained(checkpoint(), decode="gpu")
    with decoding_pool(CPU, processor, 2) as pool, pytest.raises(ValueError, match="decode='gpu' needs a card"):
        next(features.encode(model, processor, inputs(PLAIN), pool))


@pytest.fixture
def photos(tmp_path):
    """A file of each kind, and one that `scaled` decodes at less than its size."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, (kind, data) in enumerate({**FILES, "large": jpeg(photograph((640, 480)))}.items()):
        (folder / f"{i:02d} {kind}.jpg").write_bytes(data)
    return folder


def features_of(out):
    shards = {}
    rows = {}
    for row in table(out / "index.csv"):
        tensors = shards.setdefault(row["shard"], load_file(out / row["shard"]))
        rows[Path(row["input"]).stem[3:]] = (row["grid"], tensors["pooled"][int(row["row"])])
    return rows


def on_cpu(monkeypatch):
    found = []

    def card_of(processor, device):
        found.append(Card(CPU, processor.patch_size, processor.resample, decode_jpegs))
        return found[-1]

    monkeypatch.setattr(encode, "card_of", card_of)
    monkeypatch.setattr(identity, "version", lambda package: f"{package}'s")
    return found


@pytest.mark.parametrize("how", ["scaled", "gpu"])
def test_every_row_is_near_the_exact_one_and_says_how(checkpoint, photos, tmp_path, capsys, monkeypatch, how):
    flags = ["--pooled", "--no-patches", "--shard-size", "9", "--patch-budget", "40", "--workers", "2"]
    assert run(checkpoint, photos, tmp_path / "exact", *flags) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert "decode exact (JPEG by " in said
    cards = on_cpu(monkeypatch) if how == "gpu" else []
    assert run(checkpoint, photos, tmp_path / how, *flags, "--decode", how) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    exact, found = features_of(tmp_path / "exact"), features_of(tmp_path / how)
    assert list(found) == list(exact) and set(BROKEN).isdisjoint(found) and len(found) == len(FILES) - len(BROKEN) + 1
    assert table(tmp_path / "exact" / "errors.csv")[0]["reason"] == table(tmp_path / how / "errors.csv")[0]["reason"]
    for kind, (grid, vector) in exact.items():
        assert found[kind][0] == grid
        assert vector.isfinite().all() and found[kind][1].isfinite().all()
        assert (found[kind][1] - vector).norm() <= (0.03 if how == "scaled" else 5e-3) * vector.norm(), kind
    assert json.loads((tmp_path / how / "run.json").read_text())["decode"] == how
    if how == "gpu":
        assert json.loads((tmp_path / how / "run.json").read_text())["versions"]["torchvision"] == "torchvision's"
        assert f"decode gpu ({len(PLAIN) + 2} on the card, 0 refused by it)" in said
        assert cards[0].decoded == len(PLAIN) + 2
    else:
        assert "decode scaled (JPEG by " in said
        assert not torch.equal(found["large"][1], exact["large"][1])
        assert all(torch.equal(found[kind][1], exact[kind][1]) for kind in OTHER)


def test_a_run_goes_on_as_it_was_begun_and_no_other_way(checkpoint, photos, tmp_path, capsys):
    flags = ["--pooled", "--no-patches", "--patch-budget", "40"]
    out = tmp_path / "out"
    assert run(checkpoint, photos, out, *flags, "--decode", "scaled") == 0
    assert run(checkpoint, photos, out, *flags, "--decode", "exact", "--resume") == 2
    assert "has decode scaled, this one exact" in capsys.readouterr().err
    [shard] = out.glob("shard-*")
    before = load_file(shard)
    shard.unlink()
    assert run(checkpoint, photos, out, *flags, "--resume") == 0
    assert "decode scaled" in capsys.readouterr().out
    assert torch.equal(load_file(shard)["pooled"], before["pooled"])


def test_a_card_that_runs_out_of_memory_costs_no_row(checkpoint, photos, tmp_path, capsys, monkeypatch):
    """In the midst of a run, while it decodes and while it cuts, for a while."""
    flags = ["--pooled", "--no-patches", "--patch-budget", "40", "--workers", "2"]
    assert run(checkpoint, photos, tmp_path / "exact", *flags) == 0
    cards, calls = on_cpu(monkeypatch), itertools.count()
    whole_card = encode.card_of

    def out_of_memory(function):
        def tried(*args):
            if next(calls) % 3:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
            return function(*args)

        return tried

    def short(*args):
        found = whole_card(*args)
        found.decode_jpegs, found.resized = out_of_memory(found.decode_jpegs), out_of_memory(found.resized)
        return found

    monkeypatch.setattr(encode, "card_of", short)
    monkeypatch.setattr(card, "FILES_AT_ONCE", 4)
    assert run(checkpoint, photos, tmp_path / "gpu", *flags, "--decode", "gpu") == 0
    exact, found = features_of(tmp_path / "exact"), features_of(tmp_path / "gpu")
    assert list(found) == list(exact)
    assert all((found[kind][1] - exact[kind][1]).norm() <= 5e-3 * exact[kind][1].norm() for kind in exact)
    assert cards[0].decoded > 0 and cards[0].refused > 0
    said = f"decode gpu ({cards[0].decoded} on the card, {cards[0].refused} refused by it)"
    assert said in capsys.readouterr().out


def killed(argv, moment):
    """The command on a CPU for a card, killed before the `moment`-th renaming of a file."""
    renamings, rename = itertools.count(), os.replace

    def replace(*args):
        if next(renamings) == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(*args)

    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        on_cpu(patch)
        patch.setattr(os, "replace", replace)
        sys.exit(main(argv))


@pytest.mark.parametrize("moment", [1, 2])
def test_a_run_by_the_card_that_was_killed_goes_on(checkpoint, photos, tmp_path, monkeypatch, moment):
    """Before the first shard and before its part."""
    flags = ["--pooled", "--no-patches", "--shard-size", "9", "--patch-budget", "40", "--decode", "gpu"]
    argv = ["encode", str(photos), "--ckpt", str(checkpoint()), "--device", "cpu", *flags, "--out"]
    process = start(killed, [*argv, str(tmp_path / "killed")], moment)
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert len(list((tmp_path / "killed").glob("shard-*"))) == moment - 1
    on_cpu(monkeypatch)
    for out in ("killed", "whole"):
        assert run(checkpoint, photos, tmp_path / out, *flags, "--resume") == 0
    found, whole = features_of(tmp_path / "killed"), features_of(tmp_path / "whole")
    assert list(found) == list(whole)
    assert all((found[kind][1] - whole[kind][1]).norm() <= 1e-5 * whole[kind][1].norm() for kind in whole)
    assert (tmp_path / "killed" / "errors.csv").read_text() == (tmp_path / "whole" / "errors.csv").read_text()


def test_a_card_that_is_not_there(checkpoint, photos, tmp_path, capsys, monkeypatch):
    """No CUDA device is an error; one without nvJPEG decodes the exact way, and says so."""
    assert run(checkpoint, photos, tmp_path / "out", "--decode", "gpu") == 2
    assert "--decode gpu needs a CUDA device, this is cpu" in capsys.readouterr().err
    assert not (tmp_path / "out" / "run.json").exists()
    monkeypatch.setattr(encode, "local_device", lambda name: torch.device("cuda"))
    monkeypatch.setitem(sys.modules, "torchvision.io", None)
    monkeypatch.setattr(card, "resizes_exactly", lambda *_: False)
    processor = Siglip2PackedImageProcessor(decode="gpu")
    assert encode.card_of(processor, None) is None
    assert processor.decode == "exact"
    assert "torchvision has no nvJPEG here" in capsys.readouterr().err
    with pytest.raises(ValueError, match="is for a CUDA device, got cpu"):
        Siglip2PackedEncoder(checkpoint(), device="cpu", decode="gpu")


def test_the_ray_actor_decodes_at_a_scale(checkpoint):
    large = np.array([jpeg(photograph((640, 480))), PLAIN["grey"]], object)
    found = {}
    for how in ("exact", "scaled"):
        actor = Siglip2PackedEncoder(checkpoint(), device="cpu", decode=how, patch_budget=40, workers=1)
        found[how] = actor({"bytes": large})["pooled"]
    assert np.isfinite(found["scaled"]).all()
    assert not np.array_equal(found["exact"][0], found["scaled"][0])
    assert np.linalg.norm(found["exact"][0] - found["scaled"][0]) <= 0.02 * np.linalg.norm(found["exact"][0])


@pytest.mark.parametrize("how", ["scaled", "gpu"])
def test_align_says_how_far_features_move(checkpoint, tmp_path, capsys, monkeypatch, how):
    def on_card(processor, device):
        return Card(CPU, processor.patch_size, processor.resample, lambda some: [x ^ 1 for x in decode_jpegs(some)])

    monkeypatch.setattr(Siglip2PackedImageProcessor, "on_card", on_card)
    file, report = tmp_path / "photo.png", tmp_path / "report.json"
    flags = ["--ckpt", str(checkpoint()), "--device", "cpu", "--decode", how, "--json", str(report)]
    photograph((1280, 960)).save(file)
    assert main(["align", *flags, "--images", str(file)]) == 0
    shown = capsys.readouterr().out
    assert f"decode {how}, in float32" in shown and "pixels differ by up to" in shown
    [row] = [row for row in json.loads(report.read_text())["rows"] if row["reference"] == "exact"]
    assert (row["case"], row["stage"], row["passed"]) == ("photo.png", how, True)
    assert 0 < row["relative_error"] <= row["relative_error_bound"] == 8.6e-3
    assert row["cosine_bound"] == 0.9995 <= row["min_cosine"]

    if how == "scaled":  # decoded whole
        photograph((20, 20)).save(file)
    else:
        monkeypatch.setattr(card, "plain_jpeg", lambda *_: None)
    assert main(["align", *flags, "--images", str(file)]) == 1
    assert "nothing to compare: every file has its exact pixels" in capsys.readouterr().out


def test_align_fails_on_pixels_of_another_picture(checkpoint, tmp_path, capsys, monkeypatch):
    right = images._draft

    def half(*args):
        found = right(*args)
        return found._replace(box=tuple(side / 2 for side in found.box))

    monkeypatch.setattr(images, "_draft", half)
    photograph((1280, 960)).save(tmp_path / "photo.jpg")
    flags = ["--ckpt", str(checkpoint()), "--device", "cpu", "--images", str(tmp_path / "photo.jpg")]
    assert main(["align", *flags, "--decode", "scaled"]) == 1
    assert "1 of " in capsys.readouterr().out


def test_long_images_are_enlarged_to_what_a_jpeg_file_holds(tmp_path):
    Image.new("RGB", (1, 600)).save(tmp_path / "tall.png")
    Image.new("RGB", (20, 15)).save(tmp_path / "plain.png")
    found = jpegs([tmp_path / "tall.png", tmp_path / "plain.png"], enlarge=True)
    sizes = {name: Image.open(io.BytesIO(data)).size for name, data in found}
    assert sizes == {
        "tall.png": (1, 600),
        "tall.png, 7 megapixels": (109, 65500),
        "plain.png": (20, 15),
        "plain.png, 12 megapixels": (4000, 3000),
    }
    Image.new("L", (65501, 1)).save(tmp_path / "wide.png")
    with pytest.raises(ValueError, match=r"wide\.png: 65501x1; a JPEG file has at most 65500 pixels a side"):
        next(jpegs([tmp_path / "wide.png"], enlarge=False))


def test_align_needs_files_and_a_card(checkpoint, tmp_path, capsys):
    flags = ["--ckpt", str(checkpoint()), "--device", "cpu"]
    for flag, value in (("--decode", "scaled"), ("--max-num-patches", "0")):
        assert main(["align", *flags, flag, value]) == 2
        assert f"{flag} is about images in files" in capsys.readouterr().err
    (tmp_path / "photo.jpg").write_bytes(PLAIN["grey"])
    assert main(["align", *flags, "--decode", "gpu", "--images", str(tmp_path)]) == 2
    assert "decode='gpu' is for a CUDA device, got cpu" in capsys.readouterr().err
