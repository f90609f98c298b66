"""What is there before torch is: the package's names, and an end that is a line whenever it comes."""

import importlib
import os
import pickle
import signal
import subprocess
import sys

import pytest
import torch

import siglip2_packed
from siglip2_packed import cli

ENDS = {signal.SIGINT: (130, "interrupted"), signal.SIGTERM: (143, "terminated")}


def python(code, **kwargs):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **kwargs)


def test_no_name_is_loaded_before_it_is_asked_for():
    code = (
        "import sys, siglip2_packed as s\n"
        "assert set(s.__all__) <= set(dir(s)) and s.__version__\n"
        "assert not hasattr(s, 'Siglip2PackedVisonModel') and not hasattr(s, '__wrapped__')\n"
        "assert not {'torch', 'transformers', 'numpy'} & sys.modules.keys()\n"
    )
    result = python(code)
    assert result.returncode == 0, result.stderr


def test_star_and_modules():
    scope = {}
    exec("from siglip2_packed import *", scope)
    assert set(siglip2_packed.__all__) <= scope.keys()
    assert scope["unpack"] is siglip2_packed.__dict__["unpack"] is siglip2_packed.packing.unpack
    assert siglip2_packed.__getattr__("data").PatchBudgetBatchSampler


def test_names_are_those_of_their_modules():
    homes = {name: module for module, names in siglip2_packed._HOME.items() for name in names}
    assert {*homes, "__version__"} == set(siglip2_packed.__all__)
    for name, module in homes.items():
        assert getattr(siglip2_packed, name) is getattr(importlib.import_module(f"siglip2_packed.{module}"), name)


def test_what_there_is_not_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'siglip2_packed' has no attribute 'Siglip2PackedVisonModel'"):
        siglip2_packed.Siglip2PackedVisonModel  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'pack_images'"):
        exec("from siglip2_packed import pack_images")


def test_pickles():
    packed = pickle.loads(pickle.dumps(siglip2_packed.PackedPatches(torch.zeros(6, 48), [(1, 2, 3)])))
    assert isinstance(packed, siglip2_packed.PackedPatches)
    assert (
        pickle.loads(pickle.dumps(siglip2_packed.Siglip2PackedVisionModel)) is siglip2_packed.Siglip2PackedVisionModel
    )


def stopped(tmp_path, number, where, *command):
    """A command stopped when it imports `where`, which gives itself the signal: (exit code, stderr)."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "class Stop:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == {where!r}:\n"
        "            sys.meta_path.remove(self)\n"
        f"            os.kill(os.getpid(), {int(number)})\n"
        "sys.meta_path.insert(0, Stop())\n"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    argv = [sys.executable, "-m", "siglip2_packed", *command]
    result = subprocess.run(argv, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    return result.returncode, result.stderr


@pytest.mark.parametrize("number", list(ENDS))
@pytest.mark.parametrize(
    ("where", "command"),
    [("siglip2_packed.flags", ["doctor"]), ("torch", ["doctor"]), ("torch", ["encode", "x", "--ckpt=y", "--out=z"])],
)
def test_a_signal_while_it_starts_is_a_line(tmp_path, number, where, command):
    code, err = stopped(tmp_path, number, where, *command)
    expected, word = ENDS[number]
    assert (code, err) == (expected, f"\nsiglip2-packed {command[0]}: {word}\n")


def test_a_signal_while_it_works_is_a_line(tmp_path):
    argv = [sys.executable, "-u", "-m", "siglip2_packed", "doctor", "--device", "cpu"]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert (
        process.returncode == 130 and err.endswith("\nsiglip2-packed doctor: interrupted\n") and "Traceback" not in err
    )


def test_encode_puts_away_what_it_has_begun(monkeypatch, capsys):
    """It gets the first signal as an exception, and the second ends it at once."""
    signals = cli.Signals()
    try:
        ended = []
        monkeypatch.setattr(cli, "stop", lambda *what: ended.append(what))
        for number, kind in ((signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, cli.Terminated)):
            signals.orderly = True
            with pytest.raises(kind):
                signal.raise_signal(number)
            assert not ended
        signal.raise_signal(signal.SIGINT)
        assert [code for _, code in ended] == [130]
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    monkeypatch.setattr(cli, "command", lambda *_: (_ for _ in ()).throw(cli.Terminated))
    assert cli.main(["encode"]) == 143
    assert capsys.readouterr().err == "\nsiglip2-packed encode: terminated\n"


FINALIZED = """
import gc, os, signal, sys, time
from siglip2_packed import cli
class Cycle:
    def __init__(self):
        self.me = self
    def __del__(self):
        signal.raise_signal(int(sys.argv[1]))
def work(*_):
    signals.orderly = True
    Cycle()
    gc.collect()
    time.sleep(60)
cli.Signals.done = lambda self: None
signals = cli.Signals()
cli.Signals = lambda: signals
cli.command = work
sys.exit(cli.main())
"""


@pytest.mark.parametrize("number", ENDS)
def test_a_signal_while_a_finalizer_runs_is_not_lost(number):
    code, words = ENDS[number]
    process = subprocess.run([sys.executable, "-c", FINALIZED, str(int(number))], capture_output=True, text=True)
    assert (process.returncode, process.stderr.split(": ")[-1]) == (code, f"{words}\n")
    assert "Traceback" not in process.stderr


@pytest.mark.parametrize("buffered", [True, False])
def test_output_whose_reader_has_left_ends_it_quietly(buffered):
    argv = [sys.executable, *([] if buffered else ["-u"]), "-m", "siglip2_packed", "--version"]
    read, write = os.pipe()
    os.close(read)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    result = subprocess.run(argv, stdout=write, stderr=subprocess.PIPE, text=True, env=env)
    os.close(write)
    assert (result.returncode, result.stderr) == (141, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_output_that_cannot_be_written_is_a_line():
    with open("/dev/full", "w") as full:
        argv = [sys.executable, "-m", "siglip2_packed", "--version"]
        result = subprocess.run(argv, stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1 and "No space left" in result.stderr
