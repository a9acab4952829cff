"""The model against an independent implementation, closed forms and the paper's numbers."""

import math
import re

import pytest
import torch
from conftest import GROUPS, YARN, oracle, random_model, small
from torch.nn import functional as F

import deepseek
from deepseek import (
    MLA,
    YARN_V2,
    Config,
    ConfigError,
    DeepSeek,
    Experts,
    Gate,
    RMSNorm,
    Routing,
    add_lora,
    apply_rotary_emb,
    balance_losses,
    drop_tokens,
    rope_angles,
    rope_frequencies,
    softmax_scale,
)

GRID = [
    pytest.param(q | g | y, id="-".join(names))
    for q, n1 in (({}, "direct"), (dict(q_lora_rank=28), "compressed"))
    for g, n2 in (({}, "greedy"), (GROUPS, "grouped"))
    for y, n3 in (({}, "rope"), (YARN, "yarn"))
    for names in [(n1, n2, n3)]
]
CHUNKS = ((0, 7), (7, 12), (12, 13), (13, 14), (14, 40))


def close(a, b, relative=1e-5):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= relative * b.abs().max(), (a - b).abs().max() / b.abs().max()


def in_chunks(model, ids, absorb):
    cache = model.new_cache(len(ids), 64)
    return torch.cat([model(ids[:, a:b], cache=cache, absorb=absorb).logits for a, b in CHUNKS], 1)


# --- the whole model ---------------------------------------------------------------------------


@pytest.mark.parametrize("absorb", [None, True, False])
@pytest.mark.parametrize("overrides", GRID)
@torch.no_grad()
def test_logits_equal_those_of_transformers(overrides, absorb):
    model = random_model(small(**overrides))
    other = oracle(model.config)
    other.load_state_dict(model.state_dict())  # the names are the official ones: no table needed
    ids = torch.randint(0, 96, (2, 40))
    expected = other(ids).logits
    close(model(ids, absorb=absorb).logits, expected)
    close(in_chunks(model, ids, absorb), expected)


@pytest.mark.parametrize(
    "overrides",
    [
        dict(first_k_dense_replace=2),
        dict(first_k_dense_replace=0, n_group=4),
        dict(v_head_dim=24),  # wider than query and key
        dict(qk_rope_head_dim=2, **YARN),
        dict(rope_scaling=YARN_V2),  # dr = 8: the ramp's end is clamped
        dict(rope_scaling=YARN["rope_scaling"] | dict(beta_fast=1, beta_slow=1)),  # no ramp at all
        dict(rope_scaling=YARN["rope_scaling"] | dict(beta_fast=4, beta_slow=0.5)),
        dict(rope_scaling=YARN["rope_scaling"] | dict(mscale=0.5, mscale_all_dim=1.5)),
        dict(
            rope_scaling={
                k: YARN["rope_scaling"][k]
                for k in ("type", "factor", "original_max_position_embeddings")
            }
        ),
    ],
)
@torch.no_grad()
def test_further_shapes_equal_transformers(overrides):
    model = random_model(small(**overrides))
    other = oracle(model.config)
    other.load_state_dict(model.state_dict())
    ids = torch.randint(0, 96, (2, 30))
    close(model(ids).logits, other(ids).logits)


@pytest.mark.parametrize("overrides", [{}, GROUPS | YARN | dict(q_lora_rank=28)])
def test_gradients_equal_those_of_transformers(overrides):
    model = random_model(small(aux_loss_alpha=0.0, device_loss_alpha=0.0, **overrides)).train()
    other = oracle(model.config)
    other.load_state_dict(model.state_dict())
    ids, targets = torch.randint(0, 96, (2, 2, 24))
    model(ids, targets).loss.backward()
    F.cross_entropy(other(ids).logits.flatten(0, 1), targets.flatten()).backward()
    expected = dict(other.named_parameters())
    for name, p in model.named_parameters():
        close(p.grad, expected[name].grad, 1e-4)


@torch.no_grad()
def test_bfloat16_model_stays_near_float32():
    # every expert is taken: a near tie that rounding decides otherwise would hide all else
    model = random_model(small(num_experts_per_tok=8))
    ids = torch.randint(0, 96, (2, 40))
    exact = model(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        close(model(ids).logits.float(), exact, 0.05)
        close(in_chunks(model, ids, None).float(), exact, 0.05)


@torch.no_grad()
def test_a_model_cast_to_bfloat16_runs_in_bfloat16():
    model = random_model(small(num_experts_per_tok=8))
    ids = torch.randint(0, 96, (2, 40))
    exact = model(ids).logits
    model = model.bfloat16()
    assert model(ids).logits.dtype == torch.bfloat16
    close(model(ids).logits.float(), exact, 0.08)
    close(in_chunks(model, ids, None).float(), exact, 0.08)


@pytest.mark.parametrize("values", [12, 28])
@pytest.mark.parametrize("T, flash", [(2, False), (40, False), (512, False), (513, True)])
def test_bfloat16_attends_as_the_paper_writes_it(T, flash, values, monkeypatch):
    calls, real = [], F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or real(*a, **k)
    )
    torch.manual_seed(0)
    mla = MLA(small(v_head_dim=values, **YARN)).bfloat16()
    H, dn, dr, R = 3, mla.config.qk_nope_head_dim, mla.config.qk_rope_head_dim, 20
    torch.nn.init.normal_(mla.kv_b_proj.weight, std=0.3)
    shapes = (2, T, H, dn), (2, T, H, dr), (2, T, R), (2, T, dr)
    inputs = [torch.randn(shape).bfloat16().requires_grad_() for shape in shapes]
    exact = [x.detach().float().requires_grad_() for x in inputs]
    q_nope, q_pe, latent, k_pe = exact
    kv = (latent @ mla.kv_b_proj.weight.detach().float().T).unflatten(-1, (H, -1))
    scores = torch.einsum("bthd, bshd -> bhts", q_nope, kv[..., :dn])
    scores = (scores + torch.einsum("bthd, bsd -> bhts", q_pe, k_pe)) * mla.scale
    scores = scores.masked_fill(torch.arange(T) > torch.arange(T)[:, None], -torch.inf)
    wanted = torch.einsum("bhts, bshd -> bthd", scores.softmax(-1), kv[..., dn:])
    found = mla.expanded(*inputs, None)
    assert bool(calls) == flash
    close(found.float(), wanted, 0.02)
    grads = [
        torch.autograd.grad((out.float() * wanted.detach()).sum(), x)
        for out, x in ((found, inputs), (wanted, exact))
    ]
    for a, b in zip(*grads, strict=True):
        close(a.float(), b, 0.03)
    for x in inputs:
        x.data[:, -1] *= 30  # the last token cries out, and none before hears it
    assert torch.equal(mla.expanded(*inputs, None)[:, :-1], found[:, :-1])
    calls.clear()
    close(mla.float().expanded(*exact, None), wanted)
    assert calls  # fp32 always goes this way


@torch.no_grad()
def test_no_token_sees_a_later_one():
    for device in (
        ["cpu"]
        + ["cuda"] * torch.cuda.is_available()
        + ["mps"] * (torch.backends.mps.is_available())
    ):
        model = random_model(small()).to(device)
        ids = torch.randint(0, 96, (1, 20), device=device)
        changed = ids.clone()
        changed[:, 12:] = (changed[:, 12:] + 1) % 96
        a, b = model(ids).logits, model(changed).logits
        assert torch.allclose(a[:, :12], b[:, :12], atol=1e-6)
        assert not torch.allclose(a[:, 12:], b[:, 12:], atol=1e-3)


