"""
DeepSeek-V2 in one file: 236 billion parameters, of which each token uses 21 billion. Its attention
caches one small latent vector per token (MLA), and its feed-forward layers activate 6 of 160 small
experts per token (DeepSeekMoE).

    model = DeepSeek(Config.preset("tiny"))
    out = model(ids[:, :-1], ids[:, 1:])                  # inputs, and the ids that come next
    (out.loss + out.aux_loss).backward()                  # cross-entropy + balance losses
    for token in model.eval().generate(prompt_ids, 100): ...

Papers:  [V2]  DeepSeek-V2, arXiv 2405.04434      [MoE] DeepSeekMoE, arXiv 2401.06066
         [RoPE] RoFormer, arXiv 2104.09864        [YaRN] arXiv 2309.00071
"The official code" is modeling_deepseek.py, published with the weights.

Contents, to be read from top to bottom:
     1 Config       2 RMSNorm      3 RoPE and YaRN       4 MLA and its cache      5 SwiGLU
     6 the router, its balance losses, token dropping    7 the experts            8 the block
     9 the model and its loss     10 generation         11 LoRA

What differs from Llama is in parts 4, 6 and 7, and YaRN is in part 3. Config fields are those of
the official config.json, except for three with names of our own. Parameters are named as in the
official checkpoint, except that there each expert has its own tensors, while here the experts of
a layer are stacked. The sizes tiny, small and 1b are ours; v2-lite and v2 are DeepSeek's. What else
is ours is listed in docs/differences.md. You may skip part 1 at first, except for Config's fields.

Symbols. Comments at the ends of lines give shapes in these letters.

    here  paper   in the code                     V2     V2-Lite   tiny
    ----  ------  ----------------------------  -------  -------  -----
    B             batch: sequences
    T     T       time: tokens in this pass
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
    G     D       n_group: groups (= devices)         8        1      1
    M     M       topk_group: devices per token       3        1      1
    C             numbers cached per token and
                  layer, R + dr                     576      576     80
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import partial
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# ----------------------------------------------------------------------------------------------
# 1. Config. Which numbers define DeepSeek-V2?
# ----------------------------------------------------------------------------------------------


class ConfigError(ValueError):
    """A configuration that cannot be built; the message names the value and the remedy."""


# How a field is declared. Export, reading, checks and command lines all follow from this.
OFFICIAL = "official"  # it changes what the model computes, in transformers too
LOCAL = "local"  # transformers ignores it, so it can be exported only at its `absent` value
TRAINING = "training"  # it affects only training


def setting(
    default: Any, meaning: str, absent: Any = MISSING, role: str = OFFICIAL, least: float = 1
) -> Any:
    """A field of Config. absent: what a config.json without the field means, as transformers reads
    it (MISSING: the field is required). least: the smallest number allowed."""
    metadata = dict(meaning=meaning, absent=absent, role=role, least=least)
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


YARN_V2 = dict(
    type="yarn", factor=40, original_max_position_embeddings=4096, beta_fast=32, beta_slow=1,
    mscale=0.707, mscale_all_dim=0.707,
)  # fmt: skip

# Routing without groups, as in V2-Lite: no limit on devices, and only one balance loss.
GREEDY = dict(
    n_group=1, topk_group=1, topk_method="greedy", routed_scaling_factor=1.0,
    device_loss_alpha=0.0, comm_loss_alpha=0.0,
)  # fmt: skip
OURS = GREEDY | dict(rope_scaling=None, bos_token_id=0, eos_token_id=1)
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": OURS | dict(
        vocab_size=4096, hidden_size=128, num_hidden_layers=4, num_attention_heads=2,
        q_lora_rank=None, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16,
        v_head_dim=48, intermediate_size=512, moe_intermediate_size=96, n_routed_experts=16,
        n_shared_experts=1, num_experts_per_tok=2, max_position_embeddings=256,
        rope_theta=100.0,  # ours, see docs/differences.md
        initializer_range=0.04,
    ),
    "small": OURS | dict(
        vocab_size=8192, hidden_size=384, num_hidden_layers=6, num_attention_heads=6,
        q_lora_rank=None, kv_lora_rank=128, qk_nope_head_dim=48, qk_rope_head_dim=16,
        v_head_dim=64, intermediate_size=1024, moe_intermediate_size=96, n_routed_experts=32,
        num_experts_per_tok=4, max_position_embeddings=512, initializer_range=0.02,
    ),
    "1b": OURS | dict(
        vocab_size=32768, hidden_size=1024, num_hidden_layers=14, num_attention_heads=16,
        q_lora_rank=512, kv_lora_rank=256, qk_nope_head_dim=64, qk_rope_head_dim=32,
        v_head_dim=96, intermediate_size=4096, moe_intermediate_size=256, n_routed_experts=80,
        num_experts_per_tok=8, max_position_embeddings=1024,
    ),
    "v2-lite": GREEDY | dict(
        hidden_size=2048, num_hidden_layers=27, num_attention_heads=16, q_lora_rank=None,
        intermediate_size=10944, moe_intermediate_size=1408, n_routed_experts=64,
        aux_loss_alpha=0.001,
    ),
    "v2": {},  # the defaults of Config
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Every number of the model, under its official config.json name where it has one.

    The defaults are DeepSeek-V2 itself ([V2] section 3.1.2); `preset` gives the other sizes.
    Raises a one-sentence ConfigError if a combination is impossible.
    """

    vocab_size: int = setting(102400, "rows of the embedding and of the output head")
    hidden_size: int = setting(5120, "width of the residual stream")
    num_hidden_layers: int = setting(60, "blocks of attention + feed-forward")
    num_attention_heads: int = setting(128, "attention heads")
    q_lora_rank: int | None = setting(1536, "rank of the compressed query; none = direct", 1536)
    kv_lora_rank: int = setting(512, "width of the cached latent")
    qk_nope_head_dim: int = setting(128, "query/key width per head without position")
    qk_rope_head_dim: int = setting(64, "query/key width per head with RoPE")
    v_head_dim: int = setting(128, "value width per head")
    intermediate_size: int = setting(12288, "inner width of a dense feed-forward layer")
    moe_intermediate_size: int = setting(1536, "inner width of one expert")
    n_routed_experts: int = setting(160, "routed experts per MoE layer")
    n_shared_experts: int = setting(2, "experts that every token uses", 0, least=0)
    num_experts_per_tok: int = setting(6, "routed experts that a token uses")
    n_group: int = setting(8, "groups (devices) that the routed experts are divided into", 1)
    topk_group: int = setting(3, "groups that one token may reach", 1)
    topk_method: str = setting("group_limited_greedy", "greedy ignores the groups", "greedy")
    norm_topk_prob: bool = setting(False, "normalise the K weights, unscaled", False, LOCAL)
    routed_scaling_factor: float = setting(16.0, "multiplies the weights", 1.0, least=1e-6)
    first_k_dense_replace: int = setting(1, "first layers with a dense feed-forward", 0, least=0)
    moe_layer_freq: int = setting(1, "every n-th layer is an MoE layer", 1, LOCAL)
    aux_loss_alpha: float = setting(0.003, "weight of the expert balance loss", 0.001, TRAINING, 0)
    device_loss_alpha: float = setting(
        0.05, "weight of the device loss; our name", 0.0, TRAINING, 0
    )
    comm_loss_alpha: float = setting(
        0.02, "weight of the communication loss; our name", 0.0, TRAINING, 0
    )
    token_drop_capacity: float = setting(
        0.0, "a device's capacity, in average loads; 0 = off; our name", 0.0, TRAINING, 0
    )
    max_position_embeddings: int = setting(163840, "longest sequence")
    rms_norm_eps: float = setting(1e-6, "epsilon of the block and final norms", 1e-6, least=1e-12)
    rope_theta: float = setting(10000.0, "base of the RoPE frequencies", 10000.0, least=1.1)
    rope_scaling: dict | None = setting(YARN_V2, "YaRN's numbers as JSON; none = plain RoPE", None)
    initializer_range: float = setting(0.006, "std of the initial weights", 0.02, TRAINING, 0)
    bos_token_id: int = setting(100000, "token that begins a document", least=0)
    eos_token_id: int = setting(100001, "token that ends a document", least=0)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> Config:
        """One of tiny, small, 1b, v2-lite, v2, with any field overridden by keyword."""
        if name not in PRESETS:
            raise ConfigError(f"size {name!r} is unknown: choose one of {', '.join(PRESETS)}")
        return cls.from_dict(vars(cls()) | PRESETS[name] | overrides)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Config:
        """The configuration with the stored values. Raises ConfigError for a name that is not a
        field, and for a missing field that has no `absent` value."""
        if unknown := sorted(values.keys() - {f.name for f in fields(cls)}):
            raise ConfigError(f"{unknown[0]!r} is not a field of Config: see its definition")
        absent = {f.name: f.metadata["absent"] for f in fields(cls) if f.name not in values}
        if missing := [name for name, value in absent.items() if value is MISSING]:
            raise ConfigError(f"the configuration lacks {missing[0]!r}")
        return cls(**values | absent)

    def is_moe(self, layer: int) -> bool:
        """Whether layer (0-based) has experts. The first has none, because load balance converges
        especially slowly there ([MoE] 5.1.2)."""
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
        """How many numbers all layers cache per token ([V2] table 1), for attention = mla, mha,
        gqa (keys and values of `groups` heads) or mqa (of one head)."""
        heads = {"mha": self.num_attention_heads, "gqa": groups, "mqa": 1}
        a_layer = self.cache_dim if attention == "mla" else 2 * heads[attention] * self.v_head_dim
        return self.num_hidden_layers * a_layer

    def __post_init__(self) -> None:
        kinds = get_type_hints(Config)
        for f in fields(self):
            check_type(f.name, getattr(self, f.name), kinds[f.name], f.metadata["least"])
        c, limited = self, self.topk_method == "group_limited_greedy"
        reach = c.n_routed_experts // c.n_group * (c.topk_group if limited else c.n_group)
        for name, ok, must_be in (
            ("num_hidden_layers", c.num_hidden_layers <= 10_000, "at most 10000"),
            ("n_routed_experts", c.n_routed_experts <= 10_000, "at most 10000"),
            # the model does not need this, but transformers does
            ("hidden_size", c.hidden_size % c.num_attention_heads == 0,
             f"a multiple of num_attention_heads = {c.num_attention_heads}"),
            ("qk_rope_head_dim", c.qk_rope_head_dim % 2 == 0, "even: RoPE rotates pairs"),
            ("topk_method", limited or c.topk_method == "greedy",
             "greedy or group_limited_greedy"),
            ("n_routed_experts", c.n_routed_experts % c.n_group == 0,
             f"a multiple of n_group = {c.n_group}"),
            ("topk_group", c.topk_group <= c.n_group, f"at most n_group = {c.n_group}"),
            ("num_experts_per_tok", c.num_experts_per_tok <= reach,
             f"at most {reach}, the experts that a token can reach"),
            ("comm_loss_alpha", limited or c.comm_loss_alpha == 0,
             "0 unless topk_method = group_limited_greedy"),
            ("token_drop_capacity", c.token_drop_capacity == 0 or c.n_group > 1,
             "0 unless n_group is 2 or more: it is a device's capacity"),
            ("bos_token_id", c.bos_token_id < c.vocab_size, f"below vocab_size = {c.vocab_size}"),
            ("eos_token_id", c.eos_token_id < c.vocab_size, f"below vocab_size = {c.vocab_size}"),
        ):  # fmt: skip
            if not ok:
                raise ConfigError(f"{name} = {getattr(c, name)!r} must be {must_be}")
        if c.rope_scaling is not None:
            check_yarn(c.rope_scaling)


