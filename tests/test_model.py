"""The model against an independent implementation, closed forms and the paper's numbers."""

import copy
import math
import re
from dataclasses import fields, replace

import pytest
import torch
from conftest import GROUPS, YARN, oracle, random_model, small
from torch import nn
from torch.nn import functional as F

import deepseek
from common import formats
from common.runtime import UsageError
from deepseek import MLA, YARN_V2, Config, ConfigError, DeepSeek, Experts, Gate, Routing

QUERIES, ROUTERS, ROTATIONS = ({}, dict(q_lora_rank=28)), ({}, GROUPS), ({}, YARN)
GRID = [q | g | y for q in QUERIES for g in ROUTERS for y in ROTATIONS]
STRETCH = YARN["rope_scaling"]
MORE = [
    dict(first_k_dense_replace=0, n_group=4),
    dict(v_head_dim=24),  # wider than query and key
    dict(qk_rope_head_dim=2, **YARN),
    dict(rope_scaling=YARN_V2),  # dr = 8: the ramp's end is clamped
    dict(rope_scaling=STRETCH | dict(beta_fast=1, beta_slow=1)),  # no ramp at all
    dict(rope_scaling=STRETCH | dict(beta_fast=4, beta_slow=0.5)),
    dict(rope_scaling=STRETCH | dict(mscale=0.5, mscale_all_dim=1.5)),
    dict(rope_scaling=dict(type="yarn", factor=8, original_max_position_embeddings=16)),
]
CHUNKS = ((0, 7), (7, 12), (12, 13), (13, 14), (14, 40))


def close(a, b, relative=1e-5):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= relative * b.abs().max(), (a - b).abs().max() / b.abs().max()


def in_chunks(model, ids, absorb):
    cache = model.new_cache(len(ids), 64)
    return torch.cat([model(ids[:, a:b], cache=cache, absorb=absorb).logits for a, b in CHUNKS], 1)


def with_twin(**overrides):
    """A model, and transformers' with the same weights: their names are the official ones."""
    model = random_model(small(**overrides))
    other = oracle(model.config)
    other.load_state_dict(model.state_dict())
    return model, other


# --- the whole model ---------------------------------------------------------------------------


@pytest.mark.parametrize("absorb", [None, True, False])
@pytest.mark.parametrize("overrides", GRID + MORE)
@torch.no_grad()
def test_logits_equal_those_of_transformers(overrides, absorb):
    model, other = with_twin(**overrides)
    ids = torch.randint(0, 96, (2, 40))
    expected = other(ids).logits
    close(model(ids, absorb=absorb).logits, expected)
    close(in_chunks(model, ids, absorb), expected)


@pytest.mark.parametrize("overrides", [{}, GROUPS | YARN | dict(q_lora_rank=28)])
def test_gradients_equal_those_of_transformers(overrides):
    model, other = with_twin(**overrides)
    ids, targets = torch.randint(0, 96, (2, 2, 24))
    model.train()(ids, targets).loss.backward()
    F.cross_entropy(other(ids).logits.flatten(0, 1), targets.flatten()).backward()
    expected = dict(other.named_parameters())
    for name, p in model.named_parameters():
        close(p.grad, expected[name].grad, 1e-4)


@torch.no_grad()
def test_bfloat16_stays_near_float32_under_autocast_and_in_a_cast_model():
    # every expert is taken: a near tie that rounding decides otherwise would hide all else
    model = random_model(small(num_experts_per_tok=8))
    ids = torch.randint(0, 96, (2, 40))
    exact = model(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        close(model(ids).logits.float(), exact, 0.05)
        close(in_chunks(model, ids, None).float(), exact, 0.05)
    model = model.bfloat16()
    assert model(ids).logits.dtype == torch.bfloat16
    close(model(ids).logits.float(), exact, 0.08)
    close(in_chunks(model, ids, None).float(), exact, 0.08)
    loss = F.cross_entropy(model(ids).logits.float().flatten(0, 1), ids.flatten())
    close(model(ids, ids).loss, loss, 1e-4)  # in fp32 here, too


@pytest.mark.parametrize("values", [12, 28])  # narrower and wider than a key
@pytest.mark.parametrize("T, flash", [(2, False), (512, False), (513, True)])
def test_bfloat16_attends_as_float32_does_and_sees_nothing_later(T, flash, values, monkeypatch):
    calls, real = [], F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or real(*a, **k)
    )
    torch.manual_seed(0)
    mla = MLA(small(v_head_dim=values, **YARN)).bfloat16()
    nn.init.normal_(mla.kv_b_proj.weight, std=0.3)
    shapes = (2, T, 3, 10), (2, T, 3, 8), (2, T, 28)
    inputs = [torch.randn(shape).bfloat16().requires_grad_() for shape in shapes]
    exact = [x.detach().float().requires_grad_() for x in inputs]
    found = mla.expanded(*inputs, None)
    assert bool(calls) == flash
    wanted = copy.deepcopy(mla).float().expanded(*exact, None)  # fp32 is held to transformers
    close(found.float(), wanted, 0.02)
    for x, y in zip(inputs, exact, strict=True):
        (a,) = torch.autograd.grad((found.float() * wanted.detach()).sum(), x, retain_graph=True)
        (b,) = torch.autograd.grad((wanted * wanted.detach()).sum(), y, retain_graph=True)
        close(a.float(), b, 0.1 if torch.__version__.startswith("2.11") else 0.03)  # it is coarser
    for x in inputs:
        x.data[:, -1] *= 30  # the last token cries out, and none before hears it
    assert torch.equal(mla.expanded(*inputs, None)[:, :-1], found[:, :-1])


