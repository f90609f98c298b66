"""The code in docs/ and the README runs as it is written, page by page; what does not run says why."""

import contextlib
import doctest
import io
import re
import shutil

import pytest
import torch
from documents import DOCS, NOT_RUN, PAGES, ROOT, blocks, commands, furnish

import siglip2_packed
from siglip2_packed import (
    Siglip2PackedImageProcessor,
    Siglip2PackedVisionModel,
    convert_to_packing_format,
    replace_vision_tower,
)
from siglip2_packed.cli import main

OF_THEIR_OWN = {
    "seed example 1": "test_readme.py",
    "seed example 2": "test_readme.py",
    "training example": "test_readme.py",
    "accelerate example": "test_training_loops.py",
    "lightning example": "test_training_loops.py",
    "learning rates": "test_readme.py",
    "other people's models": "test_readme.py",
    "export example": "test_readme.py",
    "safetensors in NumPy": "test_readers.py",
}
"""Blocks by name, and the tests that run them."""
RUN = ("python", "bash")
SHOWN = ("diff", "text", "")
"""Languages of what is no code of ours to run."""


@pytest.fixture(scope="module")
def furnished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("furnished")
    furnish(folder)
    return folder


@pytest.fixture
def folder(furnished, tmp_path):
    """A reader's own."""
    return shutil.copytree(furnished, tmp_path / "reader", symlinks=True)


def name(page):
    return page.stem


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_block_runs_or_says_why_not(page):
    for block in blocks(page):
        assert block.language in (*RUN, *SHOWN), block
        if block.language in RUN and block.note and not block.note.startswith(NOT_RUN):
            assert block.note in OF_THEIR_OWN, block
    assert page.read_text().count("\n```") == 2 * len(blocks(page))


@pytest.mark.parametrize("block", OF_THEIR_OWN)
def test_blocks_of_their_own_have_a_test(block):
    assert sum(found.note == block for page in PAGES for found in blocks(page)) == 1
    assert f'example("{block}")' in (ROOT / "tests" / OF_THEIR_OWN[block]).read_text()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_a_page_runs_from_top_to_bottom(page, folder, monkeypatch):
    todo = [block for block in blocks(page) if block.language in RUN and not block.note]
    if not todo:
        pytest.skip("nothing to run")
    monkeypatch.chdir(folder)
    scope = {}
    for block in todo:
        if block.language == "python":
            exec(compile(block.code, f"{page.name}: {block.code.splitlines()[0]}", "exec"), scope)
            continue
        for argv in commands(block.code):
            said = io.StringIO()
            with contextlib.redirect_stdout(said):
                code = main(argv)
            assert code == 0, (argv, said.getvalue())


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        file, _, anchor = target.partition("#")
        if "://" in target:
            continue
        other = (page.parent / file).resolve() if file else page
        assert other.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", other.read_text(), flags=re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, target


@pytest.mark.parametrize("public", siglip2_packed.__all__)
def test_every_public_name_has_an_example_that_runs(public, folder, monkeypatch):
    monkeypatch.chdir(folder)
    thing = siglip2_packed if public == "__version__" else getattr(siglip2_packed, public)
    (found,) = doctest.DocTestFinder(recurse=False).find(thing, public, globs={})
    assert any(public in example.source for example in found.examples)
    said = []
    result = doctest.DocTestRunner().run(found, out=said.append)
    assert result.attempted and not result.failed, "".join(said)
    if public != "__version__":
        assert "Raises:" in found.docstring or issubclass(thing, Exception)


def test_every_page_is_in_the_contents():
    contents = (ROOT / "mkdocs.yml").read_text()
    assert len(DOCS) >= 8
    assert [page.name for page in DOCS if page.name not in contents] == []


def test_messages_are_those_that_people_meet(folder, monkeypatch, capsys):
    """Each of the page is met here, and each met here is on the page."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model, rows = Siglip2PackedVisionModel.from_pretrained("CKPT"), torch.zeros(4, 768)
    load = Siglip2PackedVisionModel.from_pretrained
    encode = ["encode", "photos", "--ckpt", "CKPT", "--out", "out", "--pooled", "--no-patches"]
    assert main(encode) == 0
    capsys.readouterr()

    def said(*argv):
        assert main(argv) == 2
        raise ValueError(capsys.readouterr().err.removeprefix("siglip2-packed encode: error: "))

    provocations = [
        lambda: model(torch.zeros(15, 768), [[1, 3, 4]]),
        lambda: model(rows, [[1, 2], [1, 2]]),
        lambda: model({"pixel_values": rows, "grid_thw": [[1, 2, 2]]}),
        lambda: model(torch.zeros(1, 3, 32, 32), [[1, 2, 2]]),
        lambda: model(rows[None], [[1, 2, 2]]),
        lambda: model(rows.byte(), [[1, 2, 2]]),
        lambda: model(torch.zeros(8, 768), [[1, 2, 2]] * 2, cu_seqlens=[0, 4, 0, 4]),
        lambda: load("CKPT", vision_use_head=False)(rows, [[1, 2, 2]]).pooler_output,
        lambda: model(rows, [[1, 2, 2]], output_attentions=True),
        lambda: load("CKPT", attn_implementation="triton")(rows, [[1, 2, 2]]),
        lambda: load("CKPT", attn_implementation="flash_attention_2")(rows, [[1, 2, 2]]),
        lambda: load("no/such"),
        lambda: load("/no/such"),
        lambda: replace_vision_tower(torch.nn.Linear(2, 2)),
        lambda: Siglip2PackedImageProcessor.from_pretrained("CKPT")("missing.jpg"),
        lambda: Siglip2PackedImageProcessor.from_pretrained("CKPT")(videos=["clip.mp4"]),
        lambda: convert_to_packing_format(torch.zeros(1, 3, 30, 32), 16),
        lambda: said(*encode),
        lambda: said(*encode, "--resume", "--max-num-patches", "64"),
        lambda: said("encode", "nope.jpg", "--ckpt", "CKPT", "--out", "other"),
    ]
    met = []
    for provoke in provocations:
        with pytest.raises((ValueError, TypeError, ImportError, OSError)) as error:
            provoke()
        met.append(str(error.value))
    told = re.findall(r"^\| `(.*?)` \| ", (ROOT / "docs" / "troubleshooting.md").read_text(), flags=re.MULTILINE)
    assert [text for text in told if not any(text in message for message in met)] == []
    assert [message for message in met if not any(text in message for text in told)] == []