def check_type(name: str, value: Any, kind: Any, least: float) -> None:
    """Raise ConfigError for a value that has the wrong type for its field or is out of range."""
    if kind is bool and type(value) is not bool:
        raise ConfigError(f"{name} = {value!r} must be true or false")
    whole = kind is int or (kind == int | None and value is not None)
    if whole and (type(value) is not int or not least <= value < 2**31):
        raise ConfigError(f"{name} = {value!r} must be a whole number, at least {least}")
    if kind is float and (type(value) not in (int, float) or not least <= value < 1e18):
        raise ConfigError(f"{name} = {value!r} must be a finite number, at least {least}")


def check_yarn(yarn: Any) -> None:
    """Raise ConfigError if rope_scaling is not YaRN's or is incomplete."""
    needed = {"type", "factor", "original_max_position_embeddings"}
    if not isinstance(yarn, dict) or not needed <= yarn.keys() <= YARN_V2.keys():
        names = ", ".join(YARN_V2)
        raise ConfigError(f"rope_scaling = {yarn!r} must be null, or an object with {names}")
    if yarn["type"] != "yarn":
        raise ConfigError(f"rope_scaling type {yarn['type']!r} must be yarn")
    for key in yarn.keys() - {"type"}:
        least = {"factor": 1, "mscale_all_dim": 0}.get(key, 1e-9)
        check_type(f"rope_scaling {key}", yarn[key], float, least)
    if yarn.get("beta_fast", 32) < yarn.get("beta_slow", 1):
        raise ConfigError("rope_scaling beta_fast must be at least beta_slow (32 and 1 if absent)")


# ----------------------------------------------------------------------------------------------
# 2. RMSNorm. How does every layer read the residual stream at the same scale?
#
#        y = w * x / sqrt(mean(x^2) + eps)                                       arXiv 1910.07467
# ----------------------------------------------------------------------------------------------


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype for matrix products with x: autocast's where it is on, else that of x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class RMSNorm(nn.Module):
    """Divide each vector by its root mean square and scale it per channel. [..., n] -> same."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()  # squares lose precision in bf16 and overflow in fp16
        x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        # The cast comes before the weight, as in the official code, and goes to the dtype of the
        # matrix products that follow, so that none of them has to cast again.
        dtype = compute_dtype(self.weight)
        return self.weight.to(dtype) * x32.to(dtype)


# ----------------------------------------------------------------------------------------------
# 3. RoPE and YaRN. How does a query know how far away a key is?
#
#    At position t, RoPE rotates the pairs (x0, x1), (x2, x3), ... of a vector, pair j by the angle
#    t f_j. The dot product of a query at m and a key at n then depends only on their distance:
#
#        <Rot(q, m), Rot(k, n)> = <Rot(q, m - n), k>,    f_j = theta^(-2j/dr)               [RoPE]
#
#    Here a pair is two neighbours; Llama in transformers pairs the two halves of a vector.
#
#    YaRN stretches a context of 4K to 160K. Pairs that make more than 32 turns within 4K tell short
#    distances apart and keep their speed; pairs that do not complete one turn are slowed down by
#    `factor`, so that no unseen angle occurs; in between there is a ramp. Of V2's 32 pairs, 0 to 10
#    keep their speed, 11 runs at 0.925 of it, 16 at 0.55, 22 at 0.1, and 23 to 31 at 1/40. The ramp
#    is linear in the pair's index, as in the official code; in the YaRN paper, in turns. YaRN is on
#    for short inputs as well, because V2's last phase of training used it.
# ----------------------------------------------------------------------------------------------


def rope_frequencies(config: Config, device: torch.device | None = None) -> Tensor:
    """The angle each pair turns per position, in radians: [dr/2], fp32 ([YaRN] section 3.2)."""
    dim, base = config.qk_rope_head_dim, config.rope_theta
    pair = torch.arange(dim // 2, dtype=torch.float32, device=device)
    inv_freq = 1.0 / base ** (2 * pair / dim)
    if (yarn := config.rope_scaling) is None:
        return inv_freq

    def find_correction_dim(turns: float) -> float:
        """The (fractional) index of the pair that makes this many turns in the original context."""
        context = yarn["original_max_position_embeddings"]
        return dim * math.log(context / (2 * math.pi * turns)) / (2 * math.log(base))

    low = max(math.floor(find_correction_dim(yarn.get("beta_fast", 32))), 0)
    # dim - 1, as in the official code, although there are only dim/2 pairs
    high = min(math.ceil(find_correction_dim(yarn.get("beta_slow", 1))), dim - 1)
    if low == high:
        high += 0.001  # makes the ramp a step and avoids dividing by zero
    ramp = ((pair - low) / (high - low)).clamp(0, 1)  # 0 = unchanged, 1 = slowed by factor
    return inv_freq / yarn["factor"] * ramp + inv_freq * (1 - ramp)


def yarn_mscale(config: Config, key: str) -> float:
    """0.1 a ln(factor) + 1, where a is the value of key. Over long contexts attention spreads out;
    this sharpens it again."""
    yarn = config.rope_scaling or {}
    a = yarn.get(key, {"mscale": 1.0, "mscale_all_dim": 0.0}[key])  # the official defaults
    return 0.1 * a * math.log(yarn.get("factor", 1.0)) + 1.0


def softmax_scale(config: Config) -> float:
    """(dn + dr)^-1/2, times m^2 under YaRN, which multiplies query and key by m each. In V2
    m = 0.1 * 0.707 * ln(40) + 1 = 1.2608 and m^2 = 1.590, so 0.0722 becomes 0.1147."""
    return config.qk_head_dim**-0.5 * yarn_mscale(config, "mscale_all_dim") ** 2


def rope_angles(config: Config, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin for each position and pair: [...] -> 2 x [..., dr/2], fp32.

    They are computed anew in each pass: frequencies stored in the model would be cast to bf16
    with it, and at position 1000 some angles would then be off by more than 0.4 radians.
    """
    angles = positions[..., None].float() * rope_frequencies(config, positions.device)
    scale = yarn_mscale(config, "mscale") / yarn_mscale(config, "mscale_all_dim")
    return angles.cos() * scale, angles.sin() * scale  # scale is 1 in every released V2


