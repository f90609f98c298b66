"""`siglip2-packed search`: the nearest images, exactly, by the checkpoint that encoded them; and its contact sheet."""

import base64
import html.parser
import io
import json
import re
import shutil
import tarfile

import pytest
import torch
from encode_runs import GOOD, SETTINGS, image_bytes, run
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from siglip2_packed import load_features, search
from siglip2_packed.cli import main
from siglip2_packed.inspection.sheet import Picture, printable, thumbnail, write_sheet
from siglip2_packed.random_checkpoint import save_random_checkpoint
from siglip2_packed.zero_shot import load_text_tower


@pytest.fixture(scope="module")
def ckpt(checkpoint):
    return checkpoint("tiny", full=True)


@pytest.fixture(scope="module")
def features(ckpt, photos, tmp_path_factory):
    """Four shards of what a checkpoint with a text tower says of the photographs."""
    out = tmp_path_factory.mktemp("features") / "out"
    assert run(lambda: ckpt, photos, out, *SETTINGS) == 0
    return out


def found(capsys, *argv):
    """(cosine, input) of each line of the table."""
    capsys.readouterr()
    assert main(["search", *map(str, argv), "--device", "cpu"]) == 0
    head, *lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("wrote")]
    assert head.split() == ["rank", "cosine", "input"]
    ranks, cosines, names = zip(*(line.split(maxsplit=2) for line in lines))
    assert list(map(int, ranks)) == list(range(1, len(lines) + 1))
    return list(zip(map(float, cosines), names))


def by_hand(pooled, query):
    """Cosines in float64."""
    a, b = pooled.double(), query.double()
    return (a @ b) / a.square().sum(dim=1).sqrt() / b.square().sum().sqrt()


def test_an_image_is_most_like_itself(features, photos, capsys):
    query = photos / GOOD[4]
    lines = found(capsys, features, "--image", query)
    assert lines[0] == (1.0, str(query)) and len(lines) == len(GOOD)
    truth = by_hand(load_features(features).pooled, load_features(features).pooled[4])
    assert [name for _, name in lines] == [load_features(features).names[i] for i in truth.argsort(descending=True)]
    assert [score for score, _ in lines] == pytest.approx(truth.sort(descending=True).values.tolist(), abs=1e-3)


def test_another_pillow_is_said(features, photos, capsys, monkeypatch):
    """Of which an image's own pixels may differ; of words there are none."""
    query = "--image", str(photos / GOOD[4])
    assert main(["search", str(features), *query, "--device", "cpu"]) == 0
    assert capsys.readouterr().err == ""
    theirs = json.loads((features / "run.json").read_text())["versions"]["pillow"]
    monkeypatch.setattr("PIL.__version__", "99.1.0")
    said = f"the collection's pixels are those of Pillow {theirs}, the query's of 99.1.0: of JPEG files and tall images"
    for some, expected in ((query, 1), (("--text", "a bicycle"), 0)):
        assert main(["search", str(features), *some, "--device", "cpu"]) == 0
        assert capsys.readouterr().err.count(said) == expected


def test_words_are_encoded_by_the_text_tower(features, ckpt, capsys):
    (query,) = load_text_tower(str(ckpt), torch.device("cpu")).embed(["A red Bicycle"])
    truth = by_hand(load_features(features).pooled, query)
    lines = found(capsys, features, "--text", "a red bicycle", "--top", "3")
    best = truth.argsort(descending=True)[:3]
    assert [name for _, name in lines] == [load_features(features).names[i] for i in best]
    assert [score for score, _ in lines] == pytest.approx(truth[best].tolist(), abs=1e-3)
    assert truth.std() > 0.01


def test_the_run_s_settings_make_the_query(ckpt, photos, tmp_path, capsys):
    """Those of the checkpoint's own file would be another image's."""
    out = tmp_path / "out"
    flags = ["--no-patches", "--pooled", "--max-num-patches", "9", "--dtype", "bfloat16", "--normalize"]
    assert run(lambda: ckpt, photos, out, *flags) == 0
    assert found(capsys, out, "--image", photos / GOOD[7], "--top", "1") == [(1.0, str(photos / GOOD[7]))]


def test_blocks_change_nothing(features, monkeypatch):
    stored, device = load_features(features), torch.device("cpu")
    query = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    whole = search.nearest(stored, query, 5, device)
    blocks = stored.blocks
    monkeypatch.setattr(stored, "blocks", lambda *_: blocks(1))
    alone = search.nearest(stored, query, 5, device)
    assert [image for _, image in alone] == [image for _, image in whole]
    assert by_hand(stored.pooled, query[0]).argsort(descending=True)[:5].tolist() == [image for _, image in whole]
    with pytest.raises(ValueError, match="vectors have 64 numbers, the query 63"):
        search.nearest(stored, query[:, 1:], 5, device)


