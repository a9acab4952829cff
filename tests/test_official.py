"""Official checkpoints: read, refused, written, and read again by transformers."""

import io
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import GROUPS, MODEL, ROOT, YARN, random_model, small
from safetensors.torch import load_file, save_file

import sample
import train
from common import chat, data, formats
from common.runtime import UsageError
from deepseek import Config, DeepSeek

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
    expected = Config.preset("v2-lite", initializer_range=0.02)
    assert read(record) == expected and read(record | dict(rope_theta=500)).rope_theta == 500
    # as transformers 5 spells it; where both spellings are there, the newer one counts
    yarn = record.pop("rope_scaling") | dict(rope_type="yarn", rope_theta=record.pop("rope_theta"))
    del yarn["type"]
    record |= dict(rope_parameters=yarn, q_lora_rank=0, n_group=None, topk_group=None)
    record |= dict(rope_scaling={"type": "default"})
    assert read(record) == expected
    silent = dict(routed_scaling_factor=1, first_k_dense_replace=0, moe_layer_freq=1)
    for field, value in dict(**silent, q_lora_rank=1536).items():
        assert getattr(read({k: v for k, v in record.items() if k != field}), field) == value
    for theta, rope in ((500, None), (None, dict(rope_type="default", rope_theta=500))):
        plain = read(record | dict(rope_parameters=rope, rope_scaling=None, rope_theta=theta))
        assert plain.rope_scaling is None and plain.rope_theta == 500


@pytest.mark.parametrize("stacked", [False, True])
def test_any_files_are_read_and_experts_singly_or_stacked(stacked, folder):
    model = formats.load_pretrained(folder)
    state = dict(model.state_dict()) if stacked else load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for i in range(3):
        part = {name: state[name] for name in sorted(state)[i::3]}
        save_file(part, folder / f"part-{i}.safetensors")
    assert torch.equal(logits(formats.load_pretrained(str(folder))), logits(model))


def test_dtype_is_that_of_the_files_or_as_asked(folder, tmp_path):
    model = formats.load_pretrained(folder, torch.bfloat16)
    formats.save_pretrained(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    for dtype, expected in ((None, torch.bfloat16), (torch.float32, torch.float32)):
        again = formats.load_pretrained(tmp_path, dtype)
        assert {p.dtype for p in again.parameters()} == {expected}
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


def test_what_is_not_this_model_is_refused_in_a_sentence(folder):
    whole = (folder / "config.json").read_text()
    built_in = "model_type hidden_act scoring_func attention_bias mlp_bias tie_word_embeddings"
    for changes, message in (
        *[({name: "V3"}, f"has {name} = 'V3'; this program builds") for name in built_in.split()],
        (dict(model_type="absent"), "model_type = None"),
        (dict(num_key_value_heads=1), "num_key_value_heads = 1"),
        (dict(quantization_config={"quant_method": "fp8"}), "quantised"),
        (dict(hidden_size="absent"), "cannot be built: the configuration lacks 'hidden_size'"),
        (dict(topk_method="noaux_tc"), "'noaux_tc'"),
        (dict(rope_scaling={"type": "linear", "factor": 2.0}), "'linear'"),
    ):
        (folder / "config.json").write_text(whole)
        edit(folder, **changes)
        with pytest.raises(UsageError, match=message):
            formats.load_pretrained(folder)


def test_missing_surplus_repeated_and_misshapen_tensors_are_named(folder):
    name, path = "model.layers.2.mlp.experts.7.up_proj.weight", folder / "model.safetensors"
    whole = load_file(path)
    down = name.replace("up_proj", "down_proj")
    for changes, message in (
        ({name: None}, f"{name} is missing in [^,]*$"),
        ({name: None, down: None}, "is missing in .*, and 1 more$"),
        ({name: whole[name][:5]}, rf"{name} of shape \[5, 48\], but .* \[24, 48\]"),
        ({name: whole[name].to(torch.float8_e4m3fn)}, f"{name} in F8_E4M3"),
        ({"model.layers.2.mlp.gate.bias": torch.zeros(8)}, "gate.bias, which config.json has no"),
    ):
        save_file({k: v for k, v in (whole | changes).items() if v is not None}, path)
        with pytest.raises(UsageError, match=message):
            formats.load_pretrained(folder)
    save_file(whole, path)
    save_file({name: whole[name]}, folder / "other.safetensors")
    with pytest.raises(UsageError, match=f"other.safetensors holds {name}, which was there before"):
        formats.load_pretrained(folder)


def test_damaged_missing_and_foreign_files_are_named(folder):
    def refused(message):
        with pytest.raises(UsageError, match=message):
            formats.load_pretrained(folder)

    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for length in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        weights.write_bytes(whole[:length])
        refused("model.safetensors cannot be read")
    weights.unlink()
    torch.save({}, folder / "pytorch_model.bin")
    refused("no .*safetensors: other formats")
    for text, message in (
        ('{"weight_map": {"lm_head.weight": "gone.safetensors"}}', "gone.safetensors is missing"),
        ('{"weight_map": {}}', "index.json names no file"),
        ("[1, 2", "index.json cannot be read"),
    ):
        (folder / "model.safetensors.index.json").write_text(text)
        refused(message)
    for text, message in (("{", "damaged"), ("[]", "no object")):
        (folder / "config.json").write_text(text)
        refused(message)
    (folder / "config.json").unlink()
    refused("has no config.json")


def test_what_is_needed_is_fetched_from_the_hub(folder, tmp_path, monkeypatch):
    def fetch(name, allow_patterns):
        kinds = ["*.safetensors", "*.safetensors.index.json", "config.json", "tokenizer.json"]
        assert name == "somebody/a-model" and sorted(allow_patterns) == kinds
        return str(folder)

    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.snapshot_download", fetch)
        assert formats.load_pretrained("somebody/a-model").config.n_group == 4
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UsageError, match="^nobody/no-such-model does not exist here and cannot be"):
        formats.load_pretrained("nobody/no-such-model")
    with pytest.raises(UsageError, match="neither a folder nor a hub name"):
        formats.load_pretrained("no/such/model")


