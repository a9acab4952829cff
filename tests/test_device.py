"""What must hold on every device: `pytest --device cuda` runs this file on a card. Without one,
tensors without memory tell what a card would wait for."""

from contextlib import nullcontext

import pytest
import torch
from conftest import GROUPS, MODEL, YARN, log_of, oracle, random_model, small

from common import runtime, trainer
from common.runtime import UsageError, autocast, choose_dtype
from deepseek import DeepSeek, Experts, sample

EVERYTHING = GROUPS | YARN | dict(q_lora_rank=28)
TRAINING = dict(token_drop_capacity=1.0, comm_loss_alpha=0.02)
IDS = torch.arange(60).view(2, 30) % 96


def close(a, b, relative):
    assert (a - b).abs().max() <= relative * b.abs().max()


# --- which device --------------------------------------------------------------------------------


@pytest.fixture
def cards(monkeypatch):
    """A machine with two CUDA cards, as far as a torch without CUDA can play it: the numbers that
    the driver was given."""
    given, zeros = [], torch.zeros

    def probe(n, device):
        given.append(device)
        return zeros(n)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", given.append, raising=False)
    monkeypatch.setattr(torch, "zeros", probe)
    return given


def test_a_card_is_taken_by_its_number(cards, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    for name, index in (("auto", 0), ("cuda", 0), ("cuda:1", 1)):
        cards.clear()
        device = torch.device("cuda", index)
        assert runtime.choose_device(name) == device and cards == [index, device]
    monkeypatch.setenv("LOCAL_RANK", "0")  # left over, without torchrun
    assert runtime.choose_device("cuda:1") == torch.device("cuda", 1)
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    for own, index in (("1", 1), ("0", 0), ("", 1)):  # torchrun's word counts, where it says one
        cards.clear()
        monkeypatch.setenv("LOCAL_RANK", own)
        assert runtime.choose_device("cuda:1") == torch.device("cuda", index) and cards[0] == index
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UsageError, match="'cuda:2' is not there: this machine has 2 CUDA cards"):
        runtime.choose_device("auto")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert runtime.choose_device("auto") == torch.device("mps")


@pytest.mark.parametrize("module, name", [(torch._C, "_cuda_setDevice"), (torch, "zeros")])
def test_a_card_in_use_by_others_or_too_old_is_a_sentence(cards, monkeypatch, module, name):
    def fail(*_, **__):
        raise RuntimeError("CUDA error: no kernel image is available\nmore lines")

    monkeypatch.setattr(module, name, fail, raising=False)
    with pytest.raises(UsageError, match=r"does not compute \(CUDA error: no kernel .* available"):
        runtime.choose_device("cuda")


def test_the_processes_of_cards_meet_by_nccl(monkeypatch):
    asked = []
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):  # as torchrun sets them
        monkeypatch.setenv(name, "0")
    monkeypatch.setattr(runtime.dist, "init_process_group", lambda *a, **k: asked.extend([a, k]))
    runtime.init_distributed(torch.device("cuda:1"))
    assert asked[0] == ("nccl",) and asked[1]["device_id"] == torch.device("cuda:1")
    assert asked[1]["timeout"].total_seconds() >= 3600  # one process may prepare a long text


@pytest.mark.parametrize("name", ["cuda", "cuda:7", "mps", "xpu", "meta", "gpu", "cuda:x"])
def test_a_device_that_is_not_there_is_a_sentence(name):
    with pytest.raises(UsageError, match=f"device '{name}' is"):
        runtime.choose_device(name)


# --- without a card: nothing is made on the CPU, nothing waits for a value -----------------------


