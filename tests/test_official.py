"""Official checkpoints: read, refused, written, and read again by transformers."""

import io
import json
import os
import shutil
import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch
from conftest import GROUPS, MODEL, ROOT, YARN, random_model, small
from safetensors.torch import load_file, save_file

import sample
import train
from common import chat, data, formats
from common.runtime import UsageError
from deepseek import Config, ConfigError, DeepSeek, add_lora

IDS = torch.arange(60).view(2, 30) % 96
ALL = GROUPS | YARN | dict(q_lora_rank=28)


@pytest.fixture
def folder(tmp_path):
    formats.save_pretrained(random_model(small(**ALL)), tmp_path / "model")
    return tmp_path / "model"


def edit(folder, **changes):
    path = folder / "config.json"
    record = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in record.items() if v != "absent"}))


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def test_the_released_config_is_read_to_the_last_field(tmp_path):
    def read(record):
        (tmp_path / "config.json").write_text(json.dumps(record))
        return formats.read_config(tmp_path)

    record = dict(
        architectures=["DeepseekV2ForCausalLM"], attention_bias=False, attention_dropout=0.0,
        aux_loss_alpha=0.001, bos_token_id=100000, eos_token_id=100001, first_k_dense_replace=1,
        hidden_act="silu", hidden_size=2048, initializer_range=0.02, intermediate_size=10944,
        kv_lora_rank=512, max_position_embeddings=163840, model_type="deepseek_v2",
        moe_intermediate_size=1408, moe_layer_freq=1, n_group=1, n_routed_experts=64,
        n_shared_experts=2, norm_topk_prob=False, num_attention_heads=16, num_experts_per_tok=6,
        num_hidden_layers=27, num_key_value_heads=16, pretraining_tp=1, q_lora_rank=None,
        qk_nope_head_dim=128, qk_rope_head_dim=64, rms_norm_eps=1e-6,
        rope_scaling=dict(beta_fast=32, beta_slow=1, factor=40, mscale=0.707, type="yarn",
                          mscale_all_dim=0.707, original_max_position_embeddings=4096),
        rope_theta=10000, routed_scaling_factor=1.0, scoring_func="softmax", seq_aux=True,
        tie_word_embeddings=False, topk_group=1, topk_method="greedy", torch_dtype="bfloat16",
        transformers_version="4.33.1", use_cache=True, v_head_dim=128, vocab_size=102400,
    )  # fmt: skip
    expected = Config.preset("v2-lite", initializer_range=0.02)
    assert read(record) == read(record | dict(n_group=None, topk_group=None)) == expected
    silent = dict(routed_scaling_factor=1, first_k_dense_replace=0, moe_layer_freq=1)
    for field, value in dict(**silent, q_lora_rank=1536).items():
        assert getattr(read({k: v for k, v in record.items() if k != field}), field) == value
    newer = dict(rope_parameters=dict(rope_type="default", rope_theta=500))  # counts, if both are
    for changes in (dict(rope_scaling=None, rope_theta=500), newer):
        plain = read(record | changes)
        assert (plain.rope_scaling, plain.rope_theta) == (None, 500)


def test_any_shards_are_read_and_experts_singly_or_stacked(folder):
    model, path = formats.load_pretrained(folder), folder / "model.safetensors"
    for state in (load_file(path), dict(model.state_dict())):
        path.unlink(missing_ok=True)
        for i in range(3):
            part = {name: state[name] for name in sorted(state)[i::3]}
            save_file(part, folder / f"model-{i}.safetensors")
        assert torch.equal(logits(formats.load_pretrained(str(folder))), logits(model))


