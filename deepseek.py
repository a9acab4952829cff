"""
DeepSeek-V2 in one file: a language model whose attention caches one small latent vector per
token (MLA) and whose feed-forward layers wake 6 of 160 small experts per token (DeepSeekMoE).

    model = DeepSeek(Config.preset("tiny"))
    out = model(input_ids, targets)                      # out.loss, out.aux_loss, out.expert_load
    for token in model.eval().generate(prompt_ids, 100): ...
    model = DeepSeek.from_pretrained("deepseek-ai/DeepSeek-V2-Lite")

Papers:  [V2]  DeepSeek-V2, arXiv 2405.04434      [MoE] DeepSeekMoE, arXiv 2401.06066
         [RoPE] RoFormer, arXiv 2104.09864        [YaRN] arXiv 2309.00071

Contents, to be read from top to bottom; parts 12 and 13 serve parts 1 and 10:
     1 Config        2 RMSNorm      3 RoPE and YaRN      4 MLA and its cache      5 SwiGLU
     6 the router, its balance losses, token dropping    7 the experts            8 the block
     9 sampling     10 the model   11 generation        12 which configurations are refused
    13 official checkpoints           14 LoRA

What changes with respect to a plain transformer is parts 4, 6 and 7; the rest is Llama's, YaRN
aside. Field names are those of the official config.json (five fields of training are ours),
parameter names those of the official checkpoint, where each expert is a tensor of its own and
here they are stacked.

Symbols. Comments at line ends give shapes in these letters, most significant dimension first.

    here  paper   in the code                     V2     V2-Lite   tiny
    ----  ------  ----------------------------  -------  -------  -----
    B             batch: sequences
    T     T       time: tokens given now
    S             source: tokens attended to (cached ones included)
    V             vocab_size                    102,400  102,400  4,096
    D     d       hidden_size                     5,120    2,048    128
    L     l       num_hidden_layers                  60       27      4
    H     n_h     num_attention_heads               128       16      2
    Q     d_c'    q_lora_rank                     1,536     none   none
    R     d_c     kv_lora_rank                      512      512     64
    dn    d_h     qk_nope_head_dim                  128      128     32
    dr    d_h^R   qk_rope_head_dim                   64       64     16
    dv    d_h     v_head_dim                        128      128     48
    E     N_r     n_routed_experts                  160       64     16
    K     K_r     num_experts_per_tok                 6        6      2
    Ns    N_s     n_shared_experts                    2        2      1
    I             moe_intermediate_size           1,536    1,408     96
    G     D       n_group: devices that hold E        8        1      1
    M     M       topk_group: devices per token       3        1      1
    C             cache numbers per token and
                  layer, R + dr                     576      576     80
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_type_hints

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# ----------------------------------------------------------------------------------------------
# 1. Config. What are the numbers that make a DeepSeek-V2?
# ----------------------------------------------------------------------------------------------


class ConfigError(ValueError):
    """A configuration that cannot be built; the message names the value and the remedy."""


YARN_V2 = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(
        vocab_size=4096, hidden_size=128, num_hidden_layers=4, num_attention_heads=2,
        q_lora_rank=None, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16,
        v_head_dim=48, intermediate_size=512, moe_intermediate_size=96, n_routed_experts=16,
        n_shared_experts=1, num_experts_per_tok=2, n_group=1, topk_group=1, topk_method="greedy",
        routed_scaling_factor=1.0, device_loss_alpha=0.0, comm_loss_alpha=0.0,
        max_position_embeddings=256, rope_theta=100.0, rope_scaling=None, initializer_range=0.04,
        copying_start=0.4, bos_token_id=0, eos_token_id=1,
    ),
    "small": dict(
        vocab_size=8192, hidden_size=384, num_hidden_layers=6, num_attention_heads=6,
        q_lora_rank=None, kv_lora_rank=128, qk_nope_head_dim=48, qk_rope_head_dim=16,
        v_head_dim=64, intermediate_size=1024, moe_intermediate_size=96, n_routed_experts=32,
        num_experts_per_tok=4, n_group=1, topk_group=1, topk_method="greedy",
        routed_scaling_factor=1.0, device_loss_alpha=0.0, comm_loss_alpha=0.0,
        max_position_embeddings=512, rope_scaling=None, initializer_range=0.02,
        bos_token_id=0, eos_token_id=1,
    ),
    "1b": dict(
        vocab_size=32768, hidden_size=1024, num_hidden_layers=14, num_attention_heads=16,
        q_lora_rank=512, kv_lora_rank=256, qk_nope_head_dim=64, qk_rope_head_dim=32,
        v_head_dim=96, intermediate_size=4096, moe_intermediate_size=256, n_routed_experts=80,
        num_experts_per_tok=8, n_group=1, topk_group=1, topk_method="greedy",
        routed_scaling_factor=1.0, device_loss_alpha=0.0, comm_loss_alpha=0.0,
        max_position_embeddings=1024, rope_scaling=None, bos_token_id=0, eos_token_id=1,
    ),
    "v2-lite": dict(
        hidden_size=2048, num_hidden_layers=27, num_attention_heads=16, q_lora_rank=None,
        intermediate_size=10944, moe_intermediate_size=1408, n_routed_experts=64, n_group=1,
        topk_group=1, topk_method="greedy", routed_scaling_factor=1.0, aux_loss_alpha=0.001,
        device_loss_alpha=0.0, comm_loss_alpha=0.0,
    ),
    "v2": {},  # the defaults of Config
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Every number of the model, under its name in the official config.json.

    The defaults are DeepSeek-V2 itself ([V2] section 3.1.2); `preset` gives the other sizes.
    Construction refuses an impossible combination with a ConfigError of one sentence.
    """

    vocab_size: Annotated[int, "rows of the embedding and of the output head"] = 102400
    hidden_size: Annotated[int, "width of the residual stream"] = 5120
    num_hidden_layers: Annotated[int, "blocks of attention + feed-forward"] = 60
    num_attention_heads: Annotated[int, "attention heads"] = 128
    q_lora_rank: Annotated[int | None, "rank of the compressed query; none = direct"] = 1536
    kv_lora_rank: Annotated[int, "width of the cached latent"] = 512
    qk_nope_head_dim: Annotated[int, "query/key width per head without position"] = 128
    qk_rope_head_dim: Annotated[int, "query/key width per head with RoPE"] = 64
    v_head_dim: Annotated[int, "value width per head"] = 128
    intermediate_size: Annotated[int, "inner width of a dense feed-forward layer"] = 12288
    moe_intermediate_size: Annotated[int, "inner width of one expert"] = 1536
    n_routed_experts: Annotated[int, "routed experts per MoE layer"] = 160
    n_shared_experts: Annotated[int, "experts that every token visits"] = 2
    num_experts_per_tok: Annotated[int, "routed experts that a token visits"] = 6
    n_group: Annotated[int, "groups (devices) that the routed experts are divided into"] = 8
    topk_group: Annotated[int, "groups that one token may reach"] = 3
    topk_method: Annotated[str, "greedy or group_limited_greedy"] = "group_limited_greedy"
    norm_topk_prob: Annotated[bool, "normalise gate weights to sum 1 instead of scaling"] = False
    routed_scaling_factor: Annotated[float, "multiplies the routed experts' weights"] = 16.0
    first_k_dense_replace: Annotated[int, "first layers with a dense feed-forward"] = 1
    moe_layer_freq: Annotated[int, "MoE are the layers (from 0) that it divides"] = 1
    aux_loss_alpha: Annotated[float, "weight of the expert balance loss"] = 0.003
    device_loss_alpha: Annotated[float, "weight of the device balance loss"] = 0.05
    comm_loss_alpha: Annotated[float, "weight of the communication balance loss"] = 0.02
    bias_update_speed: Annotated[float, "step of V3's balancing bias; 0 = V2, without it"] = 0.0
    token_drop_capacity: Annotated[float, "device capacity / average load; 0 = no drop"] = 0.0
    max_position_embeddings: Annotated[int, "longest sequence"] = 163840
    rms_norm_eps: Annotated[float, "epsilon of the block and final norms"] = 1e-6
    rope_theta: Annotated[float, "base of the RoPE frequencies"] = 10000.0
    rope_scaling: Annotated[dict | None, "YaRN's numbers as JSON; none = plain RoPE"] = field(
        default_factory=lambda: dict(YARN_V2)
    )
    initializer_range: Annotated[float, "standard deviation of the initial weights"] = 0.006
    copying_start: Annotated[
        float, "std of the embedding if attention starts as a copy; 0 = off"
    ] = 0.0
    bos_token_id: Annotated[int, "token that begins a document"] = 100000
    eos_token_id: Annotated[int, "token that ends a document"] = 100001

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> Config:
        """One of tiny, small, 1b, v2-lite, v2, with any field overridden by keyword."""
        if name not in PRESETS:
            raise ConfigError(f"size {name!r} is unknown: choose one of {', '.join(PRESETS)}")
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(overrides) - known):
            raise ConfigError(f"{unknown[0]!r} is not a field of Config: see its definition")
        return cls(**{**PRESETS[name], **overrides})

    @classmethod
    def describe(cls) -> dict[str, tuple[Any, str]]:
        """The type and the meaning of every field, for checks and command lines."""
        hints = get_type_hints(cls, include_extras=True)
        return {
            f.name: (hints[f.name].__origin__, hints[f.name].__metadata__[0]) for f in fields(cls)
        }

    def is_moe(self, layer: int) -> bool:
        """Whether layer (0-based) has experts: the first few are dense ([V2] 3.1.2)."""
        return layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0

    @property
    def qk_head_dim(self) -> int:
        """dn + dr, the width over which query and key are compared."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def cache_dim(self) -> int:
        """C = R + dr, all that is cached per token and layer ([V2] table 1)."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    def cache_per_token(self, attention: str = "mla", groups: int = 8) -> int:
        """Numbers cached per token over all layers ([V2] table 1), for attention = mla, mha,
        gqa (keys and values for `groups` heads) or mqa (for one head)."""
        heads = {"mha": self.num_attention_heads, "gqa": groups, "mqa": 1}
        a_layer = self.cache_dim if attention == "mla" else 2 * heads[attention] * self.v_head_dim
        return self.num_hidden_layers * a_layer

    def __post_init__(self) -> None:
        check_config(self)  # part 12


