"""
How the loss falls with size, and what DeepSeek-V2's two ideas are worth at such sizes.

    python -m benchmarks.scaling                            # eight models, each twice
    python -m benchmarks.scaling --only tiny,mha-cache      # some of the models
    python -m benchmarks.scaling --tokens 200000 --seeds 1  # a look

Every model is trained on the built-in stories with the recipe of tiny, its learning rate falling to
zero over the run: only ends of curves are results, and a rival might do better at another rate.
"cached" counts numbers per token over all layers. What was measured comes as scaling.jsonl, a line
per evaluation, and as two pictures. A model that is finished is not trained again: the same command
goes on where it was interrupted.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.speed import dense_twin
from common import data, stories
from common.chat import TEMPLATE
from common.induction import COPY_SCALE, LOOK_SCALE, induction_init
from common.runlog import read_log, rounded
from common.runtime import UsageError, choose_device, choose_dtype, flag, parse_flags, run_script
from common.trainer import Trainer, evaluate, run_lock
from deepseek import Config, DeepSeek, apply_rotary_emb, rope_angles
from train import Options as TrainOptions
from train import choose_config, with_recipe

EVALUATIONS = 16  # of a model, evenly spread
STORIES = "stories"  # all of them

# The models of each picture; of the sizes, how wide they are compared to tiny.
SIZES = {"tiny/4": 1 / 4, "tiny/2": 1 / 2, "tiny": 1, "tiny*1.5": 3 / 2}
EXPERTS = ["tiny", "dense-active", "dense-total"]
ATTENTIONS = ["tiny", "mha-parameters", "mha-cache"]
MODELS = list(dict.fromkeys([*SIZES, *EXPERTS, *ATTENTIONS]))

# ----------------------------------------------------------------------------------------------
# The models
# ----------------------------------------------------------------------------------------------


class MHA(nn.Module):
    """Multi-head attention as before MLA: each head has its own keys and values, all turned by
    RoPE. [B, T, D] -> [B, T, D]. For training alone: there is no cache."""

    def __init__(self, config: Config, head_dim: int):
        super().__init__()
        # All channels are turned, so slow pairs are needed for what has no position.
        self.config = replace(config, qk_rope_head_dim=head_dim, rope_theta=10000.0)
        D, wide = config.hidden_size, config.num_attention_heads * head_dim
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(D, wide, bias=False) for _ in range(3))
        self.o_proj = nn.Linear(wide, D, bias=False)
        for layer in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            layer.weight.data.normal_(0.0, config.initializer_range)

    def start_as_copy(self) -> None:
        """As MLA's in common/induction.py: look for what is expected, and copy it."""
        std, half = self.config.initializer_range, self.config.hidden_size // 2
        for layer in (self.k_proj, self.v_proj):
            layer.weight[:, half:] = 0
        look = self.k_proj.weight.roll(half, 1)
        self.q_proj.weight.copy_(look * (LOOK_SCALE * std / look.std()))
        read = self.v_proj.weight.roll(half, 1)
        self.o_proj.weight.copy_(read.T * (COPY_SCALE * std / read.std()))

    def forward(self, x: Tensor, context, layer_cache: Tensor | None = None) -> Tensor:
        heads = self.config.num_attention_heads
        cos, sin = rope_angles(self.config, context.positions)
        q, k, v = (
            layer(x).unflatten(-1, (heads, -1)) for layer in (self.q_proj, self.k_proj, self.v_proj)
        )  # 3 x B T H dh
        q, k = apply_rotary_emb(q, cos, sin), apply_rotary_emb(k, cos, sin)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # B H T dh
        return self.o_proj(out.transpose(1, 2).flatten(2))  # B T D