def apply_rotary_emb(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the neighbouring pairs of x [B, T, heads, dr] by angles [B or 1, T, dr/2]."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # 2 x B T heads dr/2
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # the same for all heads
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x.dtype)


# ----------------------------------------------------------------------------------------------
# 4. Multi-head latent attention (MLA). How can 128 heads share one small memory?
#
#    Ordinary attention caches K and V of every head: 2 x 128 x 128 = 32,768 numbers per token and
#    layer in a model shaped like V2. MLA caches 576: a latent c, from which every head's key and
#    value can be made, and one small key that carries the position.  [V2] section 2.1, eq. 9-19
#    In the paper's names of the matrices, D goes down to a low rank and U up from it; Q, K and V
#    say for what, and R says that RoPE follows. (These are not the letters of the table above.)
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
#    and W_KR, kv_b_proj = W_UK and W_UV, o_proj = W_O. Without query compression, q_proj makes the
#    whole query. "a" goes down and "b" up; "lora" in the names of the ranks means just that, and
#    has nothing to do with fine-tuning. "pe" is the part with position, "nope" the part without.
#
#    Two ways to attend, which give the same numbers:
#
#    Expanded: make k_nope = W_UK c and v = W_UV c for every cached token, then attend as usual.
#
#    Absorbed: never make them. Both are linear in c, so W_UK can be applied to the query instead,
#    and W_UV after the sum:
#        q_nope . (W_UK c_s)  =  (W_UK^T q_nope) . c_s           one product per query, not per key
#        sum_s p_s (W_UV c_s) =  W_UV (sum_s p_s c_s)
#    All heads then read one small memory, as in multi-query attention. W_UQ and W_UK are not merged
#    in advance: in V2 the merged matrix has 100.7M weights a layer, the two together only 33.6M.
#
#    Which is cheaper? Multiply-adds per head of V2, with only c and k_pe cached:
#                                                         absorbed            expanded
#        each pair of a query and a key                   2 R + dr = 1,088    dn + dr + dv = 320
#        W_UK and W_UV, R (dn + dv) = 131,072             for each query      for each key
#        1 query over 4,096 keys (decoding)               4.6M                538M
#        4,096 queries over 4,096 keys (a prompt, with
#            the half that causality masks)               18.8G               5.9G
#    So absorbing pays for fewer than 131,072 / (1,088 - 320) = 170 queries over a long cache: V2
#    decodes absorbed and reads a prompt expanded. Decoding is also bound by memory reads; absorbed
#    reads 576 numbers per cached token, where ordinary attention would read 32,768.
#
#    Why the key is decoupled. Otherwise absorbing would not work: RoPE on k_nope would put a
#    rotation between q_nope and W_UK. With the query at m and the key at n, the score would be
#    <Rot(q_nope, m - n), W_UK c_n>, and the absorbed query, W_UK^T Rot(q_nope, m - n), would have
#    to be made anew for every cached n. So position gets dr numbers of its own, which do not pass
#    through W_UK. All heads share one k_pe: a k_pe per head would take 128 x 64 = 8,192 numbers of
#    the cache instead of 64.
# ----------------------------------------------------------------------------------------------


def absorbing_is_cheaper(config: Config, queries: int, keys: int) -> bool:
    """Whether absorbed attention needs fewer multiply-adds per head."""
    c, pairs = config, queries * keys
    up = c.kv_lora_rank * (c.qk_nope_head_dim + c.v_head_dim)  # W_UK and W_UV, for one token
    absorbed = pairs * (2 * c.kv_lora_rank + c.qk_rope_head_dim) + queries * up
    expanded = pairs * (c.qk_head_dim + c.v_head_dim) + keys * up
    return absorbed < expanded


@dataclass
class LatentCache:
    """What the model remembers of B sequences; made by `DeepSeek.new_cache`.

    latents, [B, max_length, C] for each layer, hold c after its norm and k_pe after its rotation,
    so that neither is computed twice. lengths holds each row's token count; it lives on the host,
    where shapes are decided. Lowering a count makes the model forget the tokens beyond it.
    """

    latents: list[Tensor]
    lengths: list[int]


class AttentionContext(NamedTuple):
    """Where the T tokens of a forward pass stand and what they see. All layers share it and only
    read it (under FSDP each gets a copy). Any attention that replaces MLA must obey the mask."""

    positions: Tensor  # [1, T], or [B, T] where the rows of a cache differ in length
    cos: Tensor  # [B or 1, T, dr/2]
    sin: Tensor  # [B or 1, T, dr/2]
    length: int  # S: how many places of the cache are attended to
    # [B or 1, 1, T, S], True = visible. None in the two common cases that need no mask: whole
    # sequences in expanded attention (T == S, each token sees itself and those before it), and one
    # new token after rows of equal length (T == 1, it sees everything).
    mask: Tensor | None
    absorb: bool  # attend in latent space


def attention_context(
    config: Config, ids: Tensor, cache: LatentCache | None, absorb: bool | None
) -> AttentionContext:
    """Positions, rotation and mask for ids [B, T] that follow what the cache already holds (without
    a cache, nothing). Raises ValueError if they do not fit."""
    B, T = ids.shape
    lengths = cache.lengths if cache else [0]
    start, end = min(lengths), max(lengths) + T
    if end > config.max_position_embeddings:
        limit = config.max_position_embeddings
        raise ValueError(f"{end} tokens do not fit: the model's context ends at {limit}")
    if cache and end > cache.latents[0].shape[1]:
        raise ValueError(f"{end} tokens do not fit: the cache ends at {cache.latents[0].shape[1]}")
    positions = torch.arange(start, start + T, device=ids.device)[None]  # 1 T
    ragged = start + T < end  # rows of different length
    if ragged:
        first = torch.tensor(lengths, device=ids.device)[:, None]  # B 1
        positions = first + torch.arange(T, device=ids.device)  # B T
    if absorb is None:
        absorb = cache is not None and absorbing_is_cheaper(config, T, end)
    mask = None
    if ragged or (T > 1 and (T < end or absorb)):
        mask = visible(positions, end)
    return AttentionContext(positions, *rope_angles(config, positions), end, mask, absorb)


