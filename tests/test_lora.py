"""LoRA: the start, training, merging, and PEFT as the independent implementation."""

import dataclasses
import json
import math
from contextlib import nullcontext

import pytest
import torch
from conftest import GROUPS, YARN, oracle, random_model, small
from safetensors.torch import load_file, save_file

from common.formats import load_lora, lora_state, save_lora, save_pretrained
from common.runtime import UsageError
from deepseek import MLA_PROJECTIONS, ConfigError, LoRALinear, add_lora, merge_lora, remove_lora
from finetune import TARGETS

IDS = torch.arange(60).view(2, 30) % 96
COMPRESSED = GROUPS | YARN | dict(q_lora_rank=28)
COMPRESSED_MLA = [name for name in MLA_PROJECTIONS if name != "q_proj"]
MLPS = ["0.mlp", "1.mlp.shared_experts", "2.mlp.shared_experts"]
MLP_WEIGHTS = [f"model.layers.{m}.{n}_proj.weight" for m in MLPS for n in ("gate", "up", "down")]


def logits(model, **options):
    with torch.no_grad():
        return model(IDS, **options).logits


def adapted(targets=MLA_PROJECTIONS, dropout=0.0, **overrides):
    """A model with adapters that do something: B random instead of zero."""
    model = random_model(small(**overrides))
    add_lora(model, 4, 6.0, targets, dropout)
    torch.manual_seed(1)
    for name, tensor in lora_state(model).items():
        if "lora_B" in name:
            tensor.normal_(0, 0.1)
    return model


def close(a, b, relative=1e-5):
    assert (a - b).abs().max() <= relative * b.abs().max()


@pytest.mark.parametrize("overrides, dtype", [({}, torch.float32), (COMPRESSED, torch.bfloat16)])
def test_the_start_is_the_base_exactly_and_only_adapters_learn(overrides, dtype):
    model = random_model(small(**overrides)).to(dtype)
    base, before = logits(model), {k: v.clone() for k, v in model.state_dict().items()}
    names = add_lora(model, rank=4)
    assert len(names) == (15 if overrides else 12) and all(".self_attn." in n for n in names)
    assert torch.equal(logits(model), base)
    trainable = [p for p in model.train().parameters() if p.requires_grad]
    assert len(trainable) == 2 * len(names) and {p.dtype for p in trainable} == {torch.float32}
    optimizer = torch.optim.AdamW(trainable, 1e-2)
    for _ in range(3):
        out = model(IDS[:, :-1], IDS[:, 1:])
        assert out.aux_loss == 0  # the router is frozen: there is nothing to balance
        out.loss.backward()
        optimizer.step()
    for name, value in model.state_dict().items():
        if ".lora_" not in name:
            assert torch.equal(value, before[name.replace(".base_layer", "")])
    assert not torch.allclose(logits(model.eval()), base, atol=1e-3)
    remove_lora(model)
    assert torch.equal(logits(model), base)
    assert model.state_dict().keys() == before.keys()


def test_y_is_wx_plus_scaled_bax():
    layer = LoRALinear(torch.nn.Linear(3, 2, bias=False), rank=1, alpha=5.0, dropout=0.0)
    with torch.no_grad():
        layer.base_layer.weight.copy_(torch.tensor([[1.0, 0, 0], [0, 1, 0]]))
        layer.lora_A.weight.copy_(torch.tensor([[1.0, 2, 3]]))
        layer.lora_B.weight.copy_(torch.tensor([[1.0], [-1]]))
    assert layer(torch.ones(3)).tolist() == [31, -29]  # A x = 6, times 5, beside [1, 1]
    assert layer.weight.tolist() == [[6, 10, 15], [-5, -9, -15]]
    layer = LoRALinear(torch.nn.Linear(400, 30, bias=False), rank=8, alpha=1.0, dropout=0.0)
    bound = 1 / math.sqrt(400)  # Kaiming's: sqrt(6 / ((1 + 5) * fan_in))
    assert 0.99 * bound < layer.lora_A.weight.abs().max() <= bound
    assert not layer.lora_B.weight.any()


