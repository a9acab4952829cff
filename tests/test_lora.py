"""LoRA: the start, training, merging, and PEFT as the independent implementation."""

import dataclasses
import json
import math

import pytest
import torch
from conftest import GROUPS, YARN, oracle, random_model, small
from safetensors.torch import load_file, save_file

from common import formats
from deepseek import (
    MLA_PROJECTIONS,
    ConfigError,
    LoRALinear,
    UsageError,
    add_lora,
    load_lora,
    lora_state,
    merge_lora,
    remove_lora,
    save_lora,
)
from finetune import TARGETS

IDS = torch.arange(60).view(2, 30) % 96
COMPRESSED = GROUPS | YARN | dict(q_lora_rank=28)
ATTENTION = ["q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]


def logits(model, **options):
    with torch.no_grad():
        return model(IDS, **options).logits


def adapted(seed=1, rank=4, alpha=6.0, targets=MLA_PROJECTIONS, dropout=0.0, **overrides):
    """A model with adapters that do something: B random instead of zero."""
    model = random_model(small(**overrides))
    add_lora(model, rank, alpha, targets, dropout)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, tensor in lora_state(model).items():
            if "lora_B" in name:
                tensor.normal_(0, 0.1)
    return model


def close(a, b, relative=1e-5):
    assert (a - b).abs().max() <= relative * b.abs().max()


@pytest.mark.parametrize("overrides", [{}, COMPRESSED])
def test_the_start_is_the_base_exactly_and_only_adapters_learn(overrides):
    model = random_model(small(**overrides))
    base, before = logits(model), {k: v.clone() for k, v in model.state_dict().items()}
    names = add_lora(model, rank=4)
    per_layer = 5 if overrides else 4
    assert len(names) == 3 * per_layer and all(".self_attn." in name for name in names)
    assert torch.equal(logits(model), base)
    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert len(trainable) == 2 * len(names)
    optimizer = torch.optim.AdamW(trainable, 1e-2)
    for _ in range(3):
        out = model(IDS[:, :-1], IDS[:, 1:])
        assert out.aux_loss == 0  # the router is frozen: there is nothing to balance
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, value in model.state_dict().items():
        if ".lora_" not in name:
            assert torch.equal(value, before[name.replace(".base_layer", "")])
    assert not torch.allclose(logits(model.eval()), base, atol=1e-3)
    back = remove_lora(model)
    assert torch.equal(logits(model), base)
    assert {k for k in model.state_dict()} == set(before)
    back()
    assert len(lora_state(model)) == len(trainable)


def test_y_is_wx_plus_scaled_bax():
    layer = LoRALinear(torch.nn.Linear(3, 2, bias=False), rank=1, alpha=5.0, dropout=0.0)
    with torch.no_grad():
        layer.base_layer.weight.copy_(torch.tensor([[1.0, 0, 0], [0, 1, 0]]))
        layer.lora_A.weight.copy_(torch.tensor([[1.0, 2, 3]]))
        layer.lora_B.weight.copy_(torch.tensor([[1.0], [-1]]))
    x = torch.tensor([1.0, 1, 1])
    assert layer(x).tolist() == [31, -29]  # A x = 6, times 5, beside [1, 1]
    assert layer.weight.tolist() == [[6, 10, 15], [-5, -9, -15]]


def test_a_starts_uniform_as_kaiming_and_b_zero():
    layer = LoRALinear(torch.nn.Linear(400, 30, bias=False), rank=8, alpha=1.0, dropout=0.0)
    bound = 1 / math.sqrt(400)  # sqrt(6 / ((1 + 5) * fan_in))
    assert 0.99 * bound < layer.lora_A.weight.abs().max() <= bound
    assert not layer.lora_B.weight.any()


def test_dropout_drops_in_training_only():
    layer = LoRALinear(torch.nn.Linear(64, 1, bias=False), rank=1, alpha=1.0, dropout=0.5)
    with torch.no_grad():
        layer.base_layer.weight.zero_()
        layer.lora_A.weight.fill_(1)
        layer.lora_B.weight.fill_(1)
        x = torch.ones(64)
        assert layer.eval()(x).item() == 64
        torch.manual_seed(0)
        seen = {layer.train()(x).item() for _ in range(20)}
    assert len(seen) > 5 and all(value % 2 == 0 for value in seen)  # each survivor counts twice


@pytest.mark.parametrize("overrides", [{}, COMPRESSED])
def test_absorbed_attention_sees_an_adapter_on_kv_b_proj(overrides):
    model = adapted(**overrides)
    close(logits(model, absorb=True), logits(model, absorb=False))
    cache = model.new_cache(2, 30)
    with torch.no_grad():
        step = [model(IDS[:, t : t + 1], cache=cache, absorb=True).logits for t in range(30)]
    close(torch.cat(step, 1), logits(model))


@pytest.mark.parametrize("overrides", [{}, COMPRESSED])
def test_merging_changes_nothing_and_unmerging_brings_all_back(overrides):
    model = adapted(**overrides)
    before, state = logits(model), {k: v.clone() for k, v in model.state_dict().items()}
    undo = merge_lora(model)
    close(logits(model), before)
    assert not lora_state(model) and not any(p.requires_grad for p in model.parameters())
    undo()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(logits(model), before)


def test_merging_in_bfloat16_keeps_the_original():
    model = random_model(small()).bfloat16()
    base = {k: v.clone() for k, v in model.state_dict().items()}
    add_lora(model, 4)
    with torch.no_grad():
        for tensor in lora_state(model).values():
            tensor.normal_(0, 0.1)
            assert tensor.dtype == torch.float32
    before = logits(model)
    merge_lora(model)()
    assert torch.equal(logits(model), before)
    remove_lora(model)
    assert all(torch.equal(v, base[k]) for k, v in model.state_dict().items())


def test_other_targets_can_be_chosen_and_unknown_ones_are_refused():
    model = random_model(small())
    names = add_lora(model, 2, targets=["gate_proj", "down_proj"])
    assert {n.split(".", 3)[3] for n in names} == {
        f"mlp.{where}{which}_proj"
        for where in ("", "shared_experts.")
        for which in ("gate", "down")
    }
    for options, message in (
        (dict(targets=["experts"]), "target 'experts' is no linear layer"),
        (dict(targets=["q_a_proj"]), "has none of them"),
        (dict(rank=0), "rank = 0"),
        (dict(alpha=0.0), "alpha = 0.0"),
        (dict(dropout=1.0), "dropout = 1.0"),
    ):
        with pytest.raises(ConfigError, match=message):
            add_lora(random_model(small()), **options)
    with pytest.raises(ConfigError, match="has adapters already"):
        add_lora(model)


@pytest.mark.parametrize("overrides", [{}, COMPRESSED])
@pytest.mark.parametrize(
    "options",
    [
        dict(targets=MLA_PROJECTIONS),
        dict(targets=MLA_PROJECTIONS, dropout=0.25),
        dict(targets=TARGETS),
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
    formats.save_pretrained(model, tmp_path / "base")
    load = dict(attn_implementation="eager")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", **load)
    other = peft.PeftModel.from_pretrained(base, tmp_path / "lora").eval()
    close(logits(other), expected)
    close(logits(other.merge_and_unload()), expected)
    load_lora(model, tmp_path / "lora")
    assert torch.equal(logits(model), expected)


def made_by_peft(model, folder, **settings):
    """The logits of PEFT's model, on the base of ours, with an adapter that it writes to folder."""
    peft = pytest.importorskip("peft")
    base = oracle(model.config)
    base.load_state_dict(model.state_dict())
    settings = dict(r=4, lora_alpha=5, target_modules=ATTENTION) | settings
    other = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    torch.manual_seed(2)
    with torch.no_grad():
        for name, p in other.named_parameters():
            if "lora_" in name:
                p.add_(torch.empty_like(p).normal_(0, 0.1))
    formats.save_pretrained(other, folder)
    return logits(other)


@pytest.mark.parametrize("overrides", [{}, COMPRESSED])
@pytest.mark.parametrize("mlp", [False, True])
def test_an_adapter_made_by_peft_loads_here(overrides, mlp, tmp_path):
    model = random_model(small(**overrides))
    before, settings = logits(model), {}
    if mlp:
        layers = [n for n in model.state_dict() if "mlp." in n and n.endswith("_proj.weight")]
        settings = dict(target_parameters=[n for n in layers if ".experts." not in n])
        assert len(settings["target_parameters"]) == 9
    targets = [n for n in MLA_PROJECTIONS if overrides or n[:2] != "q_" or n == "q_proj"]
    expected = made_by_peft(model, tmp_path, target_modules=targets, **settings)
    load_lora(model, tmp_path)
    close(logits(model), expected)
    assert not torch.allclose(logits(model), before, atol=1e-3)


@pytest.mark.parametrize(
    "settings, refused",
    [
        (dict(layers_to_transform=[1]), None),
        (dict(exclude_modules=["o_proj"]), None),
        (dict(target_modules=r".*self_attn\.o_proj"), None),
        (dict(init_lora_weights=False), None),
        (dict(init_lora_weights="gaussian"), None),
        (dict(init_lora_weights="pissa"), "init_lora_weights = 'pissa'"),
        (dict(init_lora_weights="pissa_niter_4"), "init_lora_weights = 'pissa_niter_4'"),
        (dict(init_lora_weights="olora"), "init_lora_weights = 'olora'"),
        (dict(init_lora_weights="orthogonal"), "init_lora_weights = 'orthogonal'"),
        (dict(use_rslora=True), "use_rslora = True"),
        (dict(use_dora=True), "use_dora = True"),
        (dict(lora_bias=True), "lora_bias = True"),
        (dict(bias="all"), "bias = 'all'"),
        (dict(rank_pattern={"o_proj": 2}), "rank_pattern = "),
        (dict(alpha_pattern={"o_proj": 9}), "alpha_pattern = "),
        (dict(modules_to_save=["lm_head"]), "modules_to_save = "),
        (dict(trainable_token_indices=[3]), "trainable_token_indices = "),
        (dict(layer_replication=[[0, 2], [1, 3]]), "layer_replication = "),
        (dict(target_modules=["gate_proj", "up_proj", "down_proj"]), "_pattern = "),
        (dict(target_modules=["down_proj"]), "does not fit the model at model.layers.1.mlp.expert"),
    ],
    ids=str,
)
def test_what_peft_makes_is_read_to_the_same_logits_or_refused(settings, refused, tmp_path):
    model = random_model(small())
    expected = made_by_peft(model, tmp_path, **settings)
    if refused:
        with pytest.raises(UsageError, match=refused):
            load_lora(model, tmp_path)
    else:
        load_lora(model, tmp_path)
        close(logits(model), expected)


def test_every_setting_of_peft_is_known_to_be_harmless_or_refused(tmp_path):
    peft = pytest.importorskip("peft")
    expected = made_by_peft(random_model(small()), tmp_path)
    path = tmp_path / "adapter_config.json"
    record = json.loads(path.read_text())
    harmless = {
        "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
        "inference_mode", "lora_dropout", "megatron_core", "qalora_group_size", "target_modules",
        "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern",
    }  # fmt: skip
    off = dict(init_lora_weights="pissa", lora_dropout=0.5)
    fields = {field.name: field.default for field in dataclasses.fields(peft.LoraConfig)}
    for name in ("r", "lora_alpha"):  # which are read, and count in the other tests
        del fields[name]
    for name, default in (fields | dict(of_tomorrow=None)).items():
        value = off.get(name, True if default is False else ["x"])
        path.write_text(json.dumps(record | {name: value}))
        model = random_model(small())
        if name in harmless:
            load_lora(model, tmp_path)
            close(logits(model), expected)
        else:
            with pytest.raises(UsageError, match=f"has {name} = .* only plain LoRA"):
                load_lora(model, tmp_path)
            assert not lora_state(model)
    model = random_model(small())
    path.write_text(json.dumps(record | dict(of_tomorrow=None, new=False, more={}, any=[])))
    load_lora(model, tmp_path)
    close(logits(model), expected)


def test_a_folder_that_names_mlp_layers_as_modules_still_loads(tmp_path):
    model = adapted(targets=TARGETS)
    save_lora(model, tmp_path)
    path = tmp_path / "adapter_config.json"
    record = json.loads(path.read_text())
    del record["target_parameters"]
    older = dict(target_modules=TARGETS, lora_dropout=0.25, use_dora=False, lora_bias=False)
    path.write_text(json.dumps(record | older))
    again = random_model(small())
    load_lora(again, tmp_path)
    assert torch.equal(logits(again), logits(model))


def test_saved_and_loaded_nothing_has_changed(tmp_path):
    model = adapted(dropout=0.25)
    save_lora(model, tmp_path)
    again = random_model(small())
    load_lora(again, tmp_path)
    assert torch.equal(logits(again), logits(model))
    layer = again.model.layers[0].self_attn.o_proj
    assert (layer.scaling, layer.dropout.p, layer.training) == (1.5, 0.25, False)
    with pytest.raises(ConfigError, match="no adapters to save"):
        save_lora(random_model(small()), tmp_path)


def test_an_adapter_that_cannot_be_written_is_said_and_the_old_one_stays(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot be written"):
        save_lora(adapted(), tmp_path / "file")
    save_lora(adapted(), tmp_path / "lora")
    before = (tmp_path / "lora" / "adapter_model.safetensors").read_bytes()

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(UsageError, match="No space left"):
        save_lora(adapted(seed=2), tmp_path / "lora")
    assert (tmp_path / "lora" / "adapter_model.safetensors").read_bytes() == before
    assert len(list((tmp_path / "lora").iterdir())) == 2


def test_adapters_of_another_base_or_kind_are_refused(tmp_path):
    save_lora(adapted(), tmp_path)
    for overrides in (dict(hidden_size=51), dict(num_hidden_layers=2), dict(q_lora_rank=28)):
        with pytest.raises(UsageError, match="does not fit the model at model.layers"):
            load_lora(random_model(small(**overrides)), tmp_path)
    path, file = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    record, state = json.loads(path.read_text()), load_file(file)
    for change in (
        dict(peft_type="IA3"),
        dict(bias="all"),
        dict(use_rslora=True),
        dict(use_dora=True),
        dict(lora_bias=True),
        dict(rank_pattern={"o_proj": 2}),
        dict(modules_to_save=["lm_head"]),
    ):
        path.write_text(json.dumps(record | change))
        with pytest.raises(UsageError, match=f"has {next(iter(change))} = .* only plain LoRA"):
            load_lora(random_model(small()), tmp_path)
    path.write_text(json.dumps({k: v for k, v in record.items() if k != "peft_type"}))
    with pytest.raises(UsageError, match="has peft_type = None"):
        load_lora(random_model(small()), tmp_path)
    path.write_text(json.dumps(record | dict(r=5)))
    with pytest.raises(UsageError, match="does not fit"):
        load_lora(random_model(small()), tmp_path)
    path.write_text(json.dumps(record))
    lost = {k: v for k, v in state.items() if "layers.1.self_attn.o_proj.lora_B" not in k}
    save_file(lost, file)
    with pytest.raises(UsageError, match="layers.1.self_attn.o_proj"):
        load_lora(random_model(small()), tmp_path)
    save_file(state | {next(iter(state)).replace("weight", "bias"): torch.ones(1)}, file)
    with pytest.raises(UsageError, match="holds tensors that are no lora_A"):
        load_lora(random_model(small()), tmp_path)
    save_file({}, file)
    with pytest.raises(UsageError, match="holds no adapter"):
        load_lora(random_model(small()), tmp_path)
    file.write_bytes(b"no tensors")
    with pytest.raises(UsageError, match="cut short"):
        load_lora(random_model(small()), tmp_path)
    file.unlink()
    with pytest.raises(UsageError, match="is missing"):
        load_lora(random_model(small()), tmp_path)
    path.write_text(json.dumps(record | dict(lora_alpha=None)))
    with pytest.raises(UsageError, match="cannot be read"):
        load_lora(random_model(small()), tmp_path)
    path.write_text("{}")
    with pytest.raises(UsageError, match="cannot be read"):
        load_lora(random_model(small()), tmp_path)
    with pytest.raises(UsageError, match="has no adapter_config.json"):
        load_lora(random_model(small()), tmp_path / "nowhere")
