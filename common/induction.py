"""
A start of our own, which is not DeepSeek's: attention begins as a copy.

The embedding fills the first half of the channels, the head reads the second half with half the
same numbers, and each attention head starts as one that looks for what is expected, and copies it
from the one to the other. A model has to learn to look back before it can tell who was named; but
where copying has yet to be learned too, looking gains nothing, and copying nothing without looking.
Small models stay for millions of tokens on that plateau. With a copy, any look back lowers the
loss; and kept apart from what comes next, what a token is can be read in every layer.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from common.runtime import UsageError
from deepseek import MLA, DeepSeek

# W_Q and W_O are so many times as large as random weights, which trial has found: a W_Q of 6 or 12
# times learns as well.
LOOK_SCALE, COPY_SCALE = 9, 1.5


@torch.no_grad()
def induction_init(model: DeepSeek, embedding_std: float) -> None:
    """Let a freshly initialised model start so. An attention of another kind brings a method
    start_as_copy of its own. Raises UsageError."""
    if not model.config.initializer_range:
        raise UsageError(
            "--induction_init needs an --initializer_range above 0: 0 cannot be scaled"
        )
    half = model.config.hidden_size // 2
    own = model.model.embed_tokens.weight.normal_(0.0, embedding_std)[:, :half]  # V D/2
    model.model.embed_tokens.weight[:, half:] = 0
    model.lm_head.weight.copy_(F.pad(own / 2, (model.config.hidden_size - half, 0)))
    for layer in model.model.layers:
        attention = layer.self_attn
        own = getattr(attention, "start_as_copy", None)
        own() if own else start_as_copy(attention)


def start_as_copy(mla: MLA) -> None:
    """Latents are made of the first half of the stream alone. W_Q takes from the second what
    W_UK W_DKV takes from the first, so that a query likes the tokens that the stream already
    expects; W_O writes into the second what the value has read. Where R is half of D or more, the
    copy is a whole one."""
    c, std = mla.config, mla.config.initializer_range
    half, H = c.hidden_size // 2, c.num_attention_heads

    def scaled(w: Tensor, times: float) -> Tensor:
        return w * (times * std / w.std())

    mla.kv_a_proj_with_mqa.weight[: c.kv_lora_rank, half:] = 0
    w_dkv = mla.kv_a_proj_with_mqa.weight[: c.kv_lora_rank, :half]  # R D/2
    w_kv = mla.kv_b_proj.weight.unflatten(0, (H, -1))  # H dn+dv R
    w_uk, w_uv = w_kv.split([c.qk_nope_head_dim, c.v_head_dim], 1)  # H dn R, H dv R
    look = F.pad(w_uk @ w_dkv, (c.hidden_size - half, 0))  # H dn D
    if c.q_lora_rank:
        look = look @ mla.q_a_proj.weight.T  # H dn Q
    w_q = (mla.q_b_proj if c.q_lora_rank else mla.q_proj).weight.unflatten(0, (H, -1))
    w_q[:, : c.qk_nope_head_dim] = scaled(look, LOOK_SCALE)
    read = F.pad((w_uv @ w_dkv).flatten(0, 1), (c.hidden_size - half, 0))  # H*dv D
    mla.o_proj.weight.copy_(scaled(read, COPY_SCALE).T)