# ----------------------------------------------------------------------------------------------
# 2. RMSNorm. How is the residual stream kept at a scale that every layer can read?
#
#        y = w * x / sqrt(mean(x^2) + eps)                                       arXiv 1910.07467
# ----------------------------------------------------------------------------------------------


def product_dtype(x: Tensor) -> torch.dtype:
    """In which matrix products of x are computed: its own dtype, or autocast's."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class RMSNorm(nn.Module):
    """Divide each vector by its root mean square and scale it per channel. [..., n] -> same."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()  # squares are coarse in bf16 and overflow in fp16
        x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        # The cast comes before the weight, as officially; under autocast to the dtype of the
        # matrix products that follow, so that each of them need not cast again.
        dtype = product_dtype(x)
        return self.weight.to(dtype) * x32.to(dtype)


# ----------------------------------------------------------------------------------------------
# 3. RoPE and YaRN. How does a query know how far away a key is?
#
#    RoPE turns each neighbouring pair (x0, x1), (x2, x3), ... of a vector at position t by the
#    angle t * f_j. A dot product of two rotated vectors then depends on their distance only:
#
#        <rot(q, m), rot(k, n)> = <rot(q, m - n), k>,    f_j = theta^(-2j/dr)               [RoPE]
#
#    YaRN stretches a context of 4K to 160K: fast pairs, with many turns within 4K, tell short
#    distances apart and stay as they are; pairs that do not complete one turn are slowed down by
#    `factor`, so that no angle comes that training has not seen; a ramp lies in between. It is
#    on for short inputs as well: the last training steps of V2 had it.
# ----------------------------------------------------------------------------------------------


