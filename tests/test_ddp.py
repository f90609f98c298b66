"""What is read of DistributedDataParallel is private to torch: without it a step goes on, and says nothing."""

import copy
import warnings
from types import SimpleNamespace

import pytest
from torch.autograd import Variable
from torch.nn.parallel import DistributedDataParallel

from siglip2_packed import Siglip2PackedVisionModel

GRIDS = [(1, 13, 19), (1, 2, 3)]


def active(monkeypatch, **fields):
    wrapper = SimpleNamespace(**fields)
    monkeypatch.setattr(DistributedDataParallel, "_get_active_ddp_module", lambda: wrapper)


def sees(monkeypatch, module):
    active(
        monkeypatch,
        find_unused_parameters=False,
        static_graph=False,
        require_backward_grad_sync=True,
        module=module,
        parameters_to_ignore=(),
    )


def without_its_fields(monkeypatch):
    active(monkeypatch)


def without_the_name(monkeypatch):
    monkeypatch.delattr(DistributedDataParallel, "_get_active_ddp_module")


def with_another_signature(monkeypatch):
    monkeypatch.setattr(DistributedDataParallel, "_get_active_ddp_module", lambda model: model)


def without_the_engine(monkeypatch):
    active(monkeypatch, find_unused_parameters=False, static_graph=False, require_backward_grad_sync=True)
    engine = SimpleNamespace(run_backward=Variable._execution_engine.run_backward)
    monkeypatch.setattr(Variable, "_execution_engine", engine)


def without_the_wrapped_module(monkeypatch):
    active(monkeypatch, find_unused_parameters=False, static_graph=False, require_backward_grad_sync=True)


@pytest.mark.parametrize(
    "change",
    [without_its_fields, without_the_name, with_another_signature, without_the_engine, without_the_wrapped_module],
)
@pytest.mark.filterwarnings("error")
def test_a_step_needs_no_private_name_of_torch(checkpoint, patches, monkeypatch, change):
    model = Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny"))
    model(patches(GRIDS), GRIDS).pooler_output.sum().backward()
    expected = model.head.probe.grad.clone()
    model.zero_grad()
    change(monkeypatch)
    model(patches(GRIDS), GRIDS).pooler_output.sum().backward()
    assert expected.isfinite().all() and (model.head.probe.grad == expected).all()


def test_a_copy_has_a_first_step_of_its_own(checkpoint, patches, monkeypatch):
    model = Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny"))

    def step(model):
        sees(monkeypatch, model)
        model.zero_grad()
        model(patches(GRIDS), GRIDS).last_hidden_state.sum().backward()

    for one in (model, copy.deepcopy(model)):
        with pytest.warns(UserWarning, match="head.probe"):
            step(one)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model)
    with pytest.warns(UserWarning, match="head.probe"):
        step(copy.deepcopy(model))
