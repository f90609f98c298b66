"""Runs transformers' own tests of a model (`ModelTesterMixin`) on `Siglip2PackedVisionModel`.

    python tests/transformers_suite/run.py [pytest's arguments]

The tests are those of the installed transformers, from its source distribution, which pip fetches into a folder of the
user's cache; nothing of it is kept here. What fails or is skipped has to be in `reasons.csv`, with its reason, and what
is in there has to fail or be skipped; else the exit status is 1. Needs the package index, and takes minutes: no part of
the suite that CI runs.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from xml.etree import ElementTree

import transformers

HERE = Path(__file__).parent
REASONS = HERE / "reasons.csv"
NOT_IN_IT = {"exporters/test_export.py": "ExportTesterMixin", "generation/test_utils.py": "GenerationTesterMixin"}
"""What the tests import, and their source distribution leaves out; no test of a vision encoder is among it."""


def main() -> int:
    folder = fetch(transformers.__version__)
    with tempfile.TemporaryDirectory() as reports:
        report = Path(reports) / "report.xml"
        paths = [HERE.parents[1], folder, folder / "packages", os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "CUDA_VISIBLE_DEVICES": ""}
        options = ["-q", "-p", "no:cacheprovider", "-o", "addopts=", "--timeout=300", f"--junitxml={report}"]
        command = [sys.executable, "-m", "pytest", *options, str(HERE / "suite.py"), *sys.argv[1:]]
        subprocess.run(command, env=environment, check=False)
        found = dict(outcomes(report))
    return compare(found, whole=len(sys.argv) == 1)


def fetch(version: str) -> Path:
    """The folder that holds that version's tests as the package `transformers_tests`; fetched once."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder = cache / "siglip2_packed" / f"transformers-{version}"
    if (folder / "packages").is_dir():
        return folder
    with tempfile.TemporaryDirectory() as download:
        pip("download", f"transformers=={version}", "--no-deps", "--no-binary", ":all:", "--dest", download)
        (archive,) = Path(download).glob("transformers-*")
        with tarfile.open(archive) as tar:
            for member in tar:
                _, _, name = member.name.partition("/")
                if member.isfile() and name.startswith("tests/") and name.endswith(".py"):
                    write(folder / "transformers_tests" / name.removeprefix("tests/"), tar.extractfile(member).read())
    for name, mixin in NOT_IN_IT.items():
        write(folder / "transformers_tests" / name, f"class {mixin}:\n    pass\n".encode())
    pip("install", "parameterized", "--quiet", "--target", str(folder / "packages"))
    return folder


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", *arguments], check=True)


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def outcomes(report: Path):
    """(test, (outcome, what pytest says))."""
    for case in ElementTree.parse(report).iter("testcase"):
        for kind in ("failure", "error", "skipped"):
            for element in case.iter(kind):
                yield case.get("name"), ("skipped" if kind == "skipped" else "failed", element.get("message", ""))
                break
            else:
                continue
            break
        else:
            yield case.get("name"), ("passed", "")


def compare(found: dict[str, tuple[str, str]], whole: bool) -> int:
    """Prints what the table does not say; its rows are by test, or by a test's name up to a `*`."""
    with REASONS.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    wrong, used = [], set()
    for test, (outcome, message) in sorted(found.items()):
        row = next((i for i, row in enumerate(rows) if fits(test, row["test"])), None)
        expected = "passed" if row is None else rows[row]["outcome"]
        used.add(row)
        if outcome != expected:
            wrong.append(f"{test}: {outcome}, not {expected}: {message.splitlines()[0] if message else ''}")
    if whole:
        wrong += [
            f"{row['test']}: in the table, but there is no such test" for i, row in enumerate(rows) if i not in used
        ]
    counts = {outcome: sum(x == outcome for x, _ in found.values()) for outcome in ("passed", "failed", "skipped")}
    print(*wrong, f"transformers {transformers.__version__}: {counts}", sep="\n")
    return int(bool(wrong) or not found)


def fits(test: str, pattern: str) -> bool:
    return test.startswith(pattern[:-1]) if pattern.endswith("*") else test == pattern


if __name__ == "__main__":
    sys.exit(main())