@torch.no_grad()
def test_no_token_sees_a_later_one():
    model, ids = random_model(small()), torch.randint(0, 96, (1, 20))
    changed = torch.cat([ids[:, :12], (ids[:, 12:] + 1) % 96], 1)
    a, b = model(ids).logits, model(changed).logits
    close(a[:, :12], b[:, :12])
    assert ((a - b)[:, 12:].abs().amax(-1) > 1e-3).all()


@pytest.mark.parametrize(
    "name, total, active, cached",
    [
        ("v2-lite", 15_706_484_224, 2_451_435_008,
         dict(mha=110_592, gqa=55_296, mqa=6_912, mla=15_552)),
        ("v2", 235_741_434_880, 20_851_512_320,
         dict(mha=1_966_080, gqa=122_880, mqa=15_360, mla=34_560)),
    ],
)  # fmt: skip
def test_sizes_are_the_papers_and_shapes_those_of_transformers(name, total, active, cached):
    config = Config.preset(name)
    with torch.device("meta"):
        model, other = DeepSeek(config), oracle(config)
        assert sum(t.numel() for t in model.new_cache(1, 1).latents) == cached["mla"]
    assert model.num_parameters() == (total, active)
    assert {kind: config.cache_per_token(kind) for kind in cached} == cached
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (model, other)]
    assert shapes[0] == shapes[1]


def test_parts_for_training_alone_are_neither_counted_nor_exported(tmp_path):
    model = random_model(small())
    before = model.num_parameters()
    model.head_for_training = nn.Linear(48, 96)
    model.head_for_training.training_only = True
    assert model.num_parameters() == before
    formats.save_pretrained(model, tmp_path)
    names = dict(formats.load_pretrained(tmp_path).named_parameters())
    assert names.keys() == {n for n, _ in model.named_parameters() if "for_training" not in n}


def test_the_table_of_symbols_tells_the_presets():
    number = r" +([\d,]+|none)"
    rows = re.findall(rf"([a-z_]+)(?:: .*)?{number * 3}$", deepseek.__doc__, re.MULTILINE)
    assert len(rows) == 16
    for name, *values in rows:
        name = "cache_dim" if name == "dr" else name  # C: "..., R + dr"
        for size, value in zip(("v2", "v2-lite", "tiny"), values, strict=True):
            value = None if value == "none" else int(value.replace(",", ""))
            assert getattr(Config.preset(size), name) == value, (name, size)


@pytest.mark.parametrize("name, size", [("tiny", 3.3e6), ("small", 29e6), ("1b", 1e9)])
def test_the_small_sizes_keep_every_idea(name, size):
    c = Config.preset(name)
    with torch.device("meta"):
        assert DeepSeek(c).num_parameters()[0] == pytest.approx(size, rel=0.03)
    assert c.first_k_dense_replace == 1 and c.n_shared_experts >= 1
    assert c.moe_intermediate_size * 5 < c.intermediate_size  # fine-grained
    assert 6 * c.num_experts_per_tok < c.n_routed_experts * 2
    if name == "1b":  # tiles of a card's grouped product are 128 wide
        assert c.q_lora_rank and c.n_routed_experts >= 64 and c.moe_intermediate_size % 128 == 0


def test_every_second_layer_can_be_moe_and_none_need_be():
    model = random_model(small(num_hidden_layers=5, first_k_dense_replace=1, moe_layer_freq=2))
    assert [layer.is_moe for layer in model.model.layers] == [False, False, True, False, True]
    dense = random_model(small(first_k_dense_replace=3, n_shared_experts=0))
    out = dense(torch.zeros(1, 4, dtype=torch.long))
    assert out.expert_load.shape == (0, 8) and out.aux_loss == 0
    bare = random_model(small(n_shared_experts=0))
    assert torch.isfinite(bare(torch.zeros(1, 4, dtype=torch.long)).logits).all()


def test_initial_weights_have_the_stated_spread():
    for name, p in DeepSeek(Config.preset("tiny", initializer_range=0.03)).named_parameters():
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
        torch.manual_seed(3)  # which sequences drop nothing is drawn: the same ones again
        out = model(ids, targets, checkpoint_activations=keep)
        (out.loss + out.aux_loss).backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)
    assert len(calls) == 3  # one per layer


def test_compiled_without_a_graph_break_with_the_gradients_of_eager():
    model = random_model(small(num_hidden_layers=2))
    ids, targets = torch.randint(0, 96, (2, 2, 16))
    ends = [model.model.embed_tokens.weight, model.lm_head.weight]
    found = []
    for forward in (torch.compile(model, backend="aot_eager", fullgraph=True), model):
        with torch.autocast("cpu", torch.bfloat16):
            loss = forward(ids, targets).loss
        found.append([loss, *torch.autograd.grad(loss, ends)])
    for compiled, eager in zip(*found, strict=True):
        close(compiled, eager, 1e-2)


