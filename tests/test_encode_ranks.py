"""`siglip2-packed encode` under torchrun: ranks write what one process writes, and go on with what any number began."""

import os
import signal
import socket
import sys
import time

import pytest
import torch
from encode_runs import GOOD, SETTINGS, check, run, start

from siglip2_packed.cli import main
from siglip2_packed.collection.lock import Lock, lock_of
from siglip2_packed.collection.run import read_run
from siglip2_packed.encode import shard_size


def command(argv, environment, output):
    os.environ.update(environment)
    torch.set_num_threads(1)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.exit(main(argv))


def ranks(argv, world, folder, *of_the_last):
    """What torchrun starts: the command, and the environment that tells it its rank; more flags for the last one."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    environments = [{"RANK": str(rank), "LOCAL_RANK": str(rank), **common} for rank in range(world)]
    argvs = [argv] * (world - 1) + [[*argv, *of_the_last]]
    return [start(command, *some, f"{folder}/rank{rank}.log") for rank, some in enumerate(zip(argvs, environments))]


def test_torchrun(checkpoint, photos, expected, tmp_path, finished):
    """Two ranks write what one process writes, and one goes on with what they began."""
    argv = ["encode", str(photos), "--ckpt", str(checkpoint()), "--device", "cpu", *SETTINGS, "--out", str(tmp_path)]
    processes = ranks(argv, 2, tmp_path)
    for process in processes:
        process.join(120)
    said = [(tmp_path / f"rank{rank}.log").read_text() for rank in range(2)]
    assert [process.exitcode for process in processes] == [0, 0], said  # images could not be read, on whichever rank
    assert "4 of 15 images could not be read" in said[0]
    assert ["11 images" in text for text in said] == [True, False]
    check(tmp_path, expected, GOOD)
    for name in ("index.csv", "errors.csv"):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()
    (tmp_path / ".parts" / "00002.csv").unlink()
    assert run(checkpoint, photos, tmp_path, *SETTINGS, "--resume") == 0
    check(tmp_path, expected, GOOD)


@pytest.mark.parametrize("world", [1, 2, 8, 64, 1024])
@pytest.mark.parametrize("inputs", [1, 15, 20_000, 1_000_000])
def test_all_ranks_are_busy(world, inputs):
    """The busiest rank has less than a shard more than the mean; of many inputs less than half a percent."""
    size = shard_size(True, inputs, world)
    sizes = [min(size, inputs - first) for first in range(0, inputs, size)]
    busiest = max(sum(sizes[rank::world]) for rank in range(world))
    assert 1 <= size <= 1024 and busiest < inputs / world + size
    if inputs == 1_000_000:
        assert busiest < 1.005 * inputs / world


def test_a_run_goes_on_with_its_own_shards(checkpoint, photos, tmp_path):
    """Begun by two ranks, whose shards are smaller; resumed by one without a word about them."""
    argv = ["encode", str(photos), "--ckpt", str(checkpoint()), "--device", "cpu", "--out", str(tmp_path)]
    for process in (processes := ranks(argv, 2, tmp_path)):
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    assert read_run(tmp_path)["shard_size"] == 2
    index = (tmp_path / "index.csv").read_bytes()
    (tmp_path / ".parts" / "00002.csv").unlink()
    assert main([*argv, "--resume"]) == 0
    assert (tmp_path / "index.csv").read_bytes() == index


def test_ranks_over_a_folder_that_is_written_to(checkpoint, photos, tmp_path):
    lock = Lock(lock_of(tmp_path / "out", False))
    lock.take()
    argv = ["encode", str(photos), "--ckpt", str(checkpoint()), "--device", "cpu", "--out", str(tmp_path / "out")]
    processes = ranks(argv, 2, tmp_path)
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [2, 2]
    assert all(f"process {os.getpid()} on" in (tmp_path / f"rank{rank}.log").read_text() for rank in range(2))
    lock.release()
    assert not (tmp_path / "out").exists()


def test_ranks_that_disagree(checkpoint, photos, tmp_path):
    argv = ["encode", str(photos), "--ckpt", str(checkpoint()), "--device", "cpu", "--out", str(tmp_path / "out")]
    processes = ranks(argv, 2, tmp_path, "--shard-size", "3")
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [2, 2]
    assert "error: rank 1 has shard_size 3, rank 0 2" in (tmp_path / "rank0.log").read_text()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("world", [1, 2])
def test_sigkill_from_outside(checkpoint, photos, expected, tmp_path, world):
    """All ranks killed as soon as one has finished a shard; another number of them goes on."""
    argv = ["encode", str(photos), "--ckpt", str(checkpoint()), "--out", str(tmp_path / "out"), "--device", "cpu"]
    processes = ranks([*argv, *SETTINGS, "--decode-in", "processes"], world, tmp_path)
    end = time.monotonic() + 120
    while all(process.is_alive() for process in processes) and time.monotonic() < end:
        if list((tmp_path / "out" / ".parts").glob("*.csv")):
            break
        time.sleep(0.001)
    for process in processes:
        process.kill()
    for process in processes:
        process.join(60)
        assert process.exitcode in (-signal.SIGKILL, 0)
    assert run(checkpoint, photos, tmp_path / "out", *SETTINGS, "--resume") == 0
    check(tmp_path / "out", expected, GOOD)


def test_a_rank_that_ends_is_a_line_on_the_others(checkpoint, photos, tmp_path):
    """The last one at a broken image; nobody waits for it, and its lock is gone with the first."""
    images = [str(photos / name) for name in [*GOOD[:4], "05-text.jpg"]]
    argv = [
        "encode",
        *images,
        "--ckpt",
        str(checkpoint()),
        "--device",
        "cpu",
        *SETTINGS,
        "--out",
        str(tmp_path / "out"),
    ]
    processes = ranks(argv, 2, tmp_path, "--strict")
    for process in processes:
        process.join(120)
    said = [(tmp_path / f"rank{rank}.log").read_text() for rank in range(2)]
    assert [process.exitcode for process in processes] == [2, 1], said
    assert "error: another process of this run has ended" in said[0] and "Traceback" not in said[0]
    assert not (tmp_path / "out" / ".run.lock").exists()
    assert (tmp_path / "out" / ".parts" / "00000.csv").exists()