def rope_frequencies(config: Config, device: torch.device | None = None) -> Tensor:
    """The turn per position of each pair, in radians: [dr/2], fp32 ([YaRN] section 3.2)."""
    dim, base = config.qk_rope_head_dim, config.rope_theta
    pair = torch.arange(dim // 2, dtype=torch.float32, device=device)
    inv_freq = 1.0 / base ** (2 * pair / dim)
    if (yarn := config.rope_scaling) is None:
        return inv_freq

    def pair_that_turns(times: float) -> float:  # so often in the original context; a fraction
        context = yarn["original_max_position_embeddings"]
        return dim * math.log(context / (2 * math.pi * times)) / (2 * math.log(base))

    low = max(math.floor(pair_that_turns(yarn.get("beta_fast", 32))), 0)
    high = min(math.ceil(pair_that_turns(yarn.get("beta_slow", 1))), dim - 1)  # as officially
    if low == high:
        high += 0.001  # a step instead of a ramp, without dividing by zero
    slowed = ((pair - low) / (high - low)).clamp(0, 1)  # 0 = as it was, 1 = slowed by factor
    return inv_freq / yarn["factor"] * slowed + inv_freq * (1 - slowed)


def yarn_mscale(config: Config, key: str) -> float:
    """0.1 a ln(factor) + 1, YaRN's cure for attention that flattens over long contexts."""
    yarn = config.rope_scaling or {}
    a = yarn.get(key, {"mscale": 1.0, "mscale_all_dim": 0.0}[key])  # the official defaults
    return 0.1 * a * math.log(yarn.get("factor", 1.0)) + 1.0


def softmax_scale(config: Config) -> float:
    """(dn + dr)^-1/2, times mscale^2 under YaRN: 0.1147 for V2 rather than 0.0722."""
    return config.qk_head_dim**-0.5 * yarn_mscale(config, "mscale_all_dim") ** 2


def rope_angles(config: Config, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin for each position and pair: [...] -> 2 x [..., dr/2], fp32.

    Computed anew in each pass: frequencies kept in the model would be cast to bf16 with it, and
    at position 1000 the angles would be off by up to 0.4 radians.
    """
    angles = positions[..., None].float() * rope_frequencies(config, positions.device)
    scale = yarn_mscale(config, "mscale") / yarn_mscale(config, "mscale_all_dim")
    return angles.cos() * scale, angles.sin() * scale  # scale is 1 in every released V2


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the neighbouring pairs of x [B, T, heads, dr] by angles [B or 1, T, dr/2]."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # 2 x B T heads dr/2
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # the same for all heads
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x.dtype)


# ----------------------------------------------------------------------------------------------
# 4. Multi-head latent attention (MLA). How can 128 heads share one small memory?
#
#    Ordinary attention caches K and V of every head: 2 H dh numbers per token and layer, 32,768
#    in a model shaped like V2. MLA caches 576: a latent c, from which every head's key and value
#    can be made, and one small key that carries the position.       [V2] section 2.1, eq. 9-19
#
#            x  [D]
#            |
#       +----+----------------------+----------------------+
#       |                           |                      |
#    W_DQ, norm                 W_DKV, norm            W_KR, RoPE
#       |                           |                      |
#    c_q [Q]                     c [R] ======= cached    k_pe [dr] ===== cached
#       |                           |                      |
#    +--+---------+            +----+----+                 |
#  W_UQ      W_QR, RoPE      W_UK      W_UV                |
#    |            |            |         |                 |
#  q_nope       q_pe         k_nope      v                 |    (one k_pe for all heads)
#  [H dn]      [H dr]        [H dn]    [H dv]              |
#    |            |            |         |                 |
#    q = [q_nope | q_pe],      k = [k_nope | k_pe],      o = W_O softmax(q.k * scale) v
#
#    In the official names: q_a_proj = W_DQ, q_b_proj = W_UQ and W_QR, kv_a_proj_with_mqa = W_DKV
#    and W_KR, kv_b_proj = W_UK and W_UV, o_proj = W_O; without query compression q_proj does all
#    of the query. "a" goes down to a low rank and "b" up from it; "lora" in the names of the ranks
#    says just that, and has nothing to do with fine-tuning. "pe" is with position, "nope" without.
#
#    Why the key is decoupled: k_nope = W_UK c is linear in c, so q.k = (W_UK^T q).c, and W_UK
#    can move to the query's side. A rotation between W_UK and c depends on the position and
#    would forbid that. So position gets dr numbers of its own, which do not pass through W_UK.
#
#    Expanded: make k_nope and v from c for each cached token, then ordinary attention.
#    Absorbed: leave the cache as it is, carry q to the latent space, attend there, and carry
#    the result back. Same numbers, two costs; the next function weighs them.
# ----------------------------------------------------------------------------------------------


def absorbing_is_cheaper(config: Config, queries: int, keys: int) -> bool:
    """Whether absorbed attention needs fewer multiply-adds for so many queries and keys.

    Per head it takes 2R + dr for each query and key and R (dn + dv) for each query; expanded
    takes dn + dr + dv for each query and key and R (dn + dv) for each key. With a long cache V2
    absorbs up to 170 queries at a time: it decodes absorbed and reads a prompt expanded.

        queries (keys (2R + dr) + R (dn + dv)) < keys (queries (dn + dr + dv) + R (dn + dv))
    """
    r, expand = config.kv_lora_rank, config.qk_nope_head_dim + config.v_head_dim
    return queries * keys * (2 * r - expand) < (keys - queries) * r * expand


@dataclass
class LatentCache:
    """What the model remembers of B sequences; made by `DeepSeek.new_cache`.

    latents [L, B, max_length, C] holds c after its norm and k_pe after its rotation, so that
    neither is computed twice; it is written in place. lengths counts the tokens of each row; it
    lives on the host, so that no decoding step waits for the device. Setting it back makes the
    model forget what came later.
    """

    latents: Tensor
    lengths: list[int]

    @property
    def nbytes(self) -> int:
        """Bytes that the cache takes, the free places included."""
        return self.latents.numel() * self.latents.element_size()


class Span(NamedTuple):
    """Where the T tokens of a forward pass stand: the same for all layers, computed once."""

    positions: Tensor  # [1, T], or [B, T] where the rows of a cache differ in length
    cos: Tensor  # [B or 1, T, dr/2]
    sin: Tensor  # [B or 1, T, dr/2]
    end: int  # S: how many places of the cache are attended to
    mask: Tensor | None  # [B or 1, 1, T, S], True = visible. None: causal with T == S, or T == 1
    absorb: bool  # which of MLA's two ways is taken


def make_span(config: Config, ids: Tensor, cache: LatentCache | None, absorb: bool | None) -> Span:
    """Positions, rotation and mask for ids [B, T], behind what the cache already holds."""
    B, T = ids.shape
    lengths = cache.lengths if cache else [0]
    start, end = min(lengths), max(lengths) + T
    if end > config.max_position_embeddings:
        limit = config.max_position_embeddings
        raise ValueError(f"{end} tokens do not fit: the model's context ends at {limit}")
    if cache and end > cache.latents.shape[2]:
        raise ValueError(f"{end} tokens do not fit: the cache ends at {cache.latents.shape[2]}")
    positions = torch.arange(start, start + T, device=ids.device)[None]  # 1 T
    ragged = start + T < end
    if ragged:
        ahead = torch.tensor([n - start for n in lengths], device=ids.device)
        positions = positions + ahead[:, None]  # B T
    if absorb is None:
        absorb = cache is not None and absorbing_is_cheaper(config, T, end)
    mask = None
    if ragged or (T > 1 and (T < end or absorb)):
        # Key j lies at position j of its row, so this one line is the causal mask, the offset
        # of a chunk and the blanking of places that a shorter row has not written yet.
        mask = (torch.arange(end, device=ids.device) <= positions[..., None]).unsqueeze(1)
    return Span(positions, *rope_angles(config, positions), end, mask, absorb)


class MLA(nn.Module):
    """Multi-head latent attention. [B, T, D] -> [B, T, D]."""

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        heads_q = c.num_attention_heads * c.qk_head_dim
        heads_kv = c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim)
        if c.q_lora_rank:  # saves activation memory in training; nothing of it is cached
            self.q_a_proj = nn.Linear(c.hidden_size, c.q_lora_rank, bias=False)
            self.q_a_layernorm = RMSNorm(c.q_lora_rank)
            self.q_b_proj = nn.Linear(c.q_lora_rank, heads_q, bias=False)
        else:
            self.q_proj = nn.Linear(c.hidden_size, heads_q, bias=False)
        # W_DKV and W_KR in one matrix: "mqa", since one key serves all heads
        self.kv_a_proj_with_mqa = nn.Linear(c.hidden_size, c.cache_dim, bias=False)
        # The norms tame bottlenecks whose scale nothing else holds ([V2] 3.1.2); their eps is
        # 1e-6 whatever the config says, as officially.
        self.kv_a_layernorm = RMSNorm(c.kv_lora_rank)
        self.kv_b_proj = nn.Linear(c.kv_lora_rank, heads_kv, bias=False)  # W_UK and W_UV
        self.o_proj = nn.Linear(c.num_attention_heads * c.v_head_dim, c.hidden_size, bias=False)
        self.scale = softmax_scale(c)

    @torch.no_grad()
    def start_as_copy(self) -> None:
        """Start each head as one that looks for what is expected, and copies it.

        The first half of the residual stream says what a token is, the second what comes next
        (see `DeepSeek.init_weights`). Latents are made of the first half alone. W_Q takes from
        the second what W_UK W_DKV takes from the first, so that a query likes the tokens that the
        stream already expects; W_O writes into the second what the value has read. Where R is half
        of D or more, the copy is a whole one. Both are larger than random weights, 9 and 1.5 times,
        which trial has found; a W_Q of 6 or 12 times learns as well.
        """
        c, std = self.config, self.config.initializer_range
        half, H = c.hidden_size // 2, c.num_attention_heads

        def scaled(w: Tensor, times: float) -> Tensor:
            return w * (times * std / w.std())

        self.kv_a_proj_with_mqa.weight[: c.kv_lora_rank, half:] = 0
        w_dkv = self.kv_a_proj_with_mqa.weight[: c.kv_lora_rank, :half]  # R D/2
        w_kv = self.kv_b_proj.weight.unflatten(0, (H, -1))  # H dn+dv R
        w_uk, w_uv = w_kv.split([c.qk_nope_head_dim, c.v_head_dim], 1)  # H dn R, H dv R
        look = F.pad(w_uk @ w_dkv, (c.hidden_size - half, 0))  # H dn D
        if c.q_lora_rank:
            look = look @ self.q_a_proj.weight.T  # H dn Q
        w_q = (self.q_b_proj if c.q_lora_rank else self.q_proj).weight.unflatten(0, (H, -1))
        w_q[:, : c.qk_nope_head_dim] = scaled(look, 9)
        read = F.pad((w_uv @ w_dkv).flatten(0, 1), (c.hidden_size - half, 0))  # H*dv D
        self.o_proj.weight.copy_(scaled(read, 1.5).T)

    def forward(self, x: Tensor, span: Span, memory: Tensor | None = None) -> Tensor:
        """x [B, T, D]; memory [B, max_length, C], this layer's part of the cache, is written."""
        c = self.config
        if c.q_lora_rank:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))  # B T H*(dn+dr)
        else:
            q = self.q_proj(x)  # B T H*(dn+dr)
        q = q.unflatten(-1, (-1, c.qk_head_dim))  # B T H dn+dr
        q_nope, q_pe = q.split([c.qk_nope_head_dim, c.qk_rope_head_dim], -1)
        q_pe = rotate(q_pe, span.cos, span.sin)

        widths = [c.kv_lora_rank, c.qk_rope_head_dim]
        latent, k_pe = self.kv_a_proj_with_mqa(x).split(widths, -1)  # B T R, B T dr
        latent = self.kv_a_layernorm(latent)
        k_pe = rotate(k_pe.unsqueeze(2), span.cos, span.sin).squeeze(2)
        if memory is not None:
            row = torch.arange(len(memory), device=x.device)[:, None]
            new = torch.cat([latent, k_pe], -1).detach()  # a cache is not trained through
            memory[row, span.positions] = new.to(memory.dtype)
            latent, k_pe = memory[:, : span.end].to(q.dtype).split(widths, -1)  # B S R, B S dr

        attend = self.absorbed if span.absorb else self.expanded
        out = attend(q_nope, q_pe, latent, k_pe, span.mask)  # B T H dv
        return self.o_proj(out.flatten(2))  # B T D

    def expanded(self, q_nope, q_pe, latent, k_pe, mask) -> Tensor:
        """Attention as the paper writes it: every head's keys and values are built."""
        c = self.config
        kv = self.kv_b_proj(latent).unflatten(-1, (c.num_attention_heads, -1))  # B S H dn+dv
        k_nope, v = kv.split([c.qk_nope_head_dim, c.v_head_dim], -1)  # B S H dn, B S H dv
        k_pe = k_pe.unsqueeze(2).expand(-1, -1, c.num_attention_heads, -1)  # B S H dr
        q, k = torch.cat([q_nope, q_pe], -1), torch.cat([k_nope, k_pe], -1)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # B H T, or S, dn+dr or dv
        T = q.shape[2]
        causal = mask is None and T > 1
        if causal and T <= 512 and q.dtype == torch.bfloat16 and q.device.type == "cpu":
            # Flash attention spares memory and rounds less. But on a CPU it takes twice the time
            # of scores written down, as long as they are few. As in the official code they are
            # rounded to bf16 and their softmax is summed in fp32.
            future = q.new_full((T, T), -torch.inf).triu(1)
            scores = torch.add(future, q @ k.mT, alpha=self.scale)  # B H T T
            return (scores.softmax(-1) @ v).transpose(1, 2)  # B T H dv
        # Flash attention wants one width for q, k and v. Zeros change neither the scores nor
        # the values, and cost less than the slow path.
        if (more := c.qk_head_dim - c.v_head_dim) > 0:
            v = F.pad(v, (0, more))
        elif more < 0:
            q, k = F.pad(q, (0, -more)), F.pad(k, (0, -more))
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=self.scale)
        return out[..., : c.v_head_dim].transpose(1, 2)  # B H T dv -> B T H dv

    def absorbed(self, q_nope, q_pe, latent, k_pe, mask) -> Tensor:
        """The same attention in latent space ([V2] 2.1.2): no key or value is ever built."""
        c = self.config
        B, T, H = q_nope.shape[:3]
        w = self.kv_b_proj.weight.unflatten(0, (H, -1))  # H dn+dv R
        w_uk, w_uv = w.split([c.qk_nope_head_dim, c.v_head_dim], 1)  # H dn R, H dv R
        q_latent = q_nope.transpose(1, 2) @ w_uk  # B H T dn, H dn R -> B H T R
        # All heads read one memory: H heads of T queries are H*T queries of one head.
        scores = q_latent.flatten(1, 2) @ latent.mT  # B H*T S
        scores = scores + q_pe.transpose(1, 2).flatten(1, 2) @ k_pe.mT  # B H*T S
        scores = (scores * self.scale).float().unflatten(1, (H, T))  # B H T S
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        probs = scores.softmax(-1).to(q_latent.dtype)
        out = (probs.flatten(1, 2) @ latent).unflatten(1, (H, T))  # B H T R
        return (out @ w_uv.mT).transpose(1, 2)  # B H T R, H R dv -> B T H dv


# ----------------------------------------------------------------------------------------------
# 5. SwiGLU. What does a feed-forward layer compute?
#
#        y = W_down (silu(W_gate x) * W_up x)                                    arXiv 2002.05202
# ----------------------------------------------------------------------------------------------


class MLP(nn.Module):
    """A gated feed-forward layer: dense layers and shared experts. [..., D] -> [..., D]."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


# ----------------------------------------------------------------------------------------------
# 6. The router. Which experts does a token visit, and how are they kept equally busy?
#
#        s_i = softmax_i(x . e_i)         affinity of the token to expert i      [V2] eq. 20-22
#        g_i = scaling * s_i if s_i is among the K largest, else 0
#
#    The softmax goes over all experts and precedes the choice: a token that is unsure between
#    many experts gives each a small weight, and the weights need not sum to one. Six out of 160
#    such weights are small indeed, so V2 multiplies them by routed_scaling_factor = 16.
#
#    Device-limited routing ([V2] 2.2.2): experts live in G groups, one per device. A token may
#    reach only the M groups whose best expert it likes most, so that it crosses the network at
#    most M times however many experts it visits.
# ----------------------------------------------------------------------------------------------


class Routing(NamedTuple):
    """What the router decided, for each token."""

    scores: Tensor  # [B, T, E] affinities s, summing to 1; carry the router's gradient
    weights: Tensor  # [B, T, K] what the chosen experts' outputs are multiplied by
    index: Tensor  # [B, T, K] which experts were chosen
    sent: Tensor  # [B, T, G] bool: the groups that the token may reach


class Gate(nn.Module):
    """The router: one vector e_i per expert."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        if config.bias_update_speed:
            self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts))

    def forward(self, x: Tensor) -> Routing:
        c = self.config
        # In fp32 even under autocast: near ties decided by rounding would train the wrong expert.
        with torch.autocast(x.device.type, enabled=False):
            scores = F.linear(x.float(), self.weight.float()).softmax(-1)  # B T E
        wanted = scores + self.e_score_correction_bias if c.bias_update_speed else scores
        by_group = wanted.unflatten(-1, (c.n_group, -1))  # B T G E/G
        sent = torch.ones_like(by_group[..., 0], dtype=torch.bool)  # B T G
        if c.topk_method == "group_limited_greedy":
            best = by_group.amax(-1).topk(c.topk_group, -1).indices  # B T M
            sent = torch.zeros_like(sent).scatter_(-1, best, True)
            by_group = by_group.masked_fill(~sent.unsqueeze(-1), -torch.inf)
        index = by_group.flatten(-2).topk(c.num_experts_per_tok, -1).indices  # B T K
        weights = scores.gather(-1, index)  # B T K
        if c.norm_topk_prob and c.num_experts_per_tok > 1:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        else:  # the official code normalises instead of scaling, never both
            weights = weights * c.routed_scaling_factor
        return Routing(scores, weights, index, sent)