def visible(positions: Tensor, length: int) -> Tensor:
    """Which of the first `length` places of its row a token at positions [B or 1, T] sees:
    [B or 1, 1, T, length]."""
    # Key j lies at position j of its row, so this one line handles causality, the offset of a
    # chunk, and the places that a shorter row has not written yet.
    return (torch.arange(length, device=positions.device) <= positions[..., None]).unsqueeze(1)


class MLA(nn.Module):
    """Multi-head latent attention. [B, T, D] -> [B, T, D]."""

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        heads_q = c.num_attention_heads * c.qk_head_dim
        heads_kv = c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim)
        if c.q_lora_rank:  # saves activation memory in training; none of it is cached
            self.q_a_proj = nn.Linear(c.hidden_size, c.q_lora_rank, bias=False)
            self.q_a_layernorm = RMSNorm(c.q_lora_rank)
            self.q_b_proj = nn.Linear(c.q_lora_rank, heads_q, bias=False)
        else:
            self.q_proj = nn.Linear(c.hidden_size, heads_q, bias=False)
        # W_DKV and W_KR in one matrix; "mqa" because one k_pe serves all heads
        self.kv_a_proj_with_mqa = nn.Linear(c.hidden_size, c.cache_dim, bias=False)
        # The norms keep the scale of the narrow latents in check ([V2] 3.1.2); their eps is 1e-6
        # whatever the config says, as in the official code.
        self.kv_a_layernorm = RMSNorm(c.kv_lora_rank)
        self.kv_b_proj = nn.Linear(c.kv_lora_rank, heads_kv, bias=False)  # W_UK and W_UV
        self.o_proj = nn.Linear(c.num_attention_heads * c.v_head_dim, c.hidden_size, bias=False)
        self.scale = softmax_scale(c)

    def forward(
        self, x: Tensor, context: AttentionContext, layer_cache: Tensor | None = None
    ) -> Tensor:
        """x [B, T, D]; layer_cache [B, max_length, C] is this layer's cache, and is written to."""
        q_nope, q_pe = self.query(x, context)
        memory = self.memory(x, context, layer_cache)  # B S C
        attend = self.absorbed if context.absorb else self.expanded
        out = attend(q_nope, q_pe, memory, context.mask)  # B T H dv
        return self.o_proj(out.flatten(2))  # B T D

    def query(self, x: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]:
        """q_nope [B, T, H, dn] and the rotated q_pe [B, T, H, dr]."""
        c = self.config
        if c.q_lora_rank:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))  # B T H*(dn+dr)
        else:
            q = self.q_proj(x)  # B T H*(dn+dr)
        q = q.unflatten(-1, (-1, c.qk_head_dim))  # B T H dn+dr
        q_nope, q_pe = q.split([c.qk_nope_head_dim, c.qk_rope_head_dim], -1)
        return q_nope, apply_rotary_emb(q_pe, context.cos, context.sin)

    def memory(self, x: Tensor, context: AttentionContext, layer_cache: Tensor | None) -> Tensor:
        """What is attended to, [B, S, C]: the tokens x, preceded by those in the cache, if there is
        one. The new ones are written to the cache."""
        entry = self.compress(x, context)  # B T C
        if layer_cache is None:
            return entry
        row = torch.arange(len(x), device=x.device)[:, None]
        entry = entry.detach()  # gradients do not flow through a cache
        layer_cache[row, context.positions] = entry.to(layer_cache.dtype)
        return layer_cache[:, : context.length].to(entry.dtype)

    def compress(self, x: Tensor, context: AttentionContext) -> Tensor:
        """Exactly what is cached for each token: c, and beside it k_pe, [B, T, C]."""
        widths = [self.config.kv_lora_rank, self.config.qk_rope_head_dim]
        latent, k_pe = self.kv_a_proj_with_mqa(x).split(widths, -1)  # B T R, B T dr
        k_pe = apply_rotary_emb(k_pe.unsqueeze(2), context.cos, context.sin).squeeze(2)
        return torch.cat([self.kv_a_layernorm(latent), k_pe], -1)

    def expanded(self, q_nope, q_pe, memory, mask) -> Tensor:
        """Attention as the paper writes it: every head's keys and values are built."""
        c = self.config
        latent, k_pe = memory.split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
        kv = self.kv_b_proj(latent).unflatten(-1, (c.num_attention_heads, -1))  # B S H dn+dv
        k_nope, v = kv.split([c.qk_nope_head_dim, c.v_head_dim], -1)  # B S H dn, B S H dv
        k_pe = k_pe.unsqueeze(2).expand(-1, -1, c.num_attention_heads, -1)  # B S H dr
        q, k = torch.cat([q_nope, q_pe], -1), torch.cat([k_nope, k_pe], -1)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # B H T, or S, dn+dr or dv
        T = q.shape[2]
        causal = mask is None and T > 1
        if causal and T <= 512 and q.dtype == torch.bfloat16 and q.device.type == "cpu":
            # On a CPU, flash attention is slower than scores written out in full, while these are
            # few. As in the official code, the scores are rounded to bf16; flash attention keeps
            # them in fp32.
            future = q.new_full((T, T), -torch.inf).triu(1)
            scores = torch.add(future, q @ k.mT, alpha=self.scale)  # B H T T
            return (scores.softmax(-1) @ v).transpose(1, 2)  # B T H dv
        # Flash attention wants q, k and v of one width. Padding with zeros changes neither the
        # scores nor the values, and costs less than the slow path.
        if (more := c.qk_head_dim - c.v_head_dim) > 0:
            v = F.pad(v, (0, more))
        elif more < 0:
            q, k = F.pad(q, (0, -more)), F.pad(k, (0, -more))
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=self.scale)
        return out[..., : c.v_head_dim].transpose(1, 2)  # B H T dv -> B T H dv

    def absorbed(self, q_nope, q_pe, memory, mask) -> Tensor:
        """The same attention in latent space ([V2] 2.1.2): no key or value is ever built."""
        c = self.config
        B, T, H = q_nope.shape[:3]
        # Scaled before the products, because a sum over R = 512 could overflow fp16.
        q_nope, q_pe = q_nope * self.scale, q_pe * self.scale
        w = self.kv_b_proj.weight.unflatten(0, (H, -1))  # H dn+dv R
        w_uk, w_uv = w.split([c.qk_nope_head_dim, c.v_head_dim], 1)  # H dn R, H dv R
        q_latent = q_nope.transpose(1, 2) @ w_uk  # B H T dn, H dn R -> B H T R
        q = torch.cat([q_latent, q_pe.transpose(1, 2)], -1)  # B H T C
        # All heads read one memory, so H heads of T queries act as one head of H*T queries. The
        # whole entry of a token serves as its key, and c alone as its value.
        scores = q.flatten(1, 2) @ memory.mT  # B H*T S
        scores = scores.float().unflatten(1, (H, T))  # B H T S
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        probs = scores.softmax(-1).to(q_latent.dtype)
        latent = memory[..., : c.kv_lora_rank]  # B S R
        out = (probs.flatten(1, 2) @ latent).unflatten(1, (H, T))  # B H T R
        return (out @ w_uv.mT).transpose(1, 2)  # B H T R, H R dv -> B T H dv


# ----------------------------------------------------------------------------------------------
# 5. SwiGLU. What does a feed-forward layer compute?
#
#        y = W_down (silu(W_gate x) * W_up x)                                    arXiv 2002.05202
#
#    Each inner channel has a value, W_up x, and a gate that lets more or less of it pass.
# ----------------------------------------------------------------------------------------------


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """The activation of all feed-forward layers, dense ones and experts alike."""
    return F.silu(gate) * up