def test_the_loss_in_chunks_is_that_of_all_logits_and_keeps_none_of_them():
    model = random_model(small())
    x, targets = torch.randn(4, 30, 48, requires_grad=True), torch.randint(0, 96, (4, 30))
    targets[1, 2:] = -100
    ends = [x, model.lm_head.weight]
    whole = F.cross_entropy(model.lm_head(x).flatten(0, 1), targets.flatten())
    wanted = torch.autograd.grad(whole, ends)
    rows, kept = [], []
    model.lm_head.register_forward_hook(lambda module, args, y: rows.append(len(y)))
    for vocabulary, chunks in ((96, [120]), (2**20, [32, 32, 32, 24])):
        model.config = replace(model.config, vocab_size=vocabulary)  # decides on the chunks alone
        rows.clear(), kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.append(tuple(t.shape)) or t, lambda t: t
        ):
            loss = model.cross_entropy(x, targets)
        assert rows == chunks
        assert any((n, 96) in kept for n in chunks) == (len(chunks) == 1)
        close(loss, whole)
        for a, b in zip(torch.autograd.grad(loss, ends), wanted, strict=True):
            close(a, b)
        with torch.no_grad():
            close(model.cross_entropy(x, targets), whole)
            assert model.cross_entropy(x, torch.full_like(targets, -100)) == 0
            other = nn.Linear(48, 96)  # as of a second token
            expected = F.cross_entropy(other(x).flatten(0, 1), targets.flatten())
            close(model.cross_entropy(x, targets, other), expected)


def test_balance_losses_of_all_layers_are_added_by_name_in_training_alone():
    alphas = dict(aux_loss_alpha=2.5, device_loss_alpha=0.5, comm_loss_alpha=0.0)
    model = random_model(small(**GROUPS | alphas))
    for layer in model.model.layers[1:]:
        nn.init.zeros_(layer.mlp.gate.weight)  # uniform: each layer gives alpha exactly
    ids, targets = torch.randint(0, 96, (2, 2, 16))
    expected = F.cross_entropy(model(ids).logits.flatten(0, 1), targets.flatten())
    out = model(ids, targets)
    close(out.loss, expected)
    assert out.losses.keys() == {"cross_entropy"} and out.aux_loss == 0
    out = model.train()(ids, targets)
    close(out.loss, expected)
    assert out.losses.keys() == {"cross_entropy", "expert_balance", "device_balance"}
    assert out.losses["expert_balance"].item() == pytest.approx(5.0)
    assert out.losses["device_balance"].item() == pytest.approx(1.0)
    assert out.aux_loss.item() == pytest.approx(6.0)


@torch.no_grad()
def test_expert_load_counts_the_choices_of_each_layer():
    model, loads = random_model(small()), []

    def count(gate, args, routing):
        loads.append(routing.index.flatten().bincount(minlength=8) / (2 * 16 * 3))

    for layer in model.model.layers[1:]:
        layer.mlp.gate.register_forward_hook(count)
    close(model(torch.randint(0, 96, (2, 16))).expert_load, torch.stack(loads))


# --- norm, RoPE, YaRN --------------------------------------------------------------------------


