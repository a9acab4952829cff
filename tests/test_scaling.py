"""The study of sizes and ideas: its models are what they are called, and it goes on."""

import json
import signal
from types import SimpleNamespace

import pytest
import torch
from conftest import small
from torch import nn

from benchmarks import scaling
from deepseek import Config

TINY = Config.preset("tiny", vocab_size=2816)


@torch.no_grad()
def test_mha_is_softmax_attention_over_rotated_heads_and_starts_as_a_copy():
    """Against torch's own module, which knows no RoPE: at position 0 of every row nothing turns."""
    torch.manual_seed(0)
    mha = scaling.MHA(small(), 16)
    theirs = nn.MultiheadAttention(48, 3, bias=False, batch_first=True)
    *qkv, o = (p.weight for p in (mha.q_proj, mha.k_proj, mha.v_proj, mha.o_proj))
    theirs.in_proj_weight.copy_(torch.cat(qkv))
    theirs.out_proj.weight.copy_(o)
    x, steps = torch.randn(2, 7, 48), torch.arange(7)[None]
    expected = theirs(x, x, x, attn_mask=torch.ones(7, 7, dtype=torch.bool).triu(1))[0]
    contexts = (SimpleNamespace(positions=p) for p in (0 * steps, steps, steps + 5))
    unturned, turned, shifted = (mha(x, context) for context in contexts)
    assert torch.allclose(unturned, expected, atol=1e-6)
    assert not torch.allclose(turned, expected, atol=1e-3)
    assert torch.allclose(turned, shifted, atol=1e-5)  # only distances count
    copy = scaling.MHA(TINY, 44)
    assert copy.config.rope_theta == 10000  # whatever tiny's own base is
    copy.start_as_copy()
    q, k, v, o = (p.weight for p in (copy.q_proj, copy.k_proj, copy.v_proj, copy.o_proj))
    assert not k[:, 64:].any() and not v[:, 64:].any() and not o[:64].any() and not q[:, :64].any()
    assert torch.allclose(q[:, 64:] / q.std(), k[:, :64] / k.std(), atol=1e-5)
    assert torch.allclose(o[64:].T / o.std(), v[:, :64] / v.std(), atol=1e-5)


def test_the_models_are_equal_in_what_they_are_called_after():
    with torch.device("meta"):
        models = {name: scaling.make_model(name, TINY) for name in scaling.MODELS}
    size = {name: model.num_parameters() for name, model in models.items()}
    assert size["dense-active"][1] == pytest.approx(size["tiny"][1], rel=1e-3)
    assert size["dense-total"][0] == pytest.approx(size["tiny"][0], rel=1e-3)
    assert size["mha-parameters"][0] == pytest.approx(size["tiny"][0], rel=1e-3)
    assert size["tiny/4"] < size["tiny/2"] < size["tiny"] < size["tiny*1.5"]
    pairs = 4 * 2 * 2 * ((8 + 16) + 8) * 256 / 2  # of two heads of tiny/4; half of all pairs attend
    assert scaling.flops_per_token(models["tiny/4"], 256) == 6 * size["tiny/4"][1] + 3 * pairs


def test_the_study_goes_on_and_draws(run, tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "EVALUATIONS", 3)
    monkeypatch.setattr(scaling, "STORIES", "stories:100")

    def study(only, tokens=2048):
        code, out, err = run(f"scaling --only {only} --tokens {tokens} --seeds 1 --out {tmp_path}")
        return code, out.count("nats per token after"), err

    evaluate, press = scaling.evaluate, lambda: signal.raise_signal(signal.SIGINT)
    with monkeypatch.context() as keys:  # what Ctrl-C cut short is not counted
        keys.setattr(scaling, "evaluate", lambda *given: press() or evaluate(*given))
        assert study("tiny/4,mha-cache") == (130, 0, "scaling.py: interrupted\n")
    assert study("tiny/4,mha-cache")[:2] == (0, 2)
    assert study("tiny/4", 16384)[:2] == (0, 1)  # another study, kept in the same file
    assert study("tiny/4,dense-active")[:2] == (0, 1)
    records = [json.loads(li) for li in (tmp_path / "scaling.jsonl").read_text().splitlines()]
    assert [r["tokens"] // 2048 for r in records] == [1, 2, 3, 1, 2, 3, 2, 4, 6, 1, 2, 3]
    assert all(r["val_loss"] > r["floor"] and r["flops"] > 6 * r["active"] for r in records)
    cached = {r["model"]: r["cached"] for r in records}
    assert cached == {"tiny/4": 4 * (16 + 16), "mha-cache": 4 * 2 * 40, "dense-active": 4 * 80}
    for picture in ("sizes.png", "ideas.png", "dense-active-0/curves.png"):
        assert (tmp_path / picture).stat().st_size > 10_000
    code, _, err = run("scaling --only big")
    assert code == 2 and "--only 'big' is no model: choose from tiny/4,tiny/2" in err
