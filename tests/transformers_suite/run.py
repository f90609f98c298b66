"""Runs transformers' own tests of a model (`ModelTesterMixin`) on `Siglip2PackedVisionModel`.

    python tests/transformers_suite/run.py [pytest's arguments]

The tests are those of the installed transformers, from its source distribution, which pip fetches into a folder of the
user's cache; nothing of it is kept here. What fails or is skipped has its reason in `reasons.csv`; else the exit status
is 1. Needs the package index, so it is no part of what CI runs. A minute on a CPU.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import transformers

HERE = Path(__file__).parent
REASONS = HERE / "reasons.csv"
NOT_IN_IT = {"exporters/test_export.py": "ExportTesterMixin", "generation/test_utils.py": "GenerationTesterMixin"}
"""What the tests import, and their source distribution leaves out; no test of a vision encoder is among it."""

KINDS = {"failure": "failed", "error": "failed", "skipped": "skipped"}


def main() -> int:
    folder = fetch(transformers.__version__)
    with tempfile.TemporaryDirectory() as reports:
        report = Path(reports) / "report.xml"
        paths = [HERE.parents[1], folder, folder / "packages", os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
        options = ["-q", "-p", "no:cacheprovider", "-o", "addopts=", "--timeout=300", f"--junitxml={report}"]
        command = [sys.executable, "-m", "pytest", *options, str(HERE / "suite.py"), *sys.argv[1:]]
        subprocess.run(command, env=environment, check=False)
        found = dict(outcomes(report))
    return compare(found)


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


def outcomes(report: Path) -> Iterator[tuple[str, tuple[str, str]]]:
    """(test, (outcome, what pytest says of it)); a test with subtests failed if one of them did."""
    failed = set()
    for case in ElementTree.parse(report).iter("testcase"):
        name = case.get("name", "")
        said = {element.tag: element.get("message", "") for element in case}
        kind = next((kind for kind in ("failure", "error", "skipped") if kind in said), None)
        if name not in failed:
            yield name, ("passed" if kind is None else KINDS[kind], said.get(kind or "", ""))
        failed |= {name} if kind in ("failure", "error") else set()


def compare(found: dict[str, tuple[str, str]]) -> int:
    """Prints what the table does not say. Its rows are by a test's name, or by how it begins, up to a `*`."""
    with REASONS.open(newline="", encoding="utf-8") as file:
        rows = [(row["test"], row["outcome"]) for row in csv.DictReader(file)]
    unexplained = 0
    for test, (outcome, message) in sorted(found.items()):
        expected = next((outcome for pattern, outcome in rows if fits(test, pattern)), "passed")
        if outcome != expected:
            print(f"{test}: {outcome}, not {expected}: {message[:200].splitlines()[:1]}")
            unexplained += outcome != "passed"
    counts = {kind: sum(outcome == kind for outcome, _ in found.values()) for kind in ("passed", "failed", "skipped")}
    print(f"transformers {transformers.__version__}: {counts}, {unexplained} without a reason")
    return int(unexplained > 0 or not found)


def fits(test: str, pattern: str) -> bool:
    return test.startswith(pattern[:-1]) if pattern.endswith("*") else test == pattern


if __name__ == "__main__":
    sys.exit(main())
