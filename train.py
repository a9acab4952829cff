"""
Pretrain a DeepSeek-V2 of any size.

    python train.py                                        # tiny, built-in stories, five minutes
    python train.py --data my.txt --out out/mine           # your own text
    python train.py --resume --out out/mine                # go on where it stopped
    torchrun --nproc_per_node=8 train.py --size 1b --data tinystories
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from common import data, stories
from common.chat import TEMPLATE
from common.checkpoint import build_model
from common.induction import induction_init
from common.memory import fixed_memory, plan_pieces
from common.optimizers import OPTIMIZERS
from common.runtime import (
    FREE,
    UsageError,
    flag,
    main_process_first,
    parse_flags,
    refuse_change,
    run_script,
    say,
    set_up,
    world_size,
)
from common.trainer import (
    RunOptions,
    Trainer,
    describe,
    eval_rows,
    evaluate,
    open_run,
    run_lock,
    write_sample,
)
from deepseek import PRESETS, Config, DeepSeek

# What each size is trained with unless told otherwise; for the official sizes, the paper's values
# (5.7T and 8.1T tokens), except that V2's batch does not grow. muon_lr: the rates with Muon, which
# is then the default, in short runs and in long ones (where, at the first, some seeds never find
# facts that lie far back).
RECIPES: dict[str, dict[str, Any]] = {
    "tiny": dict(
        batch_size=8, lr=1.5e-3, muon_lr=(5e-3, 3.5e-3), beta2=0.99, schedule="linear", warmup=100,
        minutes=5.0, induction_init=0.4,
    ),
    "small": dict(batch_size=32, lr=1e-3, warmup=200, steps=5_000),
    "1b": dict(batch_size=64, lr=4e-4, warmup=2_000, steps=50_000),
    "v2-lite": dict(batch_size=4608, seq_len=4096, lr=4.2e-4, warmup=2_000, steps=302_000),
    "v2": dict(batch_size=9216, seq_len=4096, lr=2.4e-4, warmup=2_000, steps=215_000),
}  # fmt: skip
SPECIAL = {"bos_token_id": 0, "eos_token_id": 1}  # until the tokenizer is known
ROUNDS = 10  # a recipe goes through a text at most so many times


@dataclass(frozen=True)
class Options(RunOptions):
    """The flags of train.py; config: the fields of Config that were typed."""

    out: str = flag("out", "folder for what the run leaves", FREE)
    size: str = flag("tiny", "size of the model", choices=list(PRESETS))
    data: str = flag(
        "stories", ".txt, .jsonl, folder of such, stories, stories:N, tinystories", FREE
    )
    fsdp: bool = flag(False, "under torchrun, shard weights and optimizer over processes", FREE)
    low_memory: bool = flag(
        False, "weights and moments in bf16, rounded at random; --checkpoint_activations"
    )
    optimizer: str | None = flag(
        None, "adamw, the paper's, or muon (default: adamw, or the recipe's)", choices=OPTIMIZERS
    )
    induction_init: float | None = flag(
        None, "start attention as a copy, embedding of this std; 0 = off (default: the recipe's)",
        low=0,
    )  # fmt: skip
    config: dict[str, Any] = field(default_factory=dict)


def with_recipe(options: Options, base: Config) -> Options:
    """What was not typed, from the recipe of the size, and from its Config."""
    recipe = {"beta2": 0.95, "schedule": "step", "induction_init": 0.0} | RECIPES[options.size]
    muon_lr = recipe.pop("muon_lr", None)
    with_muon = muon_lr and not (options.low_memory or options.fsdp)
    recipe["optimizer"] = options.optimizer or ("muon" if with_muon else "adamw")
    if recipe["optimizer"] == "muon" and muon_lr and options.lr is None:
        recipe["lr"], recipe["long_lr"] = muon_lr
    if options.steps or options.minutes:
        recipe |= {"steps": None, "minutes": None}
    recipe["seq_len"] = recipe.get("seq_len", base.max_position_embeddings)
    steps = options.steps or recipe.get("steps")
    recipe["warmup"] = min(recipe["warmup"], (steps or 10**9) // 10)
    missing = {k: v for k, v in recipe.items() if getattr(options, k) is None}
    low = options.low_memory or options.checkpoint_activations
    config = {"vocab_size": base.vocab_size} | options.config
    return replace(options, **missing, checkpoint_activations=low, config=config)


def limit_rounds(options: Options, typed: dict[str, Any], tokens: int) -> Options:
    """The recipe's steps, cut to ROUNDS times through so many tokens: after that, a model begins to
    know them by heart."""
    if options.steps is None or "steps" in typed:
        return options
    steps = min(options.steps, math.ceil(ROUNDS * tokens / (options.batch_size * options.seq_len)))
    warmup = options.warmup if "warmup" in typed else min(options.warmup, steps // 10)
    return replace(options, steps=steps, warmup=warmup)


def choose_config(options: Options, tokenizer) -> Config:
    """The preset with the flags, the tokenizer's vocabulary and the context of the training."""
    fitted = {
        "vocab_size": -(-tokenizer.get_vocab_size() // 64) * 64,
        "bos_token_id": tokenizer.token_to_id(data.BOS),
        "eos_token_id": tokenizer.token_to_id(data.EOS),
    }
    overrides = {"max_position_embeddings": options.seq_len} | options.config | fitted
    config = Config.preset(options.size, **overrides)
    if options.seq_len > config.max_position_embeddings:
        raise UsageError(
            f"--seq_len {options.seq_len} is more than --max_position_embeddings"
            f" {config.max_position_embeddings}"
        )
    return config


def check_flags(options: Options, dtype: torch.dtype) -> None:
    """Raise UsageError for flags that do not go together."""
    if options.fsdp and not dist.is_initialized():
        raise UsageError("--fsdp shards a model over processes: start them with torchrun")
    if options.optimizer == "muon" and (options.fsdp or options.low_memory):
        raise UsageError("--fsdp and --low_memory do not go with --optimizer muon: leave one out")
    if options.low_memory and (options.fsdp or world_size() > 1):
        raise UsageError("--low_memory is for one process: its rounding is random")
    if options.low_memory and dtype == torch.float16:
        raise UsageError("--low_memory keeps weights in bf16, which this card does not compute")
    if options.low_memory and dtype == torch.float32:
        say(options, "note     --low_memory computes in bf16: very slow on this device")


def introduce(trainer: Trainer, corpus: data.Dataset, floor: float | None, memory: str) -> str:
    """What a run is about to do, for the screen."""
    options, model = trainer.options, trainer.model
    total, active = model.num_parameters()
    vocabulary, tokens = corpus.tokenizer.get_vocab_size(), len(corpus.train.ids)
    a_step, cached = options.batch_size * options.seq_len, model.config.cache_per_token()
    lines = [
        f"model    {options.size}: {total:,} parameters, {active:,} of them active per token",
        f"cache    {cached:,} numbers per token, {4 * cached:,} bytes in fp32",
        f"text     {corpus.name}: {tokens:,} tokens, {len(corpus.val.ids):,} held out,"
        f" vocabulary {vocabulary:,}",
        f"step     {options.batch_size} x {options.seq_len} = {a_step:,} tokens"
        + (f" in {options.grad_accum} pieces" if options.grad_accum > 1 else ""),
        f"machine  {trainer.device}, {str(trainer.dtype).removeprefix('torch.')}, memory {memory}"
        + (f", {world_size()} processes" if world_size() > 1 else ""),
        f"writes   ckpt.pt, log.jsonl, curves.png in {options.out}; tokens in {corpus.folder}",
    ]
    if corpus.remark:
        lines.append(f"note     {corpus.remark}")
    if floor is not None:
        lines.append(f"floor    {floor:.4f} nats/token, the entropy of the stories")
    if floor is not None and options.size != "tiny":
        rounds = (options.steps or 0) * a_step / tokens
        lines.append(
            f"note     the stories are little text for {options.size}: {vocabulary:,} different"
            f" tokens, read {rounds:.1f} times; --data tinystories has more"
        )
    if trainer.step:
        lines.append(f"resumes  after step {trainer.step}")
    return "\n".join(lines)


def main() -> None:
    options, typed = parse_flags(Options, __doc__)
    options, state = open_run(options, typed)
    if state:  # options hold what was typed; the tokenizer has rounded vocab_size up since
        known = vars(Config.from_dict(state["config"])) | options.config
        for name, value in typed["config"].items():
            if value != known[name]:
                refuse_change(name, value, known[name])
    if state and state["step"] >= (options.steps or math.inf):
        say(options, f"finished: {state['step']} steps are done; a larger --steps goes on")
        return
    device, dtype = set_up(options, state)
    if state:
        config = Config.from_dict(state["config"])
    else:  # the text may need a smaller vocabulary
        config = Config.preset(options.size, **SPECIAL | options.config)
        options = with_recipe(options, config)
    check_flags(options, dtype)
    with torch.device("meta"):
        model = DeepSeek(config).to(torch.bfloat16 if options.low_memory else torch.float32)
    pieces, memory = plan_pieces(options, config, fixed_memory(model), device, dtype)
    options = replace(options, grad_accum=pieces)
    with run_lock(options):
        train(options, typed, state, device, dtype, memory)


def train(options: Options, typed: dict[str, Any], state, device, dtype, memory: str) -> None:
    """Prepare the text, build the model, train it, and say how it went."""
    torch.manual_seed(options.seed)
    say(options, f"reading  {options.data} (cut into tokens once, then kept)")
    with main_process_first():
        cache = data.cache_folder(Path(options.out))
        corpus = data.prepare(options.data, options.config["vocab_size"], cache, also=[TEMPLATE])
    tokenizer, told = corpus.tokenizer, data.is_stories(options.data)
    if state and state["text"] != corpus.digest:
        raise UsageError(f"--data {options.data} has changed since the run began: start another")
    if state and state["tokenizer"] != tokenizer.to_str():
        raise UsageError("this version of tokenizers cuts the text otherwise: start another run")
    options = options if state else limit_rounds(options, typed, len(corpus.train.ids))
    batches = data.Batches(corpus.train, options.batch_size, options.seq_len, options.seed)
    config = Config.from_dict(state["config"]) if state else choose_config(options, tokenizer)
    rows, tags = eval_rows(config.vocab_size, options.seq_len), ()
    if told:
        tags = stories.tag_facts, stories.FACT_KINDS
    held_out = data.build_eval_set(
        corpus.val, tokenizer, options.seq_len, rows, options.eval_tokens, *tags
    )

    model = build_model(state) if state else DeepSeek(config)
    if options.induction_init and not state:
        induction_init(model, options.induction_init)
    notes = {"entropy_floor": held_out.entropy_floor}
    model = model.to(torch.bfloat16 if options.low_memory else torch.float32)
    trainer = Trainer(options, model, tokenizer, corpus.digest, device, dtype, state, notes)
    del state  # its tensors are in use now, or not needed

    say(options, introduce(trainer, corpus, held_out.entropy_floor, memory))
    began = time.perf_counter()
    record = trainer.fit(
        batches.get_batch,
        lambda: evaluate(model, held_out, device, dtype),
        lambda: " ".join(write_sample(model, tokenizer, device).split()),
    )
    if trainer.stop and trainer.step < (trainer.steps or math.inf):
        again = f"python train.py --resume --out {options.out}"
        say(options, f"stopped after step {trainer.step}, saved; {again} goes on")
        return
    story = write_sample(model, tokenizer, device, length=200)
    minutes = f"{(time.perf_counter() - began) / 60:.1f} minutes"
    minutes += " since it was resumed" if options.resume else ""
    say(
        options,
        f"\n{story}\n\n{trainer.step} steps, {trainer.tokens:,} tokens, {minutes}:"
        f" {describe(record)}\nnext: python sample.py --ckpt {Path(options.out) / 'ckpt.pt'}",
    )


if __name__ == "__main__":
    run_script(main)