def test_rmsnorm_casts_before_the_weight():
    norm, x = deepseek.RMSNorm(64), torch.randn(5, 64).bfloat16()
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    x32 = x.float()
    unit = x32 / (x32.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    with torch.autocast("cpu", torch.bfloat16):  # one cast, for all products that read it
        assert torch.equal(norm(x32), norm.weight.bfloat16() * unit.bfloat16())
    assert torch.equal(norm.bfloat16()(x), norm.weight * unit.bfloat16())


def test_yarn_slows_each_pair_by_the_golden_ratio():
    plain, yarn = Config.preset("v2", rope_scaling=None), Config.preset("v2")
    ratio = deepseek.rope_frequencies(yarn) / deepseek.rope_frequencies(plain)
    assert torch.allclose(ratio[:11], torch.ones(11))
    assert torch.allclose(ratio[[11, 16, 22]], torch.tensor([0.925, 0.55, 0.1]), atol=1e-4)
    assert torch.allclose(ratio[23:], torch.full((9,), 0.025), atol=1e-6)


@pytest.mark.parametrize(
    "scaling, golden, cos",
    [
        (None, 0.0721688, 1),
        (YARN_V2, 0.1147214, 1),
        (YARN_V2 | dict(mscale=1.0, mscale_all_dim=1.0), 0.1352338, 1),
        ({k: v for k, v in YARN_V2.items() if "mscale" not in k}, 0.0721688, 1.3688879),
    ],
)
def test_softmax_scale_and_the_length_of_the_rotation_are_golden(scaling, golden, cos):
    config = Config.preset("v2", rope_scaling=scaling)
    assert deepseek.softmax_scale(config) == pytest.approx(golden, abs=5e-8)
    close(deepseek.rope_angles(config, torch.zeros(1))[0], torch.full((1, 32), float(cos)), 1e-7)


# --- MLA ---------------------------------------------------------------------------------------


def test_decoding_is_absorbed_and_a_prompt_expanded_whichever_is_cheaper():
    config, many = Config.preset("v2"), 10**9
    assert deepseek.absorbing_is_cheaper(config, 170, many)
    assert not deepseek.absorbing_is_cheaper(config, 171, many)
    assert not deepseek.absorbing_is_cheaper(config, 100, 100)  # a prompt into an empty cache
    config = small(max_position_embeddings=1000, kv_lora_rank=200)
    for new, cached, absorbs in ((1, 500, True), (1, 1, True), (500, 0, False), (300, 300, False)):
        cache = deepseek.LatentCache(torch.zeros(3, 1, 900, 0), [cached])
        ids = torch.zeros(1, new)
        assert deepseek.attention_context(config, ids, cache, None).absorb == absorbs
        assert not deepseek.attention_context(config, ids, None, None).absorb


def test_absorbed_scores_stay_within_the_range_of_fp16_at_the_widths_of_v2():
    mla = deepseek.MLA(Config.preset("v2-lite", num_attention_heads=2, hidden_size=64)).half()
    torch.manual_seed(0)
    w_uk = mla.kv_b_proj.weight.data.normal_(0, 0.1).unflatten(0, (2, -1))[:, :128]
    q_nope, q_pe = (100 * torch.randn(1, 8, 2, n).half() for n in (128, 64))
    memory = 8 * torch.randn(1, 64, 576).half()
    assert (q_nope.transpose(1, 2) @ w_uk @ memory[..., :512].mT).isinf().any()  # if not scaled
    assert mla.absorbed(q_nope, q_pe, memory, None).isfinite().all()


def test_a_cache_has_the_size_asked_for_and_the_dtype_of_the_weights_and_is_not_trained_through():
    model = random_model(small())
    cache = model.bfloat16().new_cache(2, 7)
    assert cache.latents[0].dtype == torch.bfloat16 and cache.lengths == [0, 0]
    assert sum(t.nbytes for t in cache.latents) == 3 * 2 * 7 * 28 * 2
    cache = model.float().new_cache(1, 7)
    model(torch.zeros(1, 4, dtype=torch.long), cache=cache)
    latents = torch.stack(cache.latents)  # 3 layers, 1 row
    assert latents.dtype == torch.float32 and not latents.requires_grad
    assert cache.lengths == [4] and latents[:, :, :4].all() and not latents[:, :, 4:].any()


@torch.no_grad()
def test_rows_of_different_lengths_share_a_cache():
    model = random_model(small())
    cache, ids = model.new_cache(2, 32), torch.randint(0, 96, (2, 12))
    model(ids[:, :6], cache=cache)
    cache.lengths = [6, 3]  # the second row forgets three tokens, and is given them again
    more = torch.stack([ids[0, 6:9], ids[1, 3:6]])
    ahead, behind = model(more, cache=cache).logits
    close(ahead, model(ids[:1, :9]).logits[0, 6:])
    close(behind, model(ids[1:, :6]).logits[0, 3:])
    close(model(ids[:, 6:9], cache=cache).logits[1], model(ids[1:, :9]).logits[0, 6:])


@pytest.mark.parametrize("T, places, end", [(5, 4, "cache ends at 4"), (129, 200, "context ends"),
                                            (129, None, "context ends at 128")])  # fmt: skip
def test_outgrowing_the_cache_or_the_context_is_refused(T, places, end):
    model, ids = random_model(small()), torch.zeros(1, T, dtype=torch.long)
    with pytest.raises(ValueError, match=f"^{T} tokens do not fit: the .*{end}"):
        model(ids, cache=places and model.new_cache(1, places))
    model(ids[:, 1:], cache=places and model.new_cache(1, places))


# --- router, losses, experts -------------------------------------------------------------------


@torch.no_grad()
def test_in_fp16_neither_scores_nor_the_residual_stream_outgrow_it():
    lite = Config.preset("v2-lite", hidden_size=64, num_attention_heads=2)
    torch.manual_seed(0)
    exact = deepseek.MLA(lite)
    given = [12 * torch.randn(1, 3, 2, 128), torch.randn(1, 3, 2, 64)]
    given += [torch.cat([600 * torch.randn(1, 9, 512), torch.randn(1, 9, 64)], -1)]
    w_uk = exact.kv_b_proj.weight.view(2, 256, 512)[:, :128]
    scores = torch.einsum("bthn, hnr, bsr -> bhts", given[0], w_uk, given[2][..., :512])
    assert scores.abs().max() > 65_504 > scores.abs().max() * exact.scale
    got = deepseek.MLA(lite).half()
    got.load_state_dict(exact.state_dict())
    close(got.absorbed(*(t.half() for t in given), None), exact.absorbed(*given, None), 0.05)

    model = random_model(small()).half()
    model.model.embed_tokens.weight[:] = 60_000.0  # fp16 ends at 65,504
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight *= 3e4
    assert torch.isfinite(model(torch.arange(60).view(2, 30)).logits).all()


def test_norm_topk_prob_normalises_instead_of_scaling():
    for K, norm in ((3, True), (1, False)):
        config = small(norm_topk_prob=True, num_experts_per_tok=K, routed_scaling_factor=16.0)
        gate = random_model(config).model.layers[1].mlp.gate
        sums = gate(torch.randn(2, 9, 48)).weights.sum(-1)
        assert torch.allclose(sums, torch.ones(2, 9)) == norm


def test_a_group_is_judged_by_its_best_expert():
    # one strong expert (group 0) against two medium ones (group 1), whose sum is larger
    scores = torch.tensor([[[0.31, 0.0, 0.26, 0.25, 0.09, 0.03, 0.03, 0.03]]])
    for method, chosen, allowed in (
        ("group_limited_greedy", [0, 1], [True, False, False, False]),
        ("greedy", [0, 2], [True] * 4),
    ):
        config = small(n_group=4, topk_group=1, topk_method=method, num_experts_per_tok=2)
        index, groups = Gate(config).choose(scores)
        assert index[0, 0].tolist() == chosen and groups[0, 0].tolist() == allowed


def test_the_gate_computes_in_float32_under_autocast_and_of_bfloat16():
    gate, x = random_model(small()).model.layers[1].mlp.gate, torch.randn(1, 50, 48)
    with torch.autocast("cpu", torch.bfloat16):
        close(gate(x).scores, F.linear(x.double(), gate.weight.double()).softmax(-1).float())
    gate, x = gate.bfloat16(), x.bfloat16()
    close(gate(x).scores, F.linear(x.float(), gate.weight.float()).softmax(-1))


def test_balance_losses_are_per_sequence_with_gradients_through_probabilities_only():
    alphas = dict(aux_loss_alpha=0.5, device_loss_alpha=0.7, comm_loss_alpha=0.9)
    scores = torch.randn(2, 10, 8, requires_grad=True).softmax(-1)  # B T E; 4 groups
    index = torch.rand(2, 10, 8).topk(3).indices
    allowed = torch.zeros(2, 10, 4, dtype=torch.bool)
    allowed.scatter_(-1, torch.rand(2, 10, 4).topk(2).indices, True)
    routing = Routing(None, scores, None, index, allowed)
    losses = deepseek.balance_losses(small(**GROUPS | alphas), routing)
    f = F.one_hot(index, 8).sum((1, 2)) * 8 / (3 * 10)  # B E
    expected = {
        "expert_balance": 0.5 * f,
        "device_balance": 0.7 * f.view(2, 4, 2).mean(-1).repeat_interleave(2, -1),
        "communication_balance": 0.9 * (allowed.sum(1) * 4 / (2 * 10)).repeat_interleave(2, -1),
    }
    assert losses.keys() == expected.keys()
    for name, loss in losses.items():
        (grad,) = torch.autograd.grad(loss, scores, retain_graph=True)
        close(grad, (expected[name] / 10 / 2)[:, None].expand_as(grad))  # mean over T and B
        close(loss, (grad * scores).sum())


@pytest.mark.parametrize("size", [12, 15])  # as on a card, and with rows of padding, as on a CPU
def test_rows_go_to_their_places_and_back_and_the_rest_is_zero(size, monkeypatch):
    # what is not written shows, as NaN
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda x, *shape: x.new_full(shape, torch.nan))
    torch.manual_seed(0)
    x, y = (torch.randn(n, 5, dtype=torch.float64, requires_grad=True) for n in (12, size))
    place = torch.randperm(size)[:12]
    expected = torch.zeros(size, 5, dtype=torch.float64)
    for i, row in enumerate(place.tolist()):
        expected[row] = x[i]
    assert torch.equal(deepseek.spread(x, place, size), expected)
    back = torch.full([size], 12)  # rows of padding share one place after the last
    back[place] = torch.arange(12)
    assert torch.equal(deepseek.spread(y, back, 13)[:-1], y[place])
    assert torch.autograd.gradcheck(lambda x: deepseek.spread(x, place, size), x)
    assert torch.autograd.gradcheck(lambda y: deepseek.spread(y, back, 13)[:-1], y)


