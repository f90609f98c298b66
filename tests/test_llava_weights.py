"""The weights of the LLaVA tower stay what its owner made them; requires_grad, mode and names are theirs."""

import copy

import pytest
import torch
from llava_reference import SAME, args
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from siglip2_packed import SigLip2NaflexVisionTower

INNER = "vision_tower.vision_tower."


# weights that stay (V1)


def weights_of(tower):
    return {name: p.detach().clone() for name, p in tower.vision_tower.named_parameters()}


def assert_weights(tower, expected):
    """Also after `load_model()`, which LLaVA calls at every turn."""
    for _ in range(2):
        assert tower.is_loaded
        found = weights_of(tower)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
        inner = tower.vision_tower
        tower.load_model(device_map="cpu")
        assert tower.vision_tower is inner


def tuned(tower):
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter += 0.1
    return tower


class VlmConfig(PretrainedConfig):
    model_type = "llava_of_this_test"

    def __init__(self, mm_vision_tower=None, delay_load=False, **kwargs):
        self.mm_vision_tower, self.delay_load = mm_vision_tower, delay_load
        super().__init__(**kwargs)


class Vlm(PreTrainedModel):
    """The parts of a LLaVA model that matter here."""

    config_class = VlmConfig
    supports_gradient_checkpointing = True

    def __init__(self, config):
        super().__init__(config)
        if config.mm_vision_tower is not None:
            self.vision_tower = SigLip2NaflexVisionTower(config.mm_vision_tower, config, delay_load=config.delay_load)
        self.mm_projector = nn.Linear(64, 8)
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight)


@pytest.fixture
def vlm(checkpoint):
    return Vlm(VlmConfig(str(checkpoint("tiny"))))


@pytest.fixture
def saved(vlm, tmp_path):
    """A saved VLM with a tuned tower, whose configuration still names the base: (folder, its tower's weights)."""
    tuned(vlm.vision_tower)
    vlm.save_pretrained(tmp_path / "vlm")
    return tmp_path / "vlm", weights_of(vlm.vision_tower)


def test_a_delayed_tower_has_its_configuration_and_no_weights(checkpoint, tower, patches):
    delayed = SigLip2NaflexVisionTower(checkpoint("tiny"), args(mm_tunable_parts=None), delay_load=True)
    assert not delayed.is_loaded and not list(delayed.parameters())
    assert (delayed.hidden_size, delayed.config.hidden_size, delayed.image_processor.patch_size) == (64, 64, 4)
    for use in (lambda: delayed(patches(SAME), SAME), lambda: delayed.device, lambda: delayed.dummy_feature):
        with pytest.raises(RuntimeError, match="load_model"):
            use()
    delayed.load_model()
    assert_weights(delayed, weights_of(tower))
    assert_weights(tuned(delayed), {name: p + 0.1 for name, p in weights_of(tower).items()})
    for fields in ({"unfreeze_mm_vision_tower": True}, {"mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter"}):
        assert SigLip2NaflexVisionTower(checkpoint("tiny"), args(**fields), delay_load=True).is_loaded


@pytest.mark.parametrize("delay_load", [True, False])
@pytest.mark.parametrize("written_by", ["ours", "the original", "another select layer", "part"])
def test_a_state_dict_decides(checkpoint, delay_load, written_by):
    layer = -1 if written_by == "another select layer" else -2
    source = SigLip2NaflexVisionTower(checkpoint("tiny"), args(mm_vision_select_layer=layer))
    expected = weights_of(source)
    expected |= {name: p for name, p in weights_of(tuned(source)).items() if written_by != "part" or "mlp" in name}
    state = {f"vision_tower.{name}": tensor for name, tensor in expected.items()}
    if written_by == "part":
        state = {name: tensor for name, tensor in state.items() if "mlp" in name}
    if written_by == "the original":  # which has all layers
        state = {key.replace("vision_tower.", "vision_tower.vision_model."): tensor for key, tensor in state.items()}
        for name in ("encoder.layers.2.mlp.fc1.bias", "post_layernorm.weight", "head.probe"):
            state[f"vision_tower.vision_model.{name}"] = torch.zeros(1)
    tower = SigLip2NaflexVisionTower(checkpoint("tiny"), args(), delay_load=delay_load)
    holder = nn.ModuleDict({"vision_tower": tower})
    holder.load_state_dict({f"vision_tower.{key}": x for key, x in state.items()}, strict=written_by != "part")
    assert_weights(tower, {name: p for name, p in expected.items() if not name.startswith("encoder.layers.2.")})