class MLP(nn.Module):
    """A gated feed-forward layer, for dense layers and shared experts. [..., D] -> [..., D]."""

    def __init__(self, config: Config, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x)))


# ----------------------------------------------------------------------------------------------
# 6. The router. Which experts does a token use, and how are they kept equally busy?
#
#        s_i = softmax_i(x . e_i)         affinity of the token to expert i      [V2] eq. 20-22
#        g_i = scaling * s_i if s_i is among the K largest, else 0
#
#    The softmax covers all experts and precedes the choice, so a weight is the router's confidence
#    in an expert among all; over the chosen K alone, weights would always sum to one. Eq. 21 has no
#    factor; the official routed_scaling_factor is 16 in V2 and 1 in V2-Lite. [V2] 3.1.2 says only
#    that scaling routed experts stabilises training; presumably because six of 160 weights add up
#    to little.
#
#    Device-limited routing ([V2] 2.2.2): the experts form G groups, one per device. A token may use
#    only the M groups whose best expert scores highest, so it is sent to at most M devices, however
#    many experts it uses. In the paper, M >= 3 did about as well as no limit.
# ----------------------------------------------------------------------------------------------


class Routing(NamedTuple):
    """What the router decided, for each token."""

    logits: Tensor  # [B, T, E] fp32
    scores: Tensor  # [B, T, E] affinities s, summing to 1; the router's gradient runs through them
    weights: Tensor  # [B, T, K] what the chosen experts' outputs are multiplied by
    index: Tensor  # [B, T, K] which experts were chosen
    allowed_groups: Tensor  # [B, T, G] bool: the groups that the token may reach


