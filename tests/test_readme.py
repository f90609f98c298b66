"""Examples that need more than their page gives run as written; tables are those of the committed results."""

import re
import sys
from types import SimpleNamespace

import pytest
import torch
from documents import README, ROOT, example

from siglip2_packed import (
    PackedPatches,
    Siglip2NaflexPacking,
    Siglip2PackedImageProcessor,
    Siglip2PackedVisionModel,
    __version__,
    convert_to_packing_format,
)


@pytest.fixture
def without_hub_or_gpu(checkpoint, monkeypatch):
    """The hub id is a local checkpoint of the base shape, and `.cuda()` stays where it is."""
    for cls in (Siglip2PackedVisionModel, Siglip2PackedImageProcessor):
        original = cls.from_pretrained.__func__

        def local(cls, ckpt, _original=original, **kwargs):
            assert ckpt == "google/siglip2-so400m-patch16-naflex"
            short = {"num_hidden_layers": 2} if cls is Siglip2PackedVisionModel else {}
            return _original(cls, checkpoint("base"), **kwargs, **short)

        monkeypatch.setattr(cls, "from_pretrained", classmethod(local))
    if torch.cuda.is_available():
        return
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    for cls in (torch.Tensor, torch.nn.Module):

        def stay(self, *args, _to=cls.to, **kwargs):
            return self if args[:1] == ("cuda",) else _to(self, *args, **kwargs)

        monkeypatch.setattr(cls, "to", stay)


def test_seed_example_1(without_hub_or_gpu, capsys):
    scope = {}
    exec(example("seed example 1"), scope)
    assert scope["output"].shape == (392, 768)
    assert "Output shape: torch.Size([392, 768])" in capsys.readouterr().out


def test_seed_example_2(without_hub_or_gpu):
    scope = {"torch": torch}  # the document imports it in its first example only
    exec(example("seed example 2"), scope)
    ours = convert_to_packing_format(scope["images"], patch_size=16)
    assert all(torch.equal(x, y) for x, y in zip(ours, (scope["hidden_states"], scope["grid_thw"])))
    assert scope["output"].shape == (392, 768)
    assert isinstance(scope["packing_model"], Siglip2NaflexPacking)


def test_training_example(without_hub_or_gpu, tmp_path):
    from PIL import Image

    ckpt = "google/siglip2-so400m-patch16-naflex"
    processor = Siglip2PackedImageProcessor.from_pretrained(ckpt)
    files = [tmp_path / f"{i}.png" for i in range(3)]
    for i, file in enumerate(files):
        Image.new("RGB", (40 + 30 * i, 60)).save(file)
    scope = dict(files=files, processor=processor, dataset=[processor(file) for file in files], epochs=1)
    scope["model"] = Siglip2PackedVisionModel.from_pretrained(ckpt)
    exec(example("training example").replace("num_workers=8", "num_workers=0"), scope)
    assert scope["step"] == 1
    assert len(scope["out"].pooler_output) == 3


def test_the_tower_has_its_own_learning_rate():
    model = torch.nn.ModuleDict({"vision_tower": torch.nn.Linear(2, 2), "mm_projector": torch.nn.Linear(2, 3)})
    scope = dict(torch=torch, model=model)
    exec(example("learning rates"), scope)
    rates = {id(p): group["lr"] for group in scope["optimizer"].param_groups for p in group["params"]}
    assert {name: rates[id(p)] for name, p in model.named_parameters()} == {
        f"{part}.{name}": lr
        for part, lr in (("vision_tower", 2e-6), ("mm_projector", 1e-5))
        for name in ("weight", "bias")
    }


def test_a_tower_is_replaced_and_put_back(checkpoint):
    from transformers import AutoModel

    model = torch.nn.ModuleDict({"tower": AutoModel.from_pretrained(checkpoint("tiny"))})
    before = list(model.modules())
    scope = {"model": model}
    exec(example("other people's models"), scope)
    assert len(scope["towers"]) == 1 and list(model.modules()) == before


def test_a_model_is_exported(checkpoint, monkeypatch, tmp_path):
    pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    packed = PackedPatches(torch.zeros(6, 48), [(1, 2, 3)])
    scope = dict(torch=torch, model=Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny")).eval(), packed=packed)
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", lambda *args, **kwargs: None)  # takes a minute
    exec(example("export example"), scope)
    assert scope["tokens"].shape == (6, 64) and scope["pooled"].shape == (1, 64)
    assert (tmp_path / "siglip2.onnx").exists()


def test_it_is_read_in_five_minutes():
    text = README.read_text()
    assert len(text.splitlines()) <= 150
    tree = text[text.index("## The tree") :]
    package = ROOT / "siglip2_packed"
    modules = {file.stem for file in package.glob("*.py")} - {"__init__", "__main__"}
    folders = {f"{file.name}/" for file in [*ROOT.iterdir(), *package.iterdir()] if (file / "__init__.py").exists()}
    folders |= {"benchmarks/", "docs/", "examples/", "findings/", "tests/"}
    assert {*re.findall(r"[\w/]+", tree)} >= modules | folders


def test_the_version_is_the_same_everywhere():
    heads = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    released = [head for head in heads if head != "Unreleased"]
    assert re.fullmatch(rf"{re.escape(__version__)} \(\d{{4}}-\d\d-\d\d\)", released[0])
    assert heads.count("Unreleased") == heads[:1].count("Unreleased")  # at the top, if at all
    date = released[0].split("(")[1].rstrip(")")
    assert f"\nversion: {__version__}\ndate-released: {date}\n" in (ROOT / "CITATION.cff").read_text()


def test_every_finding_is_listed():
    listed = set(re.findall(r"^\| `(\w+)` \|", (ROOT / "findings" / "README.md").read_text(), re.MULTILINE))
    assert listed == {script.stem for script in (ROOT / "findings").glob("*.sh")}


def test_tables_are_those_of_the_committed_results(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    tables = pytest.importorskip("readme_tables")
    for page in tables.PAGES:
        assert tables.render(page.read_text()) == page.read_text(), page
    sys.modules.pop("readme_tables")


def test_the_legend_of_attentions_plot_covers_nothing(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    tables, figures = pytest.importorskip("readme_tables"), pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(figures.Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    tables.plot_attention()
    for figure in drawn:
        figure.draw_without_rendering()
        (legend,) = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == list(tables.PROVIDERS.values())
        assert not any(legend.get_window_extent().overlaps(axis.get_tightbbox()) for axis in figure.axes)
    assert drawn
    sys.modules.pop("readme_tables")


def test_the_legend_of_the_encoders_plot_covers_nothing(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    tables, figures = pytest.importorskip("readme_tables"), pytest.importorskip("matplotlib.figure")
    path = tables.RESULTS / "encoder_h200.csv"
    monkeypatch.setattr(tables, "RESULTS", SimpleNamespace(glob=lambda *_: [path]))
    drawn = []
    monkeypatch.setattr(figures.Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    tables.plot_encoder()
    (figure,) = drawn
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(tables.ENCODERS.values())[:5]
    boxes = [axis.get_tightbbox() for axis in figure.axes]
    assert not any(legend.get_window_extent().overlaps(box) for box in boxes) and not boxes[0].overlaps(boxes[1])
    for axis in figure.axes:
        labels = [label.get_text().splitlines() for label in axis.get_xticklabels()]
        assert ["mixed", "48 images", "64 to 1,024 patches", "up to 2:1"] in labels
        assert ["video", "8 videos, 8 frames", "196 patches a frame", "square"] in labels
    sys.modules.pop("readme_tables")