@pytest.mark.parametrize(
    "name, total, active, cached",
    [
        ("v2-lite", 15_706_484_224, 2_451_435_008, 15_552),
        ("v2", 235_741_434_880, 20_851_512_320, 34_560),
    ],
)
def test_parameters_and_cache_are_the_papers(name, total, active, cached):
    config = Config.preset(name)
    with torch.device("meta"):
        model = DeepSeek(config)
    assert model.num_parameters() == (total, active)
    with_embedding = {"v2-lite": 2_661_150_208, "v2": 21_375_800_320}[name]
    assert active + model.model.embed_tokens.weight.numel() == with_embedding
    with torch.device("meta"):
        assert model.new_cache(1, 1).latents.numel() == cached
    assert small().cache_per_token("mha") == 3 * 2 * 3 * 14  # layers, K and V, heads, dv
    kinds = {kind: config.cache_per_token(kind) for kind in ("mha", "gqa", "mqa", "mla")}
    assert (
        kinds
        == {
            "v2-lite": dict(mha=110_592, gqa=55_296, mqa=6_912, mla=15_552),
            "v2": dict(mha=1_966_080, gqa=122_880, mqa=15_360, mla=34_560),
        }[name]
    )
    attention = sum(p.numel() for p in model.model.layers[0].self_attn.parameters())
    assert attention == {"v2-lite": 13_763_072, "v2": 149_227_520}[name]


def test_the_table_of_symbols_tells_the_presets():
    number = r" +([\d,]+|none)"
    rows = re.findall(rf"([a-z_]+)(?:: .*)?{number * 3}$", deepseek.__doc__, re.MULTILINE)
    assert len(rows) == 16
    for name, *values in rows:
        name = "cache_dim" if name == "dr" else name  # C: "..., R + dr"
        for size, value in zip(("v2", "v2-lite", "tiny"), values, strict=True):
            value = None if value == "none" else int(value.replace(",", ""))
            assert getattr(Config.preset(size), name) == value, (name, size)


@pytest.mark.parametrize(
    "name, low, high", [("tiny", 2.5e6, 3.5e6), ("small", 27e6, 33e6), ("1b", 0.97e9, 1.03e9)]
)
def test_the_small_sizes_keep_every_idea(name, low, high):
    config = Config.preset(name)
    with torch.device("meta"):
        model = DeepSeek(config)
    assert low < model.num_parameters()[0] < high
    assert config.first_k_dense_replace == 1 and config.n_shared_experts >= 1
    assert config.moe_intermediate_size * 5 < config.intermediate_size  # fine-grained
    assert 6 * config.num_experts_per_tok < config.n_routed_experts * 2
    if name == "1b":
        assert config.q_lora_rank and config.topk_method == "greedy"
        # tiles of a card's grouped product are 128 wide
        assert config.n_routed_experts >= 64 and config.moe_intermediate_size % 128 == 0


def test_names_and_shapes_are_those_of_the_official_checkpoint():
    with torch.device("meta"):
        shapes = {
            k: list(v.shape) for k, v in DeepSeek(Config.preset("v2-lite")).state_dict().items()
        }
    assert shapes["lm_head.weight"] == [102400, 2048]  # not tied
    assert shapes["model.layers.0.mlp.gate_proj.weight"] == [10944, 2048]  # layer 0 is dense
    at = "model.layers.1."
    for name, shape in {
        "self_attn.q_proj.weight": [3072, 2048],
        "self_attn.kv_a_proj_with_mqa.weight": [576, 2048],
        "self_attn.kv_a_layernorm.weight": [512],
        "self_attn.kv_b_proj.weight": [4096, 512],
        "self_attn.o_proj.weight": [2048, 2048],
        "mlp.gate.weight": [64, 2048],
        "mlp.experts.gate_up_proj": [64, 2816, 2048],
        "mlp.experts.down_proj": [64, 2048, 1408],
        "mlp.shared_experts.gate_proj.weight": [2816, 2048],
        "mlp.shared_experts.up_proj.weight": [2816, 2048],
        "mlp.shared_experts.down_proj.weight": [2048, 2816],
        "input_layernorm.weight": [2048],
        "post_attention_layernorm.weight": [2048],
    }.items():
        assert shapes.pop(at + name) == shape
    assert not [k for k in shapes if k.startswith(at)]
    assert {"model.embed_tokens.weight", "model.norm.weight"} < set(shapes)
    assert not [k for k in shapes if k.startswith("model.layers.27")]


def test_every_second_layer_can_be_moe_and_none_need_be():
    model = random_model(small(num_hidden_layers=5, first_k_dense_replace=1, moe_layer_freq=2))
    assert [layer.is_moe for layer in model.model.layers] == [False, False, True, False, True]
    dense = random_model(small(first_k_dense_replace=3, n_shared_experts=0))
    out = dense(torch.zeros(1, 4, dtype=torch.long))
    assert out.expert_load.shape == (0, 8) and out.aux_loss == 0
    bare = random_model(small(n_shared_experts=0))
    assert not [name for name, _ in bare.named_parameters() if "shared" in name]
    assert torch.isfinite(bare(torch.zeros(1, 4, dtype=torch.long)).logits).all()


def test_a_copying_start_tells_later_tokens_what_came_and_the_head_reads_it_off():
    def own_logit_rank(start):  # of one early token, in the logits behind it; 0 = the highest
        torch.manual_seed(0)
        model = DeepSeek(Config.preset("tiny", vocab_size=2816, copying_start=start)).eval()
        ids = torch.randint(0, 2816, (40, 12))
        with torch.no_grad():
            logits = model(ids).logits[:, -1]
        own = logits.gather(1, ids[:, 3:4])
        return model, (logits > own).sum(1).float().mean().item()

    model, rank = own_logit_rank(0.4)
    assert rank < 0.2 * 2816 and abs(own_logit_rank(0.0)[1] / 2816 - 0.5) < 0.1
    embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
    assert embedding[:, :64].std().item() == pytest.approx(0.4, rel=0.02)
    assert torch.equal(head[:, 64:], embedding[:, :64] / 2)
    assert not embedding[:, 64:].any() and not head[:, :64].any()


@pytest.mark.parametrize("D", [50, 51])
@pytest.mark.parametrize("compressed", [dict(), dict(q_lora_rank=100)])
def test_a_copying_start_looks_for_what_is_expected_and_writes_what_it_read(compressed, D):
    half, R, dn, dr, dv = 25, 32, 12, 8, 26
    H = 2 if D == 50 else 3
    config = small(
        hidden_size=D, num_attention_heads=H, kv_lora_rank=R, qk_nope_head_dim=dn, v_head_dim=dv,
        copying_start=0.3, initializer_range=0.05, **compressed,
    )  # fmt: skip
    torch.manual_seed(0)
    model = DeepSeek(config)
    embedding, second = model.model.embed_tokens.weight, D - half  # where the second half begins
    assert embedding[:, :half].std().item() == pytest.approx(0.3, rel=0.05)
    for layer in model.model.layers:
        attention = layer.self_attn
        w_dkv, w_kr = attention.kv_a_proj_with_mqa.weight.split([R, dr])
        w_uk, w_uv = attention.kv_b_proj.weight.view(H, dn + dv, R).split([dn, dv], 1)
        w_o = attention.o_proj.weight.view(D, H, dv)
        q = attention.q_b_proj.weight if compressed else attention.q_proj.weight
        w_q, w_qr = q.view(H, dn + dr, -1).split([dn, dr], 1)
        assert not w_dkv[:, half:].any() and not w_o[:second].any()
        for w, std in ((w_o, 1.5 * 0.05), (w_q, 9 * 0.05), (w_kr, 0.05), (w_qr, 0.05)):
            assert w.std().item() == pytest.approx(std, rel=0.15 if std == 0.05 else 1e-4)
        assert w_kr[:, half:].std() > 0.03  # the position's key is read from everywhere
        if compressed:
            w_q = w_q @ attention.q_a_proj.weight
        for h in range(H):
            copied = w_o[:, h] @ w_uv[h] @ w_dkv  # reads the first half, writes the second
            path = copied[second:, :half]
            assert torch.allclose(path, path.T, atol=1e-5)
            assert torch.linalg.eigvalsh(path).min() > -1e-4
            liked = w_q[h].T @ w_uk[h] @ w_dkv  # x.T liked y: how much a query of x likes a key y
            same, other = liked[second:, :half].diagonal(), liked[second:, :half].flatten()
            assert same.mean() > 1.5 * other.std()