# Left alone, a router collapses: an expert that is chosen more often learns more and is chosen
# still more often. Three losses pull against that ([V2] 2.2.3, eq. 23-31), each of the form
#
#        alpha * sum_i f_i P_i      f_i: the load of i divided by the average load
#                                   P_i: mean probability that the router gave to i
#
# f counts and has no gradient; P has. So the router lowers its probabilities most where the
# load is highest. Both are taken within a sequence, the loss is then averaged over the batch, as
# in the official code (seq_aux). They differ in what i is:
#     expert           one of E experts: none starves
#     device           one of G groups, P summed over its experts: no GPU works while others wait
#     communication    one of G groups, f counting the tokens sent there: limited routing bounds
#                      what a device sends, this loss evens out what it receives
#
# DeepSeek-V3 (arXiv 2412.19437, section 2.1.2) balances without a gradient: a bias per expert
# counts in the choice and not in the weight; after each step it rises where the load was below
# average and falls where it was above. `bias_update_speed` gives it to this model, to compare.


def balance_loss(config: Config, routing: Routing) -> Tensor:
    """The weighted sum of the three balance losses of one MoE layer; a scalar, fp32."""
    c, (scores, _, index, sent) = config, routing
    T, K = index.shape[1:]
    P = scores.mean(1)  # B E
    chosen = index.flatten(1)  # B T*K
    counts = torch.zeros_like(P).scatter_add_(1, chosen, torch.ones_like(chosen, dtype=P.dtype))
    f = counts * c.n_routed_experts / (K * T)  # B E
    loss = c.aux_loss_alpha * (f * P).sum(-1)  # eq. 23-25
    P_group = P.unflatten(1, (c.n_group, -1)).sum(-1)  # B G
    f_group = f.unflatten(1, (c.n_group, -1)).mean(-1)  # B G
    loss = loss + c.device_loss_alpha * (f_group * P_group).sum(-1)  # eq. 26-28
    f_sent = sent.float().mean(1) * c.n_group / c.topk_group  # B G
    loss = loss + c.comm_loss_alpha * (f_sent * P_group).sum(-1)  # eq. 29-31
    return loss.mean()


def drop_tokens(config: Config, routing: Routing, exempt: Tensor) -> Tensor:
    """Weights [B, T, K] with 0 where a device is over its capacity ([V2] 2.2.4).

    Each device takes token_drop_capacity times its average share of the batch's assignments,
    those of highest affinity first. exempt [B]: sequences of which nothing is dropped (about a
    tenth of them), so that the model also learns what it meets in use, where nothing is dropped.
    What the paper leaves open: capacity counts assignments, and weights are not renormalised.
    """
    c = config
    B, T, K = routing.index.shape
    capacity = int(c.token_drop_capacity * B * T * K / c.n_group)
    device = (routing.index // (c.n_routed_experts // c.n_group)).flatten()  # B*T*K
    exempt = exempt[:, None, None]  # B 1 1
    affinity = routing.weights.detach().masked_fill(exempt, torch.inf)
    order = affinity.flatten().argsort(descending=True)  # B*T*K
    onehot = F.one_hot(device[order], c.n_group)  # B*T*K G
    place = (onehot.cumsum(0) * onehot).sum(-1)  # 1 = the assignment its device wants most
    kept = torch.empty_like(order, dtype=torch.bool).scatter_(0, order, place <= capacity)
    return routing.weights * (kept.view(B, T, K) | exempt)


# ----------------------------------------------------------------------------------------------
# 7. DeepSeekMoE. How can a model know much and yet compute little?
#
#                       x                                        [V2] section 2.2, [MoE] section 3
#                       |
#        +--------------+------------+
#        |              |            |              Fine-grained: 8 of 64 experts allow 4.4
#        |            router      shared            billion combinations where 2 of 16 experts
#        |        s = softmax     expert(s)         four times as wide allow 120, at equal cost.
#        |        top K of E         |
#        v              |            |              Shared: what every token needs is learned
#    E_1  E_2  ... E_E  |            |              once, so that routed experts can specialise.
#     |    |        |   |            |              Their N_s experts are one MLP, N_s * I wide.
#     +- g_i E_i(x) +<--+            |
#           |                        |
#           +-----------> + <--------+
#                         y
# ----------------------------------------------------------------------------------------------


class Experts(nn.Module):
    """All routed experts of a layer, stacked: sum_k weights[n, k] * E_{index[n, k]}(x[n]).

    x [N, D], index [N, K], weights [N, K] -> [N, D], N = B*T tokens in a row.
    """

    def __init__(self, config: Config):
        super().__init__()
        E, D, I = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * I, D))  # gate above, up below
        self.down_proj = nn.Parameter(torch.empty(E, D, I))

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        dtype = product_dtype(x)
        can_group = self.can_group(x.device, dtype)
        run = self.grouped if can_group else self.looped
        if index.numel() <= len(self.gate_up_proj):
            run = self.gathered
        elif torch.compiler.is_compiling() and not (can_group and dtype == torch.bfloat16):
            run = torch.compiler.disable(run)  # grouped_mm is traced in bf16 alone, a loop never
        gate_up, down = self.gate_up_proj.to(dtype), self.down_proj.to(dtype)
        return run(x.to(dtype), index, weights, gate_up, down)

    def can_group(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether grouped_mm runs here; it wants rows of a multiple of 16 bytes."""
        aligned = all(n * dtype.itemsize % 16 == 0 for n in self.down_proj.shape[1:])
        if device.type == "cuda":
            return (
                aligned
                and dtype == torch.bfloat16
                and torch.cuda.get_device_capability(device) >= (8,)
            )
        return aligned and device.type == "cpu"

    def looped(self, x, index, weights, gate_up, down) -> Tensor:
        """One expert after the other: the definition, on any device."""
        out = torch.zeros_like(x, dtype=weights.dtype)
        for e in range(len(gate_up)):
            token, k = (index == e).nonzero(as_tuple=True)
            gate, up = F.linear(x[token], gate_up[e]).chunk(2, -1)
            y = F.linear(F.silu(gate) * up, down[e])
            out = out.index_add(0, token, y * weights[token, k, None])
        return out

    def gathered(self, x, index, weights, gate_up, down) -> Tensor:
        """Each token's experts, copied side by side: for so few tokens, as in decoding, that the
        copies are no more than the experts there are. Nothing is sorted, and no expert is asked
        that nobody has chosen: a quarter less time for a token of tiny on a CPU."""
        gate, up = (gate_up[index] @ x[:, None, :, None]).squeeze(-1).chunk(2, -1)  # 2 x N K I
        y = (down[index] @ (F.silu(gate) * up).unsqueeze(-1)).squeeze(-1)  # N K D
        return (y * weights.unsqueeze(-1)).sum(1)

    def grouped(self, x, index, weights, gate_up, down, block: int = 32) -> Tensor:
        """All experts in two grouped products: sort the N*K assignments by expert, multiply each
        run of rows with its expert's matrix, add the results up token by token.

        Each run starts at a multiple of `block` rows in a buffer of fixed size. So nothing waits
        for the device to count (unlike looped), torch.compile sees one shape, and the products
        run on aligned rows. Rows left over are zeros; what the products give behind the last run
        is undefined, but never read, and its gradient reaches the row of zeros alone.
        """
        (N, D), K, E = x.shape, index.shape[1], len(gate_up)
        order = index.flatten().argsort(stable=True)  # N*K
        expert = index.flatten()[order]  # N*K
        count = torch.zeros(E, dtype=torch.long, device=x.device)
        count = count.scatter_add_(0, expert, torch.ones_like(expert))  # bincount would sync
        space = (count + block - 1) // block * block
        ends = space.cumsum(0)  # E: one past the last row of each expert
        shift = (ends - space) - (count.cumsum(0) - count)  # padded start less dense start
        row = torch.arange(N * K, device=x.device) + shift[expert]  # N*K, all different
        source = torch.full([(N * K // block + E) * block], N, device=x.device)
        source = source.scatter_(0, row, order // K)  # token of each row; N = the row of zeros
        rows = torch.cat([x, x.new_zeros(1, D)]).index_select(0, source)  # rows D
        offs = ends.to(torch.int32)
        gate, up = F.grouped_mm(rows, gate_up.mT, offs=offs).chunk(2, -1)  # 2 x rows I
        y = F.grouped_mm(F.silu(gate) * up, down.mT, offs=offs)  # rows D
        place = torch.empty_like(row).scatter_(0, order, row)  # N*K: the row of each assignment
        return (y.index_select(0, place).view(N, K, D) * weights.unsqueeze(-1)).sum(1)


class MoE(nn.Module):
    """Mixture of experts. [B, T, D] -> [B, T, D], balance loss, expert load [E]."""

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        self.gate = Gate(c)
        self.experts = Experts(c)
        if c.n_shared_experts:
            width = c.n_shared_experts * c.moe_intermediate_size
            self.shared_experts = MLP(c.hidden_size, width)

    def forward(self, x: Tensor, exempt: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, D]; exempt [B]: sequences that token dropping spares; None drops nothing."""
        c = self.config
        routing = self.gate(x)
        weights, aux_loss = routing.weights, torch.zeros((), device=x.device)
        if self.training and self.gate.weight.requires_grad:  # a frozen router stays as it is
            aux_loss = balance_loss(c, routing)
        if exempt is not None:
            weights = drop_tokens(c, routing, exempt)
        index = routing.index.flatten(0, 1)  # B*T K
        y = self.experts(x.flatten(0, 1), index, weights.flatten(0, 1)).view_as(x)  # B T D
        if c.n_shared_experts:
            y = y + self.shared_experts(x)
        share = torch.full([index.numel()], 1 / index.numel(), device=x.device)
        load = torch.zeros(c.n_routed_experts, device=x.device)
        return y.to(x.dtype), aux_loss, load.scatter_add_(0, index.flatten(), share)


# ----------------------------------------------------------------------------------------------
# 8. The block. How do the parts stack?
#
#        x += attention(norm(x));  x += feed_forward(norm(x))
# ----------------------------------------------------------------------------------------------


class Block(nn.Module):
    """One layer: MLA, then a dense or a mixed feed-forward, each behind its own norm."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        c = config
        self.is_moe = c.is_moe(layer)
        self.self_attn = MLA(c)
        self.mlp = MoE(c) if self.is_moe else MLP(c.hidden_size, c.intermediate_size)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x: Tensor, span: Span, exempt: Tensor | None, memory: Tensor | None):
        """[B, T, D] -> [B, T, D], and of a MoE layer its balance loss and load, else None."""
        x = x + self.self_attn(self.input_layernorm(x), span, memory)
        normed = self.post_attention_layernorm(x)
        if not self.is_moe:
            return x + self.mlp(normed), None, None
        y, aux_loss, load = self.mlp(normed, exempt)
        return x + y, aux_loss, load


# ----------------------------------------------------------------------------------------------
# 9. Sampling. Which token comes next?
# ----------------------------------------------------------------------------------------------


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one id per row of logits [B, V]; see `DeepSeek.generate` for the arguments."""
    if temperature < 1e-6:  # the limit; dividing by less would leave the range of fp32
        return logits.argmax(-1)
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        kth = logits.topk(top_k, -1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p is not None:
        probs, ids = logits.softmax(-1).sort(-1, descending=True)
        before = probs.cumsum(-1) - probs  # the probability of all that rank higher
        outside = before >= max(top_p, 1e-6)  # of any top_p the most probable one stays
        drop = torch.zeros_like(outside).scatter_(-1, ids, outside)
        logits = logits.masked_fill(drop, -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)


# ----------------------------------------------------------------------------------------------
# 10. The model. From token ids to logits and losses.
# ----------------------------------------------------------------------------------------------


class Output(NamedTuple):
    """What `DeepSeek.forward` returns."""

    logits: Tensor | None  # [B, T, V]; None with targets
    loss: Tensor | None  # mean cross-entropy in nats per token, without the balance losses
    aux_loss: Tensor  # balance losses of all layers, weighted and added; 0 in eval mode
    expert_load: Tensor  # [MoE layers, E]: each expert's share of the assignments


class Decoder(nn.Module):
    """Embedding, blocks, final norm: ids [B, T] -> [B, T, D], aux_loss, expert_load."""

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c, i) for i in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, ids, cache=None, absorb=None, checkpoint_activations=False):
        span = make_span(self.config, ids, cache, absorb)
        x = self.embed_tokens(ids)  # B T D
        dropping = self.training and self.config.token_drop_capacity > 0
        # B; drawn once, so that a sequence is spared by all layers or by none
        exempt = torch.rand(len(ids), device=ids.device) < 0.1 if dropping else None
        aux_loss, loads = torch.zeros((), device=ids.device), []
        for i, layer in enumerate(self.layers):
            memory = cache.latents[i] if cache else None
            if checkpoint_activations:
                x, aux, load = checkpoint(layer, x, span, exempt, memory, use_reentrant=False)
            else:
                x, aux, load = layer(x, span, exempt, memory)
            if layer.is_moe:
                aux_loss = aux_loss + aux
                loads.append(load)
        if cache:
            cache.lengths = [n + ids.shape[1] for n in cache.lengths]
        load = torch.stack(loads) if loads else x.new_zeros(0, self.config.n_routed_experts)
        return self.norm(x), aux_loss, load


