"""
What keeps fine-tuning from forgetting: text that the base itself writes, of which the tuned model
is to think what the base thinks.

A model that is taught answers alone loses everything else. The text that it once learned from is
seldom at hand, but the base can write more of the kind. On that the divergence from the base is
added to the loss, as in "Learning without Forgetting" (arXiv 1606.09282): where nothing is asked,
nothing is to change.
"""

from __future__ import annotations

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from common.data import IGNORE, pad
from deepseek import DeepSeek

DOCUMENTS, AT_ONCE = 300, 100  # that the base writes
# Steps from one rehearsal to the next, and its weight: four documents at once take less time than
# one in each step.
EVERY = 4


class Rehearsal:
    """Documents by the base, and how far a model has moved away from the base on them."""

    def __init__(self, base: DeepSeek, tokenizer: Tokenizer, rows: int, seq_len: int, seed: int):
        """rows: documents in a rehearsal, of at most seq_len tokens. base is kept, to be compared
        with."""
        self.base, self.rows, self.seed = base.eval(), rows, seed
        self.device = base.lm_head.weight.device
        config, generator = base.config, torch.Generator(self.device).manual_seed(seed)
        documents = []
        while len(documents) < DOCUMENTS:
            stream = base.generate(
                [[config.bos_token_id]] * AT_ONCE, seq_len, stop=config.eos_token_id,
                vocab_size=tokenizer.get_vocab_size(), generator=generator,
            )  # fmt: skip
            for row in torch.stack(list(stream), 1).cpu().numpy():  # AT_ONCE t
                ends = np.flatnonzero(row == config.eos_token_id)
                row = row[: ends[0] + 1] if len(ends) else row
                documents.append((np.array([config.bos_token_id, *row[:-1]]), row))
        # All of one length: a CPU prepares its kernels anew for each shape that it meets.
        ids, targets = (t.to(self.device) for t in pad(documents))
        self.ids, self.real = ids, targets != IGNORE  # [DOCUMENTS, t]

    def loss(self, model: DeepSeek, step: int, piece: int, pieces: int) -> Tensor:
        """The mean divergence per token, in nats and weighted, of the step's documents of one piece
        of so many: a scalar. It depends on seed and step alone."""
        if step % EVERY:
            return torch.zeros((), device=self.device)
        rng = np.random.default_rng([self.seed, step])
        chosen = torch.from_numpy(rng.choice(len(self.ids), self.rows, replace=False))
        mine = chosen[piece * self.rows // pieces : (piece + 1) * self.rows // pieces]
        if not len(mine):  # there are more pieces than documents
            return torch.zeros((), device=self.device)
        found = divergence(self.base, model, self.ids[mine], self.real[mine])
        return EVERY * found / self.real[chosen].sum()


def divergence(base: DeepSeek, model: DeepSeek, ids: Tensor, real: Tensor) -> Tensor:
    """The sum over the real places of ids [b, t] of KL(base, model) = sum_v p(v) log(p(v) / q(v)).

    Logits are made in chunks and made again in the backward pass, as in `DeepSeek.cross_entropy`.
    """
    with torch.no_grad():
        wanted = base.model(ids)[0].flatten(0, 1)  # b*t D
    said = model.model(ids)[0].flatten(0, 1)  # b*t D

    def chunk_loss(wanted: Tensor, said: Tensor, real: Tensor) -> Tensor:
        with torch.no_grad():
            p = base.lm_head(wanted).float().log_softmax(-1)  # n V
        q = model.lm_head(said).float().log_softmax(-1)  # n V
        return (F.kl_div(q, p, reduction="none", log_target=True).sum(-1) * real).sum()

    chunk = max(1, 2**25 // base.config.vocab_size)
    chunks = zip(*(t.split(chunk) for t in (wanted, said, real.flatten())), strict=True)
    return sum(checkpoint(chunk_loss, *part, use_reentrant=False) for part in chunks)