def test_initial_weights_have_the_stated_spread():
    model = DeepSeek(Config.preset("tiny", initializer_range=0.03, copying_start=0.0))
    for name, p in model.named_parameters():
        if p.dim() > 1:
            assert p.std().item() == pytest.approx(0.03, rel=0.05), name
        else:
            assert (p == 1).all(), name


def test_activation_checkpointing_changes_nothing(monkeypatch):
    calls, real = [], deepseek.checkpoint
    monkeypatch.setattr(deepseek, "checkpoint", lambda *a, **k: calls.append(1) or real(*a, **k))
    ids, targets = torch.randint(0, 96, (2, 2, 16))
    grads = []
    for keep in (False, True):
        model = random_model(small(token_drop_capacity=1.0, **GROUPS)).train()
        torch.manual_seed(3)  # the sequences exempt from dropping are drawn: the same ones again
        out = model(ids, targets, checkpoint_activations=keep)
        (out.loss + out.aux_loss).backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)
    assert len(calls) == 3  # one per layer


def test_compiled_without_a_graph_break(monkeypatch):
    model = random_model(small(num_hidden_layers=2, hidden_size=48, moe_intermediate_size=24))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    ids, targets = torch.randint(0, 96, (2, 2, 16))
    with torch.autocast("cpu", torch.bfloat16):
        close(compiled(ids, targets).loss, model(ids, targets).loss, 1e-3)
    calls, real = [], Experts.grouped
    monkeypatch.setattr(Experts, "grouped", lambda *args: calls.append(1) or real(*args))
    broken = torch.compile(model, backend="eager")  # in fp32 the experts run as they are
    close(broken(ids, targets).loss, model(ids, targets).loss)
    assert len(calls) == 2


@pytest.mark.parametrize(
    "dtype, can_group, tokens, untraced",
    [
        (torch.bfloat16, True, 20, []),
        (torch.bfloat16, False, 20, ["looped"]),
        (torch.float32, True, 20, ["grouped"]),
        (torch.float32, False, 2, []),  # gathered
    ],
)
def test_what_cannot_be_traced_is_kept_from_the_compiler(
    dtype, can_group, tokens, untraced, monkeypatch
):
    experts, kept = Experts(small()), []
    for p in experts.parameters():
        torch.nn.init.normal_(p)
    x = torch.randn(tokens, 48).to(dtype)
    index, weights = torch.randint(0, 8, (tokens, 2)), torch.rand(tokens, 2)
    monkeypatch.setattr(experts, "can_group", lambda device, dtype: can_group)
    expected = experts(x, index, weights)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(torch.compiler, "disable", lambda f: kept.append(f.__name__) or f)
    assert torch.equal(experts(x, index, weights), expected) and kept == untraced


def test_compiled_gradients_are_those_of_eager():
    model = random_model(small(num_hidden_layers=2, hidden_size=48, moe_intermediate_size=24))
    ids, targets = torch.randint(0, 96, (2, 2, 16))
    ends = [model.model.embed_tokens.weight, model.lm_head.weight]
    found = []
    for forward in (torch.compile(model, backend="aot_eager", fullgraph=True), model):
        with torch.autocast("cpu", torch.bfloat16):
            loss = forward(ids, targets).loss
        found.append(torch.autograd.grad(loss, ends))
    for compiled, eager in zip(*found, strict=True):
        close(compiled, eager, 1e-2)


@pytest.mark.parametrize("chunk", [1, 7, 30, 100])
def test_head_and_loss_in_one_give_the_loss_and_gradients_of_the_two(chunk):
    x = torch.randn(30, 48, requires_grad=True)
    weight = torch.randn(96, 48, requires_grad=True)
    targets = torch.randint(0, 96, (30,))
    targets[[2, 3, 4, 5, 6, 7, 8, 29]] = -100  # none counts in a whole chunk of one
    whole = F.cross_entropy(x @ weight.T, targets, reduction="sum")
    loss = deepseek.HeadLoss.apply(x, weight, targets, chunk)
    close(loss, whole)
    wanted = torch.autograd.grad(whole * 0.3, [x, weight])
    for found, expected in zip(torch.autograd.grad(loss * 0.3, [x, weight]), wanted, strict=True):
        close(found, expected)
    with pytest.raises((IndexError, RuntimeError)):  # another negative number is no sign
        deepseek.HeadLoss.apply(x, weight, targets.masked_fill(targets == -100, -1), chunk)
    again = deepseek.HeadLoss.apply(x, weight, targets, chunk)
    (first,) = torch.autograd.grad(again.square(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):  # and not a wrong one
        first.sum().backward()
    frozen = deepseek.HeadLoss.apply(x, weight.detach(), targets, chunk)
    close(torch.autograd.grad(frozen * 0.3, x)[0], wanted[0])


def test_head_and_loss_in_one_keep_gradients_alone_and_go_by_chunks(monkeypatch):
    rows, kept, real = [], [], torch.Tensor.log_softmax

    def log_softmax(logits, *args, **kwargs):
        rows.append(len(logits))
        return real(logits, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "log_softmax", log_softmax)
    x = torch.randn(250, 4, requires_grad=True)
    weight = torch.randn(200, 4, requires_grad=True)
    for head, shapes in ((weight, [weight.shape, x.shape]), (weight.detach(), [x.shape])):
        rows.clear(), kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape), id):
            deepseek.HeadLoss.apply(x, head, torch.zeros(250, dtype=torch.long), 100)
        assert sorted(kept) == shapes and rows == [100, 100, 50]