def scaled(config: Config, width: int) -> Config:
    """A config with all widths in proportion to hidden_size = width; RoPE and heads stay."""

    def fit(n: int) -> int:
        return max(8, n * width // config.hidden_size // 8 * 8)

    names = ("kv_lora_rank", "qk_nope_head_dim", "v_head_dim", "intermediate_size")
    widths = {name: fit(getattr(config, name)) for name in (*names, "moe_intermediate_size")}
    return replace(config, hidden_size=width, **widths)


def make_model(name: str, config: Config) -> DeepSeek:
    """A model of the study, made of tiny's config."""
    if name in SIZES:
        return DeepSeek(scaled(config, int(config.hidden_size * SIZES[name])))
    kind, equal = name.split("-")
    if kind == "dense":
        return DeepSeek(dense_twin(config, equal))
    model, heads = DeepSeek(config), config.num_attention_heads
    if equal == "cache":
        head_dim = config.cache_dim / (2 * heads)
    else:  # MHA's four matrices are D x H dh; MLA's are counted
        attention = sum(p.numel() for p in model.model.layers[0].self_attn.parameters())
        head_dim = attention / (4 * config.hidden_size * heads)
    for layer in model.model.layers:
        layer.self_attn = MHA(config, 2 * round(head_dim / 2))
    return model


def flops_per_token(model: DeepSeek, length: int) -> float:
    """Of training: 6 for each active parameter, 3 times the forward pass for each pair of tokens
    that attend (half of all)."""
    pairs = 0
    for layer in model.model.layers:  # the widths of all heads' queries and values
        pairs += 2 * (layer.self_attn.q_proj.out_features + layer.self_attn.o_proj.in_features)
    return 6 * model.num_parameters()[1] + 3 * pairs * length / 2


@dataclass(frozen=True)
class Options:
    """The flags."""

    only: str = flag(",".join(MODELS), "models, with commas between them")
    tokens: int = flag(2_000_000, "of each", low=2048)
    seeds: int = flag(2, "runs of each model", low=1)
    out: str = flag("out/scaling", "folder of what it leaves")
    device: str = flag("auto", "cpu, cuda, mps; auto is the best there")


# ----------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------


def measure(name: str, seed: int, folder: Path, options: Options) -> list[dict[str, Any]]:
    """Train a model; a record for each evaluation. The run's own log stays in folder."""
    run = TrainOptions(
        data=STORIES, device=options.device, out=str(folder), seed=seed, overwrite=True,
        log_level="quiet", eval_tokens=20_000, compile="off", grad_accum=1,
        optimizer="adamw",  # the paper's
    )  # fmt: skip
    run = with_recipe(run, Config.preset(run.size))
    every = max(1, options.tokens // (run.batch_size * run.seq_len) // EVALUATIONS)
    steps = every * EVALUATIONS
    warmup = min(run.warmup, steps // 10)
    run = replace(run, steps=steps, minutes=None, eval_every=every, save_every=steps, warmup=warmup)
    device = choose_device(run.device)
    dtype = choose_dtype("auto", device)
    corpus = data.prepare(run.data, run.config["vocab_size"], data.cache_folder(folder), [TEMPLATE])
    tags = stories.tag_facts, stories.FACT_KINDS
    held_out = data.build_eval_set(
        corpus.val, corpus.tokenizer, run.seq_len, 8, run.eval_tokens, *tags
    )
    batches = data.Batches(corpus.train, run.batch_size, run.seq_len, seed)
    torch.manual_seed(seed)
    model = make_model(name, choose_config(run, corpus.tokenizer))
    induction_init(model, run.induction_init)
    with run_lock(run):
        trainer = Trainer(run, model, corpus.tokenizer, corpus.digest, device, dtype)
        trainer.fit(batches.get_batch, lambda: evaluate(model, held_out, device, dtype), lambda: "")
    if trainer.stop:  # Ctrl-C: what is half done is not counted
        raise KeyboardInterrupt
    (folder / "ckpt.pt").unlink()  # the curve is what was wanted
    total, active = model.num_parameters()
    attention, cached = model.model.layers[0].self_attn, model.config.cache_dim
    if isinstance(attention, MHA):
        cached = 2 * attention.k_proj.out_features
    per_token = flops_per_token(model, run.seq_len)
    same = dict(model=name, seed=seed, run=options.tokens, total=total, active=active)
    same |= dict(cached=cached * model.config.num_hidden_layers, floor=held_out.entropy_floor)
    seconds, records = 0.0, []
    for record in itertools.islice(read_log(folder / "log.jsonl"), 1, None):
        seconds += run.batch_size * run.seq_len / record.get("tok_per_s", math.inf)  # left out
        if "val_loss" in record:
            own = {key: record[key] for key in ("tokens", "val_loss", "val_recall")}
            own |= dict(flops=per_token * record["tokens"], seconds=rounded(seconds, 4))
            records.append(same | own)
    return records


# ----------------------------------------------------------------------------------------------
# What is made of it
# ----------------------------------------------------------------------------------------------


def curve(records: list[dict[str, Any]], name: str, over: str) -> tuple[list, list]:
    """The means over the seeds of `over` and of the loss above the floor."""
    own = [r for r in records if r["model"] == name]
    groups = [[r for r in own if r["tokens"] == n] for n in sorted({r["tokens"] for r in own})]
    above = [statistics.mean(r["val_loss"] - r["floor"] for r in group) for group in groups]
    return [statistics.mean(r[over] for r in group) for group in groups], above


def draw(records: list[dict[str, Any]], panels: list[tuple], target: Path) -> None:
    """A picture with a panel for each (title, models, x)."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    import matplotlib.pyplot as plt

    labels = {"tokens": "tokens", "flops": "training FLOPs", "seconds": "seconds of training"}
    fig, axes = plt.subplots(
        1, len(panels), figsize=(4.4 * len(panels), 4), sharey=True, layout="constrained"
    )
    for axis, (title, names, over) in zip(axes, panels, strict=True):
        for i, name in enumerate(names):
            some = [r for r in records if r["model"] == name]
            if some:
                r = some[0]
                label = f"{name}: {r['total'] / 1e6:.1f}M, {r['active'] / 1e6:.2f}M active"
                label += f", {r['cached']} cached" if "mha-cache" in names else ""
                axis.plot(*curve(records, name, over), "-o", ms=3, color=f"C{i}", label=label)
        axis.set(title=title, xlabel=labels[over], xscale="log", yscale="log")
        if axis.has_data():
            axis.legend(frameon=False, fontsize="x-small")
        axis.grid(alpha=0.2)
    axes[0].set_ylabel("held-out loss above the floor (nats per token)")
    fig.savefig(target, dpi=110)
    plt.close(fig)


def print_table(records: list[dict[str, Any]]) -> None:
    """Each model at its end: mean, and lowest and highest over the seeds."""
    print(f"{'model':<16}  total  active cached TFLOPs  min  above the floor     recalled")
    for name in dict.fromkeys(r["model"] for r in records):
        last = max(r["tokens"] for r in records if r["model"] == name)
        ends = [r for r in records if r["model"] == name and r["tokens"] == last]
        above = [r["val_loss"] - r["floor"] for r in ends]
        end = {k: statistics.mean(r[k] for r in ends) for k in ("flops", "seconds", "val_recall")}
        print(
            f"{name:<16}{ends[0]['total'] / 1e6:6.2f}M {ends[0]['active'] / 1e6:6.2f}M"
            f" {ends[0]['cached']:6} {end['flops'] / 1e12:6.0f} {end['seconds'] / 60:4.1f} "
            f" {statistics.mean(above):.3f} ({min(above):.3f}-{max(above):.3f})"
            f"  {end['val_recall']:.0%}"
        )


def main() -> None:
    options, _ = parse_flags(Options, __doc__)
    chosen = options.only.split(",")
    for name in chosen:
        if name not in MODELS:
            raise UsageError(f"--only {name!r} is no model: choose from {','.join(MODELS)}")
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    file = out / "scaling.jsonl"
    known = list(read_log(file))  # of runs of other lengths too, which are kept, but not drawn
    for seed, name in itertools.product(range(options.seeds), chosen):
        if any([r["model"], r["seed"], r["run"]] == [name, seed, options.tokens] for r in known):
            continue
        known += measure(name, seed, out / f"{re.sub('[/*]', '-', name)}-{seed}", options)
        temporary = file.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(r) + "\n" for r in known), encoding="utf-8")
        os.replace(temporary, file)
        loss, minutes = known[-1]["val_loss"], known[-1]["seconds"] / 60
        said = f"{name}, seed {seed}: {loss:.4f} nats per token after {minutes:.1f} minutes"
        print(said, flush=True)
    records = [r for r in known if r["run"] == options.tokens]
    print_table(records)
    sizes = [("equal tokens", "tokens"), ("equal compute", "flops"), ("equal time", "seconds")]
    draw(records, [(title, SIZES, over) for title, over in sizes], out / "sizes.png")
    ideas = [(f"experts: {title}", EXPERTS, over) for title, over in (sizes[0], sizes[2])]
    ideas.append(("attention: equal tokens", ATTENTIONS, "tokens"))
    draw(records, ideas, out / "ideas.png")
    print(f"writes scaling.jsonl, sizes.png, ideas.png in {out}")


if __name__ == "__main__":
    run_script(main)
