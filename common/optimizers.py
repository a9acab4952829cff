"""
The optimizers: AdamW as the paper uses it, Muon, and AdamW for little memory; and the schedule of
the learning rate.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

OPTIMIZERS = ("adamw", "muon")
# Parts of names that Muon leaves to AdamW: matrices whose rows stand for tokens or for experts.
LEFT_TO_ADAMW = ("embed_tokens", "lm_head", "mlp.gate.")
MOMENTUM = 0.95  # of Muon
# Root mean square of what Muon adds to a matrix at a rate of 1. Moonlight has 0.2; with less, trial
# has found, embedding and head, which AdamW trains at the same rate, learn more.
STEP_SIZE = 0.12


def make_optimizer(
    model: nn.Module, lr: float, weight_decay: float, beta2: float, kind: str = "adamw",
    dtype: torch.dtype = torch.float32, compiled: bool = False,
) -> torch.optim.Optimizer:  # fmt: skip
    """kind: `adamw`, as in the paper ([V2] 3.1.2); `muon`, with its matrix products in dtype;
    `low_memory`, AdamW for weights in bf16. Weight decay is for matrices, not for norm weights."""
    decayed, plain, orthogonal = [], [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            is_inner = kind == "muon" and not any(part in name for part in LEFT_TO_ADAMW)
            (plain if p.dim() < 2 else orthogonal if is_inner else decayed).append(p)
    groups = [
        dict(params=decayed, weight_decay=weight_decay),
        dict(params=plain, weight_decay=0.0),
        dict(params=orthogonal, weight_decay=weight_decay, orthogonal=True),
    ]
    groups = [g for g in groups if g["params"]]
    if kind == "low_memory":
        return LowMemoryAdamW(groups, lr, (0.9, beta2), compiled)
    if kind == "muon":
        return Muon(groups, lr, (0.9, beta2), dtype)
    return torch.optim.AdamW(groups, lr, (0.9, beta2), fused=True)


class Muon(torch.optim.AdamW):
    """AdamW, except for groups marked `orthogonal`, which Muon trains
    (https://kellerjordan.github.io/posts/muon).

    A gradient [m, n] is a sum of directions, U S V^T, of which few are large: those that most
    tokens agree on. Muon steps along U V^T, in which all are equally large, so what only few tokens
    ask for, such as a rare fact, is learned as fast as the rest. Its step has one size for matrices
    of all shapes (Moonlight, arXiv 2502.16982, section 2.2), so that one rate and weight decay
    serve it and AdamW. Each stacked expert is a matrix by itself, its gate and up together.
    """

    def __init__(
        self, groups: list[dict], lr: float, betas: tuple[float, float], dtype: torch.dtype
    ):
        # In fp16, GradScaler leaves infinite gradients to a fused optimizer's kernel. Muon has none
        # that would look for them; otherwise GradScaler skips such a step itself.
        super().__init__(groups, lr, betas, fused=dtype != torch.float16)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            if group.get("orthogonal"):
                self.orthogonal_step(group)
        super().step()  # of the other parameters: these have no gradient any more

    def orthogonal_step(self, group: dict) -> None:
        """The step of a group, whose matrices of one shape are worked on together."""
        by_shape: dict[torch.Size, list[nn.Parameter]] = {}
        for p in group["params"]:
            if p.grad is not None:
                by_shape.setdefault(p.shape[-2:], []).append(p)
        for shape, parameters in by_shape.items():
            for p in parameters:
                if not self.state[p]:  # AdamW looks for a "step" when it is loaded
                    mean = torch.zeros_like(p)
                    self.state[p] = {"momentum_buffer": mean, "step": torch.zeros(())}
            gradients = [p.grad for p in parameters]
            means = [self.state[p]["momentum_buffer"] for p in parameters]
            torch._foreach_lerp_(means, gradients, 1 - MOMENTUM)
            # Nesterov's: where the mean will go
            ahead = [t.reshape(-1, *shape) for t in torch._foreach_lerp(gradients, means, MOMENTUM)]
            steps = orthogonalise(torch.cat(ahead), self.dtype).float().split([*map(len, ahead)])
            steps = [step.view_as(p) for step, p in zip(steps, parameters, strict=True)]
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            # the entries of an orthogonal [m, n] have a root mean square of max(m, n)^-1/2
            size = group["lr"] * STEP_SIZE * max(shape) ** 0.5
            torch._foreach_sub_(parameters, steps, alpha=size)
            for p in parameters:
                p.grad = None


def orthogonalise(x: Tensor, dtype: torch.dtype) -> Tensor:
    """About U V^T for each matrix U S V^T of x [b, m, n], by products in dtype: three steps of a
    Newton-Schulz iteration bring all singular values above a fiftieth of the norm into
    [0.68, 1.21]. (Five steps, which are usual, bring up a six-hundredth as well.)"""
    x = x.mT if (tall := x.shape[-2] > x.shape[-1]) else x  # b m n, m <= n
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)  # now none is above 1
    x = x.to(dtype)
    for _ in range(3):  # of s to 3.4445 s - 4.775 s^3 + 2.0315 s^5, on all singular values
        gram = x @ x.mT  # b m m
        factor = torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
        x = torch.baddbmm(x, factor, x, beta=3.4445)
    return x.mT if tall else x


class LowMemoryAdamW(torch.optim.Optimizer):
    """AdamW whose weights and moments are bf16: with the gradient 8 bytes a parameter, not 16.

    bf16 has 8 bits, and a step is often smaller than their spacing. So what is stored is rounded
    up or down at random, with the chances that make it right in the mean.
    """

    def __init__(self, groups: list[dict], lr: float, betas: tuple[float, float], compiled: bool):
        super().__init__(groups, dict(lr=lr, betas=betas))
        self.update = adamw_update
        if compiled:  # one kernel for all tensors, which is bound by reading them once
            self.update = torch.compile(adamw_update, dynamic=True)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            n = group["step"] = group.get("step", 0) + 1
            (beta1, beta2), lr = group["betas"], group["lr"]
            numbers = beta1, beta2, lr * group["weight_decay"], lr / (1 - beta1**n), 1 - beta2**n
            numbers = torch.tensor(numbers, device=trained[0].device).unbind()
            for p in trained:
                state = self.state[p]
                if not state:
                    state |= {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                moments = state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1)
                self.update(p.view(-1), p.grad.reshape(-1), *moments, *numbers)


def adamw_update(
    p: Tensor, grad: Tensor, m: Tensor, v: Tensor, beta1, beta2, decay, lr, correction
) -> None:
    """One step on flat tensors [n] in bf16, in place; the others are 0-d, so that one compilation
    serves all steps. decay: rate times weight decay; lr: with the correction of m's start."""
    g, w = grad.float(), p.float()
    m32 = g + beta1 * (m.float() - g)
    v32 = g * g + beta2 * (v.float() - g * g)
    w = w - decay * w - lr * m32 / ((v32 / correction).sqrt() + 1e-8)
    # One noise serves all three: each is right in the mean, and drawing it takes the most time.
    noise = torch.randint(0, 2**16, p.shape, dtype=torch.int32, device=p.device)
    for stored, exact in ((p, w), (m, m32), (v, v32)):
        stored.copy_(round_at_random(exact, noise))


def round_at_random(x: Tensor, noise: Tensor) -> Tensor:
    """fp32 to one of the two nearest bf16, with chances that keep the mean, where noise is uniform
    in [0, 65536). [n] -> [n]."""
    # bf16 is the upper half of fp32's bits: what is added to the lower half carries over or not.
    return ((x.view(torch.int32) + noise) & -(2**16)).view(torch.float32).bfloat16()


def learning_rate(step: int, steps: int, peak: float, warmup: int, schedule: str) -> float:
    """The rate of a step (from 0): linear warm-up, then as [V2] 3.1.2, or falling all the time."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = step / steps
    if schedule == "step":
        return peak * (0.316 if done >= 0.6 else 1) * (0.316 if done >= 0.9 else 1)
    if schedule == "linear":
        return peak * (steps - step) / max(1, steps - warmup)
    if schedule == "cosine":
        done = (step - warmup) / max(1, steps - warmup)
        return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * min(done, 1.0))))
    return peak