def test_the_heads_gradient_is_summed_in_float32():
    x = torch.ones(1000, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    loss = deepseek.HeadLoss.apply(x, weight, torch.zeros(1000, dtype=torch.long), 1)
    # a thousand halves: in bf16, 128 + 0.5 would stay 128
    assert torch.autograd.grad(loss, weight)[0].tolist() == [[-500], [500]]


def test_improbable_targets_cost_what_they_should():
    x, weight = torch.tensor([[1.0]], requires_grad=True), torch.tensor([[0.0], [500.0]])
    loss = deepseek.HeadLoss.apply(x, weight, torch.tensor([0]), 1)  # p = exp(-500) is 0 in fp32
    assert loss.item() == 500
    assert torch.autograd.grad(loss, x)[0].item() == 500


def test_which_way_the_loss_is_taken(monkeypatch):
    model = random_model(small())
    x, targets = torch.randn(1, 12_000, 48, requires_grad=True), torch.zeros(1, 12_000).long()
    chunks, rows, kept, real = [], [], [], deepseek.HeadLoss.apply
    monkeypatch.setattr(
        deepseek.HeadLoss, "apply", lambda *args: chunks.append(args[3]) or real(*args)
    )
    model.lm_head.register_forward_hook(lambda module, args, y: rows.append(len(y)))
    torch.autograd.grad(model.cross_entropy(x, targets), [x, model.lm_head.weight])
    assert (chunks, rows) == ([2**20 // 96], [])
    with torch.no_grad():
        model.cross_entropy(x, targets)
    assert len(chunks) == 1 and rows == [10_922, 1_078]
    with torch.autocast("cpu", torch.float16):
        model.cross_entropy(x, targets)
    assert len(chunks) == 1
    add_lora(model, targets=["lm_head"])
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()), id):
        model.cross_entropy(x, targets)
    assert len(chunks) == 1 and max(kept) <= x.numel()  # no logits: 96 for each token


def test_loss_is_the_same_with_an_adapted_head_in_fp16_and_without_gradients(monkeypatch):
    model = random_model(small()).train()
    x = torch.randn(300, 40, 48)  # 12,000 tokens: two chunks
    targets = torch.randint(0, 96, (300, 40))
    targets[1, 4:] = -100
    expected = _whole(model, x, targets)
    assert torch.allclose(model.cross_entropy(x, targets), expected)
    with torch.no_grad():
        assert torch.allclose(model.cross_entropy(x, targets), expected)
    nothing = torch.full_like(targets, -100)
    assert model.cross_entropy(x, nothing).item() == 0
    few = x[:8].clone().requires_grad_(), targets[:8]
    half, whole = random_model(small()).half(), random_model(small())
    with monkeypatch.context() as patch:  # what a scaler multiplies must not have vanished before
        patch.setattr(deepseek.HeadLoss, "apply", None)
        close(half.cross_entropy(few[0].half(), few[1]), _whole(whole, *few), 1e-2)
    add_lora(model, targets=["lm_head"], dropout=0.5)
    model.lm_head.lora_B.weight.data.normal_()
    close(model.eval().cross_entropy(x, targets), _whole(model, x, targets))
    torch.manual_seed(0)
    dropped = model.train().cross_entropy(x[:1], targets[:1])  # one chunk
    torch.manual_seed(0)
    whole = _whole(model, x[:1], targets[:1])
    close(dropped, whole)
    found, expected = (
        torch.autograd.grad(t, model.lm_head.lora_B.weight)[0] for t in (dropped, whole)
    )
    close(found, expected)  # the same dropout in the second forward pass


def _whole(model, x, targets):
    return F.cross_entropy(model.lm_head(x).flatten(0, 1), targets.flatten())


def test_cross_entropy_is_taken_in_float32():
    model = random_model(small()).bfloat16()
    x, targets = torch.randn(2, 40, 48).bfloat16(), torch.randint(0, 96, (2, 40))
    exact = F.cross_entropy(model.lm_head(x).float().flatten(0, 1), targets.flatten())
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            assert torch.allclose(model.cross_entropy(x, targets), exact, rtol=1e-4)


def test_loss_is_cross_entropy_alone_and_evaluation_has_no_balance_loss():
    model = random_model(small(aux_loss_alpha=5.0))
    ids, targets = torch.randint(0, 96, (2, 2, 16))
    expected = F.cross_entropy(model(ids).logits.flatten(0, 1), targets.flatten())
    out = model(ids, targets)
    close(out.loss, expected)
    assert isinstance(out.aux_loss, torch.Tensor) and out.aux_loss == 0
    out = model.train()(ids, targets)
    close(out.loss, expected)
    assert out.aux_loss > 5


def test_balance_losses_of_all_layers_are_added():
    model = random_model(small(aux_loss_alpha=0.25, device_loss_alpha=0.0)).train()
    for layer in model.model.layers[1:]:
        torch.nn.init.zeros_(layer.mlp.gate.weight)  # uniform: each layer gives alpha exactly
    out = model(*torch.randint(0, 96, (2, 2, 16)))
    assert out.aux_loss.item() == pytest.approx(0.5, rel=1e-6)


@torch.no_grad()
def test_expert_load_counts_the_choices_of_each_layer(monkeypatch):
    seen, real = [], Gate.forward

    def spy(self, x):
        seen.append(real(self, x))
        return seen[-1]

    monkeypatch.setattr(Gate, "forward", spy)
    load = random_model(small())(torch.randint(0, 96, (2, 16))).expert_load
    expected = [r.index.flatten().bincount(minlength=8) / (2 * 16 * 3) for r in seen]
    assert torch.allclose(load, torch.stack(expected))


# --- norm, RoPE, YaRN --------------------------------------------------------------------------


def test_rmsnorm_casts_before_the_weight():
    norm, x = RMSNorm(64), torch.randn(5, 64).bfloat16()
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    x32 = x.float()
    unit = x32 / (x32.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    with torch.autocast("cpu", torch.bfloat16):  # one cast, for all products that read it
        assert torch.equal(norm(x32), norm.weight.bfloat16() * unit.bfloat16())
    assert torch.equal(norm.bfloat16()(x), norm.weight * unit.bfloat16())


def test_rope_is_multiplication_by_a_complex_number():
    config = small()
    x, positions = torch.randn(2, 9, 3, 8), torch.arange(9)[None]
    pairs = torch.view_as_complex(x.reshape(2, 9, 3, 4, 2))  # neighbours, not halves
    turn = torch.tensor([10000.0 ** (-2 * j / 8) for j in range(4)])
    unit = torch.polar(torch.ones(9, 4), torch.arange(9.0)[:, None] * turn)
    expected = torch.view_as_real(pairs * unit[None, :, None]).flatten(-2)
    assert torch.allclose(apply_rotary_emb(x, *rope_angles(config, positions)), expected, atol=1e-6)


def test_yarn_slows_each_pair_by_the_golden_ratio():
    plain, yarn = Config.preset("v2", rope_scaling=None), Config.preset("v2")
    ratio = rope_frequencies(yarn) / rope_frequencies(plain)
    assert torch.allclose(ratio[:11], torch.ones(11))
    golden = torch.tensor([0.925, 0.55, 0.1])
    assert torch.allclose(ratio[[11, 16, 22]], golden, atol=1e-4)
    assert torch.allclose(ratio[23:], torch.full((9,), 0.025), atol=1e-6)


@pytest.mark.parametrize(
    "scaling, golden",
    [
        (None, 0.0721688),
        (YARN_V2, 0.1147214),
        (YARN_V2 | dict(mscale=1.0, mscale_all_dim=1.0), 0.1352338),
        (YARN_V2 | dict(mscale=0.707, mscale_all_dim=0.707, beta_slow=1.5), 0.1147214),
    ],
)
def test_softmax_scale_is_golden_and_cos_is_not_scaled(scaling, golden):
    config = Config.preset("v2", rope_scaling=scaling)
    assert softmax_scale(config) == pytest.approx(golden, abs=5e-8)
    assert torch.equal(rope_angles(config, torch.zeros(1))[0], torch.ones(1, 32))


def test_yarn_without_mscale_scales_the_rotation_as_officially():
    scaling = {k: v for k, v in YARN_V2.items() if "mscale" not in k}
    config = Config.preset("v2", rope_scaling=scaling)
    assert softmax_scale(config) == pytest.approx(0.0721688, abs=5e-8)
    assert rope_angles(config, torch.zeros(1))[0][0, 0] == pytest.approx(0.1 * math.log(40) + 1)


# --- MLA ---------------------------------------------------------------------------------------


def test_cache_holds_the_normed_latent_and_the_rotated_key():
    model = random_model(small())
    cache, ids = model.new_cache(1, 16), torch.randint(0, 96, (1, 5))
    with torch.no_grad():
        model(ids, cache=cache)
        layer = model.model.layers[0]
        x = layer.input_layernorm(model.model.embed_tokens(ids))
        latent, k_pe = layer.self_attn.kv_a_proj_with_mqa(x).split([20, 8], -1)
        norm = layer.self_attn.kv_a_layernorm.weight
        normed = latent / (latent.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * norm
        turned = apply_rotary_emb(
            k_pe[:, :, None], *rope_angles(model.config, torch.arange(5)[None])
        )
    assert cache.latents.shape == (3, 1, 16, 28)
    close(cache.latents[0, :, :5], torch.cat([normed, turned[:, :, 0]], -1))
    assert (cache.latents[:, :, 5:] == 0).all()


def test_absorbing_pays_below_171_queries_in_v2():
    config, many = Config.preset("v2"), 10**9
    assert deepseek.absorbing_is_cheaper(config, 170, many)
    assert not deepseek.absorbing_is_cheaper(config, 171, many)
    assert not deepseek.absorbing_is_cheaper(config, 100, 100)  # a prompt into an empty cache
    assert deepseek.absorbing_is_cheaper(config, 1, 2)


def test_a_cache_decodes_absorbed_and_reads_a_prompt_expanded():
    config = small(max_position_embeddings=1000, kv_lora_rank=200)
    cache = DeepSeek(config).new_cache(1, 900)

    def absorbs(tokens, cached, cache=cache):
        cache and setattr(cache, "lengths", [cached])
        ids = torch.zeros(1, tokens, dtype=torch.long)
        return deepseek.attention_context(config, ids, cache, None).absorb

    assert absorbs(1, 500) and not absorbs(500, 0) and not absorbs(300, 300)
    assert not absorbs(5, 0, cache=None)


def test_a_cache_has_the_size_and_dtype_asked_for():
    cache = DeepSeek(small()).new_cache(2, 7, torch.bfloat16)
    assert cache.latents.dtype == torch.bfloat16 and cache.lengths == [0, 0]
    assert cache.nbytes == 3 * 2 * 7 * 28 * 2
    assert DeepSeek(small()).new_cache(1, 7).latents.dtype == torch.float32


def test_latent_norms_use_eps_1e_6_whatever_the_config_says():
    attention = MLA(small(rms_norm_eps=1e-3, q_lora_rank=8))
    assert attention.kv_a_layernorm.eps == attention.q_a_layernorm.eps == 1e-6


@torch.no_grad()
def test_rows_of_different_lengths_share_a_cache():
    model = random_model(small())
    cache, ids = model.new_cache(2, 32), torch.randint(0, 96, (2, 12))
    model(ids[:, :6], cache=cache)
    cache.lengths = [6, 3]  # the second row forgets three tokens, and is given them again
    more = torch.stack([ids[0, 6:9], ids[1, 3:6]])
    close(model(more, cache=cache).logits[1], model(ids[1:, :6]).logits[0, 3:])
    close(model(ids[:, 6:9], cache=cache).logits[1], model(ids[1:, :9]).logits[0, 6:])


def test_a_cache_is_not_trained_through():
    model = random_model(small())
    cache = model.new_cache(1, 8)
    model(torch.zeros(1, 4, dtype=torch.long), cache=cache)
    assert not cache.latents.requires_grad


def test_outgrowing_the_cache_or_the_context_is_refused():
    model = random_model(small())
    assert (
        model(torch.zeros(1, 4, dtype=torch.long), cache=model.new_cache(1, 4)).logits.shape[1] == 4
    )
    assert model(torch.zeros(1, 128, dtype=torch.long)).logits.shape[1] == 128
    with pytest.raises(ValueError, match="129 tokens do not fit: the model's"):
        model(torch.zeros(1, 129, dtype=torch.long), cache=model.new_cache(1, 200))
    with pytest.raises(ValueError, match="5 tokens do not fit: the cache ends at 4"):
        model(torch.zeros(1, 5, dtype=torch.long), cache=model.new_cache(1, 4))
    with pytest.raises(ValueError, match="129 tokens do not fit: the model's context ends at 128"):
        model(torch.zeros(1, 129, dtype=torch.long))


# --- router, losses, experts -------------------------------------------------------------------


def gate_with(config, logits):
    """A gate that gives these logits [T, E] for the rows of an identity matrix."""
    gate = Gate(config)
    gate.weight = torch.nn.Parameter(logits.T.contiguous())
    return gate(torch.eye(len(logits))[None])


def test_gate_weights_are_the_raw_probabilities():
    config = small(hidden_size=9)
    logits = torch.randn(9, 8)
    routing = gate_with(config, logits)
    probs = logits.softmax(-1)
    assert torch.allclose(routing.weights[0], probs.gather(1, routing.index[0]))
    assert torch.equal(routing.index[0].sort().values, probs.topk(3).indices.sort().values)
    assert (routing.weights.sum(-1) < 1).all()
    scaled = gate_with(small(hidden_size=9, routed_scaling_factor=16.0), logits)
    assert torch.allclose(scaled.weights, 16 * routing.weights)


def test_norm_topk_prob_normalises_instead_of_scaling():
    config = small(hidden_size=9, norm_topk_prob=True, routed_scaling_factor=16.0)
    assert torch.allclose(gate_with(config, torch.randn(9, 8)).weights.sum(-1), torch.ones(1, 9))
    one = small(hidden_size=9, norm_topk_prob=True, num_experts_per_tok=1)
    assert (gate_with(one, torch.randn(9, 8)).weights < 1).all()


def test_a_group_is_judged_by_its_best_expert():
    # one strong expert (group 0) against two medium ones (group 1), whose sum is larger
    logits = torch.tensor([[3.0, -9.0, 2.8, 2.8, 0.0, 0.0, 0.0, 0.0]])
    config = small(hidden_size=3, **GROUPS | dict(topk_group=1), num_experts_per_tok=2)
    routing = gate_with(config, logits)
    assert routing.index[0, 0].tolist() == [0, 1]
    assert routing.sent[0, 0].tolist() == [True, False, False, False]


def test_the_gate_computes_in_float32_under_autocast():
    gate, x = Gate(small()), torch.randn(1, 50, 48)
    torch.nn.init.normal_(gate.weight)
    exact = gate(x)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = gate(x)
    assert torch.equal(exact.index, mixed.index) and torch.equal(exact.scores, mixed.scores)
    gate, x = gate.bfloat16(), x.bfloat16()
    expected = (x.float() @ gate.weight.float().T).softmax(-1)
    assert torch.allclose(gate(x).scores, expected, atol=1e-6)


def routing_of(scores, index, sent=None):
    if sent is None:
        sent = torch.ones(*index.shape[:2], 4, dtype=torch.bool)
    return Routing(scores, torch.ones(index.shape), index, sent)


@pytest.mark.parametrize("kind", ["aux_loss_alpha", "device_loss_alpha", "comm_loss_alpha"])
def test_uniform_probabilities_give_each_loss_its_weight(kind):
    zero = dict(aux_loss_alpha=0.0, device_loss_alpha=0.0, comm_loss_alpha=0.0)
    config = small(**GROUPS | zero | {kind: 0.25})
    index = torch.rand(2, 10, 8).topk(3).indices  # whatever was chosen
    sent = torch.zeros(2, 10, 4, dtype=torch.bool)
    sent.scatter_(-1, torch.rand(2, 10, 4).topk(2).indices, True)
    loss = balance_losses(config, routing_of(torch.full((2, 10, 8), 1 / 8), index, sent))
    assert loss.item() == pytest.approx(0.25, rel=1e-6)


def test_balance_losses_equal_a_computation_by_hand():
    # T = 2 tokens, E = 8, K = 3, groups {0,1} {2,3} {4,5} {6,7}, M = 2
    scores = torch.tensor(
        [[[0.3, 0.2, 0.2, 0.1, 0.1, 0.1, 0, 0], [0.1] * 4 + [0.3, 0.1, 0.1, 0.1]]]
    )
    index = torch.tensor([[[0, 1, 2], [4, 0, 1]]])
    sent = torch.tensor([[[True, True, False, False], [True, False, True, False]]])
    f = [8 / 6 * n for n in (2, 2, 1, 0, 1, 0, 0, 0)]
    P = [0.2, 0.15, 0.15, 0.1, 0.2, 0.1, 0.05, 0.05]
    expert = sum(a * b for a, b in zip(f, P, strict=True))
    device = sum((f[i] + f[i + 1]) / 2 * (P[i] + P[i + 1]) for i in (0, 2, 4, 6))
    communication = 4 / (2 * 2) * (2 * 0.35 + 1 * 0.25 + 1 * 0.3)
    config = small(**GROUPS, aux_loss_alpha=1.0, device_loss_alpha=10.0)
    config = Config(**vars(config) | dict(comm_loss_alpha=100.0))
    loss = balance_losses(config, routing_of(scores, index, sent))
    assert loss.item() == pytest.approx(expert + 10 * device + 100 * communication, rel=1e-5)


def test_balance_is_per_sequence_not_per_batch():
    # each sequence uses its own half of the experts: balanced as a batch, not as sequences
    config = small(num_experts_per_tok=4, aux_loss_alpha=1.0, device_loss_alpha=0.0)
    index = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]])[:, None].expand(2, 6, 4)
    scores = F.one_hot(index, 8).sum(-2) / 4.0
    assert balance_losses(config, routing_of(scores, index)).item() == pytest.approx(2.0)


