"""The study of sizes and ideas: its models are what they are called, and it goes on."""

import json

import pytest
import torch
from conftest import small
from torch import nn

from benchmarks import scaling, speed
from common import trainer
from deepseek import Config, DeepSeek, attention_context, rope_frequencies

TINY = Config.preset("tiny", vocab_size=2816)


@torch.no_grad()
def test_mha_is_softmax_attention_over_rotated_heads_and_starts_as_a_copy():
    """Against torch's own module, which knows no RoPE: at position 0 of every row nothing turns."""
    torch.manual_seed(0)
    config = small()
    mha = scaling.MHA(config, 16)
    theirs = nn.MultiheadAttention(48, 3, bias=False, batch_first=True)
    q, k, v, o = (p.weight for p in (mha.q_proj, mha.k_proj, mha.v_proj, mha.o_proj))
    theirs.in_proj_weight.copy_(torch.cat([q, k, v]))
    theirs.out_proj.weight.copy_(o)
    x, still = torch.randn(2, 7, 48), torch.zeros(1, 7, dtype=torch.long)
    context = attention_context(config, still, None, None)
    expected = theirs(x, x, x, attn_mask=torch.ones(7, 7, dtype=torch.bool).triu(1))[0]
    assert torch.allclose(mha(x, context._replace(positions=still)), expected, atol=1e-6)
    turned = mha(x, context)  # and with positions the first token sees itself alone, as before
    assert torch.allclose(turned[:, 0], expected[:, 0], atol=1e-6)
    assert not torch.allclose(turned, expected, atol=1e-3)
    shifted = mha(x, context._replace(positions=context.positions + 5))
    assert torch.allclose(turned, shifted, atol=1e-5)  # only distances count
    copy = scaling.MHA(TINY, 44)
    slowest = rope_frequencies(copy.config).min().item()
    assert slowest == pytest.approx(10000 ** (-42 / 44))  # whatever tiny's own base is
    copy.start_as_copy()
    q, k, v, o = (p.weight for p in (copy.q_proj, copy.k_proj, copy.v_proj, copy.o_proj))
    assert not k[:, 64:].any() and not v[:, 64:].any() and not o[:64].any() and not q[:, :64].any()
    assert torch.allclose(q[:, 64:] / q.std(), k[:, :64] / k.std(), atol=1e-5)
    assert torch.allclose(o[64:].T / o.std(), v[:, :64] / v.std(), atol=1e-5)


def test_the_models_are_equal_in_what_they_are_called_after():
    with torch.device("meta"):
        models = {name: make() for name, make in scaling.make_models(TINY).items()}
    total = {name: model.num_parameters()[0] for name, model in models.items()}
    active = {name: model.num_parameters()[1] for name, model in models.items()}
    assert active["dense-active"] == pytest.approx(active["tiny"], rel=1e-3)
    assert total["dense-total"] == pytest.approx(total["tiny"], rel=1e-3)
    assert total["mha-parameters"] == pytest.approx(total["tiny"], rel=1e-3)
    attention = models["mha-cache"].model.layers[0].self_attn
    assert 2 * attention.k_proj.out_features == TINY.cache_dim == 64 + 16
    flops = 6 * active["mha-cache"] + 3 * 4 * 2 * 2 * 40 * 256 / 2  # 40: of all heads' keys
    assert speed.flops_per_token(models["mha-cache"], 256) == flops
    assert total["tiny/4"] < total["tiny/2"] < total["tiny"] < total["tiny*1.5"]
    assert total["tiny"] == DeepSeek(TINY).num_parameters()[0]


def test_the_study_goes_on_and_draws(run, tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "EVALUATIONS", 3)
    step = trainer.Trainer.train_step

    def study(only, tokens=2048):
        flags = f"--tokens {tokens} --seeds 1 --data stories:100 --out {tmp_path}"
        code, out, err = run(f"scaling --only {only} {flags}")
        return code, out.count("nats per token after"), err

    def pressed(self, *batch):
        self.stop_requested = self.step == 1
        return step(self, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "draw_curves", lambda *_: None)
        patch.setattr(scaling, "draw", lambda *_: None)
        with patch.context() as keys:  # what Ctrl-C cut short is not counted
            keys.setattr(trainer.Trainer, "train_step", pressed)
            assert study("tiny/4,mha-cache") == (130, 0, "scaling.py: interrupted\n")
        assert not (tmp_path / "scaling.jsonl").exists()
        assert not (tmp_path / "mha-cache-0").exists()  # nor does the next one begin
        assert study("tiny/4")[:2] == (0, 1)
        assert study("tiny/4,mha-cache")[:2] == (0, 1)
        assert study("tiny/4", 16384)[:2] == (0, 1)  # another study, kept in the same file
        assert study("tiny/4,mha-cache")[:2] == (0, 0)
    assert study("dense-active")[:2] == (0, 1)
    records = [json.loads(li) for li in (tmp_path / "scaling.jsonl").read_text().splitlines()]
    assert [r["tokens"] for r in records] == [n * 2048 for n in (2, 4, 6, *[1, 2, 3] * 3)]
    assert all(r["val_loss"] > r["floor"] and r["flops"] > 6 * r["active"] for r in records)
    for picture in ("sizes.png", "ideas.png", "dense-active-0/curves.png"):
        assert (tmp_path / picture).stat().st_size > 10_000


def test_what_is_not_there_is_refused(run):
    for line, message in (
        ("scaling --only big", "--only 'big' is no model: choose from tiny/4,tiny/2"),
        ("scaling --data my.txt", "must be stories or stories:N"),
        ("speed --only speed", "--only 'speed' is no part: choose from peak,train"),
    ):
        code, _, err = run(line)
        assert code == 2 and message in err