@pytest.mark.parametrize("dtype, relative", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_grouped_and_gathered_experts_equal_the_loop(dtype, relative):
    torch.manual_seed(0)
    experts = Experts(small())
    given = [torch.randn(37, 48).to(dtype), torch.rand(37, 3)]
    given += [(torch.randn_like(p) * 0.3).to(dtype) for p in experts.parameters()]
    index = torch.rand(37, 8).topk(3).indices
    index[index == 5] = 4  # expert 5 has nothing to do, expert 4 may get a token twice
    results = []
    for run in (experts.looped, experts.grouped, experts.gathered):
        x, *rest = (t.clone().requires_grad_() for t in given)
        out = run(x, index, *rest)
        assert out.dtype == torch.float32  # that of the router's weights
        out.square().sum().backward()
        results.append([out, *(t.grad.float() for t in (x, *rest))])
        assert not results[-1][3][5].any() and not results[-1][4][5].any()  # idle: gradient zero
    for looped, *others in zip(*results, strict=True):
        for other in others:
            assert torch.isfinite(other).all()
            close(looped, other, relative)


@pytest.mark.parametrize(
    "dtype, overrides, tokens, eager, compiled, traced",
    [
        (torch.bfloat16, {}, 22, "grouped", "grouped", True),
        # not 16 bytes
        (torch.float32, dict(moe_intermediate_size=22), 22, "looped", "looped", False),
        (torch.float32, dict(hidden_size=51), 22, "looped", "looped", False),
        (torch.float32, dict(moe_intermediate_size=24), 22, "grouped", "grouped", False),
        (torch.bfloat16, dict(moe_intermediate_size=20), 22, "looped", "looped", False),
        # 8 experts, 3 for a token: 6 are copied, not 9
        (torch.float32, {}, 2, "gathered", "gathered", True),
        # compiled, up to 64 are copied; grouped_mm is traced in bf16 alone
        (torch.float32, {}, 3, "grouped", "gathered", True),
        (torch.bfloat16, {}, 21, "grouped", "gathered", True),
        (torch.float32, {}, 22, "grouped", "grouped", False),
    ],
)
def test_experts_run_in_the_way_that_fits_traced_where_that_works(
    dtype, overrides, tokens, eager, compiled, traced, monkeypatch
):
    torch._dynamo.reset()  # another test's graphs count towards its limit
    taken = []

    def spy(real, self, x, *rest):
        taken.append((real.__name__, x.dtype, torch.compiler.is_compiling()))
        return real(self, x, *rest)

    for real in (Experts.looped, Experts.grouped, Experts.gathered):
        monkeypatch.setattr(Experts, real.__name__, lambda *a, real=real: spy(real, *a))
    experts = Experts(small(**overrides)).requires_grad_(False)
    for p in experts.parameters():
        nn.init.normal_(p)
    x = torch.randn(tokens, experts.gate_up_proj.shape[2])
    index, weights = torch.rand(tokens, 8).topk(3).indices, torch.rand(tokens, 3)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        expected = experts(x, index, weights)
        close(torch.compile(experts, backend="eager")(x, index, weights), expected)
    assert taken == [(eager, dtype, False), (compiled, dtype, traced)]


def test_dropping_keeps_what_each_device_wants_most():
    # 2 groups of 4 experts; capacity = 0.5 * (1*8*1)/2 = 2 of the 6 and 2 assignments
    config = small(n_group=2, num_experts_per_tok=1, token_drop_capacity=0.5)
    index = torch.tensor([0, 1, 2, 3, 0, 1, 4, 5]).view(1, 8, 1)
    weights = torch.tensor([0.1, 0.9, 0.2, 0.8, 0.3, 0.4, 0.05, 0.06]).view(1, 8, 1)
    routing = Routing(None, None, weights, index, None)
    dropped = deepseek.drop_tokens(config, routing, torch.tensor([False])).flatten()
    assert torch.equal(dropped, torch.tensor([0, 0.9, 0, 0.8, 0, 0, 0.05, 0.06]))
    assert torch.equal(deepseek.drop_tokens(config, routing, torch.tensor([True])), weights)


def test_capacity_is_shared_by_the_batch_and_taken_first_by_those_that_drop_nothing():
    config = small(n_group=2, num_experts_per_tok=2, token_drop_capacity=1.0)
    index = torch.tensor([0, 1]).expand(4, 3, 2)  # all 24 assignments to device 0, which takes 12
    weights = torch.rand(4, 3, 2, requires_grad=True)
    routing = Routing(None, None, weights, index, None)
    dropped = deepseek.drop_tokens(config, routing, torch.zeros(4, dtype=torch.bool))
    assert (dropped > 0).sum() == 12
    assert dropped[dropped > 0].min() > weights[dropped == 0].max()
    assert torch.autograd.grad(dropped.sum(), weights)[0].sum() == 12
    two = torch.tensor([True, False, True, False])
    dropped = deepseek.drop_tokens(config, routing, two)  # the two that drop nothing fill it alone
    assert (dropped[two] > 0).all() and (dropped[~two] == 0).all()


@torch.no_grad()
def test_a_tenth_of_the_sequences_is_spared_by_all_layers(monkeypatch):
    seen, real = [], deepseek.drop_tokens
    monkeypatch.setattr(deepseek, "drop_tokens", lambda *a: seen.append(a[2]) or real(*a))
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


@pytest.mark.parametrize("lengths", [(5, 5), (7, 1, 3)])
def test_greedy_generation_equals_the_uncached_argmax_of_each_row_alone(lengths):
    model = random_model(small(**GROUPS))
    prompts = [torch.randint(0, 96, (n,)) for n in lengths]
    for prompt, row in zip(prompts, generated(model, prompts, temperature=0), strict=True):
        ids = prompt[None]
        with torch.no_grad():
            for _ in range(12):
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(row, ids[0, len(prompt) :])


@pytest.mark.parametrize("prompts", [[[3, 4, 5]], [[3, 4, 5, 6], [11]]])
def test_decoding_compiles_to_one_graph_that_says_the_same(monkeypatch, prompts):
    torch._dynamo.reset()  # another test's broken graphs are remembered
    graphs, real = [], torch.compile

    def count(graph, inputs):
        graphs.append([tuple(t.shape) for t in inputs])
        return graph

    def compile(function, dynamic, mode):
        assert not dynamic
        modes.append(mode)
        return real(function, backend=count, fullgraph=bool(mode), dynamic=False)

    modes, static = [], []  # what a graph on a card may write to
    monkeypatch.setattr(torch._dynamo, "mark_static_address", lambda t: static.append(t.shape))
    monkeypatch.setattr(torch, "compile", compile)
    model = random_model(small(**GROUPS | dict(max_position_embeddings=400)))
    longest = len(prompts[0])
    for more, n, expected in (
        ([], 30, 1), ([7], 31, 1), ([7, 8, 9], 90, 1), ([], 256 - longest, 1), ([], 300, 2)
    ):  # fmt: skip
        longer = [prompt + more for prompt in prompts]
        eager = generated(model, longer, n, temperature=0)
        assert torch.equal(generated(model, longer, n, temperature=0, compiled=True), eager)
        assert len(graphs) == expected  # for each size of the cache one
    caches = [(len(prompts), room, 28) for room in (256, 400)]
    # one tensor for each of 3 layers: a write to one must not copy the others
    assert [[t for t in shapes if t[-1:] == (28,)] for shapes in graphs] == [
        3 * [cache] for cache in caches
    ]
    assert static == 4 * 3 * caches[:1] + 3 * caches[1:]
    assert modes == 5 * ["reduce-overhead"]
    list(model.generate([[3]] * 22, 2, temperature=0, compiled=True))  # 66 assignments, 8 experts
    assert modes[5:] == [None]


def test_stop_repeats_itself_and_ends_the_stream():
    model, prompts = random_model(small()), [[3, 4], [5, 6]]
    free = generated(model, prompts, 40, temperature=0)
    stop = int(free[0, 2])
    first, second = generated(model, prompts, 40, temperature=0, stop=stop)
    assert (first[2:] == stop).all()
    own = [*free[1].tolist(), stop].index(stop)
    assert own > 3 and torch.equal(second[:own], free[1, :own])  # the other row goes on
    alone = generated(model, prompts[:1], 40, temperature=0, stop=stop)
    assert alone.shape[1] == free[0].tolist().index(stop) + 1


def test_sampling_draws_what_torch_multinomial_draws():
    logits = torch.randn(50, 96, generator=torch.Generator().manual_seed(0))
    for seed in range(5):
        ours, theirs = (torch.Generator().manual_seed(seed) for _ in range(2))
        expected = torch.multinomial((logits / 0.7).softmax(-1), 1, generator=theirs)[:, 0]
        assert torch.equal(deepseek.sample(logits, 0.7, generator=ours), expected)


def test_sampling_follows_the_distribution_and_its_cuts():
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05])
    shuffled = torch.tensor([2, 0, 3, 1])  # a token's rank is not its id
    logits = probs.log().expand(20_000, 4)[:, shuffled]

    def share(**options):
        g = torch.Generator().manual_seed(0)
        ids = shuffled[deepseek.sample(logits, generator=g, **options)]
        return ids.bincount(minlength=4) / 20_000

    two, three = torch.tensor([0.625, 0.375, 0, 0]), torch.tensor([0.5, 0.3, 0.15, 0]) / 0.95
    for expected, many in (
        (probs, [{}, dict(top_k=99)]),
        (probs**2 / (probs**2).sum(), [dict(temperature=0.5)]),
        (two, [dict(top_k=2), dict(top_p=0.8), dict(top_k=3, top_p=0.6)]),
        (three, [dict(top_p=0.81)]),  # 1e-300 is zero in fp32
        (torch.tensor([1.0, 0, 0, 0]), [dict(top_p=1e-300), dict(temperature=1e-30)]),
    ):
        for options in many:
            assert torch.allclose(share(**options), expected, atol=0.02), options
    assert deepseek.sample(torch.zeros(1000, 2), top_p=0.5).unique().numel() == 1  # exactly half