class Gate(nn.Module):
    """The router: one vector e_i per expert. [B, T, D] -> Routing."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))

    def forward(self, x: Tensor) -> Routing:
        # In fp32 even under autocast: in bf16, rounding would decide between near ties.
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), self.weight.float())  # B T E
        scores = logits.softmax(-1)
        index, allowed_groups = self.choose(scores)
        weights = scores.gather(-1, index)  # B T K
        if self.config.norm_topk_prob and self.config.num_experts_per_tok > 1:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        else:  # as in the official code: normalised or scaled, never both
            weights = weights * self.config.routed_scaling_factor
        return Routing(logits, scores, weights, index, allowed_groups)

    def choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """The K best experts of the allowed groups [B, T, K], and these groups [B, T, G]."""
        c = self.config
        by_group = scores.unflatten(-1, (c.n_group, -1))  # B T G E/G
        allowed = torch.ones_like(by_group[..., 0], dtype=torch.bool)  # B T G
        if c.topk_method == "group_limited_greedy":
            best = by_group.amax(-1).topk(c.topk_group, -1).indices  # B T M
            allowed = torch.zeros_like(allowed).scatter_(-1, best, True)
            by_group = by_group.masked_fill(~allowed.unsqueeze(-1), -torch.inf)
        return by_group.flatten(-2).topk(c.num_experts_per_tok, -1).indices, allowed


# Left alone, a router collapses: an expert that is chosen more often learns more, and so is chosen
# still more often. Three losses counteract this ([V2] 2.2.3, eq. 23-31), each of the form
#
#        alpha * sum_i f_i P_i      f_i: the load of i divided by the average load
#                                   P_i: mean probability that the router gave to i
#
# both taken over the T tokens of one sequence; the losses are averaged over the batch.
#
#    expert               i is one of E experts        f_i = E / (K T) * #{tokens that chose i}
#    (aux_loss_alpha)     none starves                 P_i = mean_t s_i(t)
#    device               i is one of G groups         f   = mean of f over the group's experts
#    (device_loss_alpha)  no device waits for others   P   = sum of P over them
#    communication        i is one of G groups         f   = G / (M T) * #{tokens sent to the group}
#    (comm_loss_alpha)    all receive the same share   P   = as for devices
#
# f is a count and has no gradient; P has one. So the router lowers its probabilities most where the
# load is highest. At perfect balance every f is 1 and P sums to 1, so each loss equals its alpha;
# the losses of all layers are added. Limited routing bounds what a device sends; the third loss
# evens out what devices receive. The paper does not say when a token counts as "sent" to a group;
# here, when the group is among the M that it may reach. V2 uses all three; V2-Lite and the small
# sizes have one group, and so only the first loss, which is also the only one in the official code.


def balance_losses(config: Config, routing: Routing) -> dict[str, Tensor]:
    """The balance losses of one MoE layer whose alpha is not 0: fp32 scalars, already weighted."""
    c = config
    chosen = F.one_hot(routing.index.flatten(1), c.n_routed_experts).float()  # B T*K E
    f, P = chosen.mean(1) * c.n_routed_experts, routing.scores.mean(1)  # 2 x B E
    P_group = P.unflatten(1, (c.n_group, -1)).sum(-1)  # B G
    f_group = f.unflatten(1, (c.n_group, -1)).mean(-1)  # B G
    f_sent = routing.allowed_groups.float().mean(1) * c.n_group / c.topk_group  # B G
    terms = {
        "expert_balance": (c.aux_loss_alpha, f, P),  # eq. 23-25
        "device_balance": (c.device_loss_alpha, f_group, P_group),  # eq. 26-28
        "communication_balance": (c.comm_loss_alpha, f_sent, P_group),  # eq. 29-31
    }
    return {
        name: (alpha * (load * probability).sum(-1)).mean()
        for name, (alpha, load, probability) in terms.items()
        if alpha
    }


NO_DROP_SHARE = 0.1  # of the sequences, "approximately 10%" ([V2] 2.2.4)


def drop_tokens(config: Config, routing: Routing, no_drop: Tensor) -> Tensor:
    """Weights [B, T, K] with 0 where a device is over its capacity ([V2] 2.2.4).

    Each device takes token_drop_capacity times its average share of the assignments of this pass,
    those of highest affinity first. no_drop [B] marks sequences that lose nothing, so that the
    model also trains as it is used: without dropping. Where the paper is silent, we chose that
    capacity counts assignments and that weights are not renormalised. Dropping saves no computation
    here: the expert still runs, its result gets weight 0, and it still counts in the load.
    """
    c = config
    B, T, K = routing.index.shape
    capacity = int(c.token_drop_capacity * B * T * K / c.n_group)
    device = (routing.index // (c.n_routed_experts // c.n_group)).flatten()  # B*T*K
    no_drop = no_drop[:, None, None]  # B 1 1
    affinity = routing.weights.detach().masked_fill(no_drop, torch.inf)
    order = affinity.flatten().argsort(descending=True)  # B*T*K
    onehot = F.one_hot(device[order], c.n_group)  # B*T*K G
    place = (onehot.cumsum(0) * onehot).sum(-1)  # 1 = the assignment its device takes first
    kept = torch.empty_like(order, dtype=torch.bool).scatter_(0, order, place <= capacity)
    return routing.weights * (kept.view(B, T, K) | no_drop)


# ----------------------------------------------------------------------------------------------
# 7. DeepSeekMoE. How can a model know a lot but compute little?
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
#     |    |        |   |            |              A sum of gated MLPs is one wider MLP: Ns * I.
#     +- g_i E_i(x) +<--+            |
#           |                        |
#           +-----------> + <--------+
#                         y
# ----------------------------------------------------------------------------------------------


# Compiled decoding copies up to FEW times as many experts as a layer has. With tiny that costs less
# than leaving the compiled graph, or than a product for each expert.
FEW = 8


def spread(x: Tensor, place: Tensor, size: int) -> Tensor:
    """The rows of x [n, D], each put at its place [n] of a result [size, D]; other rows are zeros.
    Its backward pass is a look-up; that of x[place] would be a slow sum over scattered rows."""
    rows = (x.new_empty if len(place) == size else x.new_zeros)(size, x.shape[1])
    return rows.index_put((place,), x)  # unlike index_copy, this does not keep x for backward


class Experts(nn.Module):
    """All routed experts of a layer, stacked: sum_k weights[n, k] * E_{index[n, k]}(x[n]).

    x [N, D], index [N, K], weights [N, K] -> [N, D], for N = B*T tokens. There are three ways, with
    one result up to rounding: looped, the definition, for any device; grouped, which sorts the
    assignments by expert, fast for many tokens; gathered, which copies the chosen experts, fast for
    the few tokens of decoding.
    """

    def __init__(self, config: Config):
        super().__init__()
        E, D, I = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * I, D))  # gate rows, then up rows
        self.down_proj = nn.Parameter(torch.empty(E, D, I))

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        dtype = compute_dtype(x)
        can_group = self.can_group(x.device)
        run = self.grouped if can_group else self.looped
        compiling = torch.compiler.is_compiling()
        if index.numel() <= (FEW if compiling else 1) * len(self.gate_up_proj):
            run = self.gathered
        elif compiling and not (can_group and dtype == torch.bfloat16):
            run = torch.compiler.disable(run)  # torch.compile traces grouped_mm in bf16 only
        gate_up, down = self.gate_up_proj.to(dtype), self.down_proj.to(dtype)
        return run(x.to(dtype), index, weights, gate_up, down)

    def can_group(self, device: torch.device) -> bool:
        """Whether grouped_mm runs here; its rows must have a multiple of 8 numbers (16 bytes)."""
        return device.type in ("cpu", "cuda") and not any(n % 8 for n in self.down_proj.shape[1:])

    def looped(self, x, index, weights, gate_up, down) -> Tensor:
        """One expert after another: the definition, for any device."""
        out = torch.zeros_like(x, dtype=weights.dtype)
        for e in range(len(gate_up)):
            token, k = (index == e).nonzero(as_tuple=True)
            gate, up = F.linear(x[token], gate_up[e]).chunk(2, -1)
            y = F.linear(gated(gate, up), down[e])
            out = out.index_add(0, token, y * weights[token, k, None])
        return out

    def grouped(self, x, index, weights, gate_up, down) -> Tensor:
        """All experts in two grouped products: lay out the N*K assignments by expert, multiply each
        expert's run of rows by its matrix, and collect the results by token.

        No shape depends on the routing, so the host need not wait for any count (though grouped_mm
        itself waits on GPUs before sm90, and in fp16 or fp32), and torch.compile sees one shape.
        """
        (N, D), K, expert = x.shape, index.shape[1], index.flatten()  # N*K
        # A CPU prepares a kernel for each number of rows that it meets. To keep these numbers few,
        # each expert's run of rows is filled up with zeros to a multiple of 32 rows. These, and the
        # rows after the last run, which the products leave undefined, are not collected.
        block = 32 if x.device.type == "cpu" else 1
        order = expert.argsort(stable=True)  # N*K
        count = torch.zeros(len(gate_up), dtype=torch.long, device=x.device)
        count = count.scatter_add_(0, expert, torch.ones_like(expert))  # bincount would sync
        space = (count + block - 1) // block * block
        ends = space.cumsum(0)  # E: one past the last row of each expert
        shift = (ends - space) - (count.cumsum(0) - count)  # padded start minus dense start
        row = torch.arange(N * K, device=x.device) + shift[expert[order]]  # N*K, all different
        place = torch.empty_like(row).scatter_(0, order, row)  # N*K: the row of each assignment
        size = N * K + len(count) * (block - 1)  # rows, those between the runs included
        back = row.new_full((size,), N * K).scatter_(0, row, order)  # rows: and the way back
        copies = x.unsqueeze(1).expand(-1, K, -1).flatten(0, 1)  # N*K D
        rows = spread(copies, place, size)  # rows D
        offs = ends.to(torch.int32)
        gate, up = F.grouped_mm(rows, gate_up.mT, offs=offs).chunk(2, -1)  # 2 x rows I
        y = F.grouped_mm(gated(gate, up), down.mT, offs=offs)  # rows D
        y = spread(y, back, N * K + 1)[:-1].view(N, K, D)  # without those rows
        return (y * weights.unsqueeze(-1)).sum(1)

    def gathered(self, x, index, weights, gate_up, down) -> Tensor:
        """Copies each token's experts side by side: for few tokens, as in decoding. Nothing is
        sorted, and torch.compile traces this in any dtype."""
        gate, up = (gate_up[index] @ x[:, None, :, None]).squeeze(-1).chunk(2, -1)  # 2 x N K I
        y = (down[index] @ gated(gate, up).unsqueeze(-1)).squeeze(-1)  # N K D
        return (y * weights.unsqueeze(-1)).sum(1)


class LayerOutput(NamedTuple):
    """What an MoE layer or a whole block returns; a dense one has neither losses nor load."""

    y: Tensor  # [B, T, D]
    losses: dict[str, Tensor]  # by name, weighted; empty outside training
    load: Tensor | None  # [E]: each expert's share of the assignments


class MoE(nn.Module):
    """Mixture of experts. [B, T, D] -> LayerOutput."""

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        self.gate = Gate(c)
        self.experts = Experts(c)
        if c.n_shared_experts:
            self.shared_experts = MLP(c, c.n_shared_experts * c.moe_intermediate_size)

    def forward(self, x: Tensor, no_drop: Tensor | None = None) -> LayerOutput:
        """x [B, T, D]; no_drop [B]: True for sequences that lose nothing; None: no dropping."""
        c = self.config
        routing = self.gate(x)
        weights, losses = routing.weights, {}
        if self.training and self.gate.weight.requires_grad:  # a frozen router needs no losses
            losses = balance_losses(c, routing)
        if no_drop is not None:
            weights = drop_tokens(c, routing, no_drop)
        index = routing.index.flatten(0, 1)  # B*T K
        y = self.experts(x.flatten(0, 1), index, weights.flatten(0, 1)).view_as(x)  # B T D
        if c.n_shared_experts:
            y = y + self.shared_experts(x)
        load = F.one_hot(index, c.n_routed_experts).float().mean((0, 1))  # E
        return LayerOutput(y.to(x.dtype), losses, load)


# ----------------------------------------------------------------------------------------------
# 8. The block. How do the parts stack?
#
#        x += attention(norm(x));  x += feed_forward(norm(x))
# ----------------------------------------------------------------------------------------------


class Block(nn.Module):
    """One layer: MLA, then a dense or MoE feed-forward layer, each after its own norm."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        c = config
        self.is_moe = c.is_moe(layer)
        self.self_attn = MLA(c)
        self.mlp = MoE(c) if self.is_moe else MLP(c, c.intermediate_size)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x: Tensor, context, no_drop=None, layer_cache=None) -> LayerOutput:
        """[B, T, D] -> the same shape, with the losses and the load of an MoE layer. The other
        arguments are those of MLA and MoE."""
        x = x + self.self_attn(self.input_layernorm(x), context, layer_cache)
        normed = self.post_attention_layernorm(x)
        if not self.is_moe:
            return LayerOutput(x + self.mlp(normed), {}, None)
        y, losses, load = self.mlp(normed, no_drop)
        return LayerOutput(x + y, losses, load)


# ----------------------------------------------------------------------------------------------
# 9. The model and its loss. How do token ids become logits?
# ----------------------------------------------------------------------------------------------


class Output(NamedTuple):
    """What `DeepSeek.forward` returns."""

    logits: Tensor | None  # [B, T, V]; None with targets
    losses: dict[str, Tensor]  # with targets: cross_entropy, and balance losses in training; fp32
    expert_load: Tensor  # [MoE layers, E]: each expert's share of the assignments

    @property
    def loss(self) -> Tensor | None:
        """Mean cross-entropy in nats per token, without the balance losses."""
        return self.losses.get("cross_entropy")

    @property
    def aux_loss(self) -> Tensor | float:
        """The sum of all other losses, already weighted; 0 in eval mode."""
        return sum(loss for name, loss in self.losses.items() if name != "cross_entropy")