@pytest.mark.parametrize("differs", ["weights", "layer_norm_eps"])
def test_another_checkpoint_is_refused(features, ckpt, tmp_path, capsys, differs):
    other = tmp_path / "other"
    if differs == "weights":
        save_random_checkpoint(other, "tiny", seed=1, full=True)
    else:
        config = json.loads((shutil.copytree(ckpt, other) / "config.json").read_text())
        config["vision_config"]["layer_norm_eps"] = 1e-3
        (other / "config.json").write_text(json.dumps(config))
    for asked in ("--text=cat", f"--image={tmp_path / 'x.jpg'}"):
        assert main(["search", str(features), asked, "--ckpt", str(other), "--device", "cpu"]) == 2
        assert f"configuration or weights are not those of '{other}'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--text", "cat", "--top", "0"], "--top must be at least 1, got 0"),
        (["--text", "caf\udce9"], "is not UTF-8"),
        (["--text", "cat", "--html", "x.png"], "must end in .html"),
        (["--image", "absent.jpg"], "absent.jpg"),
    ],
)
def test_what_cannot_be_searched_for_is_named(features, capsys, flags, message):
    assert main(["search", str(features), *flags, "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err


def test_what_cannot_be_searched_is_named(checkpoint, finished, photos, tmp_path, capsys):
    assert main(["search", str(finished), "--text", "cat", "--device", "cpu"]) == 2
    assert "text_model.*, logit_scale, logit_bias missing" in capsys.readouterr().err
    assert run(checkpoint, photos / GOOD[0], tmp_path / "out") == 0
    assert main(["search", str(tmp_path / "out"), "--image", str(photos / GOOD[0]), "--device", "cpu"]) == 2
    assert "holds no pooled: it was encoded without --pooled" in capsys.readouterr().err
    assert main(["search", str(tmp_path), "--text", "cat", "--device", "cpu"]) == 2
    assert "holds no run.json" in capsys.readouterr().err


def test_texts_are_written(ckpt, tmp_path, capsys):
    out, texts = tmp_path / "made" / "texts.safetensors", [f"{i} cats" for i in range(65)] + ["“É”"]
    argv = ["encode-text", *texts, "--ckpt", str(ckpt), "--device", "cpu", "--out"]
    assert main([*argv, str(out)]) == main([*argv, str(tmp_path / "unit.safetensors"), "--normalize"]) == 0
    tower = load_text_tower(str(ckpt), torch.device("cpu"))
    one_by_one = torch.cat([tower.embed([text]) for text in texts])
    written, unit = load_file(out)["pooled"], load_file(tmp_path / "unit.safetensors")["pooled"]
    torch.testing.assert_close(written, one_by_one, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(unit, written / written.square().sum(dim=1, keepdim=True).sqrt())
    with safe_open(out, "pt") as file:
        assert json.loads(file.metadata()["texts"]) == texts
    assert main([*argv, str(tmp_path / "x.npy")]) == 2
    assert "must end in .safetensors" in capsys.readouterr().err
    weights = ckpt / "model.safetensors"
    before = weights.read_bytes()
    assert main([*argv, str(weights)]) == 2 and weights.read_bytes() == before
    assert "is there, and no file of this command" in capsys.readouterr().err
    assert main([*argv, str(out)]) == 0  # of this command


class Page(html.parser.HTMLParser):
    """Its images, its text, and the names of its tags."""

    def __init__(self, path):
        super().__init__()
        self.images, self.words, self.tags = [], [], set()
        self.feed(path.read_text(encoding="utf-8"))
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag == "img":
            self.images.append(Image.open(io.BytesIO(base64.b64decode(dict(attributes)["src"].split(",")[1]))))

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_shows_files_and_members_and_says_what_is_gone_or_changed(ckpt, photos, tmp_path, capsys):
    here = tmp_path / "in"
    here.mkdir()
    for name in ("a#1.png", "gone.png", "changed.png"):
        shutil.copy(photos / GOOD[5], here / name)
    with tarfile.open(here / "some.tar", "w") as tar:
        for size in ((30, 20), (8, 32)):  # two members of one name
            data = image_bytes(sum(size), size)
            member = tarfile.TarInfo("x#y.png")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    out, page = tmp_path / "out", tmp_path / "made" / "sheet.html"
    assert run(lambda: ckpt, here, out, "--pooled", "--no-patches") == 0
    (here / "gone.png").unlink()
    Image.new("RGB", (9, 9)).save(here / "changed.png")
    assert main(["search", str(out), "--image", str(here / "a#1.png"), "--html", str(page), "--device", "cpu"]) == 0
    assert "2 of 5 images could not be shown" in capsys.readouterr().out
    shown = Page(page)
    assert sorted(image.size for image in shown.images) == [(5, 40), (20, 30), (32, 8)]
    assert shown.text.count("not there any more") == shown.text.count("changed since it was encoded") == 1
    assert shown.text.count("x#y.png") == 2 and "1.000" in shown.text and "a#1.png" in shown.text


def test_the_page_is_escaped_and_fetches_nothing(tmp_path):
    page, evil = tmp_path / "x.html", "<script>alert('1')</script>\"&\u202e\n\udcff{0}"
    good, bad = Picture(evil, 0.5, thumbnail(image_bytes(0, (700, 300))), ""), Picture("n", 0, b"", evil)
    write_sheet(page, evil, evil, [good, bad])
    shown = Page(page)
    assert "script" not in shown.tags and "a" not in shown.tags and shown.text.count("alert('1')") == 5
    assert max(shown.images[0].size) == 256
    source = re.sub(r"base64,[\w+/=]*", "", page.read_text(encoding="utf-8"))
    assert not re.search(r'src=(?!"data:)|href|url|//', source) and "default-src 'none'" in source
    assert "\u202e" not in source
    assert printable("é 猫\t\x1b[31m\udcff") == "é 猫\\t\\x1b[31m\\udcff"
