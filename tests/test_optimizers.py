"""The optimizers against PyTorch's own, and the schedule of the learning rate."""

import copy

import pytest
import torch
from conftest import random_model, small

from common import optimizers
from common.optimizers import make_optimizer, orthogonalise
from deepseek import DeepSeek

# --- Muon ---------------------------------------------------------------------------------------


def step_with_same_gradients(models_and_optimizers, steps=3):
    for step in range(steps):
        for model, optimizer in models_and_optimizers:
            numbers = torch.Generator().manual_seed(step)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=numbers)
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("shape", [(24, 56), (56, 24), (32, 32)])
def test_muon_steps_as_that_of_pytorch(shape):
    torch.manual_seed(0)
    ours = torch.nn.Linear(*shape, bias=False)
    theirs = copy.deepcopy(ours)
    # theirs has steps of 0.2 instead of 0.12
    recipe = dict(lr=0.006, weight_decay=20.0, momentum=0.95, ns_steps=3)
    muon = torch.optim.Muon(theirs.parameters(), adjust_lr_fn="match_rms_adamw", **recipe)
    start = ours.weight.detach().clone()
    mine = make_optimizer(ours, 1.0, 12.0, 0.99, "muon", torch.bfloat16)
    mine.param_groups[0]["lr"] = 0.01  # as the schedule does
    step_with_same_gradients([(ours, mine), (theirs, muon)])
    moved = (theirs.weight - start).norm()
    assert moved / start.numel() ** 0.5 > 3e-3
    # both in bf16, which is rounded at other places
    assert (ours.weight - theirs.weight).norm() < 0.03 * moved


def test_muon_sets_the_singular_values_of_the_mean_gradient():
    torch.manual_seed(0)
    layer = torch.nn.Linear(40, 24, bias=False).double()
    muon = make_optimizer(layer, 0.01, 0.5, 0.99, "muon", torch.float64)
    expected, mean = layer.weight.detach().clone(), torch.zeros(24, 40, dtype=torch.float64)
    for _ in range(3):
        grad = layer.weight.grad = torch.randn(24, 40, dtype=torch.float64)
        mean = 0.95 * mean + 0.05 * grad
        u, s, v = torch.linalg.svd(0.95 * mean + 0.05 * grad, full_matrices=False)
        s = s / s.square().sum().sqrt()
        for _ in range(3):
            s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
        expected = expected * (1 - 0.01 * 0.5) - 0.01 * 0.12 * 40**0.5 * (u * s) @ v
        muon.step()
        assert torch.allclose(layer.weight, expected, atol=1e-12)


@pytest.mark.parametrize("dtype, off", [(torch.float32, 1e-3), (torch.float16, 0.02)])
def test_orthogonalising_keeps_the_directions_and_evens_their_sizes(dtype, off):
    torch.manual_seed(0)
    u = torch.linalg.qr(torch.randn(2, 40, 16)).Q
    v = torch.linalg.qr(torch.randn(2, 24, 16)).Q
    sizes = torch.logspace(0, -1.4, 16)  # the smallest is a fortieth of the norm
    x = 1e-6 * (u * sizes) @ v.mT  # as small as gradients are
    for y in (orthogonalise(x, dtype), orthogonalise(x.mT, dtype).mT):
        assert y.dtype == dtype
        inner = u.mT @ y.float() @ v  # diagonal where the directions are kept
        found = inner.diagonal(dim1=1, dim2=2)
        assert found.min() > 0.65 and found.max() < 1.25  # 0.68 and 1.21, and rounding
        assert (inner - torch.diag_embed(found)).abs().max() < off
    for tiny in (0.0, 1e-25):  # an expert that no token reaches any more
        assert orthogonalise(tiny * x, dtype).abs().max() < 1e-3


def test_muon_leaves_embedding_head_router_and_norms_to_adamw_and_takes_experts_one_by_one():
    model = random_model(small(q_lora_rank=24))
    other = copy.deepcopy(model)
    names = {p: name for name, p in model.named_parameters()}
    muon = make_optimizer(model, 0.01, 0.1, 0.99, "muon")
    inner = {names[p] for g in muon.param_groups if g.get("orthogonal") for p in g["params"]}
    ends = ("embed_tokens.weight", "lm_head.weight", "norm.weight", ".mlp.gate.weight")
    assert inner == {name for name in names.values() if not name.endswith(ends)}
    adamw = torch.optim.AdamW(other.parameters(), 0.01, (0.9, 0.99), weight_decay=0.1)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    step_with_same_gradients([(model, muon), (other, adamw)], steps=1)
    theirs = dict(other.named_parameters())
    for name, p in model.named_parameters():
        if p.dim() == 1:  # no weight decay
            assert torch.allclose(p, theirs[name] + 0.1 * 0.01 * start[name], atol=1e-6)
        elif name not in inner:
            assert torch.allclose(p, theirs[name], atol=1e-6)
        elif p.dim() == 3:
            numbers, grads = torch.Generator().manual_seed(0), {}
            for n, q in model.named_parameters():
                grads[n] = torch.randn(q.shape, generator=numbers)
            for e in range(len(p)):
                one = torch.nn.Module()
                one.weight = torch.nn.Parameter(start[name][e])
                one.weight.grad = grads[name][e]
                make_optimizer(one, 0.01, 0.1, 0.99, "muon").step()
                assert torch.allclose(p[e], one.weight, atol=1e-5)