class Decoder(nn.Module):
    """Embedding, blocks, final norm: ids [B, T] -> [B, T, D], losses by name, expert_load. In the
    official checkpoint its name is `model`."""

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c, i) for i in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, ids, cache=None, absorb=None, checkpoint_activations=False):
        context = attention_context(self.config, ids, cache, absorb)
        latents = cache.latents if cache else None
        out = self.run_layers(ids, context, latents, checkpoint_activations)
        if cache:
            cache.lengths = [n + ids.shape[1] for n in cache.lengths]
        return out

    def run_layers(self, ids, context, latents=None, checkpoint_activations=False):
        """One layer after the other; latents are a cache's: [B, max_length, C] for each layer.
        Apart from `forward`, because compiled decoding makes its context by itself."""
        x = self.embed_tokens(ids).float()  # B T D; the sum of many layers can overflow fp16
        dropping = self.training and self.config.token_drop_capacity > 0
        # B; drawn once, so that a sequence is spared by all layers or by none
        no_drop = torch.rand(len(ids), device=ids.device) < NO_DROP_SHARE if dropping else None
        losses, loads = {}, []
        for i, layer in enumerate(self.layers):
            run = layer
            if checkpoint_activations:
                run = partial(checkpoint, layer, use_reentrant=False)
            out = run(x, context, no_drop, None if latents is None else latents[i])
            x = out.y
            losses |= {name: losses.get(name, 0.0) + loss for name, loss in out.losses.items()}
            if out.load is not None:
                loads.append(out.load)
        load = torch.stack(loads) if loads else x.new_zeros(0, self.config.n_routed_experts)
        return self.norm(x), losses, load