@pytest.mark.parametrize("shard_bytes", [10**9, 50_000])
@pytest.mark.parametrize("overrides", [{}, ALL])
def test_files_pass_to_transformers_and_back_unchanged(overrides, shard_bytes, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = random_model(small(aux_loss_alpha=0.02, **overrides))
    formats.save_pretrained(model, tmp_path, 20_000)  # and over it: nothing of it may stay
    formats.save_pretrained(model, tmp_path, shard_bytes)
    files = list(tmp_path.glob("*.safetensors"))
    assert len(files) == 1 if shard_bytes == 10**9 else len(files) > 5
    assert max(sum(t.nbytes for t in load_file(file).values()) for file in files) <= shard_bytes
    if len(files) > 1:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == 4 * model.num_parameters()[0]
        # beside an index other files are left alone
        save_file({"lm_head.weight": torch.zeros(96, 48)}, tmp_path / "adapter_model.safetensors")
    again = formats.load_pretrained(tmp_path)
    assert again.config == model.config
    pairs = zip(model.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    other, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (logits(other) - logits(model)).abs().max() <= 1e-5 * logits(model).abs().max()
    other.save_pretrained(tmp_path / "theirs")
    back = formats.load_pretrained(tmp_path / "theirs")
    assert torch.equal(logits(back), logits(model)) and back.config == model.config


def test_what_the_format_cannot_say_is_left_out_or_refused(tmp_path):
    for name, value in dict(norm_topk_prob=True, moe_layer_freq=2).items():
        with pytest.raises(UsageError, match=f"{name} = {value} cannot be exported"):
            formats.save_pretrained(DeepSeek(small(**{name: value})), tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
    model = DeepSeek(small(n_group=4, topk_group=2))  # greedy: all groups are allowed
    model.second_head = torch.nn.Linear(4, 4)
    model.second_head.training_only = True
    formats.save_pretrained(model, tmp_path)
    assert formats.load_pretrained(tmp_path).config.topk_group == 4
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1  # who may read the configuration may read the weights
    with pytest.raises(UsageError, match="config.json cannot be written: "):
        formats.save_pretrained(model, tmp_path / "config.json")
    with pytest.raises(UsageError, match="meta device"):
        formats.save_pretrained(model.to("meta"), tmp_path)


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


def test_transformers_continues_with_the_same_greedy_text(exported, run):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported / "hf")
    other = transformers.AutoModelForCausalLM.from_pretrained(exported / "hf")
    ids = tokenizer("The cat", return_tensors="pt")
    assert ids.input_ids[0, 0] == tokenizer.bos_token_id == other.config.bos_token_id
    written = other.generate(**ids, do_sample=False, max_length=32)  # all of the context
    expected = tokenizer.decode(written[0], skip_special_tokens=True)
    for ckpt in ("ckpt.pt", "hf"):
        command = ["sample", "--ckpt", f"{exported}/{ckpt}", "--temperature", "0"]
        assert run([*command, "--prompt", "The cat"])[:2] == (0, expected + "\n")


def test_the_chat_template_is_the_same_for_transformers_and_for_us(exported):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(exported / "hf")
    ours = data.load_tokenizer((exported / "hf/tokenizer.json").read_text())
    said = ("user", "Where is the cat?"), ("assistant", "On mat 3."), ("user", "Is it big?")
    messages = [{"role": role, "content": content} for role, content in said]
    text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        f"{data.BOS}User: Where is the cat?\n\nAssistant: On mat 3.{data.EOS}"
        "User: Is it big?\n\nAssistant:"
    )
    ids = chat.encode_chat(ours, [("Where is the cat?", "On mat 3."), ("Is it big?", None)])
    assert ids == theirs(text, add_special_tokens=False).input_ids


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


def test_an_export_scores_as_its_checkpoint_and_replaces_nothing(exported, corpus, run, tmp_path):
    scores = [run(f"sample --ckpt {exported}/{c} --score {corpus}") for c in ("ckpt.pt", "hf")]
    assert scores[0] == scores[1] and scores[0][0] == 0 and "bits per byte" in scores[0][1]
    for folder, message in (("hf", "is not empty"), ("ckpt.pt", "is a file")):
        code, _, err = run(f"sample --ckpt {exported}/hf --export {exported}/{folder}")
        assert code == 2 and message in err
    for message in ("neither ckpt.pt nor config.json", "no tokenizer.json"):
        code, _, err = run(f"sample --ckpt {tmp_path} --prompt x")
        assert code == 2 and message in err
        (tmp_path / "config.json").write_text("{}")


def test_a_part_of_training_alone_starts_anew_when_a_folder_is_read(tmp_path, monkeypatch):
    class TwoHeads(DeepSeek):
        def __init__(self, config):
            super().__init__(config)
            self.second_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            self.second_head.training_only = True

    formats.save_pretrained(random_model(small()), tmp_path)
    monkeypatch.setattr(formats, "DeepSeek", TwoHeads)
    weight = formats.load_pretrained(tmp_path).second_head.weight
    assert weight.std().item() == pytest.approx(0.06, rel=0.1)  # and not memory as it was found
    assert formats.read_config(tmp_path) == small()
    assert "norm_topk_prob" not in (tmp_path / "config.json").read_text()  # LOCAL, and neutral