class HeadLoss(torch.autograd.Function):
    """Output head and cross-entropy in one: sum_n -log p[n, target_n], p = softmax(x W^T).

    At V = 102,400 one sequence of 4,096 tokens has 1.7 GB of logits. But their gradient is
    p - onehot(target) and needs nothing that comes later, except for a factor. So the gradients
    of x and W are made in the forward pass, a chunk of tokens at a time, and the chunk's logits
    are forgotten. That of W, in fp32, waits for the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        """x [N, D], weight [V, D], targets [N] with -100 where none counts -> a scalar, fp32."""
        w = weight.to(product_dtype(x))  # V D
        total, grad_x, grad_w = torch.zeros((), device=x.device), [], None
        if ctx.needs_input_grad[1]:  # a frozen head is told nothing
            grad_w = torch.zeros_like(weight, dtype=torch.float32)
        for part, target in zip(x.split(chunk), targets.unsqueeze(1).split(chunk), strict=True):
            counts = target != -100  # n 1
            target = target.masked_fill(~counts, 0)  # n 1
            logp = (part @ w.T).log_softmax(-1, dtype=torch.float32)  # n V
            total -= (logp.gather(1, target) * counts).sum()
            p, minus_one = logp.exp_(), torch.full_like(target, -1, dtype=torch.float32)
            grad = p.scatter_add_(1, target, minus_one).to(w.dtype)  # n V
            grad_x.append((grad @ w) * counts)  # n D
            if grad_w is not None:
                grad_w += grad.T @ (part * counts)  # V D
        ctx.save_for_backward(torch.cat(grad_x), grad_w)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable  # the gradients kept have forgotten where they come from
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        grad_x, grad_w = ctx.saved_tensors
        if grad_w is not None:
            grad_w = (grad_w * factor).to(ctx.dtype)
        return grad_x * factor, grad_w, None, None


class DeepSeek(nn.Module):
    """DeepSeek-V2 for a `Config`, freshly initialised, in fp32, on the CPU.

    Under `with torch.device("meta")` it is built without memory, to count or to load into.
    For mixed precision put `torch.autocast` around the call.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)  # not tied
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Matrices normal with std initializer_range ([V2] 3.1.2), norm weights one.

        With copying_start the embedding fills the first half of the channels, the head reads the
        second half with half the same numbers, and attention starts as a copy from the one to the
        other. A model has to learn to look back before it can tell who was named; but where copying
        has yet to be learned too, looking gains nothing, and copying nothing without looking. Small
        models stay for millions of tokens on that plateau. With a copy, any look back lowers the
        loss; and kept apart from what comes next, what a token is can be read in every layer.
        """
        c = self.config
        for p in self.parameters():
            if p.dim() > 1:
                p.normal_(0.0, c.initializer_range)
            else:
                p.fill_(1.0)
        if c.copying_start:
            half = c.hidden_size // 2
            own = self.model.embed_tokens.weight.normal_(0.0, c.copying_start)[:, :half]  # V D/2
            self.model.embed_tokens.weight[:, half:] = 0
            self.lm_head.weight.copy_(F.pad(own / 2, (c.hidden_size - half, 0)))
            for layer in self.model.layers:
                layer.self_attn.start_as_copy()

    def forward(
        self,
        input_ids: Tensor,
        targets: Tensor | None = None,
        cache: LatentCache | None = None,
        absorb: bool | None = None,
        checkpoint_activations: bool = False,
    ) -> Output:
        """input_ids [B, T]; targets [B, T] are the ids to predict there, -100 where none counts.

        cache: the ids continue what it holds, and are added to it. absorb: True or False forces
        MLA's absorbed or expanded form; None takes the cheaper. checkpoint_activations: keep
        only each layer's input for the backward pass and compute the rest again.
        Raises ValueError when the sequence outgrows the cache or max_position_embeddings.
        """
        x, aux_loss, load = self.model(input_ids, cache, absorb, checkpoint_activations)
        if targets is None:
            return Output(self.lm_head(x), None, aux_loss, load)
        return Output(None, self.cross_entropy(x, targets), aux_loss, load)

    def cross_entropy(self, x: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats of x [B, T, D] against targets [B, T]; no logits are kept."""
        x, targets = x.flatten(0, 1), targets.flatten()  # B*T D, B*T
        # A chunk's logits fit the processor's cache, or take 128 MB of a GPU.
        chunk = max(1, 2 ** (20 if x.device.type == "cpu" else 25) // self.config.vocab_size)
        plain = type(self.lm_head) is nn.Linear and product_dtype(x) != torch.float16
        if plain and torch.is_grad_enabled():
            total = HeadLoss.apply(x, self.lm_head.weight, targets, chunk)
        else:  # no gradients; an adapter's; or fp16, where they must be made with the loss scaled

            def loss(x: Tensor, target: Tensor) -> Tensor:
                return F.cross_entropy(self.lm_head(x).float(), target, reduction="sum")

            total = torch.zeros((), device=x.device)
            for part in zip(x.split(chunk), targets.split(chunk), strict=True):
                total = total + checkpoint(loss, *part, use_reentrant=False)
        return total / (targets != -100).sum().clamp(min=1)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> DeepSeek:
        """The model of a folder in the official format, or of a name on the Hugging Face hub,
        in eval mode. dtype None takes that of the stored lm_head.
        Raises CheckpointError or ConfigError.
        """
        folder = find_checkpoint(source)
        config = read_config(folder)
        with torch.device("meta"):  # neither memory nor random numbers for weights to be replaced
            model = cls(config)
        read_weights(model, weight_files(folder), dtype, device)
        return model.eval()

    def save_pretrained(self, folder: str | Path, shard_bytes: int = 5 * 10**9) -> None:
        """Write config.json and *.safetensors as official checkpoints have them, for transformers
        and `from_pretrained`. Earlier model*.safetensors in folder go.

        Raises CheckpointError for a model that the official format cannot express, or a folder
        that cannot be written.
        """
        config = official_config(self.config, self.lm_head.weight.dtype)
        if self.lm_head.weight.is_meta:
            raise CheckpointError(
                "a model on the meta device has no weights to save: load it first"
            )
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_weights(self, folder, shard_bytes)
            text = json.dumps(config, indent=2) + "\n"
            (folder / "config.json").write_text(text, encoding="utf-8")
        except OSError as error:
            raise CheckpointError(f"{folder} cannot be written: {error.strerror}") from error

    def num_parameters(self) -> tuple[int, int]:
        """(total, active): active are those that one token uses, without the input embedding,
        which is a look-up. So counted, V2-Lite has 2.45B, the paper's 2.4B; with it, 2.66B."""
        c = self.config
        total = sum(p.numel() for p in self.parameters())
        routed = sum(p.numel() for n, p in self.named_parameters() if ".mlp.experts." in n)
        resting = routed * (c.n_routed_experts - c.num_experts_per_tok) // c.n_routed_experts
        return total, total - resting - self.model.embed_tokens.weight.numel()

    @torch.no_grad()
    def update_bias(self, expert_load: Tensor) -> None:
        """V3's balancing, after a step of training: expert_load [MoE layers, E] is that of the
        step. Without bias_update_speed nothing happens."""
        if not (speed := self.config.bias_update_speed):
            return
        gates = [layer.mlp.gate for layer in self.model.layers if layer.is_moe]
        for gate, load in zip(gates, expert_load, strict=True):
            if gate.weight.requires_grad:  # a frozen router stays as it is
                gate.e_score_correction_bias += speed * (load.mean() - load).sign()

    def new_cache(
        self, batch_size: int, max_length: int, dtype: torch.dtype | None = None
    ) -> LatentCache:
        """An empty cache for batch_size sequences of up to max_length tokens, in the dtype of
        the weights unless given."""
        c, weight = self.config, self.lm_head.weight
        shape = (c.num_hidden_layers, batch_size, max_length, c.cache_dim)
        latents = torch.zeros(shape, dtype=dtype or weight.dtype, device=weight.device)
        return LatentCache(latents, [0] * batch_size)

    # ------------------------------------------------------------------------------------------
    # 11. Generation. How does the model continue a text?
    # ------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Tensor | Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop: int | None = None,
        vocab_size: int | None = None,
        generator: torch.Generator | None = None,
        compile: bool = False,
    ) -> Iterator[Tensor]:
        """Continue prompts (ids [B, T], or B lists of any lengths), yielding ids [B] as they come.

        temperature 0 takes the most probable token. top_k keeps the k most probable tokens,
        top_p the fewest that hold that much probability. A row that has said `stop` goes on
        repeating it; all rows done, or the context full, ends the stream. Ids from vocab_size on
        (the padding of the embedding) never come out. compile puts the steps behind the prompt
        through torch.compile: half a minute at first, and again for the second length and for
        another number of rows; then a CPU no longer waits between hundreds of small operations.
        Raises ValueError for impossible arguments.
        """
        limit = self.config.max_position_embeddings
        rows = [torch.as_tensor(p, dtype=torch.long) for p in prompts]
        if any(row.dim() != 1 for row in rows):
            raise ValueError("prompts are rows of ids, as in [[0, 5, 7]], also where there is one")
        for bad, message in (
            (self.training, "generate needs model.eval(): token dropping is for training"),
            (not rows or min(map(len, rows)) == 0, "a prompt is empty: give at least one token"),
            (
                max(map(len, rows), default=0) >= limit,
                f"a prompt of {max(map(len, rows), default=0)} tokens leaves no room in the"
                f" context of {limit}: shorten it",
            ),
            (max_new_tokens < 0, f"max_new_tokens = {max_new_tokens} must be 0 or more"),
            (not 0 <= temperature < math.inf, f"temperature = {temperature} must be 0 or more"),
            (top_k is not None and top_k < 1, f"top_k = {top_k} must be at least 1"),
            (top_p is not None and not 0 < top_p <= 1, f"top_p = {top_p} must be in (0, 1]"),
        ):
            if bad:
                raise ValueError(message)
        max_new_tokens = min(max_new_tokens, limit - max(map(len, rows)))

        def pick(x: Tensor) -> Tensor:  # B D -> B
            logits = self.lm_head(x)[:, :vocab_size].float()
            return sample(logits, temperature, top_k, top_p, generator)

        return self._stream(rows, max_new_tokens, stop, pick, compile)

    @torch.no_grad()
    def _stream(
        self, rows: list[Tensor], max_new_tokens: int, stop, pick, compile: bool
    ) -> Iterator[Tensor]:
        if max_new_tokens == 0:
            return
        step = torch.compile(self.model) if compile else self.model
        device = self.lm_head.weight.device
        lengths = [len(r) for r in rows]
        cache = self.new_cache(len(rows), max(lengths) + max_new_tokens)
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
        x, *_ = self.model(ids, cache)
        # Rows are padded on the right. Forgetting the padding is enough: what it wrote into the
        # cache lies behind each row's end, invisible, and is overwritten token by token.
        cache.lengths = lengths
        last = torch.tensor(lengths, device=device) - 1
        x = x[torch.arange(len(rows), device=device), last]  # B D
        done = torch.zeros(len(rows), dtype=torch.bool, device=device)
        for i in range(max_new_tokens):
            token = pick(x)
            if stop is not None:
                token = torch.where(done, stop, token)
                done = done | (token == stop)
            yield token
            if i + 1 == max_new_tokens or (stop is not None and bool(done.all())):
                return
            x = step(token[:, None], cache)[0][:, 0]


