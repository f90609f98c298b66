"""`siglip2-packed show`: its numbers against independent ones, its pictures opened, its page read."""

import base64
import io
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from siglip2_packed import Siglip2PackedImageProcessor, Siglip2PackedVisionModel, cli
from siglip2_packed.inspection import views
from siglip2_packed.inspection.references import load_transformers
from siglip2_packed.random_checkpoint import save_random_checkpoint

CPU = torch.device("cpu")
SIZES = {"square.png": (64, 64), "wide.png": (40, 150), "<tall>.png": (200, 30)}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name, (h, w) in SIZES.items():
        small = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        small.resize((w, h), Image.Resampling.BICUBIC).save(folder / name)
    return [str(folder / name) for name in SIZES]


@pytest.fixture(scope="module")
def headless(checkpoint, tmp_path_factory):
    """The checkpoint without its pooling head, one of its matrices doubled."""
    folder = tmp_path_factory.mktemp("headless")
    model = Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny"), vision_use_head=False)
    with torch.no_grad():
        model.encoder.layers[1].mlp.fc1.weight.mul_(2)
    model.save_pretrained(folder)
    Siglip2PackedImageProcessor.from_pretrained(checkpoint("tiny")).save_pretrained(folder)
    return folder


def encode(ckpt, files):
    return views.encode(str(ckpt), [Path(file) for file in files], CPU, torch.float32, "auto", None)


@pytest.fixture(scope="module")
def encoded(checkpoint, files):
    return encode(checkpoint("tiny"), files)


def run(ckpt, files, *flags):
    return cli.main(["show", *files, "--ckpt", str(ckpt), "--device", "cpu", *map(str, flags)])


def features(rows=60, width=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator) @ torch.randn(width, width, generator=generator) + 3


@pytest.mark.parametrize("rows", [60, 24, 5])
def test_principal_components_are_numpys(rows):
    x = features(rows)
    components, explained = views.principal_components(x)
    centred = x.double().numpy() - x.double().numpy().mean(axis=0)
    u, s, vt = np.linalg.svd(centred, full_matrices=False)
    for k in range(3):
        sign = np.sign(vt[k][np.abs(vt[k]).argmax()])
        np.testing.assert_allclose(components[:, k].numpy(), sign * u[:, k] * s[k], atol=1e-4 * s[0])
    assert explained == pytest.approx((s[:3] ** 2).sum() / (s**2).sum(), rel=1e-5)
    assert 0 < explained < 1
    assert torch.equal(components, views.principal_components(x)[0])


@pytest.mark.parametrize("rows", [1, 2])
def test_fewer_patches_than_components(rows):
    components, _ = views.principal_components(features(rows))
    assert components.shape == (rows, 3) and components.isfinite().all()
    assert components[:, rows - 1 :].abs().max() < 1e-4
    assert torch.equal(views.colours(torch.zeros(rows, 3)), torch.full((rows, 3), 0.5))


def test_colours_are_spread_whatever_an_outlier_does():
    components = views.principal_components(features(400))[0]
    plain = views.colours(components)
    assert plain.min() == 0 and plain.max() == 1 and (plain.std(dim=0) > 0.15).all()
    components[7] = 1e4
    assert (views.colours(components).std(dim=0) > 0.15).all()