def test_dtype_is_that_of_the_files_or_as_asked(folder, tmp_path):
    model = formats.load_pretrained(folder, torch.bfloat16)
    formats.save_pretrained(model, tmp_path)
    assert '"torch_dtype": "bfloat16"' in (tmp_path / "config.json").read_text()
    for dtype in (None, torch.float32):
        again = formats.load_pretrained(tmp_path, dtype)
        assert {p.dtype for p in again.parameters()} == {dtype or torch.bfloat16}
    assert torch.equal(again.lm_head.weight, model.lm_head.weight.float())
    assert formats.load_pretrained(folder, device="meta").lm_head.weight.is_meta


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="nobody tells the peak memory")
def test_loading_takes_the_model_and_one_shard(tmp_path):
    wide = dict(hidden_size=384, moe_intermediate_size=512, n_routed_experts=24)
    model = DeepSeek(small(num_hidden_layers=6, **wide))
    size = 4 * model.num_parameters()[0]  # 300 MB
    formats.save_pretrained(model, tmp_path, shard_bytes=30_000_000)
    code = (
        "import safetensors.torch; from benchmarks.speed import *; from common import formats\n"
        "with torch.device('meta'): DeepSeek(Config())\n"  # torch's own memory
        "before = peak_memory(); formats.load_pretrained(sys.argv[1])\n"
        "print(peak_memory() - before)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert size <= int(done.stdout) < size + 2 * 30_000_000


def test_what_is_not_this_model_or_damaged_is_refused_in_a_sentence(folder):
    def refused(message):
        with pytest.raises((UsageError, ConfigError), match=message):
            formats.load_pretrained(folder)

    config, path = folder / "config.json", folder / "model.safetensors"
    text, whole = config.read_text(), load_file(path)
    built_in = "model_type hidden_act scoring_func attention_bias mlp_bias tie_word_embeddings"
    for changes, message in (
        *[({name: "V3"}, f"has {name} = 'V3'; this program builds") for name in built_in.split()],
        (dict(num_key_value_heads=1), "num_key_value_heads = 1; this program builds 3"),
        (dict(quantization_config={"quant_method": "fp8"}), "'fp8'}; this program builds None"),
        (dict(model_type="absent"), "has model_type = None"),
        (dict(hidden_size="absent"), "the configuration lacks 'hidden_size'"),
        (dict(vocab_size=2**31 - 1), r"has \[96, 48\] for lm_head.weight"),
        (dict(topk_method="noaux_tc"), "'noaux_tc'"),
        (dict(rope_scaling={"type": "linear", "factor": 2.0}), "'linear'"),
    ):
        edit(folder, **changes)
        refused(message)
        config.write_text(text)
    name = "model.layers.2.mlp.experts.7.up_proj.weight"
    for changes, message in (
        ({name: None}, rf"has nothing for {name}, where \[24, 48\] fits"),
        ({name: whole[name][:5]}, rf"has \[5, 48\] for {name}, where \[24, 48\] fits"),
        ({name: whole[name].to(torch.int8)}, f"holds {name} in torch.int8: give it in bf16"),
        ({"lm_head.bias": torch.zeros(96)}, r"has \[96\] for lm_head.bias, where nothing fits"),
    ):
        save_file({k: v for k, v in (whole | changes).items() if v is not None}, path)
        refused(message)
    save_file(whole, path)
    save_file({name: whole[name]}, folder / "model-2.safetensors")
    refused(f"model.safetensors holds {name}, as another file does")
    for length in (0, 5, 100, path.stat().st_size - 1):
        (folder / "model-2.safetensors").write_bytes(path.read_bytes()[:length])
        refused("model-2.safetensors is missing, damaged or cut short")
    (folder / "model-2.safetensors").unlink()
    path.rename(folder / "pytorch_model.bin")
    refused(r"has no model\*.safetensors: \*.bin and other pickles are not read")
    for text in ("{", "[]", "\xff"):
        config.write_text(text, encoding="latin-1")
        refused("config.json is damaged")


def test_what_is_needed_is_fetched_from_the_hub(folder, tmp_path, monkeypatch):
    def fetch(name, allow_patterns):
        assert allow_patterns == ["config.json", "tokenizer.json", "model*.safetensors"]
        return {"somebody/a-model": folder}[name]

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name in ("nobody/no-such-model", "no/such/model"):  # the latter cannot be one of the hub
        with pytest.raises(UsageError, match=f"^{name} is not a folder here and cannot be fetched"):
            formats.load_pretrained(name)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert formats.load_pretrained("somebody/a-model").config.n_group == 4


@pytest.mark.parametrize("overrides, shard_bytes", [({}, 10**9), (ALL, 50_000)])
def test_files_pass_to_transformers_and_back_unchanged(overrides, shard_bytes, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = random_model(small(aux_loss_alpha=0.02, rope_theta=500.0, **overrides))
    formats.save_pretrained(model, tmp_path, 20_000)  # and over it: nothing of it may stay
    formats.save_pretrained(model, tmp_path, shard_bytes)
    files = list(tmp_path.glob("*.safetensors"))
    assert len(files) > 5 or not overrides
    assert max(sum(t.nbytes for t in load_file(file).values()) for file in files) <= shard_bytes
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1  # all may be read alike
    # files of other names are left alone
    save_file({"lm_head.weight": torch.zeros(96, 48)}, tmp_path / "adapter_model.safetensors")
    assert torch.equal(logits(formats.load_pretrained(tmp_path)), logits(model))
    other, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (logits(other) - logits(model)).abs().max() <= 1e-5 * logits(model).abs().max()
    other.save_pretrained(tmp_path / "theirs")
    back = formats.load_pretrained(tmp_path / "theirs")
    assert torch.equal(logits(back), logits(model)) and back.config == model.config


def test_a_disk_that_fills_up_costs_no_weights_that_were_there(tmp_path, monkeypatch):
    model = random_model(small())
    formats.save_pretrained(model, tmp_path, 20_000)
    monkeypatch.setattr(formats, "save_file", Mock(side_effect=OSError(28, "No space left")))
    with pytest.raises(UsageError, match="No space left"):
        formats.save_pretrained(model, tmp_path)
    assert torch.equal(logits(formats.load_pretrained(tmp_path)), logits(model))


def test_what_only_this_program_computes_stays_out(tmp_path):
    model = DeepSeek(small(n_group=4, topk_group=2))  # greedy: all groups are allowed
    formats.save_pretrained(model, tmp_path)
    assert formats.load_pretrained(tmp_path).config.topk_group == 4
    assert "norm_topk_prob" not in (tmp_path / "config.json").read_text()  # LOCAL, and neutral
    add_lora(model)
    for other in (model, DeepSeek(small()).to("meta")):
        with pytest.raises(UsageError, match="with adapters or on the meta device"):
            formats.save_pretrained(other, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2  # what was there is not deleted


@pytest.fixture(scope="module")
def exported(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEEPSEEK_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        for script, flags in (
            (train, f"--data {corpus} --out {out} --steps 30 --lr 1e-2 --log_level quiet {MODEL}"),
            (sample, f"--ckpt {out}/ckpt.pt --export {out}/hf"),
        ):
            patch.setattr(sys, "argv", ["", *flags.split()])
            script.main()
    return out


def test_transformers_continues_and_chats_with_the_same_tokens(exported, run):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported / "hf")
    ours = data.load_tokenizer((exported / "hf/tokenizer.json").read_text())
    other = transformers.AutoModelForCausalLM.from_pretrained(exported / "hf")
    ids = tokenizer("The cat", return_tensors="pt")
    assert ids.input_ids[0, 0] == tokenizer.bos_token_id == other.config.bos_token_id
    written = other.generate(**ids, do_sample=False, max_length=32)  # all of the context
    expected = tokenizer.decode(written[0], skip_special_tokens=True)
    for ckpt in ("ckpt.pt", "hf"):
        command = f"sample --ckpt {exported}/{ckpt} --temperature 0 --prompt".split()
        assert run([*command, "The cat"])[:2] == (0, expected + "\n")
    prompts = ["The cat sat on", "A"]  # of different lengths, so padded on the left
    ids = tokenizer(prompts, return_tensors="pt", padding=True)
    written = other.generate(**ids, do_sample=False, max_new_tokens=8)[:, -8:]
    model = formats.load_pretrained(exported / "hf")
    rows = [data.encode_with_bos(ours, prompt) for prompt in prompts]
    said = torch.stack(list(model.generate(rows, 8, temperature=0)), 1)
    assert torch.equal(said, written)
    said = ("user", "Where is the cat?"), ("assistant", "On mat 3."), ("user", "Is it big?")
    messages = [{"role": role, "content": content} for role, content in said]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        f"{data.BOS}User: Where is the cat?\n\nAssistant: On mat 3.{data.EOS}"
        "User: Is it big?\n\nAssistant:"
    )
    ids = chat.encode_chat(ours, [("Where is the cat?", "On mat 3."), ("Is it big?", None)])
    assert ids == tokenizer(text, add_special_tokens=False).input_ids


def test_a_chat_goes_on_from_all_that_was_said(exported, run, monkeypatch, tmp_path):
    longer = shutil.copytree(exported / "hf", tmp_path / "longer")
    edit(longer, max_position_embeddings=200)  # else the first turn would be forgotten
    asked, stream = [], sample.Speaker.stream
    monkeypatch.setattr(
        sample.Speaker, "stream", lambda self, rows: asked.extend(rows) or stream(self, rows)
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO("The cat\n\nAgain\n"))
    code, out, _ = run(f"sample --ckpt {longer} --chat --max_new_tokens 12 --temperature 0")
    answer = out.splitlines()[0].removeprefix("> ")
    assert code == 0 and answer and answer[0] != " "
    tokenizer = data.load_tokenizer((longer / "tokenizer.json").read_text())
    for turns in ([("The cat", None)], [("The cat", answer), ("Again", None)]):
        assert asked.pop(0) == chat.encode_chat(tokenizer, turns)


def test_an_export_replaces_nothing_and_wants_its_tokenizer(exported, run, tmp_path):
    for target, said in (("hf", "is a file or is not empty"), ("ckpt.pt", "is there already")):
        before = (exported / "ckpt.pt").read_bytes()
        code, _, err = run(f"sample --ckpt {exported} --export {exported}/{target}")
        assert code == 2 and said in err and (exported / "ckpt.pt").read_bytes() == before
    (tmp_path / "config.json").write_text("{}")
    code, _, err = run(f"sample --ckpt {tmp_path} --prompt x")
    assert code == 2 and "tokenizer.json does not exist: add that of the base" in err


def test_a_part_of_training_alone_starts_anew_when_a_folder_is_read(folder, monkeypatch):
    def two_heads(config):
        model = DeepSeek(config)
        model.second_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        model.second_head.training_only = True
        return model

    monkeypatch.setattr(formats, "DeepSeek", two_heads)
    weight = formats.load_pretrained(folder).second_head.weight
    assert weight.std().item() == pytest.approx(0.06, rel=0.1)  # and not memory as it was found