def test_muon_does_not_wait_for_a_device():
    with torch.device("meta"):  # which has no values to wait for
        model = DeepSeek(small(q_lora_rank=24))
    muon = make_optimizer(model, 0.01, 0.1, 0.99, "muon", torch.float16)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    (group,) = (g for g in muon.param_groups if g.get("orthogonal"))
    with torch.no_grad():
        muon.orthogonal_step(group)
    assert all(muon.state[p]["momentum_buffer"].shape == p.shape for p in group["params"])
    assert not any(p.grad is not None for p in group["params"])


def test_a_gradient_out_of_the_range_of_fp16_leaves_muon_as_it_was():
    layer = torch.nn.Linear(8, 8, bias=False)
    muon = make_optimizer(layer, 0.01, 0.1, 0.99, "muon", torch.float16)
    scaler, before = torch.amp.GradScaler("cpu"), layer.weight.detach().clone()
    for grad, moves in ((torch.inf, False), (1.0, True)):
        scaler.scale(torch.ones(()))  # which makes the scale
        layer.weight.grad = torch.full((8, 8), grad)
        scaler.unscale_(muon)
        scaler.step(muon)
        scaler.update()
        assert torch.equal(layer.weight, before) != moves and bool(muon.state) == moves


# --- weights and moments in bf16 ----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["adamw", "muon", "low_memory"])
def test_every_optimizer_has_the_betas_asked_for(kind):
    made = make_optimizer(random_model(small()), 0.01, 0.1, 0.7, kind)
    assert {group["betas"] for group in made.param_groups} == {(0.9, 0.7)}


@pytest.mark.parametrize("scale", [1.0, 2.0**-17])
def test_a_first_step_for_little_memory_has_the_size_of_the_rate_however_small_gradients_are(scale):
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(torch.zeros(1, 64, dtype=torch.bfloat16))
    layer.weight.grad = torch.full((1, 64), scale, dtype=torch.bfloat16)
    make_optimizer(layer, 0.01, 0.0, 0.95, "low_memory").step()
    assert layer.weight.float().mean().item() == pytest.approx(-0.01, rel=0.01)


def test_rounding_at_random_is_right_in_the_mean_and_takes_a_neighbour():
    torch.manual_seed(0)
    x = torch.tensor([1.001, -3.3, 2e-30, 65000.0, 0.0])
    noise = torch.randint(0, 2**16, (200_000,), dtype=torch.int32)
    rounded = optimizers.round_at_random(x.repeat(40_000, 1).flatten(), noise).view(-1, 5)
    close = (rounded.float() / x).nan_to_num(1.0)
    assert (close - 1).abs().max() <= 2**-7
    assert torch.allclose(rounded.double().mean(0), x.double(), rtol=1e-4)
    exact = torch.randn(1000).bfloat16()
    assert torch.equal(optimizers.round_at_random(exact.float(), noise[:1000]), exact)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_step_for_little_memory_is_adamw_in_the_mean(compiled):
    def optimizer_of(weight, low_memory):
        layer = torch.nn.Module()
        layer.weight = torch.nn.Parameter(weight)
        kind = "low_memory" if low_memory else "adamw"
        return layer.weight, make_optimizer(layer, 1e-3, 0.5, 0.95, kind, compiled=compiled)

    torch.manual_seed(0)
    start = torch.randn(1, 64).bfloat16()
    exact, adamw = optimizer_of(start.float(), False)
    many, ours = optimizer_of(start.repeat(4000, 1), True)
    for step in range(4):
        grad = torch.randn(1, 64, generator=torch.Generator().manual_seed(step)).bfloat16()
        exact.grad, many.grad = grad.float(), grad.repeat(4000, 1)
        adamw.step(), ours.step()
    moved = (exact - start).abs().mean()
    assert moved > 2e-3  # half of a spacing of bf16, and less where weights are small
    assert (many.float().mean(0) - exact).abs().max() < 0.1 * moved


# --- the schedule --------------------------------------------------------------------------------


def test_the_schedules():
    def rates(schedule, steps=100, peak=1.0):
        return [optimizers.learning_rate(s, steps, peak, 10, schedule) for s in range(steps)]

    step, cosine, linear = rates("step"), rates("cosine"), rates("linear", 110, 2.0)
    assert step[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert step[10] == step[59] == 1
    assert step[60] == step[89] == pytest.approx(0.316)
    assert step[90] == step[99] == pytest.approx(0.316**2)
    assert cosine[55] == pytest.approx(0.55) and cosine[99] == pytest.approx(0.1, abs=0.01)
    assert optimizers.learning_rate(150, 100, 1.0, 10, "cosine") == pytest.approx(0.1)
    assert linear == pytest.approx([0.2 * (s + 1) for s in range(10)] +
                                   [2 - 0.02 * s for s in range(100)])  # fmt: skip
    assert rates("constant")[10:] == [1.0] * 90
