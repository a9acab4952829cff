"""LoRA: the start, training, merging, and PEFT as the independent implementation."""

import json
import math
from contextlib import nullcontext

import pytest
import torch
from conftest import GROUPS, YARN, oracle, random_model, small
from safetensors.torch import load_file, save_file

from common.formats import load_lora, lora_state, save_lora
from common.runtime import UsageError
from deepseek import MLA_PROJECTIONS, ConfigError, LoRALinear, add_lora, merge_lora, remove_lora
from finetune import TARGETS

IDS = torch.arange(60).view(2, 30) % 96
COMPRESSED = GROUPS | YARN | dict(q_lora_rank=28)
MLPS = ["0.mlp", "1.mlp.shared_experts", "2.mlp.shared_experts"]
MLP_WEIGHTS = [f"model.layers.{m}.{n}_proj.weight" for m in MLPS for n in ("gate", "up", "down")]


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def adapted(targets=MLA_PROJECTIONS, dropout=0.0, **overrides):
    """A model with adapters that do something: B random instead of zero."""
    model = random_model(small(**overrides))
    add_lora(model, 4, 6.0, targets, dropout)
    torch.manual_seed(1)
    for name, tensor in lora_state(model).items():
        if "lora_B" in name:
            tensor.normal_(0, 0.1)
    return model


def close(a, b):
    assert (a - b).abs().max() <= 1e-5 * b.abs().max()


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


def test_b_starts_at_zero_and_a_as_in_loras_own_code():
    layer = LoRALinear(torch.nn.Linear(400, 30, bias=False), rank=8, alpha=1.0, dropout=0.0)
    bound = 1 / math.sqrt(400)  # Kaiming's: sqrt(6 / ((1 + 5) * fan_in))
    assert 0.99 * bound < layer.lora_A.weight.abs().max() <= bound
    assert not layer.lora_B.weight.any()


def test_dropout_drops_in_training_only():
    layer = LoRALinear(torch.nn.Linear(64, 1, bias=False), rank=1, alpha=1.0, dropout=0.5)
    layer.requires_grad_(False)
    for name, p in layer.named_parameters():
        p.fill_("lora" in name)
    assert layer.eval()(torch.ones(64)).item() == 64
    torch.manual_seed(0)
    seen = {layer.train()(torch.ones(64)).item() for _ in range(20)}
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
    with pytest.raises(ConfigError, match="no adapters to save"):
        save_lora(random_model(small()), "nowhere")
    for options, message in (
        (dict(targets=["experts"]), "target 'experts' is no linear layer"),
        (dict(targets=["q_a_proj"]), "has none of them"),
        (dict(rank=0), "rank = 0"),
        (dict(alpha=0.0), "alpha = 0.0"),
        (dict(dropout=1.0), "dropout = 1.0"),
    ):
        with pytest.raises(ConfigError, match=message):
            add_lora(random_model(small()), **options)


@pytest.mark.parametrize(
    "options",
    [
        dict(dropout=0.25),
        COMPRESSED | dict(targets=TARGETS, dropout=0.25),
        dict(targets=TARGETS, n_shared_experts=0),
        dict(targets=TARGETS, first_k_dense_replace=0),
        dict(targets=["gate_proj"]),
        COMPRESSED | dict(targets=["lm_head", "down_proj"]),
    ],
)
def test_peft_gives_the_same_logits_from_our_files(options, tmp_path):
    peft = pytest.importorskip("peft")
    model = adapted(**options)
    save_lora(model, tmp_path, base="somewhere")
    expected = logits(model)
    remove_lora(model)
    other = peft.PeftModel.from_pretrained(twin(model), tmp_path).eval()
    close(logits(other), expected)
    close(logits(other.merge_and_unload()), expected)
    load_lora(model, tmp_path)
    assert torch.equal(logits(model), expected)
    layer = next(m for m in model.modules() if isinstance(m, LoRALinear))
    kept = 0.25 if options == dict(dropout=0.25) else 0.0  # PEFT allows none on an MLP's weights
    assert (layer.scaling, layer.dropout.p, layer.training) == (1.5, kept, False)


def twin(model):
    """transformers' model with the same weights."""
    other = oracle(model.config)
    other.load_state_dict(model.state_dict(), strict=False)  # it has shared experts of no size
    return other


def made_by_peft(model, folder, **settings):
    """The logits of PEFT's model, on the base of ours, with an adapter that it writes to folder."""
    peft = pytest.importorskip("peft")
    settings = dict(r=4, lora_alpha=5, target_modules=list(MLA_PROJECTIONS)) | settings
    config = peft.LoraConfig(task_type="CAUSAL_LM", **settings)
    other = peft.get_peft_model(twin(model), config).eval()
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
        (dict(target_modules=r".*self_attn\.o_proj"), None),
        (dict(init_lora_weights=False), None),
        (dict(init_lora_weights="gaussian"), None),
        (dict(init_lora_weights="pissa"), "init_lora_weights = 'pissa'"),
        (dict(use_rslora=True), "use_rslora = True: only plain LoRA is read"),
        (dict(use_dora=True), "use_dora = True"),
        (dict(alpha_pattern={"o_proj": 3}), "alpha_pattern = {'o_proj': 3}"),
        (dict(target_modules=["gate_proj", "up_proj", "down_proj"]), "routed experts cannot be"),
        (dict(target_modules=["down_proj"]), "model.layers.1.mlp.experts.* where nothing fits"),
    ],
)
def test_what_peft_makes_is_read_to_the_same_logits_or_refused(settings, refused, tmp_path):
    model = random_model(small(**COMPRESSED))
    before, expected = logits(model), made_by_peft(model, tmp_path, **settings)
    assert not torch.allclose(expected, before, atol=1e-3)
    with pytest.raises(UsageError, match=refused) if refused else nullcontext():
        load_lora(model, tmp_path)
        close(logits(model), expected)


def test_adapters_of_another_base_and_damaged_ones_are_refused(tmp_path):
    def refused(message, **overrides):
        model = random_model(small(**overrides))
        with pytest.raises((UsageError, ConfigError), match=message):
            load_lora(model, tmp_path)
        assert not lora_state(model)

    save_lora(adapted(), tmp_path)
    path, file = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    record, state = json.loads(path.read_text()), load_file(file)
    for overrides in (dict(hidden_size=51), dict(num_hidden_layers=2), dict(q_lora_rank=28)):
        refused(" for model.layers", **overrides)
    for change, message in (
        (dict(peft_type="IA3"), "has peft_type = 'IA3'"),
        (dict(of_tomorrow=True), "has of_tomorrow = True"),
        (dict(r=5), r"has \[4, 48\] for .*, where \[5, 48\] fits"),
        (dict(lora_alpha=None), "lora_alpha = 0, "),
    ):
        path.write_text(json.dumps(record | change))
        refused(message)
    path.write_text(json.dumps(record | dict(new=False, more={}, any=[])))  # settings that are off
    load_lora(random_model(small()), tmp_path)
    name = "base_model.model.model.layers.1.self_attn.o_proj.lora_B."
    rest = {n: tensor for n, tensor in state.items() if n != f"{name}weight"}
    for content in (rest, state | {f"{name}bias": torch.ones(1)}):
        save_file(content, file)
        refused("for model.layers.1.self_attn.o_proj.lora_B")
    file.unlink()
    refused("adapter_model.safetensors is missing")
