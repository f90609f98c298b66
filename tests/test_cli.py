"""The command line: what every command has in common, `doctor` and `random-checkpoint`."""

import contextlib
import dataclasses
import importlib
import importlib.metadata
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from siglip2_packed import Siglip2PackedVisionModel, __version__, cli, doctor, flags, formats, peers, workloads
from siglip2_packed.ops import attention as ops_attention
from siglip2_packed.ops import norm, survey
from siglip2_packed.ops.attention import backends, outside
from siglip2_packed.ops.runtime import check
from siglip2_packed.ops.runtime.choice import Card
from siglip2_packed.ops.survey import Shape

COMMANDS = [name for name, _, _ in cli.COMMANDS]


def test_commands():
    assert COMMANDS[:5] == ["align", "bench", "encode", "doctor", "random-checkpoint"]


def test_module_and_function_are_the_same(capsys):
    result = subprocess.run([sys.executable, "-m", "siglip2_packed", "--help"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert all(name in result.stdout for name in COMMANDS)
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    assert capsys.readouterr().out.split() == result.stdout.split()


def test_version_and_help_import_nothing_heavy():
    """In one process: the package, the version, the help of all commands, of each; encode asks Pillow for formats."""
    calls = [["--version"], ["--help"], *([name, "--help"] for name in sorted(COMMANDS, key="encode".__eq__))]
    code = (
        "import sys, siglip2_packed\n"
        "from siglip2_packed import cli\n"
        f"for call in {calls}:\n"
        "    try: cli.main(call)\n"
        "    except SystemExit: pass\n"
        "    found = [name for name in ('torch', 'transformers', 'numpy', 'PIL') if name in sys.modules]\n"
        "    assert not found or (call[0] == 'encode' and found == ['PIL']), (call, found)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("usage:") == len(COMMANDS) + 1


def test_names_in_flags_are_those_of_the_modules():
    assert flags.ATTN_IMPLEMENTATIONS == ops_attention.ATTN_IMPLEMENTATIONS
    assert flags.DECODE == formats.DECODE
    assert list(flags.DOCTOR_SHAPES) == list(doctor.SHAPES)
    assert list(workloads.PROVIDERS) == list(peers.PROVIDERS)
    assert set(workloads.DEFAULT_PROVIDERS) <= set(workloads.PROVIDERS)
    assert {name: flags.DTYPES[name] for name in flags.DTYPES} == {
        name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_has_one_help_line(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main([command, "--help"])
    out = capsys.readouterr().out
    assert "usage: siglip2-packed" in out
    parser = cli.argparse.ArgumentParser()
    target = next(target for name, _, target in cli.COMMANDS if name == command)
    module, function = target.split(":")
    getattr(importlib.import_module(module), function)(parser)
    for action in parser._actions:
        assert action.help, action.option_strings
        assert "\n" not in action.help
        assert not any("_" in option for option in action.option_strings)


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"siglip2-packed {__version__}\n"


def test_no_command(capsys):
    assert cli.main([]) == 2
    assert "usage" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["nonsense"], ["align"], ["doctor", "--nonsense"]])
def test_what_does_not_parse(argv):
    with pytest.raises(SystemExit, match="2"):
        cli.main(argv)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("--batch_size", "--batch-size"),
        ("--image_size=2_x", "--image-size=2_x"),
        ("--json", "--json"),
        ("my_images", "my_images"),
        ("-", "-"),
        ("a--b_c", "a--b_c"),
    ],
)
def test_dashes_and_underscores(word, expected):
    assert cli.dashed(word) == expected


@pytest.mark.parametrize("error", [ValueError("bad\tvalue"), FileNotFoundError("no file"), ImportError("no module")])
def test_user_errors_are_a_line_and_exit_code_2(monkeypatch, capsys, error):
    monkeypatch.setattr(doctor, "environment", lambda device: (_ for _ in ()).throw(error))
    assert cli.main(["doctor", "--device", "cpu"]) == 2
    assert capsys.readouterr().err == f"siglip2-packed doctor: error: {error}\n"


def test_ctrl_c_is_a_line(monkeypatch, capsys):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("siglip2_packed.random_checkpoint.save_random_checkpoint", stop)
    assert cli.main(["random-checkpoint", "x"]) == 130
    assert capsys.readouterr().err == "\nsiglip2-packed random-checkpoint: interrupted\n"


def test_what_the_terminal_cannot_show_fails_no_run(monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), "latin-1")
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr("siglip2_packed.random_checkpoint.save_random_checkpoint", lambda folder, *_, **__: folder)
    assert cli.main(["random-checkpoint", "Фото \udcff é"]) == 0
    assert b"wrote \\u0424\\u043e\\u0442\\u043e \\udcff \xe9: base" in stdout.buffer.getvalue()
    assert stdout.errors == "strict"


