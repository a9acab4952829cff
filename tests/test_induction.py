"""The start in which attention copies: what it promises of the weights and of the logits."""

import pytest
import torch
from conftest import small

from common.induction import induction_init
from common.runtime import UsageError
from deepseek import Config, DeepSeek


@pytest.mark.parametrize("std, low, high", [(0.4, 0.0, 0.2), (None, 0.4, 0.6)])
def test_later_tokens_are_told_what_came_and_the_head_reads_it_off(std, low, high):
    torch.manual_seed(0)
    model = DeepSeek(Config.preset("tiny", vocab_size=2816)).eval()
    if std:
        induction_init(model, std)
        embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
        assert embedding[:, :64].std().item() == pytest.approx(std, rel=0.02)
        assert torch.equal(head[:, 64:], embedding[:, :64] / 2)
        assert not embedding[:, 64:].any() and not head[:, :64].any()
    ids = torch.randint(0, 2816, (40, 12))
    with torch.no_grad():
        logits = model(ids).logits[:, -1]
    own = logits.gather(1, ids[:, 3:4])  # of one early token, in the logits behind the last
    assert low <= (logits > own).float().mean() < high  # its rank; 0 = the highest


@pytest.mark.parametrize("D, H", [(50, 2), (51, 3)])
@pytest.mark.parametrize("compressed", [dict(), dict(q_lora_rank=100)])
def test_attention_looks_for_what_is_expected_and_writes_what_it_read(compressed, D, H):
    half, R, dn, dr, dv = 25, 32, 12, 8, 26
    config = small(
        hidden_size=D, num_attention_heads=H, kv_lora_rank=R, qk_nope_head_dim=dn, v_head_dim=dv,
        initializer_range=0.05, **compressed,
    )  # fmt: skip
    torch.manual_seed(0)
    model = DeepSeek(config)
    induction_init(model, 0.3)
    second = D - half  # where the second half begins
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


def test_weights_of_zero_cannot_be_scaled_and_another_attention_brings_its_own_start():
    with pytest.raises(UsageError, match="--induction_init needs an --initializer_range above 0"):
        induction_init(DeepSeek(small(initializer_range=0.0)), 0.4)

    class Other(torch.nn.Module):
        started = False

        def start_as_copy(self):
            self.started = True

    model = DeepSeek(small())
    model.model.layers[1].self_attn = Other()
    induction_init(model, 0.4)
    assert model.model.layers[1].self_attn.started