def test_balance_gradient_flows_through_probabilities_only():
    alphas = dict(aux_loss_alpha=0.5, device_loss_alpha=0.7, comm_loss_alpha=0.9)
    config = small(**GROUPS | alphas)
    scores = torch.randn(2, 10, 8, requires_grad=True).softmax(-1)
    index = scores.topk(3).indices
    sent = torch.zeros(2, 10, 4, dtype=torch.bool)
    sent.scatter_(-1, torch.rand(2, 10, 4).topk(2).indices, True)
    grad = torch.autograd.grad(balance_losses(config, routing_of(scores, index, sent)), scores)[0]
    f = F.one_hot(index, 8).sum((1, 2)) * 8 / (3 * 10)  # B E
    of_device = f.view(2, 4, 2).mean(-1).repeat_interleave(2, -1)
    of_sending = (sent.float().mean(1) * 4 / 2).repeat_interleave(2, -1)
    expected = (0.5 * f + 0.7 * of_device + 0.9 * of_sending) / 10 / 2  # mean over T and B
    assert torch.allclose(grad, expected[:, None].expand_as(grad))


def test_accumulation_changes_no_gradient():
    ids, targets = torch.randint(0, 96, (2, 4, 16))
    grads = []
    for pieces in (1, 4):
        model = random_model(small(aux_loss_alpha=1.0, **GROUPS)).train()
        for x, y in zip(ids.chunk(pieces), targets.chunk(pieces), strict=True):
            out = model(x, y)
            ((out.loss + out.aux_loss) / pieces).backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        close(a, b, 1e-4)