class SummedLoss(nn.Module):
    """The cross-entropy of x [n, D] against targets [n] through a head, summed, in nats. It is a
    module only so that it can be compiled as the blocks are."""

    def forward(self, head: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(head(x).float(), targets, reduction="sum")


class DeepSeek(nn.Module):
    """DeepSeek-V2 for a `Config`, freshly initialised, in fp32, on the CPU unless told otherwise.

    Under `with torch.device("meta")` it takes no memory, for counting or for loading weights into.
    For mixed precision, wrap the call in `torch.autocast`.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)  # not tied
        self.summed_loss = SummedLoss()
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Matrices are normal with std initializer_range ([V2] 3.1.2); norm weights are one."""
        for p in self.parameters():
            if p.dim() > 1:
                p.normal_(0.0, self.config.initializer_range)
            else:
                p.fill_(1.0)

    def forward(
        self,
        input_ids: Tensor,
        targets: Tensor | None = None,
        cache: LatentCache | None = None,
        absorb: bool | None = None,
        checkpoint_activations: bool = False,
    ) -> Output:
        """input_ids [B, T]; targets [B, T]: the id to predict at each place, -100 to skip it.

        cache: input_ids continue what it holds, and are added to it. absorb: True or False forces
        MLA's absorbed or expanded form; None picks the cheaper. checkpoint_activations: keep only
        each layer's input for the backward pass and recompute the rest.
        Raises ValueError when the sequence outgrows the cache or max_position_embeddings.
        """
        x, losses, load = self.model(input_ids, cache, absorb, checkpoint_activations)
        if targets is None:
            return Output(self.lm_head(x), {}, load)
        return Output(None, {"cross_entropy": self.cross_entropy(x, targets)} | losses, load)

    def cross_entropy(self, x: Tensor, targets: Tensor, head: nn.Module | None = None) -> Tensor:
        """Mean cross-entropy in nats of x [B, T, D] against targets [B, T], through head (lm_head
        if none is given).

        With V = 102,400, the logits of one sequence of 4,096 tokens take 1.7 GB. They are therefore
        made in chunks of at most 128 MB, discarded, and made again in the backward pass.
        """
        x, targets = x.flatten(0, 1), targets.flatten()  # B*T D, B*T
        head, chunk = head or self.lm_head, max(1, 2**25 // self.config.vocab_size)
        if len(x) <= chunk:
            total = self.summed_loss(head, x, targets)
        else:
            run = partial(checkpoint, self.summed_loss, head, use_reentrant=False)
            total = sum(map(run, x.split(chunk), targets.split(chunk)))
        return total / (targets != -100).sum().clamp(min=1)

    def num_parameters(self) -> tuple[int, int]:
        """(total, active). Active are those that one token uses, except the input embedding, which
        is a mere look-up. This gives 235.7B and 20.9B for V2, 15.7B and 2.45B for V2-Lite (the
        paper says 2.4B; with the embedding it would be 2.66B)."""
        c, sizes = self.config, {n: p.numel() for n, p in inference_parameters(self)}
        total = sum(sizes.values())
        routed = sum(size for name, size in sizes.items() if ".mlp.experts." in name)
        resting = routed * (c.n_routed_experts - c.num_experts_per_tok) // c.n_routed_experts
        return total, total - resting - self.model.embed_tokens.weight.numel()

    def new_cache(self, batch_size: int, max_length: int) -> LatentCache:
        """An empty cache for batch_size sequences of up to max_length tokens, in the dtype and on
        the device of the weights."""
        c, shape = self.config, (batch_size, max_length, self.config.cache_dim)
        latents = [self.lm_head.weight.new_zeros(shape) for _ in range(c.num_hidden_layers)]
        return LatentCache(latents, [0] * batch_size)

    # ------------------------------------------------------------------------------------------
    # 10. Generation. How does the model continue a text?
    #
    #    Prefill: one pass over the prompts writes their latents into the cache. They are padded on
    #        the right to equal length; then each row's length is reset, which forgets the padding.
    #    Decoding: one pass with T = 1 per new token reads the cache, in absorbed form.
    #    Compiled, the cache has one of a few fixed lengths, all of it is read, and a mask hides
    #    what is not yet written: up to twice the work of attention, but no shape ever changes.
    # ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self, prompts: Tensor | Sequence[Sequence[int]], max_new_tokens: int, *,
        temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
        stop: int | None = None, vocab_size: int | None = None,
        generator: torch.Generator | None = None, compiled: bool = False,
    ) -> Iterator[Tensor]:  # fmt: skip
        """Continue prompts (ids [B, T], or B lists of any lengths), yielding ids [B] as they come.

        temperature 0 takes the most probable token. top_k keeps the k most probable tokens, top_p
        the fewest that together reach that probability. A row that has produced `stop` repeats it
        from then on; the stream ends when all rows have (on a GPU up to seven tokens later), or
        when the context is full. Ids from vocab_size up (padding of the embedding) are never
        produced. compiled runs the steps after the prompt through torch.compile: that takes half a
        minute, and again for each new batch size or length of the cache, but then no processor
        waits between hundreds of small operations.
        Raises ValueError for impossible arguments, and FloatingPointError for logits that are not
        finite, but only when the first token is requested.
        """
        rows = [torch.as_tensor(p, dtype=torch.long) for p in prompts]
        if any(row.dim() != 1 for row in rows):
            raise ValueError("prompts are rows of ids, as in [[0, 5, 7]], even for one prompt")
        lengths, limit = [len(row) for row in rows], self.config.max_position_embeddings
        longest = max(lengths, default=0)
        for is_right, message in (
            (not self.training, "generate needs model.eval()"),
            (min(lengths, default=0) > 0, "a prompt is empty: give at least one token"),
            (longest < limit, f"a prompt of {longest} tokens fills the context of {limit}"),
            (max_new_tokens >= 0, f"max_new_tokens = {max_new_tokens} is out of range"),
            (0 <= temperature < math.inf, f"temperature = {temperature} is out of range"),
            (top_k is None or top_k >= 1, f"top_k = {top_k} is out of range"),
            (top_p is None or 0 < top_p <= 1, f"top_p = {top_p} is out of range"),
        ):
            if not is_right:
                raise ValueError(message)
        if (max_new_tokens := min(max_new_tokens, limit - longest)) <= 0:
            return
        device, room = self.lm_head.weight.device, longest + max_new_tokens
        if compiled:  # compilation is for one size of the cache: few sizes serve all texts
            room = min(limit, max(256, 2 ** (room - 1).bit_length()))
        cache = self.new_cache(len(rows), room)
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
        position = torch.tensor(lengths, device=device)  # B: where each row's next token stands
        x = self.model(ids, cache)[0][torch.arange(len(rows), device=device), position - 1]  # B D
        logits = self.lm_head(x)  # B V
        if not logits.isfinite().all():
            advice = "compute in float32, or train at a lower rate"
            raise FloatingPointError(f"the logits are not finite: {advice}")
        # This discards the padding: what it wrote to the cache lies beyond each row's end, where no
        # token sees it, and is overwritten token by token.
        cache.lengths = lengths
        done = torch.zeros(len(rows), dtype=torch.bool, device=device)
        decode = self.compiled_decode(cache) if compiled else None
        for i in range(1, max_new_tokens + 1):
            logits = logits[:, :vocab_size].float()  # B V
            token = sample(logits, temperature, top_k, top_p, generator)  # B
            if stop is not None:
                token = torch.where(done, stop, token)
                done = done | (token == stop)
            yield token
            # To read `done`, the host waits for a GPU: so it does after every eighth token only.
            look = stop is not None and (device.type == "cpu" or i % 8 == 0)
            if i == max_new_tokens or (look and bool(done.all())):
                return
            if decode:
                logits = decode(token, position, cache.latents)  # B V
                position = position + 1
            else:
                logits = self.lm_head(self.model(token[:, None], cache)[0][:, 0])  # B V

    def compiled_decode(self, cache: LatentCache) -> Callable[..., Tensor]:
        """`decode` for this cache, compiled; on a GPU it is recorded as a graph of operations,
        which is replayed without waiting for the host."""
        for latents in cache.latents:  # a graph may write to them in place
            torch._dynamo.mark_static_address(latents)
        # With more rows the experts are grouped (see Experts.forward). On some GPUs the host then
        # waits for their products, which no graph can record.
        assigned = len(cache.lengths) * self.config.num_experts_per_tok
        mode = "reduce-overhead" if assigned <= FEW * self.config.n_routed_experts else None
        return torch.compile(self.decode, dynamic=False, mode=mode)

    def decode(self, token: Tensor, position: Tensor, latents: list[Tensor]) -> Tensor:
        """Logits [B, V] after token [B], which stands at position [B] of its row. latents
        [B, S, C] for each layer are a cache's, and are written to; its lengths are not changed.

        All S places are attended to, and a mask hides those not yet written. So no shape changes
        from token to token: torch.compile compiles this once, and a GPU replays one graph.
        """
        place, length = position[:, None], latents[0].shape[1]  # B 1
        angles, mask = rope_angles(self.config, place), visible(place, length)
        context = AttentionContext(place, *angles, length, mask, absorb=True)
        return self.lm_head(self.model.run_layers(token[:, None], context, latents)[0][:, 0])


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one id per row of logits [B, V]; see `DeepSeek.generate` for the arguments."""
    if temperature < 1e-6:  # treated as 0: dividing by less could leave the range of fp32
        return logits.argmax(-1)
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        kth = logits.topk(top_k, -1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p is not None:
        probs, ids = logits.softmax(-1).sort(-1, descending=True)
        before = probs.cumsum(-1) - probs  # the probability of all that rank higher
        outside = before >= max(top_p, 1e-6)  # the most probable token stays, whatever top_p is
        drop = torch.zeros_like(outside).scatter_(-1, ids, outside)
        logits = logits.masked_fill(drop, -torch.inf)
    # If each p_i is divided by its own draw from Exp(1), the i-th is the largest with probability
    # p_i. torch.multinomial draws the same way, but with checks for which a GPU would have to wait.
    race = torch.empty_like(logits).exponential_(generator=generator)
    return (logits.softmax(-1) / race).argmax(-1)


def inference_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that inference needs, by name: all except those of modules with the attribute
    `training_only` (say, a head that predicts a second token). Counts, export and LoRA use this."""
    modules = model.named_modules()
    left_out = tuple(f"{name}." for name, m in modules if getattr(m, "training_only", False))
    return ((name, p) for name, p in model.named_parameters() if not name.startswith(left_out))


# ----------------------------------------------------------------------------------------------
# 11. LoRA. How can a model learn something new by training few numbers?
#
#        y = W x + (alpha / r) B A x          A [r, in], B [out, r]               arXiv 2106.09685
#
#    W, the base, stays as it is, bit for bit; A and B are trained. B starts at zero, so that
#    training starts from exactly the base model; A does not, or neither would get a gradient. The
#    factor alpha / r reduces the retuning needed when r is changed (LoRA, 4.1). Any nn.Linear can
#    have an adapter. By default those of MLA do, and finetune.py adds the dense layers and shared
#    experts. The routed experts, which are stacked, the router, the embedding and the norms cannot.
# ----------------------------------------------------------------------------------------------

MLA_PROJECTIONS = (
    "q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj",
)  # fmt: skip


class LoRALinear(nn.Module):
    """A linear layer and its adapter. [..., in] -> [..., out]. The adapter is kept in fp32."""

    def __init__(self, base_layer: nn.Linear, rank: int, alpha: float, dropout: float):
        super().__init__()
        where = dict(bias=False, device=base_layer.weight.device, dtype=torch.float32)
        self.base_layer, self.alpha, self.scaling = base_layer, alpha, alpha / rank
        self.lora_A = nn.Linear(base_layer.in_features, rank, **where)
        self.lora_B = nn.Linear(rank, base_layer.out_features, **where)
        self.dropout = nn.Dropout(dropout)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))  # as in LoRA's own code
        nn.init.zeros_(self.lora_B.weight)

    @property
    def weight(self) -> Tensor:
        """W + (alpha / r) B A, summed in fp32. Absorbed attention reads kv_b_proj through this."""
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
    """Freeze the model and put an adapter on every linear layer that `targets` names, in full or by
    its last part.

    Returns the full names of the adapted layers. No model has all of MLA_PROJECTIONS; missing ones
    are skipped. Raises ConfigError for any other missing target, or if there are adapters already.
    """
    needed = {name.removesuffix(".weight") for name, _ in inference_parameters(model)}
    linear = {n: m for n, m in modules_of(model, nn.Linear).items() if n in needed}
    last = {name.rpartition(".")[2] for name in linear}
    names = [n for n in linear if n in targets or n.rpartition(".")[2] in targets]
    unknown = [t for t in targets if t not in {*last, *linear, *MLA_PROJECTIONS}]
    choices = f"choose from {', '.join(sorted(last))}"
    for bad, message in (
        (modules_of(model, LoRALinear), "the model has adapters already: merge them first"),
        (unknown, f"target {''.join(unknown[:1])!r} is no linear layer: {choices}"),
        (not names, f"targets = {', '.join(targets)}: this model has none of them, {choices}"),
        (rank < 1, f"rank = {rank} must be at least 1"),
        (not 0 < alpha < math.inf, f"alpha = {alpha} must be above 0"),
        (not 0 <= dropout < 1, f"dropout = {dropout} must be in [0, 1)"),
    ):
        if bad:
            raise ConfigError(message)
    model.requires_grad_(False)
    for name in names:
        model.set_submodule(name, LoRALinear(linear[name], rank, alpha, dropout))
    model.train(model.training)  # the new modules' mode is the model's
    return names


def modules_of(model: nn.Module, kind: type) -> dict[str, Any]:
    """The modules of one kind, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


def merge_lora(model: DeepSeek) -> None:
    """Replace each adapted layer by a plain one with the weight W + (alpha / r) B A."""
    for layer in modules_of(model, LoRALinear).values():
        layer.base_layer.weight = nn.Parameter(layer.weight.detach(), requires_grad=False)
    remove_lora(model)


def remove_lora(model: DeepSeek) -> None:
    """Put the base layers back, bit for bit as they were, without their adapters."""
    for name, layer in modules_of(model, LoRALinear).items():
        model.set_submodule(name, layer.base_layer)
