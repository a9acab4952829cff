"""Official checkpoints: read, refused, written, and read again by transformers."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import GROUPS, MODEL, YARN, oracle, random_model, small
from safetensors.torch import load_file, save_file

import deepseek
import sample
from common import chat, data, formats
from deepseek import Config, ConfigError, DeepSeek, UsageError, official_tensors

ROOT = Path(deepseek.__file__).parent
IDS = torch.arange(60).view(2, 30) % 96


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of DeepSeek's kind, written by `save_pretrained`."""
    random_model(small(**GROUPS, **YARN, q_lora_rank=28)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit(folder, **changes):
    path = folder / "config.json"
    record = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in record.items() if v != "absent"}))


def logits(model):
    with torch.no_grad():
        out = model(IDS)
    return out.logits


# --- reading ------------------------------------------------------------------------------------


@pytest.mark.parametrize("overrides", [{}, GROUPS | YARN | dict(q_lora_rank=28)])
def test_what_transformers_writes_is_read(overrides, tmp_path):
    other = oracle(small(**overrides))
    formats.save_pretrained(other, tmp_path)
    expected = logits(other)
    model = formats.load_pretrained(tmp_path)
    assert not model.training and model.config.rope_scaling == overrides.get("rope_scaling")
    assert (logits(model) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_the_released_config_is_read_to_the_last_field(tmp_path):
    record = dict(
        architectures=["DeepseekV2ForCausalLM"], attention_bias=False, attention_dropout=0.0,
        auto_map={"AutoConfig": "configuration_deepseek.DeepseekV2Config"}, aux_loss_alpha=0.001,
        bos_token_id=100000, eos_token_id=100001, first_k_dense_replace=1, hidden_act="silu",
        hidden_size=2048, initializer_range=0.02, intermediate_size=10944, kv_lora_rank=512,
        max_position_embeddings=163840, model_type="deepseek_v2", moe_intermediate_size=1408,
        moe_layer_freq=1, n_group=1, n_routed_experts=64, n_shared_experts=2,
        norm_topk_prob=False, num_attention_heads=16, num_experts_per_tok=6,
        num_hidden_layers=27, num_key_value_heads=16, pretraining_tp=1, q_lora_rank=None,
        qk_nope_head_dim=128, qk_rope_head_dim=64, rms_norm_eps=1e-6,
        rope_scaling=dict(beta_fast=32, beta_slow=1, factor=40, mscale=0.707,
                          mscale_all_dim=0.707, original_max_position_embeddings=4096,
                          type="yarn"),
        rope_theta=10000, routed_scaling_factor=1.0, scoring_func="softmax", seq_aux=True,
        tie_word_embeddings=False, topk_group=1, topk_method="greedy", torch_dtype="bfloat16",
        transformers_version="4.33.1", use_cache=True, v_head_dim=128, vocab_size=102400,
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(record))
    expected = Config.preset("v2-lite", initializer_range=0.02)
    assert deepseek.read_config(tmp_path) == expected
    # as transformers 5 spells it
    yarn = record.pop("rope_scaling") | {
        "rope_type": "yarn",
        "rope_theta": record.pop("rope_theta"),
    }
    yarn.pop("type")
    record |= dict(rope_parameters=yarn, q_lora_rank=0, n_group=None, topk_group=None)
    record |= dict(rope_scaling={"type": "default"})  # the newer spelling counts
    (tmp_path / "config.json").write_text(json.dumps(record))
    config = deepseek.read_config(tmp_path)
    assert deepseek.softmax_scale(config) == deepseek.softmax_scale(expected)
    assert (config.q_lora_rank, config.n_group, config.rope_theta) == (None, 1, 10000)
    assert config.rope_scaling == expected.rope_scaling
    for field in ("routed_scaling_factor", "first_k_dense_replace", "moe_layer_freq"):
        (tmp_path / "config.json").write_text(
            json.dumps({k: v for k, v in record.items() if k != field})
        )
        silent = {"routed_scaling_factor": 1.0, "first_k_dense_replace": 0, "moe_layer_freq": 1}
        assert getattr(deepseek.read_config(tmp_path), field) == silent[field]
    for plain in (None, {"rope_theta": 500.0}, {"rope_type": "default", "rope_theta": 500.0}):
        record |= dict(
            rope_parameters=plain, rope_scaling=None, rope_theta=None if plain else 500.0
        )
        (tmp_path / "config.json").write_text(json.dumps(record))
        config = deepseek.read_config(tmp_path)
        assert config.rope_scaling is None and config.rope_theta == 500


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("parts", [1, 3])
def test_one_file_or_many_and_experts_singly_or_fused(fused, parts, tmp_path):
    model = random_model(small())
    formats.save_pretrained(model, tmp_path)  # for its config.json
    (tmp_path / "model.safetensors").unlink()
    state = {k: v.detach() for k, v in model.state_dict().items()}
    if not fused:
        state = dict(pair for item in state.items() for pair in official_tensors(*item))
    names = sorted(state)
    for i in range(parts):
        save_file(
            {n: state[n].contiguous() for n in names[i::parts]}, tmp_path / f"part-{i}.safetensors"
        )
    assert torch.equal(logits(formats.load_pretrained(str(tmp_path))), logits(model))


def test_gate_stands_above_up_as_in_the_file(folder):
    stored = load_file(folder / "model.safetensors")
    experts = formats.load_pretrained(folder).model.layers[1].mlp.experts
    name = "model.layers.1.mlp.experts.5."
    assert torch.equal(experts.gate_up_proj[5, :24], stored[name + "gate_proj.weight"])
    assert torch.equal(experts.gate_up_proj[5, 24:], stored[name + "up_proj.weight"])
    assert torch.equal(experts.down_proj[5], stored[name + "down_proj.weight"])
    assert stored["model.layers.1.mlp.shared_experts.gate_proj.weight"].shape == (48, 48)


def test_dtype_is_that_of_the_files_or_as_asked(folder, tmp_path):
    model = formats.load_pretrained(folder, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert formats.load_pretrained(folder, device="meta").lm_head.weight.is_meta
    formats.save_pretrained(model, tmp_path / "half")
    assert json.loads((tmp_path / "half/config.json").read_text())["torch_dtype"] == "bfloat16"
    again = formats.load_pretrained(tmp_path / "half")
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(again), logits(model))
    assert formats.load_pretrained(tmp_path / "half", torch.float32).lm_head.weight.dtype == (
        torch.float32
    )


def test_loading_takes_the_model_and_one_shard(tmp_path):
    if not Path("/proc/self/status").exists():
        pytest.skip("nobody tells the peak memory here")
    config = small(
        hidden_size=384, num_hidden_layers=6, moe_intermediate_size=512, n_routed_experts=24
    )
    model = DeepSeek(config)
    size = 4 * model.num_parameters()[0]
    assert size > 3e8
    formats.save_pretrained(model, tmp_path, shard_bytes=30_000_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 9
    code = (
        "import sys; import torch, safetensors.torch; from deepseek import *\n"
        "def peak():\n"
        "    for line in open('/proc/self/status'):\n"
        "        if line.startswith('VmHWM'): return int(line.split()[1]) * 1024\n"
        "with torch.device('meta'): DeepSeek(read_config(Path(sys.argv[1])))\n"  # torch's own
        "before = peak(); formats.load_pretrained(sys.argv[1]); print(peak() - before)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert size <= int(done.stdout) < size + 2 * 30_000_000


# --- refusing -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(model_type="deepseek_v3"), "'deepseek_v3'"),
        (dict(model_type="absent"), "model_type = None"),
        (dict(topk_method="noaux_tc"), "'noaux_tc'"),
        (dict(scoring_func="sigmoid"), "'sigmoid'"),
        (dict(tie_word_embeddings=True), "tie_word_embeddings = True"),
        (dict(attention_bias=True), "attention_bias = True"),
        (dict(hidden_act="gelu"), "hidden_act = 'gelu'"),
        (dict(num_key_value_heads=1), "num_key_value_heads = 1"),
        (dict(quantization_config={"quant_method": "fp8"}), "quantised"),
        (dict(hidden_size="absent"), "lacks 'hidden_size'"),
        (dict(rope_scaling={"type": "linear", "factor": 2.0}), "'linear'"),
        (dict(num_hidden_layers=4), "model.layers.3.self_attn.q_a_proj.weight is missing"),
        (dict(num_hidden_layers=2), "which config.json has no place for"),
        (dict(vocab_size=95), r"lm_head.weight of shape \[96, 48\]"),
        (dict(hidden_size=-1), "hidden_size = -1"),
        (dict(num_hidden_layers=10**9), "num_hidden_layers = 1000000000"),
    ],
)
def test_what_is_not_this_model_is_refused_in_a_sentence(changes, message, folder):
    edit(folder, **changes)
    with pytest.raises((UsageError, ConfigError), match=message) as caught:
        formats.load_pretrained(folder)
    assert "\n" not in str(caught.value)


def change(folder, **tensors):
    state = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor is None:
            del state[name]
        else:
            state[name] = tensor
    save_file(state, folder / "model.safetensors")


def test_missing_surplus_and_misshapen_tensors_are_named(folder):
    name = "model.layers.2.mlp.experts.7.up_proj.weight"
    stored = load_file(folder / "model.safetensors")[name]
    for tensor, message in (
        (None, f"{name} is missing in"),
        (stored.T.contiguous()[:5], rf"{name} of shape \[5, 24\], but .* \[24, 48\]"),
        (stored.to(torch.float8_e4m3fn), f"{name} in F8_E4M3"),
    ):
        change(folder, **{name: tensor})
        with pytest.raises(UsageError, match=message):
            formats.load_pretrained(folder)
    others = {name.replace("up_proj", kind): None for kind in ("down_proj", "gate_proj")}
    change(folder, **others, **{name: None})
    with pytest.raises(UsageError, match="is missing in .*, and 2 more"):
        formats.load_pretrained(folder)
    change(folder, **{other: stored.T.contiguous() for other in others if "down" in other})
    change(folder, **{other: stored for other in others if "gate" in other})
    change(folder, **{name: stored, "model.layers.2.mlp.gate.bias": torch.zeros(8)})
    with pytest.raises(UsageError, match="layers.2.mlp.gate.bias, which config.json has no"):
        formats.load_pretrained(folder)


def test_a_tensor_that_comes_twice_is_named(folder):
    shutil.copy(folder / "model.safetensors", folder / "other.safetensors")
    with pytest.raises(UsageError, match="which was there before"):
        formats.load_pretrained(folder)


def test_damaged_missing_and_foreign_files_are_named(folder, tmp_path):
    whole = (folder / "model.safetensors").read_bytes()
    for length in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        (folder / "model.safetensors").write_bytes(whole[:length])
        with pytest.raises(UsageError, match="model.safetensors cannot be read"):
            formats.load_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(UsageError, match="no .*safetensors: other formats"):
        formats.load_pretrained(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "gone.safetensors"}}))
    with pytest.raises(UsageError, match="gone.safetensors is missing"):
        formats.load_pretrained(folder)
    index.write_text(json.dumps({"weight_map": {}}))
    with pytest.raises(UsageError, match="index.json names no file"):
        formats.load_pretrained(folder)
    index.write_text("[1, 2")
    with pytest.raises(UsageError, match="index.json cannot be read"):
        formats.load_pretrained(folder)
    for text, message in (("{", "damaged"), ("[]", "no object")):
        (folder / "config.json").write_text(text)
        with pytest.raises(UsageError, match=message):
            formats.load_pretrained(folder)
    with pytest.raises(UsageError, match="has no config.json"):
        formats.load_pretrained(tmp_path)