@pytest.mark.parametrize("dtype, relative", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_grouped_and_gathered_experts_equal_the_loop(dtype, relative):
    torch.manual_seed(0)
    experts = Experts(small())
    gate_up, down = (torch.randn_like(p) * 0.3 for p in experts.parameters())
    index = torch.rand(37, 8).topk(3).indices
    index[index == 5] = 4  # expert 5 has nothing to do, expert 4 may get a token twice
    results = []
    for run in (experts.looped, experts.grouped, experts.gathered):
        given = [t.clone().requires_grad_() for t in (torch.ones(37, 48), torch.rand(37, 3))]
        torch.manual_seed(1)
        given[0].data.normal_()
        given[1].data.uniform_()
        weights = [t.to(dtype).requires_grad_() for t in (gate_up, down)]
        out = run(given[0].to(dtype), index, given[1], *weights)
        assert out.dtype == torch.float32  # that of the router's weights
        out.square().sum().backward()
        results.append([out, *(t.grad.float() for t in (*given, *weights))])
    for looped, *others in zip(*results, strict=True):
        for other in others:
            assert torch.isfinite(other).all()
            close(looped, other, relative)
    for result in results:
        assert (result[3][5] == 0).all() and (result[4][5] == 0).all()  # idle: gradient zero


def test_experts_are_grouped_where_that_runs_and_looped_elsewhere(monkeypatch):
    cpu, taken = torch.device("cpu"), []
    for name in ("looped", "grouped", "gathered"):
        real = getattr(Experts, name)

        def spy(self, x, *rest, name=name, real=real):
            taken.append((name, x.dtype))
            return real(self, x, *rest)

        monkeypatch.setattr(Experts, name, spy)
    ids = torch.randint(0, 96, (1, 9))
    random_model(small(num_hidden_layers=2))(ids)
    with torch.autocast("cpu", torch.bfloat16):
        random_model(small(num_hidden_layers=2))(ids)
    assert taken == [("grouped", torch.float32), ("grouped", torch.bfloat16)]
    for odd in (dict(moe_intermediate_size=22), dict(hidden_size=51)):  # rows not 16 bytes
        config = small(num_hidden_layers=2, **odd)
        assert not Experts(config).can_group(cpu, torch.float32)
        assert torch.isfinite(random_model(config)(ids).logits).all()
        assert taken.pop() == ("looped", torch.float32)
    assert Experts(small(moe_intermediate_size=20)).can_group(cpu, torch.float32)
    assert not Experts(small(moe_intermediate_size=20)).can_group(cpu, torch.bfloat16)
    taken.clear()  # 8 experts, 3 for a token: two tokens copy 6, three would copy more than all
    model = random_model(small(num_hidden_layers=2))
    for tokens, way in ((1, "gathered"), (2, "gathered"), (3, "grouped")):
        model(ids[:, :tokens])
        assert taken.pop() == (way, torch.float32)


def test_dropping_keeps_what_each_device_wants_most():
    # 2 groups of 4 experts; capacity = 0.5 * (1*8*1)/2 = 2 of the 6 and 2 assignments
    config = small(n_group=2, num_experts_per_tok=1, token_drop_capacity=0.5, device_loss_alpha=0.0)
    index = torch.tensor([0, 1, 2, 3, 0, 1, 4, 5]).view(1, 8, 1)
    weights = torch.tensor([0.1, 0.9, 0.2, 0.8, 0.3, 0.4, 0.05, 0.06]).view(1, 8, 1)
    routing = Routing(torch.zeros(1, 8, 8), weights, index, torch.ones(1, 8, 2, dtype=torch.bool))
    dropped = drop_tokens(config, routing, torch.tensor([False])).flatten()
    kept = [0, 0.9, 0, 0.8, 0, 0, 0.05, 0.06]
    assert torch.allclose(dropped, torch.tensor(kept))
    assert torch.equal(drop_tokens(config, routing, torch.tensor([True])), weights)


def test_capacity_is_shared_by_the_batch_and_taken_by_the_exempt_first():
    config = small(n_group=2, num_experts_per_tok=2, token_drop_capacity=1.0)
    index = torch.tensor([0, 1]).expand(4, 3, 2)  # all 24 assignments to device 0, which takes 12
    weights = torch.rand(4, 3, 2, requires_grad=True)
    routing = Routing(torch.zeros(0), weights, index, torch.zeros(0))
    none = torch.zeros(4, dtype=torch.bool)
    dropped = drop_tokens(config, routing, none)
    assert (dropped > 0).sum() == 12
    assert dropped[dropped > 0].min() > weights[dropped == 0].max()
    assert torch.autograd.grad(dropped.sum(), weights)[0].sum() == 12
    two = torch.tensor([True, False, True, False])
    dropped = drop_tokens(config, routing, two)  # the two exempt ones fill it alone
    assert (dropped[two] > 0).all() and (dropped[~two] == 0).all()


@torch.no_grad()
def test_a_tenth_of_the_sequences_is_spared_by_all_layers(monkeypatch):
    seen = []

    def spy(config, routing, exempt):
        seen.append(exempt)
        return routing.weights

    monkeypatch.setattr(deepseek, "drop_tokens", spy)
    model = random_model(small(token_drop_capacity=1.0, **GROUPS)).train()
    model(torch.zeros(1000, 2, dtype=torch.long))
    assert len(seen) == 2 and torch.equal(seen[0], seen[1])
    assert 70 < seen[0].sum() < 130


@torch.no_grad()
def test_nothing_is_dropped_in_evaluation():
    strict, free = small(token_drop_capacity=0.1, **GROUPS), small(**GROUPS)
    ids = torch.randint(0, 96, (4, 16))
    model, same = random_model(strict), random_model(free)
    close(model(ids).logits, same(ids).logits)
    close(model(ids[:1]).logits, model(ids).logits[:1])  # nor does it depend on batch mates
    assert not torch.allclose(model.train()(ids).logits, same(ids).logits, atol=1e-3)


# --- generation --------------------------------------------------------------------------------


def generated(model, prompts, n=12, **options):
    return torch.stack(list(model.generate(prompts, n, **options)), 1)


def test_greedy_generation_equals_the_uncached_argmax():
    model = random_model(small(**GROUPS))
    ids = torch.randint(0, 96, (2, 5))
    out = generated(model, ids, temperature=0)
    with torch.no_grad():
        for _ in range(12):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(out, ids[:, 5:])


@pytest.mark.parametrize("prompts", [[[3, 4, 5]], [[3, 4, 5, 6], [11]]])
def test_decoding_compiles_to_one_graph_that_says_the_same(monkeypatch, prompts):
    torch._dynamo.reset()  # another test's broken graphs are remembered
    graphs, real = [], torch.compile

    def count(graph, _):
        graphs.append(graph)
        return graph

    def whole(module):
        compiled = real(module, backend=count, fullgraph=True)

        def step(ids, cache):
            assert ids.shape == (len(prompts), 1)  # the prompt is not compiled
            return compiled(ids, cache)

        return step

    monkeypatch.setattr(torch, "compile", whole)
    model = random_model(small(**GROUPS))
    eager = generated(model, prompts, 30, temperature=0)
    assert not graphs
    assert torch.equal(generated(model, prompts, 30, temperature=0, compiled=True), eager)
    assert 1 <= len(graphs) <= 2  # the first step's, and one for all lengths
    generated(model, prompts, 30, temperature=0, compiled=True)
    assert len(graphs) <= 2
    for more in ([7], [7, 8, 9]):  # after two lengths any will do
        longer = [prompt + more for prompt in prompts]
        eager = generated(model, longer, 30 + len(more), temperature=0)
        told = generated(model, longer, 30 + len(more), temperature=0, compiled=True)
        assert torch.equal(told, eager)
        assert len(graphs) <= 3


def test_prompts_of_different_lengths_continue_as_if_alone():
    model = random_model(small())
    prompts = [[3, 4, 5, 6, 7, 8, 9], [11], [20, 21, 22]]
    together = generated(model, prompts, temperature=0)
    for prompt, row in zip(prompts, together, strict=True):
        assert torch.equal(generated(model, [prompt], temperature=0)[0], row)


def test_stop_repeats_itself_and_ends_the_stream():
    model = random_model(small())
    free = generated(model, [[3, 4], [5, 6]], 40, temperature=0)
    stop = int(free[0, 2])
    rows = generated(model, [[3, 4], [5, 6]], 40, temperature=0, stop=stop)
    assert (rows[0, 2:] == stop).all()
    own = free[1].tolist()
    own = own[: own.index(stop)] if stop in own else own
    assert len(own) > 3 and rows[1, : len(own)].tolist() == own  # the other row goes on
    alone = generated(model, [[3, 4]], 40, temperature=0, stop=stop)
    assert alone.shape[1] == free[0].tolist().index(stop) + 1


def test_the_padding_of_the_vocabulary_never_comes_out():
    model = random_model(small())
    with torch.no_grad():
        model.lm_head.weight[70:] *= 100  # what lies behind the vocabulary is loud
    for temperature in (0, 1):
        rows = generated(model, torch.zeros(8, 1, dtype=torch.long), 10, vocab_size=70,
                         temperature=temperature)  # fmt: skip
        assert rows.max() < 70


def test_sampling_follows_the_distribution_and_its_cuts():
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits = probs.log().expand(20_000, 4)

    def share(**options):
        g = torch.Generator().manual_seed(0)
        return deepseek.sample(logits, generator=g, **options).bincount(minlength=4) / 20_000

    assert torch.allclose(share(), probs, atol=0.02)
    sharp = (probs**2) / (probs**2).sum()
    assert torch.allclose(share(temperature=0.5), sharp, atol=0.02)
    assert torch.allclose(share(top_k=2), torch.tensor([0.625, 0.375, 0, 0]), atol=0.02)
    assert torch.allclose(share(top_p=0.8), torch.tensor([0.625, 0.375, 0, 0]), atol=0.02)
    three = torch.tensor([0.5, 0.3, 0.15, 0]) / 0.95
    assert torch.allclose(share(top_p=0.81), three, atol=0.02)
    assert torch.allclose(share(top_k=3, top_p=0.6), torch.tensor([0.625, 0.375, 0, 0]), atol=0.02)
    assert torch.allclose(share(top_k=99), probs, atol=0.02)
    for tiny in (1e-9, 1e-300):  # the latter is zero in fp32
        assert torch.equal(share(top_p=tiny), torch.tensor([1.0, 0, 0, 0]))
    assert deepseek.sample(torch.zeros(1000, 2), top_p=0.5).unique().numel() == 1  # exactly half
    assert torch.equal(share(temperature=1e-30), torch.tensor([1.0, 0, 0, 0]))


def test_sampling_is_in_float32_and_without_gradients(monkeypatch):
    seen, real = [], deepseek.sample

    def spy(logits, *options):
        seen.append((logits.requires_grad, logits.dtype))
        return real(logits, *options)

    monkeypatch.setattr(deepseek, "sample", spy)
    list(random_model(small()).bfloat16().generate([[1]], 3))
    assert seen == [(False, torch.float32)] * 3


def test_generation_is_repeated_by_its_generator_and_leaves_the_global_one_alone():
    model = random_model(small())
    before = torch.get_rng_state()
    a, b = (generated(model, [[1]], generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(a, b)
    assert torch.equal(before, torch.get_rng_state())


def test_generation_ends_where_the_context_does():
    model = random_model(small(max_position_embeddings=10))
    assert generated(model, [[1, 2, 3]], 100).shape == (1, 7)
    assert generated(model, [[1], [1, 2, 3, 4]], 100).shape == (2, 6)
    assert not list(model.generate([[1]], 0))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(prompts=[]), "prompt is empty"),
        (dict(prompts=[[1], []]), "prompt is empty"),
        (dict(prompts=[1, 2]), "rows of ids"),
        (dict(prompts=[[1] * 128]), "128 tokens leaves no room in the context of 128"),
        (dict(temperature=-1), "temperature"),
        (dict(temperature=math.nan), "temperature"),
        (dict(top_k=0), "top_k"),
        (dict(top_p=0.0), "top_p"),
        (dict(top_p=1.5), "top_p"),
        (dict(max_new_tokens=-1), "max_new_tokens"),
    ],
)
def test_generate_refuses_impossible_arguments_at_once(options, message):
    model = random_model(small())
    with pytest.raises(ValueError, match=message):
        model.generate(**dict(prompts=[[1]], max_new_tokens=5) | options)
    with pytest.raises(ValueError, match="eval"):
        model.train().generate([[1]], 5)


