"""The study of sizes and ideas: its models are what they are called, and it goes on."""

import json

import pytest
import torch
from conftest import MODEL, small
from torch import nn

from benchmarks import scaling, speed
from common import trainer
from deepseek import Config, DeepSeek, attention_context, rope_frequencies

TINY = Config.preset("tiny", vocab_size=2816)


def test_mha_is_softmax_attention_over_rotated_heads():
    """Against torch's own module, which knows no RoPE: at position 0 of every row nothing turns."""
    torch.manual_seed(0)
    config = small(copying_start=0.0)
    mha = scaling.MHA(config, 16)
    theirs = nn.MultiheadAttention(48, 3, bias=False, batch_first=True)
    x, still = torch.randn(2, 7, 48), torch.zeros(1, 7, dtype=torch.long)
    with torch.no_grad():
        layers = (mha.q_proj, mha.k_proj, mha.v_proj)
        theirs.in_proj_weight.copy_(torch.cat([layer.weight for layer in layers]))
        theirs.out_proj.weight.copy_(mha.o_proj.weight)
        span = attention_context(config, still, None, None)
        mask = torch.ones(7, 7, dtype=torch.bool).triu(1)
        expected = theirs(x, x, x, attn_mask=mask)[0]
        assert torch.allclose(mha(x, span._replace(positions=still)), expected, atol=1e-6)
        turned = mha(x, span)  # and with positions the first token sees itself alone, as before
        assert torch.allclose(turned[:, 0], expected[:, 0], atol=1e-6)
        assert not torch.allclose(turned, expected, atol=1e-3)
        shifted = mha(x, span._replace(positions=span.positions + 5))
        assert torch.allclose(turned, shifted, atol=1e-5)  # only distances count
    slowest = rope_frequencies(scaling.MHA(TINY, 44).config).min().item()
    assert slowest == pytest.approx(10000 ** (-42 / 44))  # whatever tiny's own base is


def test_mha_starts_as_a_copy():
    torch.manual_seed(0)
    mha = scaling.MHA(TINY, 44)
    q, k, v, o = (p.weight for p in (mha.q_proj, mha.k_proj, mha.v_proj, mha.o_proj))
    assert not k[:, 64:].any() and not v[:, 64:].any() and not o[:64].any() and not q[:, :64].any()
    assert torch.allclose(q[:, 64:] / q.std(), k[:, :64] / k.std(), atol=1e-5)
    assert torch.allclose(o[64:].T / o.std(), v[:, :64] / v.std(), atol=1e-5)
    assert q.std().item() == pytest.approx(9 * 0.04, rel=1e-4)


def test_the_models_are_equal_in_what_they_are_called_after():
    with torch.device("meta"):
        models = {name: make() for name, make in scaling.make_models(TINY).items()}
    total = {name: model.num_parameters()[0] for name, model in models.items()}
    active = {name: model.num_parameters()[1] for name, model in models.items()}
    assert active["dense-active"] == pytest.approx(active["tiny"], rel=1e-3)
    assert total["dense-total"] == pytest.approx(total["tiny"], rel=1e-3)
    assert total["mha-parameters"] == pytest.approx(total["tiny"], rel=1e-3)
    cached = 2 * models["mha-cache"].model.layers[0].self_attn.k_proj.out_features
    assert cached == TINY.cache_dim == 64 + 16
    heads = 2 * 20  # of MHA's keys, and of its values
    flops = 6 * active["mha-cache"] + 3 * 4 * 2 * 2 * heads * 256 / 2
    assert speed.flops_per_token(models["mha-cache"], 256) == flops
    for name in ("dense-active", "dense-total"):
        assert not any(layer.is_moe for layer in models[name].model.layers)
    assert all(isinstance(la.self_attn, scaling.MHA) for la in models["mha-cache"].model.layers)
    assert total["tiny/4"] < total["tiny/2"] < total["tiny"] < total["tiny*1.5"]
    assert total["tiny"] == DeepSeek(TINY).num_parameters()[0]


def test_the_study_runs_goes_on_and_draws(run, tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "EVALUATIONS", 3)
    line = f"scaling --only tiny/4,mha-cache --tokens 2048 --data stories:100 --out {tmp_path}"
    code, out, err = run(f"{line} --seeds 1")
    assert code == 0 and out.count("nats per token after") == 2, err
    records = [json.loads(li) for li in (tmp_path / "scaling.jsonl").read_text().splitlines()]
    assert len(records) == 2 * 3
    assert all(r["val_loss"] > r["floor"] and r["flops"] > 6 * r["active"] for r in records)
    assert [r["tokens"] for r in records[:3]] == [2048 * n for n in range(1, 4)]
    assert (
        (tmp_path / "sizes.png").stat().st_size > 10_000 < (tmp_path / "ideas.png").stat().st_size
    )
    code, out, _ = run(f"{line} --seeds 2")  # the first seeds are there already
    assert code == 0 and out.count("nats per token after") == 2 and "seed 0" not in out
    other = f"scaling --only tiny/4 --tokens 16384 --data stories:100 --seeds 1 --out {tmp_path}"
    code, out, _ = run(other)  # another budget is another study, kept in the same file
    assert code == 0 and out.count("nats per token after") == 1
    assert len((tmp_path / "scaling.jsonl").read_text().splitlines()) == 4 * 3 + 3
    code, out, _ = run(f"{line} --seeds 2")
    assert code == 0 and "nats per token after" not in out
    code, _, err = run("scaling --only big")
    assert code == 2 and "'big' is no model" in err
    assert run("scaling --data my.txt")[0] == 2


def test_what_ctrl_c_cut_short_is_not_counted(run, tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "EVALUATIONS", 3)
    step = trainer.Trainer.train_step

    def pressed(self, *batch):
        self.asked = self.step == 1
        return step(self, *batch)

    monkeypatch.setattr(trainer.Trainer, "train_step", pressed)
    line = (
        f"scaling --only tiny/4,tiny/2 --tokens 2048 --seeds 1 --data stories:100 --out {tmp_path}"
    )
    code, out, err = run(line)
    assert code == 130 and "interrupted" in err and not (tmp_path / "scaling.jsonl").exists()
    assert not (tmp_path / "tiny-2-0").exists()  # nor does the next one begin


def test_a_dense_model_trains_and_draws(run, corpus, tmp_path):
    line = f"train {MODEL} --first_k_dense_replace 2 --data {corpus} --steps 2"
    assert run(f"{line} --out {tmp_path}/o")[0] == 0
    assert (tmp_path / "o" / "curves.png").exists()