def test_a_generator_repeats_its_text_without_the_padding_of_the_vocabulary():
    model = random_model(small())
    before = torch.get_rng_state()
    with torch.no_grad():
        model.lm_head.weight[70:] *= 100  # what lies behind the vocabulary is loud
    prompts = torch.zeros(8, 1, dtype=torch.long)
    for temperature in (0, 1):
        a, b = (
            generated(model, prompts, temperature=temperature, vocab_size=70, generator=g)
            for g in (torch.Generator().manual_seed(5), torch.Generator().manual_seed(5))
        )
        assert torch.equal(a, b) and a.max() < 70
    assert torch.equal(before, torch.get_rng_state())


def test_generation_ends_where_the_context_does_and_keeps_no_gradients():
    model, graphs = random_model(small(max_position_embeddings=10)), []
    model.lm_head.register_forward_hook(lambda head, args, y: graphs.append(y.requires_grad))
    assert generated(model, [[1, 2, 3]], 100).shape == (1, 7)
    assert generated(model, [[1], [1, 2, 3, 4]], 100).shape == (2, 6)
    assert not list(model.generate([[1]], 0))
    assert graphs == [False] * 13


@pytest.mark.parametrize(
    "message, options",
    [
        ("a prompt is empty", [dict(prompts=[]), dict(prompts=[[1], []])]),
        ("rows of ids", [dict(prompts=[1, 2])]),
        ("128 tokens fills the context of 128", [dict(prompts=[[1] * 128])]),
        ("temperature = ", [dict(temperature=-1), dict(temperature=math.nan)]),
        ("top_k = 0", [dict(top_k=0)]),
        ("top_p = ", [dict(top_p=0.0), dict(top_p=1.5)]),
        ("max_new_tokens = -1", [dict(max_new_tokens=-1)]),
    ],
)
def test_generate_refuses_impossible_arguments(message, options):
    model = random_model(small())
    for some in options:
        with pytest.raises(ValueError, match=message):
            next(model.generate(**dict(prompts=[[1]], max_new_tokens=5) | some))
    with pytest.raises(ValueError, match="eval"):
        next(model.train().generate([[1]], 5))
    nn.init.constant_(model.eval().lm_head.weight, torch.nan)
    with pytest.raises(FloatingPointError, match="not finite"):
        next(model.generate([[1]], 5))


