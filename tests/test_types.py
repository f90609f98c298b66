"""What a type checker sees: examples of the README and docs/ pass strictly, and nothing in them is of any type."""

import inspect
import re
import subprocess
import sys

import pytest
from documents import README, ROOT, blocks, named
from PIL import Image

from siglip2_packed import Siglip2PackedImageProcessor

EXAMPLES = [*(block.code for block in blocks(README) if block.language == "python"), *named().values()]
# what an example takes from the text around it, or from the example before it
GIVEN = """
import torch
from collections.abc import Sequence
from typing import Any
from siglip2_packed import PackedPatches, Siglip2PackedImageProcessor, Siglip2PackedVisionModel
files: list[str]
dataset: torch.utils.data.Dataset[PackedPatches]
epochs: int
model: Siglip2PackedVisionModel
packed: PackedPatches
processor: Siglip2PackedImageProcessor
"""
ENGINE = """# mypy: disable-error-code="import-untyped, no-untyped-def, misc"
from siglip2_packed.data import PatchBudgetBatchSampler, collate
loader: Any
optimizer: Any
sampler: PatchBudgetBatchSampler
def loss_terms(features: torch.Tensor) -> torch.Tensor:
    return features
"""
"""What comes with an engine, whose package may have no types."""
REVEALED = {
    "processor": "Siglip2PackedImageProcessor",
    "packed": "PackedPatches",
    "out": "PackedOutput",
    "out.last_hidden_state": "Tensor",
    "out.pooler_output": "Tensor",
    "tokens": "list[Tensor]",
    "packed['grid_thw']": "Tensor",
    "packed['max_seqlen']": "int",
    "packed.pixel_values": "Tensor",
    "model": "Siglip2PackedVisionModel",
    "model.eval()": "Siglip2PackedVisionModel",
    "unpack(out.last_hidden_state, [[1, 2, 3]], padded=True)": "tuple[Tensor, Tensor]",
    "siglip2_packed.pad(packed)": "BatchFeature",
    "siglip2_packed.convert_to_packing_format(out.pooler_output, 16)": "tuple[Tensor, Tensor]",
    "siglip2_packed.Siglip2NaflexPacking(ckpt)(packed['pixel_values'], packed['grid_thw'])": "Tensor",
}
WRONG = {
    "siglip2_packed.Siglip2PackedVisonModel": "attr-defined",
    "processor(files, max_num_patches='many')": "arg-type",
    "unpack('x', packed['grid_thw'])": "call-overload",
    "siglip2_packed.pad(packed, max_num_patches='many')": "call-overload",
}


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """Lines of `mypy --strict` by file: the examples, what they reveal, what is wrong."""
    shown = "import siglip2_packed\n" + EXAMPLES[0] + "files: list[str] = []\n"
    files = {f"example{i}": example(code) for i, code in enumerate(EXAMPLES)}
    files["shown"] = shown + "".join(f"reveal_type({x})\n" for x in REVEALED)
    files["wrong"] = shown + "".join(f"{x}\n" for x in WRONG)
    folder = tmp_path_factory.mktemp("types")
    for name, code in files.items():
        (folder / f"{name}.py").write_text(code)
    mypy = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--config-file=", "--no-pretty"]
    mypy += [f"--cache-dir={ROOT / '.mypy_cache' / 'readme'}", "--allow-untyped-calls", *(f"{x}.py" for x in files)]
    result = subprocess.run(mypy, cwd=folder, capture_output=True, text=True, env={"MYPYPATH": str(ROOT), "PATH": ""})
    assert not result.stderr, result.stderr
    lines = {name: [x for x in result.stdout.splitlines() if x.startswith(f"{name}.py:")] for name in files}
    return lines, shown.count("\n")


def example(code):
    """As it is written, with what the text around it gives, and what is no matter of types taken out."""
    given = "" if re.search("^model = ", code, flags=re.MULTILINE) else GIVEN
    given += ENGINE * ("loss_terms" in code)
    code = code if "import torch" in code else f"import torch\n{code}"
    code = re.sub(r"^def convert_to_packing_format\(.*\):$", r"\g<0>  # type: ignore", code, flags=re.MULTILINE)
    code = re.sub(r"^optimizer = .*$", r"\g<0>  # type: ignore[arg-type]", code, flags=re.MULTILINE)  # torch's union
    return given + re.sub(r"^out\.pooler_output", "print(out.pooler_output)", code, flags=re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("i", range(len(EXAMPLES)))
def test_examples_type_check(checked, i):
    assert not checked[0][f"example{i}"], EXAMPLES[i]


@pytest.mark.slow
def test_nothing_in_them_is_of_any_type(checked):
    lines, before = checked
    shown = {int(x.split(":")[1]) - before: x.split('"')[1] for x in lines["shown"] if "Revealed type" in x}
    assert {x: re.sub(r"[\w.]*\.(\w+)", r"\1", shown[i]) for i, x in enumerate(REVEALED, 1)} == REVEALED


@pytest.mark.slow
def test_what_is_wrong_is_an_error(checked):
    lines, before = checked
    errors = {int(x.split(":")[1]) - before: x.split("[")[-1].rstrip("]") for x in lines["wrong"] if " error: " in x}
    assert {x: errors.get(i) for i, x in enumerate(WRONG, 1)} == WRONG


def test_the_package_is_typed():
    for package in ("siglip2_packed", "kernels_ref"):
        assert (ROOT / package / "py.typed").exists()
        assert re.search(rf'^{package} = \["py.typed"', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)


def test_the_budget_is_a_named_argument_of_the_processor(tmp_path):
    processor = Siglip2PackedImageProcessor(patch_size=4, max_num_patches=64)
    assert inspect.signature(processor.__call__).parameters["max_num_patches"].kind is inspect.Parameter.KEYWORD_ONLY
    image = Image.new("RGB", (40, 40))
    assert [processor(image, max_num_patches=n)["max_seqlen"] for n in (None, 16, 64)] == [64, 16, 64]
    with pytest.raises(ValueError, match="max_num_patches"):
        processor(image, max_num_patches=0)