def test_a_hub_name_without_a_network_ends_in_a_sentence(tmp_path):
    code = "from deepseek import DeepSeek; formats.load_pretrained('deepseek-ai/no-such-model')"
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert "UsageError: deepseek-ai/no-such-model does not exist here and cannot be" in last
    with pytest.raises(UsageError, match="neither a folder nor a hub name"):
        formats.load_pretrained("no/such/model")


def test_what_is_needed_is_fetched_from_the_hub(folder, monkeypatch):
    asked = []

    def fetch(name, allow_patterns):
        asked.append((name, sorted(allow_patterns)))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert formats.load_pretrained("somebody/a-model").config.n_group == 4
    patterns = ["*.safetensors", "*.safetensors.index.json", "config.json", "tokenizer.json"]
    assert asked == [("somebody/a-model", patterns)]


def test_beside_an_index_other_files_are_left_alone(tmp_path):
    model = random_model(small())
    formats.save_pretrained(model, tmp_path, 50_000)
    save_file({"lm_head.weight": torch.zeros(96, 48)}, tmp_path / "adapter_model.safetensors")
    assert torch.equal(logits(formats.load_pretrained(tmp_path)), logits(model))


# --- writing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_bytes", [10**9, 50_000])
def test_written_and_read_again_nothing_has_changed(shard_bytes, tmp_path):
    model = random_model(small(**GROUPS, **YARN, device_loss_alpha=0.02, token_drop_capacity=1.5))
    formats.save_pretrained(model, tmp_path, 20_000)
    formats.save_pretrained(
        model, tmp_path, shard_bytes
    )  # over the first one: nothing of it may stay
    again = formats.load_pretrained(tmp_path)
    assert again.config == model.config
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )
    files = list(tmp_path.glob("*.safetensors"))
    assert len(files) == 1 if shard_bytes == 10**9 else len(files) > 5
    sizes = [sum(t.nbytes for t in load_file(file).values()) for file in files]
    assert max(sizes) <= shard_bytes
    if len(files) > 1:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == 4 * model.num_parameters()[0]
    assert json.loads((tmp_path / "config.json").read_text())["num_key_value_heads"] == 3