@pytest.mark.parametrize("flag", ["--out", "--ckpt"])
def test_a_variable_that_was_never_set_is_no_folder(flag, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["encode", "x.jpg", "--out", "o", "--ckpt", "c", flag, ""])
    assert f"argument {flag}: it is empty" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", ["align --json", "bench --out", "doctor --json", "zero-shot x.jpg --labels a --json"])
def test_reports_that_cannot_be_written_are_known_first(flags, tmp_path, capsys):
    (tmp_path / "file").touch()
    for path, message in ((tmp_path, "is a folder"), (tmp_path / "file" / "x" / "y", "cannot be written")):
        with pytest.raises(SystemExit, match="2"):
            cli.main([*flags.split(), str(path), "--ckpt", "c"])
        assert f"'{path}' {message}" in capsys.readouterr().err


def test_our_own_errors_keep_their_traceback(monkeypatch):
    monkeypatch.setattr(doctor, "environment", lambda device: [][0])
    with pytest.raises(IndexError):
        cli.main(["doctor", "--device", "cpu"])


def test_a_broken_checkpoint_is_a_user_error(checkpoint, tmp_path, capsys):
    for file in checkpoint().iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"not a checkpoint")
    assert cli.main(["align", "--ckpt", str(tmp_path), "--device", "cpu"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.fixture(scope="module")
def examined(tmp_path_factory):
    """Standard output and JSON of one `doctor --verbose` of everything."""
    path = tmp_path_factory.mktemp("doctor") / "made" / "doctor.json"
    with contextlib.redirect_stdout(io.StringIO()) as out:
        flags = ["--verbose", "--dtypes", "float32", "bfloat16", "float16", "--shapes", "base", "so400m"]
        assert cli.main(["doctor", "--device", "cpu", *flags, "--json", str(path)]) == 0
    return out.getvalue(), json.loads(path.read_text(), parse_constant=pytest.fail)


OPERATIONS = "attention norm linear mlp columns pool positions float8".split()


def test_doctor_names_every_operation_its_implementations_and_why_one_is_not_here(examined):
    out, report = examined
    assert [(model["dtype"], model["shape"]) for model in report["models"]] == [
        (dtype, shape) for dtype in ("float32", "bfloat16", "float16") for shape in ("base", "so400m")
    ]
    for model in report["models"]:
        found = model["operations"]
        assert list(dict.fromkeys(one["operation"].split(".")[0] for one in found)) == OPERATIONS
        assert [x["implementation"] for x in found if x["operation"] == "attention"] == list(backends.BACKENDS)
        for one in found:
            (line, *_) = [
                line
                for line in out.splitlines()
                if line.startswith(f"  {one['operation']} ") and f" {one['implementation']} " in line
            ]
            assert one["why_not"] is None or one["why_not"] in out, line
        absent = {one["implementation"] for one in found if one["why_not"] and "cannot be imported" in one["why_not"]}
        assert absent == {name for name in backends.BACKENDS if backends.why_missing(name)}
    assert importlib.metadata.version("torch") in out
    assert transformers.__version__ in out
    assert report["environment"]["device"].startswith("cpu")


def test_doctor_shows_errors_forward_and_backward(examined):
    out, report = examined
    for model in report["models"]:
        (sdpa,) = (one for one in model["operations"] if one["implementation"] == "sdpa")
        assert sdpa["right"] is True
        assert set(sdpa["errors"]) == {"inference", "forward", "dq", "dk", "dv"}
        assert all(0 < error <= sdpa["bounds"][name] for name, error in sdpa["errors"].items())
        assert f"dq {sdpa['errors']['dq']:.1e}" in out
        (eager,) = (x for x in model["operations"] if x["operation"] == "attention" and x["implementation"] == "eager")
        assert eager["right"] is None and eager["why_not"] is None


def test_doctor_shows_dq_at_a_shared_mean(examined):
    """Of all that run here: sdpa's flash kernel takes delta from its rounded output, the formula does not."""
    out, report = examined
    for model in report["models"]:
        found = {one["implementation"]: one for one in model["operations"] if one["operation"] == "attention"}
        error = {name: one["dq_at_shared_mean"] for name, one in found.items() if one["why_not"] is None}
        assert set(error) == {"eager", "sdpa"}
        assert all(one["dq_at_shared_mean"] is None for name, one in found.items() if name not in error)
        assert all(f"dQ at a shared mean {x:.1e}\n" in out for x in error.values())
        eps = torch.finfo(getattr(torch, model["dtype"])).eps
        assert eps / 10 < error["eager"] < 100 * eps
        assert model["dtype"] == "float32" or error["sdpa"] > 5 * error["eager"]
    assert out.count("where all keys and values share a mean of\n3 (from biases") == 1


def test_doctor_says_what_runs_for_packs(examined):
    out, report = examined
    for model in report["models"]:
        assert [pack["patches"] for pack in model["packs"]] == [256, 1024, 4096]
        assert [len(pack["images"]) for pack in model["packs"]] == [1, 4, 16]
        for pack in model["packs"]:
            assert pack["inference"]["attention"] == pack["training"]["attention"] == "sdpa"
            assert pack["inference"]["layer_norm"] == pack["training"]["layer_norm_backward_"] == "eager"
    assert "a pack of 4,096 patches, 16 images of up to 256" in out


def test_doctor_is_short_unless_asked(capsys):
    """One dtype, one size of a model; no implementation that was right, packs of one plan together."""
    assert cli.main(["doctor", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) < 40 and "so400m in float32\n" in out and "base in" not in out
    assert "checked: 1, none wrong; not for this machine: " in out and "cannot be imported" not in out
    packs = [line for line in out.splitlines() if line.startswith("  a pack of ")]
    assert len(packs) == 3 and "\n".join(packs) in out and out.count("sdpa") == 2


def test_doctor_shows_what_is_installed_and_cannot_be_imported(tmp_path, monkeypatch, forced, capsys):
    """A package built for another torch, a kernel for this card in another Triton; not what is not installed."""
    (tmp_path / "torn_package.py").write_text("raise OSError('undefined symbol: _ZN2at')\n")
    monkeypatch.syspath_prepend(tmp_path)
    torn, absent = (backends.Backend(outside.sdpa, name) for name in ("torn_package", "absent_package.cute"))
    monkeypatch.setattr(backends, "BACKENDS", {"torn": torn, "absent": absent, "flash_attention_3": torn})
    layer_norm = dataclasses.replace(norm.LAYER_NORM, modules=norm.LAYER_NORM.modules | {"triton": "torn_package"})
    monkeypatch.setattr(survey, "_functions", lambda shape: [(layer_norm, (shape.D, True))])
    forced(card=Card("cuda", 80, 2))  # FlashAttention 3 is for others
    found = list(survey.findings(torch.device("cpu"), torch.bfloat16, Shape(64, 128, 1, 4)))
    broken = [(one.operation, one.implementation) for one in found if one.broken]
    assert broken == [("attention", "torn"), ("norm.layer_norm", "triton")]
    doctor.print_findings(found, verbose=False)
    out = capsys.readouterr().out
    assert "none wrong; BROKEN: 2; not for this machine: 2 (" in out and "absent" not in out
    assert out.count("cannot be imported (OSError: undefined symbol: _ZN2at)") == 2


@pytest.mark.parametrize("verbose", [False, True])
def test_doctor_has_said_what_it_found_when_a_check_ends_it(capsys, verbose):
    wrong = check.Verdict({"out": 1.0}, {"out": 0.1})

    def coming():
        yield survey.Finding("norm.layer_norm", "triton", None, wrong)
        yield survey.Finding("norm.layer_norm", "eager", None)
        raise KeyboardInterrupt  # a check that hangs

    with pytest.raises(KeyboardInterrupt):
        doctor.print_findings(coming(), verbose)
    _, _, first, *others = capsys.readouterr().out.splitlines()
    assert first.split()[:3] == ["norm.layer_norm", "triton", "WRONG:"] and len(others) == verbose


def doctor_report(tmp_path, *flags, dtype="float32"):
    path = tmp_path / "doctor.json"
    assert cli.main(["doctor", "--device", "cpu", "--dtypes", dtype, "--json", str(path), *flags]) == 0
    return json.loads(path.read_text())["models"][0]


def test_doctor_takes_my_pack_and_my_backend(tmp_path, capsys):
    flags = ["--shapes", "base", "--patches", "700", "--image-patches", "300", "--attn-implementation"]
    (pack,) = doctor_report(tmp_path, *flags, "eager")["packs"]
    assert pack["images"] == [300, 300, 100] and pack["inference"]["attention"] == "eager"
    (pack,) = doctor_report(tmp_path, *flags, "flash_attention_2")["packs"]
    assert "'flash_attention_2' cannot be used: flash_attn" in pack["refused"]
    assert "'flash_attention_2' cannot be used: flash_attn" in capsys.readouterr().out
    assert cli.main(["doctor", "--device", "cpu", "--patches", "0"]) == 2


def test_doctor_says_what_runs_on_another_card(tmp_path, forced, monkeypatch):
    """A launch that cannot run here, because a CPU is no H100, is refused, and auto goes on to the next."""
    monkeypatch.setitem(doctor.SHAPES, "so400m", Shape(144, 208, 2, 4))  # which is interpreted in seconds
    forced(
        card=Card("cuda", 90, 2),
        **{name: ["eager"] for name in ("norm", "mlp", "columns", "pool", "positions", "float8")},
    )
    model = doctor_report(tmp_path, "--shapes", "so400m", "--patches", "1024", dtype="float16")
    launches = [one for one in model["operations"] if one["operation"] in ("attention.forward", "attention.backward")]
    kinds = {"hopper", "hopper_one_pass", "triton", "triton_short"}
    assert {one["implementation"].split(",")[0] for one in launches} == kinds
    for one in launches:
        hopper = one["implementation"].startswith("hopper")
        assert one["right"] is not hopper and bool(one["raised"]) is hopper, one
        measured = one["operation"] == "attention.backward" and not hopper
        assert one["dq_at_shared_mean"] < 2e-3 if measured else one["dq_at_shared_mean"] is None, one
    (pack,) = model["packs"]
    for plan in (pack["inference"], pack["training"]):
        assert plan["attention"] == "triton" and not any(ran.startswith("hopper") for ran in plan.values())


@pytest.mark.parametrize(
    ("fault", "wrong"), [("backward", {"dq"}), ("forward", {"inference", "forward", "dq", "dk", "dv"})]
)
def test_doctor_shows_a_backend_that_is_wrong(tmp_path, monkeypatch, forced, capsys, fault, wrong):
    forced()

    def attention(q, k, v, segments):
        return outside.sdpa(q, k, v, segments) + 0.1 * (q - q.detach()) if fault == "backward" else v

    monkeypatch.setitem(backends.BACKENDS, "wrong", backends.Backend(attention))
    (found,) = (x for x in doctor_report(tmp_path, "--shapes", "base")["operations"] if x["implementation"] == "wrong")
    assert found["right"] is False
    bad = {name for name, error in found["errors"].items() if error is None or error > found["bounds"][name]}
    assert bad == wrong  # None: there is no such gradient
    assert f"WRONG: inference {found['errors']['inference']:.1e}" in capsys.readouterr().out


def test_json_has_no_nan(tmp_path):
    doctor.write_json(str(tmp_path / "a.json"), {"x": [float("nan"), (float("inf"), 1.5)], "y": {"z": -float("inf")}})
    read = json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail)
    assert read == {"x": [None, [None, 1.5]], "y": {"z": None}}


@pytest.mark.parametrize("flags", [["--shape", "tiny72", "--seed", "3"], ["--shape=tiny", "--full"]])
def test_random_checkpoint(tmp_path, capsys, flags):
    folder = tmp_path / "made" / "checkpoint"
    assert cli.main(["random-checkpoint", str(folder), *flags]) == 0
    assert str(folder) in capsys.readouterr().out
    model = Siglip2PackedVisionModel.from_pretrained(folder)
    assert model.config.hidden_size == (144 if "tiny72" in flags else 64)
    has_text = "text_config" in json.loads((folder / "config.json").read_text())
    assert has_text is ("--full" in flags)


@pytest.mark.parametrize("name", ["config.json", "model-00001-of-00002.safetensors"])
def test_a_random_checkpoint_replaces_no_other(tmp_path, capsys, name):
    (tmp_path / name).write_text("{}")
    assert cli.main(["random-checkpoint", str(tmp_path), "--shape", "tiny"]) == 2
    assert "holds a checkpoint, which would be lost" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "{}"


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_random_checkpoint_is_read_by_whom_the_umask_lets(tmp_path, umask):
    before = os.umask(umask)
    try:
        assert cli.main(["random-checkpoint", str(tmp_path / "c"), "--shape", "tiny", "--full"]) == 0
        Siglip2PackedVisionModel.from_pretrained(tmp_path / "c").save_pretrained(tmp_path / "saved")
    finally:
        os.umask(before)
    files = [*(tmp_path / "c").iterdir(), *(tmp_path / "saved").iterdir()]
    assert {file: file.stat().st_mode & 0o777 for file in files} == dict.fromkeys(files, 0o666 & ~umask)


def test_huge_pages_are_asked_for():
    code = "import os; os.environ.pop('THP_MEM_ALLOC_ENABLE', None); import siglip2_packed.cli; "
    code += "print(os.environ['THP_MEM_ALLOC_ENABLE'])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "1\n"
    assert Path(cli.__file__).name == "cli.py"