def test_dropout_drops_in_training_only():
    layer = LoRALinear(torch.nn.Linear(64, 1, bias=False), rank=1, alpha=1.0, dropout=0.5)
    layer.requires_grad_(False)
    layer.base_layer.weight.zero_()
    layer.lora_A.weight.fill_(1)
    layer.lora_B.weight.fill_(1)
    x = torch.ones(64)
    assert layer.eval()(x).item() == 64
    torch.manual_seed(0)
    seen = {layer.train()(x).item() for _ in range(20)}
    assert len(seen) > 5 and all(value % 2 == 0 for value in seen)  # each survivor counts twice


@pytest.mark.parametrize("overrides", [{}, COMPRESSED])
def test_absorbed_and_merged_adapters_give_the_same_logits(overrides):
    model = adapted(targets=[*TARGETS, "lm_head"], **overrides)
    expected, cache = logits(model), model.new_cache(2, 30)
    with torch.no_grad():
        step = [model(IDS[:, t : t + 1], cache=cache, absorb=True).logits for t in range(30)]
    close(torch.cat(step, 1), expected)
    merge_lora(model)
    close(logits(model), expected)
    assert model.state_dict().keys() == random_model(small(**overrides)).state_dict().keys()
    assert not any(p.requires_grad for p in model.parameters())


def test_targets_are_last_or_full_names_and_unknown_ones_are_refused():
    model = random_model(small())
    model.model.layers[1].training_only = True  # as a head that inference does not need
    names = add_lora(model, 2, targets=["gate_proj", "model.layers.0.self_attn.o_proj"])
    assert names == [
        "model.layers.0.self_attn.o_proj",
        "model.layers.0.mlp.gate_proj",
        "model.layers.2.mlp.shared_experts.gate_proj",
    ]
    with pytest.raises(ConfigError, match="has adapters already"):
        add_lora(model)
    for options, message in (
        (dict(targets=["experts"]), "target 'experts' is no linear layer"),
        (dict(targets=["q_a_proj"]), "has none of them"),
    ):
        with pytest.raises(ConfigError, match=message):
            add_lora(random_model(small()), **options)


@pytest.mark.parametrize("overrides", [{}, COMPRESSED])
@pytest.mark.parametrize(
    "options",
    [
        dict(dropout=0.25),
        dict(targets=TARGETS, dropout=0.25),
        dict(targets=TARGETS, n_shared_experts=0),
        dict(targets=TARGETS, first_k_dense_replace=0),
        dict(targets=["gate_proj"]),
        dict(targets=["lm_head", "down_proj"]),
    ],
    ids=str,
)
def test_peft_gives_the_same_logits_from_our_files(overrides, options, tmp_path):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    model = adapted(**overrides | options)
    save_lora(model, tmp_path / "lora", base="somewhere")
    expected = logits(model)
    remove_lora(model)
    save_pretrained(model, tmp_path / "base")
    load = dict(attn_implementation="eager")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", **load)
    other = peft.PeftModel.from_pretrained(base, tmp_path / "lora").eval()
    close(logits(other), expected)
    close(logits(other.merge_and_unload()), expected)
    load_lora(model, tmp_path / "lora")
    assert torch.equal(logits(model), expected)
    layer = next(m for m in model.modules() if isinstance(m, LoRALinear))
    kept = 0.25 if options == dict(dropout=0.25) else 0.0  # PEFT allows none on an MLP's weights
    assert (layer.scaling, layer.dropout.p, layer.training) == (1.5, kept, False)


def made_by_peft(model, folder, **settings):
    """The logits of PEFT's model, on the base of ours, with an adapter that it writes to folder."""
    peft = pytest.importorskip("peft")
    base = oracle(model.config)
    base.load_state_dict(model.state_dict())
    settings = dict(r=4, lora_alpha=5, target_modules=COMPRESSED_MLA) | settings
    other = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    torch.manual_seed(2)
    for name, tensor in other.state_dict().items():
        if "lora_" in name:
            tensor.add_(torch.empty_like(tensor).normal_(0, 0.1))
    other.save_pretrained(folder)
    return logits(other)