@pytest.mark.parametrize("shard_bytes", [10**9, 50_000])
@pytest.mark.parametrize("overrides", [{}, GROUPS | YARN | dict(q_lora_rank=28)])
def test_transformers_reads_what_is_written(overrides, shard_bytes, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = random_model(small(**overrides))
    formats.save_pretrained(model, tmp_path, shard_bytes)
    other, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = logits(model)
    assert (logits(other) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_greedy_routing_is_exported_with_all_groups_allowed(tmp_path):
    DeepSeek(small(n_group=4, topk_group=2)).save_pretrained(tmp_path)
    assert deepseek.read_config(tmp_path).topk_group == 4


@pytest.mark.parametrize("overrides", [dict(norm_topk_prob=True), dict(moe_layer_freq=2)])
def test_what_the_format_cannot_say_is_not_written(overrides, tmp_path):
    with pytest.raises(UsageError, match=f"{next(iter(overrides))} = .* cannot be exported"):
        DeepSeek(small(**overrides)).save_pretrained(tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_a_folder_that_cannot_be_written_ends_in_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="file cannot be written: "):
        DeepSeek(small()).save_pretrained(tmp_path / "file")
    with torch.device("meta"):
        model = DeepSeek(small())
    with pytest.raises(UsageError, match="meta device"):
        formats.save_pretrained(model, tmp_path / "meta")
    DeepSeek(small()).save_pretrained(tmp_path / "model")
    modes = {path.stat().st_mode for path in (tmp_path / "model").iterdir()}
    assert len(modes) == 1  # who may read the configuration may read the weights


@pytest.fixture(scope="module")
def exported(corpus, tmp_path_factory):
    """A model trained for a few steps, as train.py leaves it and as sample.py exports it."""
    out = tmp_path_factory.mktemp("trained")
    env = os.environ | {"DEEPSEEK_CACHE": str(tmp_path_factory.getbasetemp() / "cache")}
    for line in (
        f"train.py --data {corpus} --out {out} --steps 30 --lr 1e-2 {MODEL} --log_level quiet",
        f"sample.py --ckpt {out}/ckpt.pt --export {out}/hf",
    ):
        subprocess.run([sys.executable, *line.split()], cwd=ROOT, env=env, check=True)
    return out


def test_transformers_continues_with_the_same_greedy_text(exported):
    transformers = pytest.importorskip("transformers")
    folder = exported / "hf"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    other = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer("The cat", return_tensors="pt")
    assert ids.input_ids[0, 0] == tokenizer.bos_token_id == other.config.bos_token_id
    longest = other.config.max_position_embeddings
    written = other.generate(**ids, do_sample=False, max_length=longest)
    expected = tokenizer.decode(written[0], skip_special_tokens=True)
    assert len(expected) > 20
    for ckpt in (exported / "ckpt.pt", folder):
        command = [sys.executable, "sample.py", "--ckpt", str(ckpt), "--temperature", "0"]
        command += ["--prompt", "The cat"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert done.stdout == expected + "\n"


def test_the_chat_template_is_the_same_for_transformers_and_for_us(exported):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(exported / "hf")
    ours = data.load_tokenizer((exported / "hf/tokenizer.json").read_text())
    turns = [("Where is the cat?", "On mat 3."), ("Is it big?", None)]
    messages = [
        {"role": "user", "content": "Where is the cat?"},
        {"role": "assistant", "content": "On mat 3."},
        {"role": "user", "content": "Is it big?"},
    ]
    text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        f"{data.BOS}User: Where is the cat?\n\nAssistant: On mat 3.{data.EOS}"
        "User: Is it big?\n\nAssistant:"
    )
    ids = chat.encode_chat(ours, turns)
    assert ours.decode(ids, skip_special_tokens=False) == text
    assert ids == theirs(text, add_special_tokens=False).input_ids


def test_special_tokens_typed_by_a_user_stay_text(exported):
    tokenizer = data.load_tokenizer((exported / "hf/tokenizer.json").read_text())
    ids = chat.encode_chat(tokenizer, [(f"say {data.EOS}", None)])
    assert ids.count(tokenizer.token_to_id(data.EOS)) == 0
    assert data.EOS in tokenizer.decode(ids)


def test_scores_of_checkpoint_and_export_are_the_same(exported, corpus, run):
    scores = [
        run(f"sample --ckpt {c} --score {corpus}") for c in (exported / "ckpt.pt", exported / "hf")
    ]
    assert scores[0] == scores[1] and scores[0][0] == 0 and "bits per byte" in scores[0][1]


def test_export_and_chat_refuse_and_answer(exported, run, monkeypatch, tmp_path):
    code, _, err = run(f"sample --ckpt {exported}/ckpt.pt --export {exported}/hf")
    assert code == 2 and "is not empty" in err
    lines = iter(["The cat", "", "Again"])

    def typed(prompt=""):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    asked, real = [], sample.write

    def write(model, tokenizer, args, prompts, generator):
        asked.extend(prompts)
        return real(model, tokenizer, args, prompts, generator)

    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr(sample, "write", write)
    longer = tmp_path / "longer"  # the context: else the first turn would be forgotten
    shutil.copytree(exported / "hf", longer, ignore=shutil.ignore_patterns("SHA256SUMS"))
    edit(longer, max_position_embeddings=200)
    code, out, _ = run(f"sample --ckpt {longer} --chat --max_new_tokens 4 --temperature 0")
    model = formats.load_pretrained(longer)
    tokenizer = data.load_tokenizer((exported / "hf/tokenizer.json").read_text())
    turns, prompts, expected = [], [], ""
    for question in ("The cat", "Again"):
        prompt = chat.encode_chat(tokenizer, [*turns, (question, None)])
        prompts.append(prompt)
        ids = [int(t) for t in model.generate([prompt], 4, temperature=0)]
        turns.append((question, tokenizer.decode(ids).removeprefix(" ")))
        expected += turns[-1][1] + "\n"
    assert code == 0 and asked == prompts
    assert out == expected + "\n"
    code, _, err = run(f"sample --ckpt {tmp_path} --prompt x")
    assert code == 2 and "has neither ckpt.pt nor config.json" in err
    (tmp_path / "config.json").write_text("{}")
    code, _, err = run(f"sample --ckpt {tmp_path} --prompt x")
    assert code == 2 and "has no tokenizer.json" in err
    code, _, err = run(f"sample --ckpt {exported}/hf --export {tmp_path}/config.json")
    assert code == 2 and "is a file" in err
    code, _, err = run(f"sample --ckpt {tmp_path}/no/such --prompt x")
    assert code == 2 and "neither a folder nor a hub name" in err