# --- config ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides, message",
    [
        (dict(qk_rope_head_dim=7), "qk_rope_head_dim = 7 must be even"),
        (dict(n_group=3), "n_routed_experts = 8 must be a multiple of n_group = 3"),
        (GROUPS | dict(num_experts_per_tok=5), "at most 4, the experts that a token"),
        (dict(num_experts_per_tok=9), "at most 8"),
        (dict(n_group=2, topk_group=3), "topk_group = 3 must be at most n_group = 2"),
        (dict(hidden_size=50), "hidden_size = 50 must be a multiple of num_attention_heads = 3"),
        (dict(topk_method="noaux_tc"), "topk_method = 'noaux_tc' is unknown"),
        (dict(vocab_size=0), "vocab_size = 0 must be a whole number"),
        (dict(vocab_size=1.5), "vocab_size = 1.5"),
        (dict(vocab_size=2**31), "vocab_size = 2147483648"),
        (dict(n_routed_experts=True), "n_routed_experts = True"),
        (dict(q_lora_rank=0), "q_lora_rank = 0"),
        (dict(rope_theta=math.inf), "rope_theta = inf"),
        (dict(rope_theta="1"), "rope_theta = '1'"),
        (dict(rope_theta=10**400), "must be a finite number"),
        (dict(rope_theta=0.0), "rope_theta = 0.0 must be above 1"),
        (dict(aux_loss_alpha=True), "aux_loss_alpha = True must be a finite number"),
        (dict(routed_scaling_factor=0.0), "routed_scaling_factor = 0.0 must be above 0"),
        (dict(num_hidden_layers=10_001), "is over 10000"),
        (dict(bos_token_id=96), "bos_token_id = 96 must be below"),
        (dict(rope_scaling=[1]), "must be a dict or null"),
        (dict(rope_scaling={"type": "yarn", "original_max_position_embeddings": 9}), "lacks 'fac"),
        (dict(rope_scaling=YARN_V2 | {"mscale": math.inf}), "mscale = inf"),
        (dict(rope_scaling=YARN_V2 | {"beta_slow": -1}), "beta_slow = -1"),
        (dict(copying_start=0.2, initializer_range=0.0), "needs an initializer_range above 0"),
        (dict(rope_scaling=YARN_V2 | {"factor": math.nan}), "factor = nan"),
        (dict(n_routed_experts=10**9), "n_routed_experts = 1000000000 is over 10000"),
        (dict(num_hidden_layers=10**9), "num_hidden_layers = 1000000000 is over 10000"),
        (dict(rms_norm_eps=math.nan), "rms_norm_eps = nan"),
        (dict(rms_norm_eps=0.0), "rms_norm_eps = 0.0 must be above 0"),
        (dict(aux_loss_alpha=-0.1), "aux_loss_alpha = -0.1"),
        (dict(norm_topk_prob="no"), "norm_topk_prob = 'no' must be true or false"),
        (dict(comm_loss_alpha=0.1), "comm_loss_alpha = 0.1 needs"),
        (dict(eos_token_id=96), "eos_token_id = 96 must be below vocab_size = 96"),
        (dict(rope_scaling={"type": "linear", "factor": 2}), "rope_scaling type 'linear'"),
        (dict(rope_scaling={"type": "yarn", "factor": 2}), "lacks 'original_max_position"),
        (
            dict(rope_scaling=YARN_V2 | {"factor": 0.5}),
            "factor = 0.5 must be a number of at least 1",
        ),
        (dict(rope_scaling=YARN_V2 | {"factro": 2}), "unknown key 'factro'"),
        (dict(rope_scaling=YARN_V2 | {"factor": "40"}), "factor = '40' must be a number"),
        (dict(rope_scaling=YARN_V2 | {"beta_fast": 0.5}), "beta_fast = 0.5 must not be below"),
        (dict(token_drop_capacity=1.0), "token_drop_capacity = 1.0 needs n_group of 2"),
    ],
)
def test_impossible_configs_are_refused_in_a_sentence(overrides, message):
    with pytest.raises(ConfigError, match=message) as caught:
        small(**overrides)
    assert "\n" not in str(caught.value)


