"""The command line: what every command has in common, `doctor` and `random-checkpoint`."""

import contextlib
import importlib
import importlib.metadata
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from siglip2_packed import Siglip2PackedVisionModel, __version__, cli, doctor
from siglip2_packed.ops import attention, dispatch

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


def test_help_imports_nothing_heavy():
    """The file alone, outside its package: what it costs beyond the package's own imports."""
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('cli', {cli.__file__!r})\n"
        "cli = importlib.util.module_from_spec(spec); spec.loader.exec_module(cli)\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


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
    """Standard output and JSON of one `doctor` run."""
    path = tmp_path_factory.mktemp("doctor") / "made" / "doctor.json"
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert cli.main(["doctor", "--device", "cpu", "--json", str(path)]) == 0
    return out.getvalue(), json.loads(path.read_text(), parse_constant=pytest.fail)


def test_doctor_names_every_backend_and_why(examined):
    out, report = examined
    assert list(report["backends"]) == list(attention.BACKENDS)
    for backend, found in report["backends"].items():
        assert any(line.startswith(f"{backend} ") for line in out.splitlines())
        assert found["missing"] == attention.why_missing(backend)
        assert found["missing"] is None or found["missing"] in out
        for check in found["checks"]:
            assert check["reason"] is None or f"not checked: {check['reason']}" in out
    assert importlib.metadata.version("torch") in out
    assert transformers.__version__ in out
    assert report["environment"]["device"].startswith("cpu")


def test_doctor_shows_errors_of_every_dtype_and_head_dim(examined):
    out, report = examined
    for backend in ("eager", "sdpa"):
        checks = report["backends"][backend]["checks"]
        assert {(check["dtype"], check["head_dim"]) for check in checks} == {
            (dtype, head_dim) for dtype in ("float32", "bfloat16", "float16") for head_dim in (64, 72)
        }
        for check in checks:
            assert check["forward_ok"]
            assert check["backward_ok"]
            assert 0 < check["forward"] <= check["bound"]
            assert 0 < check["dq"] <= check["bound"]
    assert f"dq {report['backends']['sdpa']['checks'][1]['dq']:.1e}" in out


def test_doctor_says_what_auto_takes(examined):
    out, report = examined
    assert len(report["auto"]) == 6
    for taken in report["auto"]:
        dtype = doctor.DTYPES[taken["dtype"]]
        for key, needs_grad in (("forward", False), ("training", True)):
            backend = dispatch.resolve_backend("auto", torch.device("cpu"), dtype, taken["head_dim"], needs_grad)
            assert taken[key] == [[None, backend]]
    assert f"float32   head_dim 72   {report['auto'][1]['forward'][0][1]}" in out


def test_doctor_says_where_auto_changes_its_mind(monkeypatch):
    names = ["a", "a", "b", "b", "b", "c", "c"]
    monkeypatch.setattr(doctor, "resolve_backend", lambda *args: names[args[-1]])
    taken = doctor.auto_takes(torch.device("cpu"), torch.float32, 64, False)
    assert taken == [(192, "a"), (1536, "b"), (None, "c")]
    assert doctor._listed(taken) == "a up to 192 patches, b up to 1536 patches, c"


def test_doctor_shows_a_backend_that_is_wrong(monkeypatch):
    def wrong_backward(q, k, v, segments):
        return attention.sdpa(q, k, v, segments) + 0.1 * (q - q.detach())

    def wrong(q, k, v, segments):
        return v

    def examine(name, *backend):
        monkeypatch.setitem(attention.BACKENDS, name, attention.Backend(*backend))
        return doctor.examine(name, torch.device("cpu"))

    monkeypatch.setattr(doctor, "DTYPES", {"float32": torch.float32})
    assert "No module named 'no_such_module'" in examine("absent", wrong, "no_such_module", "attend")["missing"]
    texts = [check["text"] for check in examine("wrong_backward", wrong_backward)["checks"]]
    assert [text.split(":")[0] for text in texts] == ["right forward only"] * 2
    assert [check["text"].split(":")[0] for check in examine("wrong", wrong)["checks"]] == ["WRONG"] * 2


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


def test_huge_pages_are_asked_for():
    code = "import os; os.environ.pop('THP_MEM_ALLOC_ENABLE', None); import siglip2_packed.cli; "
    code += "print(os.environ['THP_MEM_ALLOC_ENABLE'])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "1\n"
    assert Path(cli.__file__).name == "cli.py"