@pytest.mark.parametrize(
    "settings, refused",
    [
        ({}, None),
        (dict(target_parameters=MLP_WEIGHTS), None),
        (dict(layers_to_transform=[1]), None),
        (dict(exclude_modules=["o_proj"]), None),
        (dict(target_modules=r".*self_attn\.o_proj"), None),
        (dict(init_lora_weights=False), None),
        (dict(init_lora_weights="gaussian"), None),
        (dict(init_lora_weights="pissa"), "init_lora_weights = 'pissa'"),
        (dict(target_modules=["gate_proj", "up_proj", "down_proj"]), "_pattern = "),
        (dict(target_modules=["down_proj"]), "does not fit the model at model.layers.1.mlp.expert"),
    ],
    ids=str,
)
def test_what_peft_makes_is_read_to_the_same_logits_or_refused(settings, refused, tmp_path):
    model = random_model(small(**COMPRESSED))
    before, expected = logits(model), made_by_peft(model, tmp_path, **settings)
    assert not torch.allclose(expected, before, atol=1e-3)
    with pytest.raises(UsageError, match=refused) if refused else nullcontext():
        load_lora(model, tmp_path)
        close(logits(model), expected)


def test_every_setting_of_peft_is_known_to_be_harmless_or_refused(tmp_path):
    peft = pytest.importorskip("peft")
    expected = made_by_peft(random_model(small(**COMPRESSED)), tmp_path)
    path = tmp_path / "adapter_config.json"
    off = dict(of_tomorrow=None, new=False, more={}, any=[])
    record = json.loads(path.read_text()) | off
    harmless = {
        "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
        "inference_mode", "lora_dropout", "megatron_core", "qalora_group_size", "target_modules",
        "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern",
    }  # fmt: skip
    on = dict(init_lora_weights="pissa", bias="all", lora_dropout=0.5)
    fields = {field.name: field.default for field in dataclasses.fields(peft.LoraConfig)}
    del fields["r"], fields["lora_alpha"]  # which are read, and count in the other tests
    for name, default in (fields | off).items():
        value = on.get(name, True if default is False else ["x"])
        path.write_text(json.dumps(record | {name: value}))
        model = random_model(small(**COMPRESSED))
        message = f"has {name} = .* only plain LoRA"
        known = name in harmless
        with nullcontext() if known else pytest.raises(UsageError, match=message):
            load_lora(model, tmp_path)
            close(logits(model), expected)
        assert known == bool(lora_state(model))


def test_what_cannot_be_written_is_said_and_the_adapter_before_stays(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="merge or remove them first"):
        save_pretrained(adapted(), tmp_path / "hf")
    with pytest.raises(ConfigError, match="no adapters to save"):
        save_lora(random_model(small()), tmp_path)
    save_lora(adapted(), tmp_path)
    before = (tmp_path / "adapter_model.safetensors").read_bytes()

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(UsageError, match="cannot be written: No space left"):
        save_lora(adapted(targets=TARGETS), tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2


def test_adapters_of_another_base_and_damaged_ones_are_refused(tmp_path):
    def refused(message, **overrides):
        model = random_model(small(**overrides))
        with pytest.raises(UsageError, match=message):
            load_lora(model, tmp_path)
        assert not lora_state(model)

    save_lora(adapted(), tmp_path)
    path, file = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    record, state = json.loads(path.read_text()), load_file(file)
    for overrides in (dict(hidden_size=51), dict(num_hidden_layers=2), dict(q_lora_rank=28)):
        refused("does not fit the model at model.layers", **overrides)
    for change, message in (
        (dict(peft_type="IA3"), "has peft_type = 'IA3': only plain LoRA"),
        (dict(r=5), "does not fit"),
        (dict(lora_alpha=None), "cannot be read"),
    ):
        path.write_text(json.dumps(record | change))
        refused(message)
    path.write_text(json.dumps(record))
    for content, message in (
        ({k: v for k, v in state.items() if "1.self_attn.o_proj.lora_B" not in k}, "1.self_attn.o"),
        (state | {next(iter(state)).replace("weight", "bias"): torch.ones(1)}, "are no lora_A"),
        ({}, "holds no adapter"),
    ):
        save_file(content, file)
        refused(message)
    file.write_bytes(b"no tensors")
    refused("cut short")
    file.unlink()
    refused("is missing")
    path.write_text(json.dumps(dict(r=4, lora_alpha=6)))
    refused("has peft_type = None")
    path.unlink()
    refused("has no adapter_config.json")