def test_a_state_dict_of_other_things(checkpoint, tower):
    delayed = SigLip2NaflexVisionTower(checkpoint("tiny"), args(), delay_load=True)
    nn.ModuleDict({"tower": delayed, "projector": nn.Linear(1, 1, bias=False)}).load_state_dict(
        {"projector.weight": torch.ones(1, 1)}
    )
    assert not delayed.is_loaded
    with pytest.raises(RuntimeError, match="lora_A"):
        tower.load_state_dict({**tower.state_dict(), "vision_tower.encoder.lora_A.weight": torch.ones(1)})


@pytest.mark.parametrize("delay_load", [True, False])
def test_from_pretrained_of_a_vlm_gives_the_vlms_tower(saved, delay_load):
    folder, expected = saved
    assert_weights(Vlm.from_pretrained(folder, delay_load=delay_load).vision_tower, expected)
    tower = Vlm.from_pretrained(folder, delay_load=delay_load, dtype=torch.bfloat16).vision_tower
    assert_weights(tower, {name: p.bfloat16() for name, p in expected.items()})


@pytest.mark.parametrize("delay_load", [True, False])
def test_from_pretrained_of_a_vlm_without_tower_weights_gives_the_base(tower, tmp_path, delay_load, caplog):
    """Newer transformers leave uninitialised memory in modules they have no weights for."""
    Vlm(VlmConfig()).save_pretrained(tmp_path)
    vlm = Vlm.from_pretrained(tmp_path, mm_vision_tower=tower.vision_tower_name, delay_load=delay_load)
    assert_weights(vlm.vision_tower, weights_of(tower))
    assert "35 of 35 weights" in caplog.text


def test_from_pretrained_of_a_vlm_with_half_a_tower_or_the_originals_names(tower, saved, caplog):
    folder, expected = saved
    state = load_file(folder / "model.safetensors")
    name = "encoder.layers.0.mlp.fc1.bias"
    half = {key: tensor for key, tensor in state.items() if key != INNER + name}
    save_file(half, folder / "model.safetensors", metadata={"format": "pt"})
    assert_weights(Vlm.from_pretrained(folder).vision_tower, {**expected, name: weights_of(tower)[name]})
    original = {key.replace(INNER, INNER + "vision_model."): tensor for key, tensor in state.items()}
    save_file(original, folder / "model.safetensors", metadata={"format": "pt"})
    mapping = {f"{INNER}vision_model.": INNER}
    assert_weights(Vlm.from_pretrained(folder, key_mapping=mapping).vision_tower, expected)
    caplog.clear()
    Vlm.from_pretrained(folder)
    assert "key_mapping" in caplog.text


def test_offloaded_weights_are_loaded_weights(vlm, patches):
    """accelerate keeps them elsewhere and the parameters on the meta device."""
    accelerate = pytest.importorskip("accelerate")
    inner = tuned(vlm.vision_tower).vision_tower
    expected = vlm.vision_tower(patches(SAME), SAME)
    units = inner._no_split_modules
    accelerate.cpu_offload(vlm, execution_device=torch.device("cpu"), preload_module_classes=units)
    assert next(inner.parameters()).is_meta
    vlm.vision_tower.load_model()
    assert vlm.vision_tower.vision_tower is inner
    assert torch.equal(vlm.vision_tower(patches(SAME), SAME), expected)


def test_the_tower_copies_and_pickles(checkpoint, tower, patches, tmp_path):
    x = patches(SAME)
    torch.save(tower, tmp_path / "tower.pt")
    delayed = copy.deepcopy(SigLip2NaflexVisionTower(checkpoint("tiny"), args(), delay_load=True))
    delayed.load_state_dict(tower.state_dict())
    for other in (copy.deepcopy(tower), torch.load(tmp_path / "tower.pt", weights_only=False), delayed):
        assert torch.equal(other(x, SAME), tower(x, SAME))