# --- config ------------------------------------------------------------------------------------


OTHER = dict(
    vocab_size=80, hidden_size=54, num_hidden_layers=2, num_attention_heads=4, q_lora_rank=None,
    kv_lora_rank=24, qk_nope_head_dim=12, qk_rope_head_dim=6, v_head_dim=16, intermediate_size=64,
    moe_intermediate_size=16, n_routed_experts=16, n_shared_experts=1, num_experts_per_tok=2,
    n_group=2, topk_group=4, topk_method="greedy", norm_topk_prob=True, routed_scaling_factor=2.5,
    first_k_dense_replace=2, moe_layer_freq=2, aux_loss_alpha=0.5, device_loss_alpha=0.5,
    comm_loss_alpha=0.5, token_drop_capacity=0.7, max_position_embeddings=64, rms_norm_eps=1e-2,
    rope_theta=500.0, rope_scaling=STRETCH, initializer_range=0.5, bos_token_id=3, eos_token_id=4,
)  # fmt: skip


@pytest.mark.parametrize("field", fields(Config), ids=lambda field: field.name)
@torch.no_grad()
def test_every_field_acts_and_is_exported_as_its_role_says(field, tmp_path):
    transformers = pytest.importorskip("transformers")
    name, role = field.name, field.metadata["role"]
    base = random_model(small(**GROUPS, q_lora_rank=28))
    value = OTHER[name]
    assert value != getattr(base.config, name)
    model = random_model(replace(base.config, **{name: value}))
    ids = torch.randint(0, 80, (2, 30))
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (base, model)]
    if shapes[0] == shapes[1]:
        model.load_state_dict(base.state_dict())
        acts = role != deepseek.TRAINING and not re.search("max_position|token_id", name)
        assert torch.equal(model(ids).logits, base(ids).logits) != acts
    if role == deepseek.LOCAL:
        with pytest.raises(UsageError, match=f"{name} = {value!r} cannot be exported"):
            formats.save_pretrained(model, tmp_path)
        assert not list(tmp_path.iterdir())
        return
    formats.save_pretrained(model, tmp_path)
    ours = formats.load_pretrained(tmp_path)
    assert getattr(ours.config, name) == value
    assert torch.equal(ours(ids).logits, model(ids).logits)
    other = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", experts_implementation="eager"
    )
    close(model(ids).logits, other.eval()(ids).logits)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (dict(qk_rope_head_dim=7), "qk_rope_head_dim = 7 must be even"),
        (dict(n_group=3), "n_routed_experts = 8 must be a multiple of n_group = 3"),
        (GROUPS | dict(num_experts_per_tok=5), "at most 4, the experts that a token"),
        (dict(n_group=2, topk_group=3), "topk_group = 3 must be at most n_group = 2"),
        (dict(hidden_size=50), "hidden_size = 50 must be a multiple of num_attention_heads = 3"),
        (dict(topk_method="noaux_tc"), "topk_method = 'noaux_tc' must be greedy or group_lim"),
        (dict(vocab_size=0), "vocab_size = 0 must be a whole number, at least 1"),
        (dict(n_shared_experts=-1), "n_shared_experts = -1 must be a whole number, at least 0"),
        (dict(n_routed_experts=True), "n_routed_experts = True"),
        (dict(vocab_size=2**31), "vocab_size = 2147483648"),
        (dict(q_lora_rank=0), "q_lora_rank = 0"),
        (dict(rope_theta=math.inf), "rope_theta = inf must be a finite number"),
        (dict(rope_theta=1.0), "rope_theta = 1.0 must be a finite number, at least 1.1"),
        (dict(aux_loss_alpha=-0.1), "aux_loss_alpha = -0.1 must be a finite number, at least 0"),
        (dict(rms_norm_eps=0.0), "rms_norm_eps = 0.0 must be a finite number, at least 1e-12"),
        (dict(num_hidden_layers=10_001), "num_hidden_layers = 10001 must be at most 10000"),
        (dict(norm_topk_prob="no"), "norm_topk_prob = 'no' must be true or false"),
        (dict(bos_token_id=96), "bos_token_id = 96 must be below vocab_size = 96"),
        (dict(eos_token_id=96), "eos_token_id = 96 must be below vocab_size = 96"),
        (dict(comm_loss_alpha=0.1), "comm_loss_alpha = 0.1 must be 0 unless topk_method"),
        (dict(token_drop_capacity=1.0), "token_drop_capacity = 1.0 must be 0 unless n_group"),
        (dict(rope_scaling=YARN_V2 | {"type": "linear"}), "type 'linear' must be yarn"),
        (dict(rope_scaling={"type": "yarn", "factor": 2}), "must be null, or an object with"),
        (dict(rope_scaling=YARN_V2 | {"factro": 2}), "must be null, or an object with"),
        (dict(rope_scaling=YARN_V2 | {"beta_slow": 0}), "beta_slow = 0 must be a finite number"),
        (dict(rope_scaling=YARN_V2 | {"factor": 0.5}), "factor = 0.5 must be a finite number"),
        (dict(rope_scaling=YARN_V2 | {"factor": "40"}), "factor = '40' must be a finite number"),
        (dict(rope_scaling=YARN_V2 | {"beta_fast": 0.5}), "beta_fast must be at least beta_slow"),
    ],
)
def test_impossible_configs_are_refused_in_a_sentence(overrides, message):
    with pytest.raises(ConfigError, match=message) as caught:
        small(**overrides)
    assert "\n" not in str(caught.value)


def test_presets_and_stored_values_are_taken_with_known_names_alone():
    with pytest.raises(ConfigError, match="size 'huge' is unknown"):
        Config.preset("huge")
    with pytest.raises(ConfigError, match="'n_experts' is not a field"):
        Config.preset("tiny", n_experts=3)
    assert Config.preset("1b", n_routed_experts=32).n_routed_experts == 32
    small(n_group=4, topk_group=1)  # greedy routing does not care for groups
    neutral = dict(n_group=1, topk_method="greedy", q_lora_rank=1536, norm_topk_prob=False)
    left = {name: value for name, value in vars(small()).items() if name not in neutral}
    assert Config.from_dict(left) == small(**neutral)
    del left["vocab_size"]
    with pytest.raises(ConfigError, match="lacks 'vocab_size'"):
        Config.from_dict(left)