def test_what_is_possible_is_accepted():
    small(n_group=4, topk_group=1)  # greedy routing does not care for groups
    small(rope_scaling=YARN_V2 | {"mscale_all_dim": 0})
    small(n_shared_experts=0, first_k_dense_replace=0, q_lora_rank=4)


def test_presets_refuse_unknown_names_and_fields():
    with pytest.raises(ConfigError, match="size 'huge' is unknown"):
        Config.preset("huge")
    with pytest.raises(ConfigError, match="'n_experts' is not a field"):
        Config.preset("tiny", n_experts=3)
    assert Config.preset("1b", n_routed_experts=32).n_routed_experts == 32


def test_the_bias_of_v3_counts_in_the_choice_and_not_in_the_weight():
    config = small(bias_update_speed=0.25)
    torch.manual_seed(0)
    gate = DeepSeek(config).model.layers[1].mlp.gate
    x = torch.randn(2, 5, config.hidden_size)
    plain = gate(x)
    gate.e_score_correction_bias[7] = 5.0  # more than any affinity
    biased = gate(x)
    assert (biased.index[..., 0] == 7).all() and torch.equal(biased.scores, plain.scores)
    assert torch.equal(biased.weights, biased.scores.gather(-1, biased.index))


def test_the_bias_of_v3_follows_the_load_and_balances_it():
    model = DeepSeek(small(bias_update_speed=0.25))
    load = torch.tensor([0.5, 0.1, 0.1, 0.1, 0.1, 0.05, 0.05, 0.0]).repeat(2, 1)  # mean 1/8
    model.update_bias(load)
    for layer in model.model.layers[1:]:
        assert layer.mlp.gate.e_score_correction_bias.tolist() == [-0.25] + [0.25] * 7
    before = DeepSeek(small())
    before.update_bias(load)  # nothing to do, nothing done
    assert "bias" not in " ".join(before.state_dict())

    torch.manual_seed(1)
    model = random_model(small(bias_update_speed=0.002)).train()
    ids = torch.randint(0, 96, (8, 64))
    loads = []
    for _ in range(200):
        loads.append(model(ids).expert_load)
        model.update_bias(loads[-1])
    assert loads[-1].max() * 8 < 1.3 < loads[0].max() * 8


def test_groups_are_limited_under_a_negative_bias():
    config = small(bias_update_speed=0.1, **GROUPS)
    gate = random_model(config).model.layers[1].mlp.gate
    gate.e_score_correction_bias -= 3.0  # all below the zero that stands for "out of reach"
    routing = gate(torch.randn(4, 16, config.hidden_size))
    reached = routing.sent.gather(-1, routing.index // 2)  # two experts in a group
    assert reached.all()


def test_the_bias_of_a_frozen_router_stays_as_it_is():
    model = DeepSeek(small(bias_update_speed=0.25))
    deepseek.add_lora(model)
    model.update_bias(torch.tensor([0.5, 0.5, 0, 0, 0, 0, 0, 0]).repeat(2, 1))
    assert not model.model.layers[1].mlp.gate.e_score_correction_bias.any()


def test_the_bias_of_v3_counts_in_the_choice_of_groups():
    config = small(bias_update_speed=0.1, **GROUPS)
    gate = random_model(config).model.layers[1].mlp.gate
    gate.e_score_correction_bias[5] = 5.0
    routing = gate(torch.randn(4, 16, config.hidden_size))
    assert routing.sent[..., 2].all() and (routing.index == 5).any(-1).all()
