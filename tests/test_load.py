"""`load_features`: what encode wrote is what is read, whatever the format and however many shards."""

import shutil

import pytest
import torch
from encode_runs import BAD, GOOD, SETTINGS, run, table

from siglip2_packed import load_features
from siglip2_packed.collection import FORMATS, load


@pytest.fixture(scope="module", params=FORMATS)
def written(request, checkpoint, photos, tmp_path_factory):
    """A run of four shards in each format."""
    if request.param in ("arrow", "parquet"):
        pytest.importorskip("pyarrow")
    out = tmp_path_factory.mktemp(request.param) / "out"
    assert run(checkpoint, photos, out, *SETTINGS, "--format", request.param) == 0
    return out


def short(features):
    return [name.rsplit("/", 1)[1] for name in features.names]


def test_every_image_has_what_the_model_says_of_it_alone(written, photos, expected):
    features = load_features(str(written))
    assert short(features) == GOOD and len(features) == len(GOOD)
    assert features.pooled.shape == (len(GOOD), 64)
    for i, name in enumerate(GOOD):
        tokens, pooled, (_, h, w) = expected[name]
        path = str(photos / name)
        assert features.grid(path) == (h, w)
        torch.testing.assert_close(features.patches(path), tokens, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(features.pooled[i], pooled, rtol=1e-5, atol=1e-5)
    assert len({*(row["shard"] for row in table(written / "index.csv"))}) > 2


def test_blocks_are_all_of_it_once(written):
    features = load_features(written)
    blocks = list(features.blocks(2))
    assert max(len(images) for images, _ in blocks) == 2
    images, vectors = (torch.cat(x) for x in zip(*blocks))
    assert images.sort().values.equal(torch.arange(len(GOOD)))
    assert vectors.equal(features.pooled[images]) and vectors.isfinite().all()


def test_what_is_written_to_changes_no_file(written):
    before = {path: path.read_bytes() for path in written.rglob("*") if path.is_file()}
    features = load_features(written)
    features.pooled.zero_()
    features.patches(features.names[0]).zero_()
    assert before == {path: path.read_bytes() for path in written.rglob("*") if path.is_file()}


def test_one_shard_is_mapped_not_copied(checkpoint, photos, tmp_path, monkeypatch):
    for fmt in ("safetensors", "npy", "arrow"):
        out = tmp_path / fmt
        assert run(checkpoint, photos, out, "--pooled", "--no-patches", "--format", fmt) == 0
        with monkeypatch.context() as patched:
            patched.setattr(torch, "empty", lambda *_, **__: pytest.fail("copied"))
            features = load_features(out)
            assert len(features.pooled) == len(GOOD)
        with open("/proc/self/maps") as maps:
            assert any(str(out) in line for line in maps), fmt
        del features


def test_inputs_that_came_later_and_before(checkpoint, photos, expected, tmp_path):
    """index.csv is in the order of the inputs, which the shards are not."""
    out = tmp_path / "out"
    late, early = [photos / name for name in GOOD[6:]], [photos / name for name in GOOD[:6]]
    assert run(checkpoint, late, out, *SETTINGS) == 0
    assert run(checkpoint, early + late, out, *SETTINGS, "--resume") == 0
    features = load_features(out)
    assert short(features) == GOOD
    for pooled, name in zip(features.pooled, GOOD):
        torch.testing.assert_close(pooled, expected[name][1], rtol=1e-5, atol=1e-5)
        tokens = features.patches(str(photos / name))
        torch.testing.assert_close(tokens, expected[name][0], rtol=1e-5, atol=1e-5)


def test_one_shard_in_another_order(checkpoint, photos, expected, tmp_path):
    out, (a, b, broken) = tmp_path / "out", (photos / name for name in (GOOD[0], GOOD[1], BAD[0]))
    assert run(checkpoint, [b, a], out, "--pooled", "--no-patches") == 0
    assert run(checkpoint, [a, b, broken], out, "--pooled", "--no-patches", "--resume") == 0
    features = load_features(out)
    assert short(features) == GOOD[:2] and {row["shard"] for row in table(out / "index.csv")} == {
        "shard-00000.safetensors"
    }
    torch.testing.assert_close(features.pooled, torch.stack([expected[name][1] for name in GOOD[:2]]))


def test_bfloat16_is_itself_where_the_format_has_it(checkpoint, photos, expected, tmp_path):
    for fmt, dtype in (("safetensors", torch.bfloat16), ("npy", torch.float32)):
        assert run(checkpoint, photos, tmp_path / fmt, *SETTINGS, "--dtype", "bfloat16", "--format", fmt) == 0
        features = load_features(tmp_path / fmt)
        assert features.pooled.dtype == features.patches(features.names[0]).dtype == dtype
        truth = torch.stack([expected[name][1] for name in GOOD])
        error = (features.pooled.float() - truth).norm() / truth.norm()
        assert 0 < error < 0.05


def test_normalize(checkpoint, photos, finished, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(checkpoint, photos, out, *SETTINGS, "--normalize") == 0
    pooled, plain = load_features(out).pooled, load_features(finished).pooled
    assert not torch.allclose(plain.norm(dim=1), torch.ones(len(plain)), atol=0.1)
    torch.testing.assert_close(pooled, plain / plain.square().sum(dim=1, keepdim=True).sqrt())
    assert load_features(out).run["normalize"] is True
    assert (
        load_features(out).patches(str(photos / GOOD[2])).equal(load_features(finished).patches(str(photos / GOOD[2])))
    )
    assert run(checkpoint, photos, out, *SETTINGS, "--resume") == 2
    assert "normalize True, this one False" in capsys.readouterr().err
    assert run(checkpoint, photos, tmp_path / "x", "--normalize") == 2
    assert "give --pooled" in capsys.readouterr().err


def test_what_is_missing_is_named(finished, checkpoint, photos, tmp_path):
    features = load_features(finished)
    with pytest.raises(ValueError, match=f"'nope.png' is not among the {len(GOOD)} images"):
        features.patches("nope.png")
    with pytest.raises(ValueError, match=f"'{GOOD[3]}' is not among .*: {photos / GOOD[3]} is$"):
        features.grid(GOOD[3])
    with pytest.raises(ValueError, match="could not be read: "):
        features.patches(str(photos / BAD[0]))
    with pytest.raises(FileNotFoundError, match="no run.json"):
        load_features(tmp_path)
    with pytest.raises(FileNotFoundError, match="no run.json"):
        load_features(tmp_path / "absent")
    assert run(checkpoint, photos / GOOD[0], tmp_path / "plain") == 0
    with pytest.raises(ValueError, match=r"holds no pooled: it was encoded without --pooled"):
        load_features(tmp_path / "plain").pooled  # noqa: B018
    assert run(checkpoint, photos / GOOD[0], tmp_path / "vectors", "--pooled", "--no-patches") == 0
    with pytest.raises(ValueError, match=r"holds no patches: it was encoded with --no-patches"):
        load_features(tmp_path / "vectors").patches(str(photos / GOOD[0]))


@pytest.mark.parametrize("damage", ["index", "cut index", "more inputs", "torn", "swapped", "without parts", "version"])
def test_a_folder_that_is_not_what_it_says(finished, tmp_path, damage):
    out = shutil.copytree(finished, tmp_path / "out")
    first, second = sorted(out.glob("shard-*"))[:2]
    if damage == "index":
        (out / "index.csv").unlink()
    elif damage == "cut index":
        (out / "index.csv").write_bytes((out / "index.csv").read_bytes()[:-9])
    elif damage in ("more inputs", "version"):
        old, new = ('"inputs": 15', '"inputs": 16') if damage == "more inputs" else ('"record": 2', '"record": 1')
        text = (out / "run.json").read_text()
        assert old in text
        (out / "run.json").write_text(text.replace(old, new))
    elif damage == "torn":
        first.write_bytes(first.read_bytes()[:-9])
    elif damage == "swapped":
        first.write_bytes(second.read_bytes())
    else:
        shutil.rmtree(out / ".parts")
    unfinished = damage in ("index", "more inputs")
    messages = {"cut index": "row 12 has 3 columns", "version": "another version"}
    message = "is not finished" if unfinished else messages.get(damage, f"{first.name} is not")
    with pytest.raises(ValueError, match=message):
        load_features(out).pooled  # noqa: B018


def test_no_image_at_all(checkpoint, photos, tmp_path):
    """Nothing was read: names and vectors of nothing, of the width and dtype of the run."""
    assert run(checkpoint, photos / BAD[1], tmp_path / "out", "--pooled", "--save-dtype", "float16") == 1
    features = load_features(tmp_path / "out")
    assert features.names == [] and features.pooled.shape == (0, 64) and features.pooled.dtype == torch.float16
    with pytest.raises(ValueError, match="not among the 0 images"):
        features.patches("x")


def test_every_format_can_be_read():
    assert tuple(sorted(load.READ)) == tuple(sorted(FORMATS))