@pytest.mark.parametrize("shape", ["tiny", "tiny72"])
@pytest.mark.parametrize("grid", [(13, 19), (8, 32), (7, 1), (1, 1)])
def test_pooling_attention_is_that_of_multihead_attention(checkpoint, shape, grid):
    ours = Siglip2PackedVisionModel.from_pretrained(checkpoint(shape)).head
    theirs = load_transformers(str(checkpoint(shape)), CPU, torch.float32, head=True).model
    head = getattr(theirs, "vision_model", theirs).head
    x = torch.randn(grid[0] * grid[1], head.probe.shape[-1], generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = head.attention(head.probe, x[None], x[None], need_weights=True, average_attn_weights=False)[1]
        attention = views.pooling_attention(ours, x)
    torch.testing.assert_close(attention, expected[0, :, 0], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(attention.sum(dim=1), torch.ones(len(attention)))


def test_cosines_by_hand():
    x = torch.tensor([[3.0, 4.0], [4.0, 3.0], [-3.0, -4.0], [0.0, 2.0]])
    expected = torch.tensor([[1, 0.96, -1, 0.8], [0.96, 1, -0.96, 0.6], [-1, -0.96, 1, -0.8], [0.8, 0.6, -0.8, 1]])
    torch.testing.assert_close(views.cosines(x), expected)


def test_difference_by_hand():
    x = torch.tensor([[3.0, 4.0], [0.0, 2.0], [1.0, 0.0], [1.0, 0.0]])
    other = torch.tensor([[3.0, 4.0], [0.0, 1.0], [0.0, 1.0], [-2.0, 0.0]])
    found = views.difference(x, other, (2, 2), "other")
    torch.testing.assert_close(found.relative, torch.tensor([[0, 1], [2**0.5, 1.5]]).double())
    torch.testing.assert_close(found.cosine, torch.tensor([[0, 0], [1, 2]]).double())


def test_pixels_are_the_resized_image(encoded, files):
    """What the panel shows went through patches and normalisation, and comes back exactly."""
    assert len(set(encoded.grids)) == 3
    for file, (h, w), pixels in zip(files, encoded.grids, encoded.pixels):
        expected = Image.open(file).resize((4 * w, 4 * h), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(pixels, np.asarray(expected))


def test_features_are_those_of_the_model(checkpoint, encoded, files):
    _, padded = views.encode_padded("transformers", str(checkpoint("tiny")), [Path(file) for file in files], CPU, None)
    for ours, theirs in zip(encoded.features, padded):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def page_data(path):
    text = path.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])


def decoded(text, dtype):
    return np.frombuffer(base64.b64decode(text), dtype)


def test_panel_and_page(checkpoint, encoded, files, tmp_path, capsys):
    png, html = tmp_path / "made" / "panel.png", tmp_path / "report.html"
    assert run(checkpoint("tiny"), files, "--out", png, "--html", html, "--against", "padded") == 0
    out = capsys.readouterr().out
    assert all(name in out for name in SIZES) and f"wrote {png}" in out and f"wrote {html}" in out

    image = np.asarray(Image.open(png).convert("RGB")).astype(float)
    assert image.shape[1] > 2000  # six columns
    for column in np.array_split(image, 6, axis=1):
        assert column.std() > 20

    text = html.read_text(encoding="utf-8")
    assert "http" not in text and "<link" not in text and "import" not in text
    assert "src=" not in text and "<tall>" not in text  # pictures are set from the data; names cannot be markup
    assert not re.search(r"url\((?!data:)", text)

    shown = page_data(html)["views"]
    assert [view["name"] for view in shown] == list(SIZES)
    for view, (h, w), x in zip(shown, encoded.grids, encoded.features):
        assert view["grid"] == [h, w]
        levels = np.zeros((h * w, h * w))
        levels[np.triu_indices(h * w)] = decoded(view["cosines"], np.uint8)
        cosines = view["low"] + (1 - view["low"]) * levels / 255
        unit = (x / x.norm(dim=1, keepdim=True)).numpy()
        np.testing.assert_allclose(cosines, np.triu(unit @ unit.T) + np.tril(cosines, -1), atol=0.005)
        mean, *heads = [decoded(head, "<f4") for head in view["attention"]]
        assert len(heads) == 4
        np.testing.assert_allclose(np.mean(heads, axis=0), mean, rtol=1e-4)
        assert mean.sum() == pytest.approx(1, abs=1e-4) and view["chosen"] == mean.argmax()
        assert decoded(view["colours"], np.uint8).reshape(-1, 3).std() > 20
        assert 0 < decoded(view["difference"]["relative"], "<f4").max() < 1e-5
        with Image.open(io.BytesIO(base64.b64decode(view["image"].split(",")[1]))) as picture:
            assert picture.size == (4 * w, 4 * h)


@pytest.mark.parametrize("flags", [(), ("--pca", "image")])
def test_says_which_images_the_components_are_of(checkpoint, encoded, files, tmp_path, capsys, flags):
    html = tmp_path / "r.html"
    assert run(checkpoint("tiny"), files, "--out", tmp_path / "p.svg", "--html", html, *flags) == 0
    out, together = capsys.readouterr().out, not flags
    assert ("of the patches of all 3 images together; --pca image" in out) is together
    for view, x in zip(page_data(html)["views"], encoded.features):
        components, explained = views.principal_components(torch.cat(encoded.features) if together else x)
        assert view["variance"] == f"{explained:.0%} of the variance" + (" of 3 images together" if together else "")
        if not together:
            expected = (views.colours(components).numpy() * 255).round()
            assert np.abs(decoded(view["colours"], np.uint8).reshape(-1, 3) - expected).max() <= 1


def test_one_image_is_its_own(checkpoint, files, tmp_path, capsys):
    pages = [tmp_path / name for name in ("a.html", "b.html")]
    for page, flags in zip(pages, ((), ("--pca", "image"))):
        assert run(checkpoint("tiny"), files[:1], "--html", page, *flags) == 0
    assert page_data(pages[0]) == page_data(pages[1])
    assert "images together" not in pages[0].read_text() and "principal components:" not in capsys.readouterr().out


def test_page_of_1024_patches_is_small(checkpoint, files, tmp_path):
    html = tmp_path / "r.html"
    assert run(checkpoint("tiny"), files[:1], "--html", html, "--max-num-patches", 1024) == 0
    assert page_data(html)["views"][0]["grid"] == [32, 32]
    assert html.stat().st_size < 1.5e6


def test_same_command_same_picture(checkpoint, files, tmp_path):
    for name in ("a.png", "b.png"):
        assert run(checkpoint("tiny"), files[:1], "--out", tmp_path / name) == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_no_pooling_head(headless, files, tmp_path, capsys):
    assert run(headless, files, "--out", tmp_path / "p.png", "--html", tmp_path / "p.html") == 0
    assert capsys.readouterr().out.count("no pooling head") == 3
    for view in page_data(tmp_path / "p.html")["views"]:
        h, w = view["grid"]
        assert view["attention"] is None and view["chosen"] == h // 2 * w + w // 2


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_single_patch(checkpoint, files, tmp_path, suffix):
    flags = ("--out", tmp_path / f"p.{suffix}", "--html", tmp_path / "p.html", "--max-num-patches", 1)
    assert run(checkpoint("tiny"), files[:1], *flags, "--against", "padded") == 0
    assert (tmp_path / f"p.{suffix}").stat().st_size > 5000


def test_against_another_checkpoint(checkpoint, headless, encoded, files, tmp_path):
    html = tmp_path / "p.html"
    assert run(checkpoint("tiny"), files, "--html", html, "--against", headless, "--patch", "1,1") == 0
    theirs = encode(headless, files)
    for view, x, y in zip(page_data(html)["views"], encoded.features, theirs.features):
        assert view["difference"]["against"] == headless.name
        assert view["chosen"] == view["grid"][1] + 1
        relative = ((x - y).norm(dim=1) / y.norm(dim=1)).numpy()
        assert relative.min() > 0.01
        np.testing.assert_allclose(decoded(view["difference"]["relative"], "<f4"), relative, rtol=1e-4)
        cosine = 1 - torch.nn.functional.cosine_similarity(x, y).numpy()
        np.testing.assert_allclose(decoded(view["difference"]["cosine"], "<f4"), cosine, atol=1e-5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--out panel.png, --html report.html"),
        (["--out", "panel.gif"], "'panel.gif' must end in .png or .pdf or .svg"),
        (["--html", "report.png"], "'report.png' must end in .html"),
        (["--out", "folder.png"], "is a folder"),
        (["--out", "file/panel.png"], "file"),
        (["--out", "p.png", "--patch=10,3"], "--patch 10,3 is outside square.png, which has 4 rows and 4 columns"),
        (["--html", "p.html", "--patch=-1,0"], "--patch -1,0 is outside"),
        (["--html", "p.html", "--against", "./nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_named(checkpoint, files, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    assert run(checkpoint("tiny"), files[:1], *flags) == 2
    assert message in capsys.readouterr().err


def test_patch_that_does_not_parse(checkpoint, files):
    with pytest.raises(SystemExit, match="2"):
        run(checkpoint("tiny"), files, "--html", "p.html", "--patch", "3")


def test_images_that_cannot_be_shown(checkpoint, files, tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes(b"no image")
    assert run(checkpoint("tiny"), [files[0], str(tmp_path / "broken.png")], "--html", tmp_path / "p.html") == 2
    assert "image 1" in (err := capsys.readouterr().err) and "broken.png" in err
    assert run(checkpoint("tiny"), files * 11, "--html", tmp_path / "p.html") == 2
    assert "33 images" in capsys.readouterr().err
    assert not (tmp_path / "p.html").exists()


def test_models_that_cannot_be_compared(checkpoint, files, tmp_path, capsys):
    wide = save_random_checkpoint(tmp_path / "wide", "tiny72")
    assert run(checkpoint("tiny"), files[:1], "--html", tmp_path / "p.html", "--against", wide) == 2
    assert "width 64 here, 144 in" in capsys.readouterr().err
    Siglip2PackedImageProcessor(patch_size=4, max_num_patches=9).save_pretrained(wide)
    assert run(checkpoint("tiny"), files[:1], "--html", tmp_path / "p.html", "--against", wide) == 2
    assert "4x4 patches here, 3x3 in" in capsys.readouterr().err


def test_features_that_are_not_finite(encoded):
    x = encoded.features[0].clone()
    x[3, 1] = float("nan")
    encoded = encoded._replace(features=[x], grids=encoded.grids[:1])
    with pytest.raises(ValueError, match="square.png: features of 1 of 16 patches are not finite"):
        views.make_views(["square.png"], encoded)
    others = encoded.grids, [x]
    with pytest.raises(ValueError, match="square.png: features in other are not finite"):
        views.make_views(["square.png"], encoded._replace(features=[x.nan_to_num()]), None, "other", others)


@pytest.mark.parametrize("name", ["$\\frac$.png", "SUBTITLE DATA.png", "\udcff.png"])
def test_strange_names(checkpoint, files, tmp_path, name, capsys):
    """Formulas, the page's own placeholders, bytes that are no UTF-8; in the checkpoint's path too."""
    ckpt, file = tmp_path / "DATA", tmp_path / name
    shutil.copytree(checkpoint("tiny"), ckpt)
    shutil.copy(files[0], file)
    assert run(ckpt, [str(file)], "--out", tmp_path / "p.png", "--html", tmp_path / "p.html") == 0
    assert page_data(tmp_path / "p.html")["views"][0]["name"] == name.replace("\udcff", "?")
    assert (tmp_path / "p.html").read_text(encoding="utf-8").count("DATA, float32;") == 1


def test_only_the_panel_needs_matplotlib(checkpoint, files, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run(checkpoint("tiny"), files[:1], "--html", tmp_path / "p.html") == 0
    assert run(checkpoint("tiny"), files[:1], "--out", tmp_path / "p.png") == 2
    assert "siglip2-packed[show]" in capsys.readouterr().err


def test_weights_that_transformers_does_not_load(checkpoint, files, tmp_path, monkeypatch, capsys):
    """4.57 does not read bare keys: nothing is drawn against random weights."""
    theirs = load_transformers(str(checkpoint("tiny")), CPU, torch.float32, head=True)
    monkeypatch.setattr(views, "load_transformers", lambda *_: theirs._replace(not_loaded=["some.weight"]))
    assert run(checkpoint("tiny"), files[:1], "--html", tmp_path / "p.html", "--against", "transformers") == 2
    assert "some.weight" in capsys.readouterr().err


def test_photographs_that_come_with_scikit_image(checkpoint, capsys, tmp_path):
    pytest.importorskip("skimage")
    page = tmp_path / "report.html"
    argv = ["show", "--ckpt", str(checkpoint()), "--device", "cpu", "--html", str(page)]
    assert cli.main([*argv, "--use-real-images"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in out if "most attended" in line] == [
        "astronaut.png",
        "chelsea.png",
        "coffee.png",
    ]
    assert out[-1] == f"wrote {page}"
    assert cli.main(argv) == 2
    assert "no images: name some, or give --use-real-images" in capsys.readouterr().err
