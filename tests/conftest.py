"""What is made once a session, checkpoints and runs of `encode`; and the grids that expose faults."""

import contextlib
import importlib.util
import os

# Products in Triton's interpreter are numpy's. On some processors its BLAS changes the order of their sums with their
# shape, which batch_invariant's must not; this one has one order. Before numpy is imported.
os.environ.setdefault("OPENBLAS_CORETYPE", "Sandybridge")

from types import SimpleNamespace

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported
    if importlib.util.find_spec("triton"):
        import interpreter

        interpreter.hasten()

import encode_runs

from siglip2_packed import training_graph
from siglip2_packed.ops.runtime import check, choice
from siglip2_packed.random_checkpoint import save_random_checkpoint

# below the table on one side or both, above it, a side of 1, the table's own 4x4, and a single patch
AWKWARD_GRIDS = [(1, 13, 19), (1, 8, 32), (1, 2, 3), (1, 4, 4), (1, 7, 5), (1, 3, 4)]
SIDE_OF_ONE = [(1, 1, 256), (1, 7, 1), (1, 1, 1)]


def pytest_configure(config):
    pytest.register_assert_rewrite("llava_reference")
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """`checkpoint("tiny")` -> folder of a vision-only checkpoint; `checkpoint("tiny", full=True)` has a text tower."""
    made = {}

    def make(shape="tiny", full=False):
        if (shape, full) not in made:
            made[shape, full] = save_random_checkpoint(tmp_path_factory.mktemp(shape), shape, full=full)
        return made[shape, full]

    return make


@pytest.fixture
def forced(monkeypatch):
    """`forced(norm=["triton"], card=Card("cuda", 90, 132))`: what operations take, until the test ends.

    Nothing counts as checked before, and what is checked in the test is forgotten after it. See `choice.forced`.
    """
    monkeypatch.setattr(check, "_verdicts", {})
    with contextlib.ExitStack() as stack:
        yield lambda **what: stack.enter_context(choice.forced(**what))


@pytest.fixture
def trusted(monkeypatch, forced):
    """`forced`, without the checks, which take seconds where kernels are interpreted."""
    right = check.Verdict({"out": 0.0}, {"out": 0.0})
    monkeypatch.setattr(choice.Function, "verdict", lambda *args: right)
    return forced


@pytest.fixture
def poisoned(monkeypatch):
    """Fresh buffers hold NaN, so that what a kernel leaves unwritten shows."""

    def poison(owner, name):
        make = getattr(owner, name)

        def filled(*args, **kwargs):
            out = make(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        monkeypatch.setattr(owner, name, filled)

    poison(torch, "empty")
    poison(torch, "empty_like")
    poison(torch.Tensor, "new_empty")


@pytest.fixture
def patches():
    """`patches(grids, patch_dim)` -> `[T, P]` normal patches of a fixed seed."""

    def make(grids, patch_dim=48, seed=0):
        total = sum(t * h * w for t, h, w in grids)
        return torch.randn(total, patch_dim, generator=torch.Generator().manual_seed(seed))

    return make


@pytest.fixture
def tower(checkpoint):
    """A LLaVA tower, as its configuration's defaults have it."""
    from siglip2_packed import SigLip2NaflexVisionTower

    return SigLip2NaflexVisionTower(str(checkpoint("tiny")), SimpleNamespace())


@pytest.fixture(params=["recorded", pytest.param("cuda", marks=pytest.mark.gpu)])
def world(request, checkpoint, monkeypatch):
    """Models and packs for CUDA graphs, each test on a GPU and, with recorded graphs, on the CPU. See `graphed`."""
    from graphed import World

    monkeypatch.setattr(training_graph, "LAYERS_OF_A_PART", 2)  # several parts
    if request.param == "cuda":
        return World(checkpoint, "cuda", torch.bfloat16, "tiny72")
    if torch.cuda.is_available():
        pytest.skip("the CUDA device has graphs")
    import recorded_graphs

    request.getfixturevalue("trusted")(positions=["triton"], pool=["triton"])
    recorded_graphs.install(monkeypatch)
    return World(checkpoint, "cpu", torch.float32, "tiny")


@pytest.fixture
def said(caplog):
    """`said()` -> the reasons so far why packs ran without CUDA graphs."""
    caplog.set_level("WARNING", "siglip2_packed")
    prefix = "without CUDA graphs: "
    return lambda: [m.removeprefix(prefix) for m in caplog.messages if m.startswith(prefix)]


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder of the images `encode_runs.GOOD`, and what is none, `encode_runs.BAD`."""
    return encode_runs.make_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="session")
def expected(checkpoint, photos):
    """(tokens, pooled, grid) of each good image of `photos` from the model called on it alone."""
    return encode_runs.alone(checkpoint(), photos)


@pytest.fixture(scope="session")
def finished(checkpoint, photos, tmp_path_factory):
    """The folder of a whole run over `photos`. Who goes on with it leaves it as it was."""
    out = tmp_path_factory.mktemp("finished") / "out"
    assert encode_runs.run(checkpoint, photos, out, *encode_runs.SETTINGS) == 0
    return out


@pytest.fixture(scope="session")
def ranks():
    """`ranks(function, *args)` -> what a module-level function returns on each of two ranks."""
    from ranks import Ranks

    ranks = Ranks()
    yield ranks
    ranks.stop()