def test_a_tower_built_on_the_meta_device_says_that_it_has_no_weights(checkpoint, tower, patches):
    x = patches(SAME)
    with torch.device("meta"):
        built = SigLip2NaflexVisionTower(checkpoint("tiny"), args(), delay_load=True)
    built.load_model()
    with pytest.raises(RuntimeError, match="meta device and no weights came"):
        built(x, SAME)
    built.load_state_dict(tower.state_dict(), assign=True)
    assert torch.equal(built(x, SAME), tower(x, SAME))


# whose choices: requires_grad, mode, names (V2, V3, T4, T9)


@pytest.mark.parametrize("delay_load", [False, True])
def test_requires_grad_and_mode_are_the_users(checkpoint, patches, delay_load):
    tower = SigLip2NaflexVisionTower(checkpoint("tiny"), args(), delay_load=delay_load)
    assert delay_load or (tower.training and tower.vision_tower.training)  # as any new module
    tower.requires_grad_(False)
    nn.ModuleList([tower]).eval()
    tower.load_model()
    assert not tower.vision_tower.training
    for mode in (False, True):
        tower.train(mode)
        tower.load_model()
        tower(patches(SAME), SAME)
        _ = tower.dtype, tower.dummy_feature, tower.num_patches, tower.config
        assert tower.vision_tower.training is mode
        assert not any(p.requires_grad for p in tower.parameters())
    tower.requires_grad_(True)
    tower.vision_tower.embeddings.requires_grad_(False)
    tower.load_model()
    assert [p.requires_grad for p in tower.vision_tower.embeddings.parameters()] == [False] * 3
    assert all(p.requires_grad for p in tower.vision_tower.encoder.parameters())


def test_the_tower_learns_at_its_own_rate(vlm, patches):
    """T9: groups by the keywords of LLaVA's trainer. AdamW's first step is the rate itself."""
    vlm.double()
    names = [name for name, _ in vlm.named_parameters()]
    assert f"{INNER}encoder.layers.0.self_attn.q_proj.weight" in names
    assert sum(name.startswith(INNER) for name in names) == 35 and len(names) == 37
    rates = {"vision_tower": 2e-6, "mm_projector": 1e-5}
    groups = [{"params": [p for n, p in vlm.named_parameters() if key in n], "lr": lr} for key, lr in rates.items()]
    assert sum(len(group["params"]) for group in groups) == len(names)
    optimizer = torch.optim.AdamW(groups, eps=1e-30, weight_decay=0.0)
    before = {name: p.detach().clone() for name, p in vlm.named_parameters()}
    vlm.mm_projector(vlm.vision_tower(patches(SAME), SAME)).square().sum().backward()
    optimizer.step()
    for name, parameter in vlm.named_parameters():
        step = (before[name] - parameter).abs().max().item()
        assert step == pytest.approx(rates[name.split(".")[0]], rel=1e-3), name


def test_lora_can_leave_the_tower_out(vlm):
    """V2."""
    peft = pytest.importorskip("peft")
    vlm.language_model = nn.ModuleDict({"q_proj": nn.Linear(8, 8), "v_proj": nn.Linear(8, 8)})
    for exclude, in_tower in ((None, True), (r".*vision_tower.*", False)):
        config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], exclude_modules=exclude)
        model = peft.get_peft_model(copy.deepcopy(vlm), config)
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        assert names and any(".vision_tower." in name for name in names) == in_tower


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "nonreentrant", "reentrant"])
@pytest.mark.parametrize("part", ["all", "last layer", "lora"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_every_trainable_parameter_gets_a_gradient(vlm, patches, part, checkpointing, mode):
    """T4. `reentrant` is what transformers 4's `gradient_checkpointing_enable()` of a VLM chooses."""
    tower = vlm.vision_tower
    if part == "last layer":
        tower.requires_grad_(False)
        tower.vision_tower.encoder.layers[-1].requires_grad_(True)
    elif part == "lora":
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        tower.vision_tower = peft.get_peft_model(tower.vision_tower, config).base_model.model
    if checkpointing is not None:
        vlm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
        layers = tower.vision_tower.encoder.layers
        assert not any(layer._gradient_checkpointing_func.keywords["use_reentrant"] for layer in layers)
    getattr(vlm, mode)()
    x = patches(SAME)
    (tower(x, SAME).square().mean() + tower(x[:24], SAME[:1]).mean()).backward()  # twice a step
    for name, parameter in tower.named_parameters():
        assert bool(parameter.grad is not None and parameter.grad.any()) == parameter.requires_grad, name