@pytest.fixture
def on_meta(monkeypatch):
    """A model without memory that takes the way of a card."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)  # they know no meta
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(Experts, "can_group", lambda *_: True)

    def build(**overrides):
        with torch.device("meta"):
            return DeepSeek(small(**overrides)).bfloat16()

    return build


# a vocabulary so large that the loss is taken in chunks costs nothing without memory
@pytest.mark.parametrize("overrides", [{}, EVERYTHING | TRAINING, dict(vocab_size=2**20)])
def test_a_training_step_waits_for_nothing(on_meta, overrides):
    model, ids = on_meta(**overrides), IDS.to("meta")
    optimizer = torch.optim.AdamW(model.parameters())  # fused as on a card, it knows no meta
    for checkpointing in (False, True):
        out = model(ids, ids, checkpoint_activations=checkpointing)
        (out.loss + out.aux_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


@pytest.mark.parametrize("overrides", [{}, EVERYTHING])
@torch.no_grad()
def test_a_prompt_and_a_token_of_decoding_wait_for_nothing(on_meta, overrides):
    model, ids = on_meta(**overrides).eval(), IDS.to("meta")
    cache = model.new_cache(2, 40)
    assert model(ids, cache=cache).logits.is_meta
    cache.lengths = [30, 20]
    for absorb in (True, False):
        assert model(ids[:, :1], cache=cache, absorb=absorb).logits.is_meta
    logits = model.decode(ids[:, 0], ids[:, 1], cache.latents)
    assert sample(logits, top_k=5, top_p=0.9).is_meta


# --- on the device -------------------------------------------------------------------------------


@pytest.mark.parametrize("overrides", [{}, EVERYTHING])
@torch.no_grad()
def test_logits_are_those_of_transformers_uncached_and_cached_in_pieces(device, overrides):
    model = random_model(small(**overrides))
    other = oracle(model.config)
    other.load_state_dict(model.state_dict())
    model, ids = model.to(device), IDS.to(device)
    expected = other.to(device)(ids).logits
    # A card sums in other orders, and takes some products of fp32 apart into three of TF32.
    relative = 1e-5 if device.type == "cpu" else 1e-4
    close(model(ids).logits, expected, relative)
    for absorb in (True, False):
        cache = model.new_cache(2, 30)
        pieces = [model(p, cache=cache, absorb=absorb).logits for p in ids.split([17, 1, 12], 1)]
        close(torch.cat(pieces, 1), expected, relative)


def test_compiled_blocks_and_loss_have_the_gradients_of_eager_ones(device):
    if device.type == "cpu":
        pytest.skip("test_model has it")
    model = random_model(small(moe_intermediate_size=32)).train().to(device)
    ids, found = IDS.to(device), []
    for stance in ("force_eager", "default"):
        with torch.compiler.set_stance(stance), autocast(device, choose_dtype("auto", device)):
            out = model(ids, ids.roll(-1, 1))
        found.append(torch.autograd.grad(out.loss + out.aux_loss, [*model.parameters()]))
        trainer.compile_parts(model)
    apart = [(c - e).abs().max() / e.abs().max() for e, c in zip(*found, strict=True)]
    # in the median: rounding may send a token to another expert, whose gradient then differs
    assert torch.stack(apart).median() < 0.04


@pytest.mark.parametrize("rows, dtype", [(1, "float32"), (16, "bfloat16"), (30, "float32")])
def test_compiled_decoding_says_what_eager_decoding_says(device, rows, dtype):
    if device.type == "cpu":
        pytest.skip("test_model has it, and it takes half a minute")
    config = small(hidden_size=48, moe_intermediate_size=32)
    model = random_model(config).to(device, getattr(torch, dtype))
    prompts = [[3 + i, 5, 7][: 1 + i % 3] for i in range(rows)]
    how = dict(temperature=0, stop=int(next(model.generate([[3]], 1, temperature=0))))
    runs = [list(model.generate(prompts, 40, compiled=c, **how)) for c in (False, True, True)]
    eager, *compiled = (torch.stack(run, 1) for run in runs)
    for tokens in compiled:  # bf16 may decide otherwise between near ties
        assert (tokens == eager).float().mean() > (0.8 if dtype == "bfloat16" else 0.999)


# Sums are rounded at each step, and in other orders; fp16 has 11 bits, bf16 8.
ROUNDED = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", ROUNDED)
def test_the_fast_experts_learn_as_the_loop_does(dtype, device):
    torch.manual_seed(0)
    experts = Experts(small(hidden_size=48, moe_intermediate_size=32)).to(device, dtype)
    for p in experts.parameters():
        torch.nn.init.normal_(p, 0, 0.1)
    x = torch.randn(200, 48, device=device, dtype=dtype)
    index = torch.rand(200, 8, device=device).topk(3).indices
    weights = torch.rand(200, 3, device=device)
    results = []
    for run in (experts.looped, experts.grouped):
        given = x.clone().requires_grad_()
        y = run(given, index, weights, experts.gate_up_proj, experts.down_proj)
        loss = y.float().square().mean()
        gradients = torch.autograd.grad(loss, [given, *experts.parameters()])
        results.append([y, *gradients])
    for a, b in zip(*results, strict=True):
        close(a.float(), b.float(), ROUNDED[dtype])


# fp16 with the loss scaled; a compilation takes half a minute on a CPU, where test_train has it
@pytest.mark.parametrize("flags", ["float32", "bfloat16", "float16", "bfloat16 --compile on"])
def test_a_run_trains_resumes_speaks_is_fine_tuned_and_exported(
    run, corpus, tmp_path, device, flags
):
    if device.type == "cpu" and flags in ("float16", "bfloat16 --compile on"):
        pytest.skip("for a card")
    where, out = f"--log_level quiet --device {device}", tmp_path / "out"
    model = MODEL.replace("--dtype float32", f"--dtype {flags}")
    first = f"train {model} --data {corpus} --lr 0.01 --schedule constant {where}"
    assert run(f"{first} --steps 20 --out {out}") == (0, "", "")
    assert run(f"train --resume --steps 30 --out {out} {where}") == (0, "", "")
    records = [r for r in log_of(out)[1:] if "loss" in r or "skipped" in r]
    assert [r["step"] for r in records] == list(range(1, 31))
    assert records[-1]["loss"] < 0.7 * records[0]["loss"]
    ckpt = f"--ckpt {out}/ckpt.pt"
    tune = f"finetune {ckpt} --data {corpus} --steps 4 --batch_size 4 {where}"
    assert run(f"{tune} --out {tmp_path}/lora") == (0, "", "")
    speak = f"--prompt The --temperature 0 --max_new_tokens 12 --device {device}"
    code, said, _ = run(f"sample {ckpt} --lora {tmp_path}/lora {speak}")
    assert code == 0 and len(said.split()) > 3
    code, _, err = run(f"sample {ckpt} --lora {tmp_path}/lora --export {tmp_path}/hf")
    assert code == 0, err
    assert run(f"sample --ckpt {tmp_path}/hf {speak}")[1] == said