# ----------------------------------------------------------------------------------------------
# 12. Which configurations can be built?
# ----------------------------------------------------------------------------------------------


def check_config(c: Config) -> None:
    """Raise ConfigError, in one sentence with the value and the remedy, for an impossible one."""

    def require(ok: bool, message: str) -> None:
        if not ok:
            raise ConfigError(message)

    may_be_zero = {"n_shared_experts", "first_k_dense_replace", "bos_token_id", "eos_token_id"}
    for name, (kind, _) in c.describe().items():
        value, least = getattr(c, name), 0 if name in may_be_zero else 1
        if kind is int or (kind == int | None and value is not None):
            whole = type(value) is int and least <= value < 2**31
            require(whole, f"{name} = {value!r} must be a whole number, at least {least}")
        elif kind is float:
            finite = type(value) in (int, float) and 0 <= value < 1e18
            require(finite, f"{name} = {value!r} must be a finite number, 0 or more")
        elif kind is bool:
            require(type(value) is bool, f"{name} = {value!r} must be true or false")
    for name, least in (("rms_norm_eps", 0), ("routed_scaling_factor", 0), ("rope_theta", 1)):
        require(getattr(c, name) > least, f"{name} = {getattr(c, name)} must be above {least}")
    for name in ("num_hidden_layers", "n_routed_experts"):  # more would take forever to list
        require(getattr(c, name) <= 10_000, f"{name} = {getattr(c, name)} is over 10000")
    require(  # the model does not need this, but transformers does
        c.hidden_size % c.num_attention_heads == 0,
        f"hidden_size = {c.hidden_size} must be a multiple of num_attention_heads ="
        f" {c.num_attention_heads}",
    )
    require(
        not c.copying_start or c.initializer_range > 0,
        "copying_start needs an initializer_range above 0: the copy is made of random weights",
    )
    require(
        c.qk_rope_head_dim % 2 == 0,
        f"qk_rope_head_dim = {c.qk_rope_head_dim} must be even: RoPE rotates pairs",
    )
    require(
        c.topk_method in ("greedy", "group_limited_greedy"),
        f"topk_method = {c.topk_method!r} is unknown: use greedy or group_limited_greedy",
    )
    require(
        c.n_routed_experts % c.n_group == 0,
        f"n_routed_experts = {c.n_routed_experts} must be a multiple of n_group = {c.n_group}",
    )
    require(
        c.topk_group <= c.n_group,
        f"topk_group = {c.topk_group} must be at most n_group = {c.n_group}",
    )
    limited = c.topk_method == "group_limited_greedy"
    reach = c.n_routed_experts // c.n_group * c.topk_group if limited else c.n_routed_experts
    require(
        c.num_experts_per_tok <= reach,
        f"num_experts_per_tok = {c.num_experts_per_tok} must be at most {reach}, the experts that"
        " a token can reach",
    )
    require(
        limited or c.comm_loss_alpha == 0,
        f"comm_loss_alpha = {c.comm_loss_alpha} needs topk_method = group_limited_greedy",
    )
    require(
        c.token_drop_capacity == 0 or c.n_group > 1,
        f"token_drop_capacity = {c.token_drop_capacity} needs n_group of 2 or more: it is a"
        " device's capacity",
    )
    for name in ("bos_token_id", "eos_token_id"):
        require(
            getattr(c, name) < c.vocab_size,
            f"{name} = {getattr(c, name)} must be below vocab_size = {c.vocab_size}",
        )
    if (yarn := c.rope_scaling) is None:
        return
    require(isinstance(yarn, dict), f"rope_scaling = {yarn!r} must be a dict or null")
    kind = yarn.get("type")
    require(kind == "yarn", f"rope_scaling type {kind!r} is unknown: use yarn or null")
    for key in ("factor", "original_max_position_embeddings"):
        require(key in yarn, f"rope_scaling lacks {key!r}, which YaRN needs")
    for key, value in yarn.items():
        if key == "type":
            continue
        require(key in YARN_V2, f"rope_scaling has an unknown key {key!r}")
        least = 1 if key == "factor" else 0 if key == "mscale_all_dim" else 1e-9
        ok = type(value) in (int, float) and least <= value < 1e18
        require(ok, f"rope_scaling {key} = {value!r} must be a number of at least {least}")
    fast, slow = yarn.get("beta_fast", 32), yarn.get("beta_slow", 1)
    require(fast >= slow, f"rope_scaling beta_fast = {fast} must not be below beta_slow = {slow}")


# ----------------------------------------------------------------------------------------------
# 13. Official checkpoints. How do their files become this model, and this model such files?
#
#    A folder holds config.json and the weights, in one or many *.safetensors. Fields, names and
#    shapes are those used here, but for the experts, which are stored one by one:
#
#        mlp.experts.7.gate_proj.weight  [I, D]   =   mlp.experts.gate_up_proj[7, :I]
#        mlp.experts.7.up_proj.weight    [I, D]   =   mlp.experts.gate_up_proj[7, I:]
#        mlp.experts.7.down_proj.weight  [D, I]   =   mlp.experts.down_proj[7]
# ----------------------------------------------------------------------------------------------


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written; the message is one sentence."""


# What this file builds in. A checkpoint that says otherwise is of another model.
BUILT_IN = {
    "model_type": "deepseek_v2",
    "hidden_act": "silu",
    "scoring_func": "softmax",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}

# What config.json may leave out, and what that means; also our own five fields of training.
OFFICIAL_DEFAULTS = {
    "q_lora_rank": None,
    "n_shared_experts": 0,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 0,
    "moe_layer_freq": 1,
    "aux_loss_alpha": 0.001,
    "device_loss_alpha": 0.0,
    "comm_loss_alpha": 0.0,
    "token_drop_capacity": 0.0,
    "copying_start": 0.0,
    "bias_update_speed": 0.0,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "initializer_range": 0.02,
}


def find_checkpoint(source: str | Path) -> Path:
    """The folder itself, or that of a hub name in the hub's cache, fetched when it is not there."""
    if Path(source).is_dir():
        return Path(source)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise CheckpointError(
            f"{source} is neither a folder nor a hub name such as deepseek-ai/DeepSeek-V2-Lite"
        )
    import huggingface_hub  # comes with tokenizers
    from huggingface_hub.errors import HfHubHTTPError

    wanted = ["config.json", "tokenizer.json", "*.safetensors", "*.safetensors.index.json"]
    try:
        return Path(huggingface_hub.snapshot_download(str(source), allow_patterns=wanted))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise CheckpointError(
            f"{source} does not exist here and cannot be fetched from the hub"
            f" ({type(error).__name__}): check the name and the network"
        ) from error


def read_config(folder: Path) -> Config:
    """config.json as DeepSeek released it or as transformers 5 writes it, as a Config."""
    path = folder / "config.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no config.json: give a model's folder") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: it is damaged") from error
    if not isinstance(record, dict):
        raise CheckpointError(f"{path} holds no object of fields and values")
    for name, value in BUILT_IN.items():
        if record.get(name, None if name == "model_type" else value) != value:
            raise CheckpointError(
                f"{path} has {name} = {record.get(name)!r}; this program builds {value!r} only"
            )
    if record.get("quantization_config"):
        raise CheckpointError(f"{path} is of quantised weights: give those in bf16, fp16 or fp32")
    heads = record.get("num_attention_heads")
    if record.get("num_key_value_heads") not in (None, heads):
        raise CheckpointError(
            f"{path} has num_key_value_heads = {record['num_key_value_heads']}: in MLA they are"
            f" as many as num_attention_heads = {heads}"
        )
    rope = record.get("rope_parameters") or record.get("rope_scaling")
    if isinstance(rope, dict):  # transformers 5 spells it "rope_type", and puts theta here too
        record["rope_theta"] = rope.pop("rope_theta", record.get("rope_theta"))
        kind = rope.pop("rope_type", rope.get("type", "default"))
        rope = None if kind == "default" else rope | {"type": kind}
    record["rope_scaling"] = rope
    record["q_lora_rank"] = record.get("q_lora_rank") or None  # 0 says the same as null
    given = {k: v for k, v in record.items() if v is not None}
    if missing := set(Config.describe()) - set(OFFICIAL_DEFAULTS) - set(given):
        raise CheckpointError(f"{path} lacks {sorted(missing)[0]!r}")
    return Config(**{k: given.get(k, OFFICIAL_DEFAULTS.get(k)) for k in Config.describe()})


def official_config(config: Config, dtype: torch.dtype) -> dict[str, Any]:
    """The content of config.json for a Config. Raises CheckpointError for what it cannot say."""
    for name, value in (("norm_topk_prob", False), ("moe_layer_freq", 1), ("bias_update_speed", 0)):
        if getattr(config, name) != value:
            raise CheckpointError(
                f"{name} = {getattr(config, name)!r} cannot be exported: transformers would compute"
                f" as if it were {value!r}"
            )
    # vLLM limits groups whatever topk_method says; all groups allowed is greedy again
    reach = config.n_group if config.topk_method == "greedy" else config.topk_group
    return {
        "architectures": ["DeepseekV2ForCausalLM"],
        **BUILT_IN,
        **asdict(config),
        "topk_group": reach,
        "seq_aux": True,
        "num_key_value_heads": config.num_attention_heads,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def official_tensors(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A parameter under its official name; stacked experts as a view of each expert's matrix.

    It serves tensors from files as well: some store experts stacked, as here.
    """
    stem, _, kind = name.rpartition(".")
    if not stem.endswith(".mlp.experts") or tensor.dim() != 3 or tensor.numel() == 0:
        yield name, tensor
        return
    for e, matrix in enumerate(tensor):
        if kind == "gate_up_proj":
            gate, up = matrix.tensor_split(2)
            yield f"{stem}.{e}.gate_proj.weight", gate  # I D
            yield f"{stem}.{e}.up_proj.weight", up  # I D
        else:
            yield f"{stem}.{e}.{kind}.weight", matrix  # D I


def weight_files(folder: Path) -> list[Path]:
    """The *.safetensors of a checkpoint; where there is an index, those that it names."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        if files := sorted(folder.glob("*.safetensors")):
            return files
        raise CheckpointError(f"{folder} has no *.safetensors: other formats are not read")
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        files = [folder / name for name in sorted(names)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} cannot be read: it is damaged") from error
    if not files:
        raise CheckpointError(f"{index} names no file: it is damaged")
    for path in files:
        if not path.is_file():
            raise CheckpointError(f"{path} is missing, though {index.name} names it")
    return files


def stored_tensors(path: Path) -> Iterator[tuple[str, Any]]:
    """Names and still unread tensors of one *.safetensors: .get_shape(), .get_dtype(), [:]."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():
                yield name, file.get_slice(name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: it is damaged or cut short") from error


def read_weights(model: DeepSeek, files: list[Path], dtype, device) -> None:
    """Fill a model built on the meta device, one tensor after the other.

    First the headers are compared with the model, so that a checkpoint that does not fit ends in
    a sentence before memory is taken. Then there are at any time the model and a shard.
    """

    def official() -> dict[str, Tensor]:  # views: writing to them writes to the model
        return dict(pair for p in model.state_dict().items() for pair in official_tensors(*p))

    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    wanted, found = official(), {}
    for path in files:
        for stored_name, stored in stored_tensors(path):
            if stored.get_dtype() not in dtypes:
                raise CheckpointError(
                    f"{path} holds {stored_name} in {stored.get_dtype()}: only"
                    f" {', '.join(dtypes)} are read"
                )
            shape = torch.empty(stored.get_shape(), device="meta")
            for name, part in official_tensors(stored_name, shape):
                if name not in wanted:
                    raise CheckpointError(
                        f"{path} holds {name}, which config.json has no place for"
                    )
                if name in found:
                    raise CheckpointError(f"{path} holds {name}, which was there before")
                if part.shape != wanted[name].shape:
                    raise CheckpointError(
                        f"{path} holds {name} of shape {list(part.shape)}, but config.json asks"
                        f" for {list(wanted[name].shape)}"
                    )
                found[name] = dtypes[stored.get_dtype()]
    if missing := [name for name in wanted if name not in found]:
        raise CheckpointError(
            f"{missing[0]} is missing in {files[0].parent}"
            + (f", and {len(missing) - 1} more" if missing[1:] else "")
        )
    model.to(dtype or found["lm_head.weight"]).to_empty(device=device)
    places = official()
    with torch.no_grad():
        for path in files:
            for stored_name, stored in stored_tensors(path):
                for name, part in official_tensors(stored_name, stored[:]):
                    places[name].copy_(part)


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """One *.safetensors, whole or not at all. Raises CheckpointError, as on a full disk."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    partial = path.with_suffix(".partial")
    try:
        partial.touch()  # with the usual rights; safetensors itself lets only the owner read
        rights = partial.stat().st_mode
        tensors = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
        save_file(tensors, partial, {"format": "pt"})
        partial.chmod(rights)
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{path} cannot be written: {reason}") from error
    finally:
        partial.unlink(missing_ok=True)


def write_weights(model: DeepSeek, folder: Path, shard_bytes: int) -> None:
    """One model.safetensors, or an index and shards of at most shard_bytes (if a tensor allows).

    The shards are written one after the other, so that memory is taken for one.
    """
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for pair in model.state_dict().items():
        for name, tensor in official_tensors(*pair):
            size += tensor.nbytes
            if size > shard_bytes and shards[-1]:
                shards.append({})
                size = tensor.nbytes
            shards[-1][name] = tensor
    for stale in folder.glob("model*.safetensors*"):
        stale.unlink()
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        many = f"-{i:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        weight_map |= dict.fromkeys(shard, f"model{many}.safetensors")
        write_tensors(shard, folder / f"model{many}.safetensors")
    if len(shards) > 1:
        total = sum(p.nbytes for p in model.state_dict().values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        path = folder / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


# ----------------------------------------------------------------------------------------------
# 14. LoRA. How does a model learn something new in few numbers?
#
#        y = W x + (alpha / r) B A x          A [r, in], B [out, r]               arXiv 2106.09685
#
#    W, the base, stays as it is, to the bit; A and B are trained. B begins at zero, so that the
#    start is the base model exactly. alpha / r keeps the step size when r is changed. Files are
#    those of the library PEFT.
# ----------------------------------------------------------------------------------------------

MLA_PROJECTIONS = (
    "q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj",
)  # fmt: skip


class LoRALinear(nn.Module):
    """A linear layer and its adapter. [..., in] -> [..., out]. The adapter is kept in fp32."""

    def __init__(self, base_layer: nn.Linear, rank: int, alpha: float, dropout: float):
        super().__init__()
        where = dict(bias=False, device=base_layer.weight.device, dtype=torch.float32)
        self.base_layer, self.alpha = base_layer, alpha
        self.lora_A = nn.Linear(base_layer.in_features, rank, **where)
        self.lora_B = nn.Linear(rank, base_layer.out_features, **where)
        self.dropout = nn.Dropout(dropout)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))  # as the authors' code
        nn.init.zeros_(self.lora_B.weight)

    @property
    def scaling(self) -> float:
        """alpha / r"""
        return self.alpha / self.lora_A.out_features

    @property
    def weight(self) -> Tensor:
        """W + (alpha / r) B A, summed in fp32; absorbed attention reads it of kv_b_proj."""
        base = self.base_layer.weight
        with torch.autocast(base.device.type, enabled=False):
            delta = self.scaling * (self.lora_B.weight @ self.lora_A.weight)
        return (base.float() + delta).to(base.dtype)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        x = self.dropout(x.to(self.lora_A.weight.dtype))
        return y + (self.scaling * self.lora_B(self.lora_A(x))).to(y.dtype)


def add_lora(
    model: DeepSeek,
    rank: int = 8,
    alpha: float = 16.0,
    targets: Sequence[str] = MLA_PROJECTIONS,
    dropout: float = 0.0,
) -> list[str]:
    """Freeze the model and give every linear layer called like one of `targets` an adapter.

    Returns the adapted layers' full names. Targets that this model does not have, but another
    configuration has, are passed over. Raises ConfigError for others, and where the model has
    adapters already.
    """
    linear = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    have = {name.rpartition(".")[2] for name in linear}
    for target in targets:
        if target not in have | set(MLA_PROJECTIONS):
            raise ConfigError(
                f"target {target!r} is no linear layer: choose from {', '.join(sorted(have))}"
            )
    names = [name for name in linear if name.rpartition(".")[2] in targets]
    if not names:
        raise ConfigError(
            f"targets = {', '.join(targets)}: this model has none of them, choose from"
            f" {', '.join(sorted(have))}"
        )
    _adapt(model, names, rank, alpha, dropout)
    return names


def _adapt(model: DeepSeek, names: Sequence[str], rank: int, alpha: float, dropout: float) -> None:
    for bad, message in (
        (rank < 1, f"rank = {rank} must be at least 1"),
        (not 0 < alpha < math.inf, f"alpha = {alpha} must be above 0"),
        (not 0 <= dropout < 1, f"dropout = {dropout} must be in [0, 1)"),
        (_layers(model, LoRALinear), "the model has adapters already: merge them first"),
    ):
        if bad:
            raise ConfigError(message)
    model.requires_grad_(False)
    for name in names:
        _put(model, name, LoRALinear(model.get_submodule(name), rank, alpha, dropout))


def _layers(model: nn.Module, kind: type) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    module.train(model.training)
    setattr(model.get_submodule(parent), own, module)


def merge_lora(model: DeepSeek) -> Callable[[], None]:
    """Replace each adapted layer by a plain one with the weight W + (alpha / r) B A.

    Calling the result puts the adapted layers back, the base as it was to the bit (in bf16,
    subtracting again would not give that).
    """

    def merged(layer: LoRALinear) -> nn.Linear:
        plain = nn.Linear(*layer.base_layer.weight.T.shape, bias=False, device="meta")
        plain.weight = nn.Parameter(layer.weight.detach(), requires_grad=False)
        return plain

    return _exchange(model, merged)


def detach_lora(model: DeepSeek) -> Callable[[], None]:
    """Put the base back without its adapters. Calling the result brings them in again."""
    return _exchange(model, lambda layer: layer.base_layer)


def _exchange(model: DeepSeek, make: Callable[[LoRALinear], nn.Linear]) -> Callable[[], None]:
    adapted = _layers(model, LoRALinear)
    for name, layer in adapted.items():
        _put(model, name, make(layer))

    def undo() -> None:
        for name, layer in adapted.items():
            _put(model, name, layer)

    return undo


# PEFT's settings that leave y = W x + (alpha / r) B A x as it is, whatever they say: those that are
# read, say where adapters are (each tensor's name says so too), keep records, or do nothing alone.
PEFT_FREE = {
    "r", "lora_alpha", "lora_dropout",
    "target_modules", "target_parameters", "exclude_modules", "layers_to_transform",
    "layers_pattern",
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode",
    "megatron_core", "qalora_group_size",
}  # fmt: skip
# Those that do so with these values; any other, known or not, must be off. Most other starts change
# W itself.
PEFT_ONLY = {
    "peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": (True, False, "gaussian"),
}  # fmt: skip
PEFT_OFF = (None, False, {}, [])
PEFT_PREFIX = "base_model.model."  # in front of each tensor's name


def lora_state(model: DeepSeek) -> dict[str, Tensor]:
    """The adapters' own tensors, lora_A and lora_B of each layer, under the model's names."""
    return {k: v for k, v in model.state_dict().items() if ".lora_" in k}


def save_lora(model: DeepSeek, folder: str | Path, base: str | None = None) -> None:
    """Write adapter_model.safetensors and adapter_config.json as PEFT does; base: where the
    model comes from. The dropout, which acts in training only, is kept if no MLP has adapters.
    Raises ConfigError without adapters, CheckpointError if that fails."""
    layers = _layers(model, LoRALinear)
    if not layers:
        raise ConfigError("the model has no adapters to save: call add_lora first")
    some = next(iter(layers.values()))
    # PEFT takes the names of an MLP's layers, even full ones, for its stacked routed experts; of
    # their weights it takes full names as they are, but then allows no dropout.
    weights = [f"{name}.weight" for name in layers if ".mlp." in name]
    record = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": some.lora_A.out_features,
        "lora_alpha": some.alpha,
        "lora_dropout": 0.0 if weights else some.dropout.p,
        "target_modules": sorted({n.rpartition(".")[2] for n in layers if ".mlp." not in n}),
        "target_parameters": weights,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        state = {PEFT_PREFIX + k: v for k, v in lora_state(model).items()}
        write_tensors(state, folder / "adapter_model.safetensors")
        text = json.dumps(record, indent=2) + "\n"
        (folder / "adapter_config.json").write_text(text, encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error.strerror}") from error


def load_lora(model: DeepSeek, folder: str | Path) -> None:
    """Freeze the model and give it the adapters of a folder written by `save_lora` or by PEFT.

    Raises CheckpointError for a damaged file, another kind of adapter, or one of another base;
    ConfigError where the model has adapters already.
    """
    folder = Path(folder)
    try:
        record = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        rank, alpha = int(record["r"]), float(record["lora_alpha"])
        dropout = float(record.get("lora_dropout") or 0.0)
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} has no adapter_config.json: give an adapter's folder"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / 'adapter_config.json'} cannot be read") from error
    for name, value in ({"peft_type": None} | record).items():
        if name not in PEFT_FREE and value not in PEFT_ONLY.get(name, PEFT_OFF):
            raise CheckpointError(
                f"{folder} has {name} = {value!r}: only plain LoRA is read, so train without it"
            )
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise CheckpointError(f"{file} is missing: other formats are not read")
    state = {name.removeprefix(PEFT_PREFIX): t[:] for name, t in stored_tensors(file)}
    linear = _layers(model, nn.Linear)
    names = sorted({name.rpartition(".lora_")[0] for name in state})
    if not names:
        raise CheckpointError(f"{file} holds no adapter")
    for name in names:
        found = [state.get(f"{name}.lora_{half}.weight") for half in "AB"]
        shapes = [None if t is None else list(t.shape) for t in found]
        base = linear.get(name)
        if base is None or shapes != [[rank, base.in_features], [base.out_features, rank]]:
            raise CheckpointError(
                f"{folder} does not fit the model at {name}: give the base that it was trained on,"
                " and adapters of linear layers only"
            )
    if len(state) != 2 * len(names):
        raise CheckpointError(f"{file} holds tensors that are no lora_A or lora_B weights")
    _adapt(model, names, rank, alpha, dropout)
    model.load_state_dict(state, strict=False)
