"""
Teach a trained model to do what it is told, with LoRA: small matrices beside frozen weights.

    python finetune.py --ckpt out/ckpt.pt                        # built-in instructions, scored
    python finetune.py --ckpt out/ckpt.pt --data my.json         # Alpaca's form, or .jsonl, alpaca
    python finetune.py --ckpt out/ckpt.pt --data my.txt          # more pretraining, on raw text
    python sample.py --ckpt out/ckpt.pt --lora out/lora --chat   # talk to it
"""

from __future__ import annotations

import copy
import hashlib
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from common.checkpoint import load_checkpoint, open_model
from common.formats import load_lora, save_lora
from common.lessons import FinetuneData, evaluate_all, example, read_data, score_table, summarise
from common.memory import fixed_memory, plan_pieces
from common.rehearsal import DOCUMENTS, EVERY, Rehearsal
from common.runlog import read_log
from common.runtime import (
    FREE,
    ROUNDING,
    UsageError,
    flag,
    main_process_first,
    parse_flags,
    rank,
    run_script,
    say,
    set_up,
)
from common.trainer import RunOptions, Trainer, evaluate, open_run, run_lock
from deepseek import MLA_PROJECTIONS, Config, DeepSeek, add_lora, remove_lora

RECIPE = dict(batch_size=16, lr=4e-3, beta2=0.99, schedule="linear")
FULL_RECIPE = RECIPE | dict(lr=2e-3)
WARMUP = 20  # steps, or a tenth of all if that is less
EPOCHS = 3  # unless --steps or --minutes say otherwise
BUILT_IN_MINUTES = 4.0  # for the built-in instructions, instead of EPOCHS; scoring comes on top
# the attention's, and the MLPs' of dense layers and shared experts; routed experts lie stacked
TARGETS = [*MLA_PROJECTIONS, "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Options(RunOptions):
    """The flags of finetune.py."""

    ckpt: str = flag("out/ckpt.pt", "of train.py, or a folder or hub name in official format", FREE)
    out: str = flag("out/lora", "folder for what the run leaves", FREE)
    data: str = flag(
        "stories", "stories, stories:N, alpaca; .json or .jsonl of instructions; .txt", FREE
    )
    lora_rank: int = flag(16, "rank of the adapters", low=1)
    alpha: float = flag(32.0, "scale of the adapters", low=0, above=True)
    dropout: float = flag(0.0, "on the input of the adapters", low=0, high=0.99)
    target_modules: list[str] = flag(TARGETS, "layers to adapt, by name")
    full: bool = flag(False, "train all weights, without LoRA")
    compile: str = flag(
        "off", "torch.compile for blocks and loss: long, as rows are of many lengths", ROUNDING,
        choices=["on", "off"],
    )  # fmt: skip
    rehearsal: int = flag(
        4, f"documents by the base, every {EVERY} steps, so as not to forget; 0 = none",
        low=0, high=DOCUMENTS,
    )  # fmt: skip


def check_flags(options: Options, typed: dict[str, Any]) -> None:
    """Raise UsageError for flags that do not go together."""
    base, out = Path(options.ckpt).resolve(), Path(options.out).resolve()
    if out in (base, base.parent) and not options.resume:  # which knows the base
        raise UsageError(f"--out {options.out} holds the base {options.ckpt}: give another --out")
    for name in ("lora_rank", "alpha", "dropout", "target_modules"):
        if options.full and name in typed:
            raise UsageError(f"--{name} is of adapters, and --full trains none: leave one out")


def with_recipe(options: Options, config: Config) -> Options:
    """What was not typed, but for the number of steps."""
    recipe = FULL_RECIPE if options.full else RECIPE
    # no more than 4096 unless typed: V2's context would take a large card for a single row
    recipe = recipe | {"seq_len": min(4096, config.max_position_embeddings)}
    missing = {k: v for k, v in recipe.items() if getattr(options, k) is None}
    options = replace(options, **missing)
    if options.seq_len > config.max_position_embeddings:
        raise UsageError(
            f"--seq_len {options.seq_len} is more than the model's context: give at most"
            f" {config.max_position_embeddings}"
        )
    return options


def with_steps(options: Options, lesson: FinetuneData) -> Options:
    """How long it goes, unless that was typed."""
    steps, minutes = options.steps, options.minutes
    if not steps and not minutes:
        steps = None if lesson.tasks else EPOCHS * lesson.per_epoch
        minutes = BUILT_IN_MINUTES if lesson.tasks else None
    warmup = min(WARMUP, (steps or 10**9) // 10) if options.warmup is None else options.warmup
    return replace(options, steps=steps, minutes=minutes, warmup=warmup)


def fingerprint(model: DeepSeek) -> str:
    """A hash of a few numbers of each tensor, by which a resumed run knows its base."""
    some = hashlib.blake2b()
    for tensor in model.state_dict().values():
        some.update(tensor.flatten()[:64].float().cpu().numpy().tobytes())
    return some.hexdigest()


def save_best(trainer: Trainer) -> None:
    """Write down what has done best so far on what is held out."""
    if trainer.options.full:
        trainer.save("best.pt")
    elif rank() == 0:
        save_lora(trainer.model, trainer.out, base=trainer.options.ckpt)


def load_best(trainer: Trainer) -> None:
    """Go back to what `save_best` wrote."""
    with main_process_first():  # which wrote it
        if trainer.options.full:
            trainer.model.load_state_dict(load_checkpoint(trainer.out / "best.pt")["model"])
        else:
            remove_lora(trainer.model)
            load_lora(trainer.model, trainer.out)


def main() -> None:
    renamed = {"rank": "lora_rank", "targets": "target_modules"}
    options, typed = parse_flags(Options, __doc__, renamed)
    check_flags(options, typed)
    options, state = open_run(options, typed)
    scored = any("val_loss_after" in record for record in read_log(Path(options.out) / "log.jsonl"))
    if state and scored and state["step"] >= (options.steps or math.inf):
        say(options, f"finished: {state['step']} steps are done; a larger --steps goes on")
        return
    device, dtype = set_up(options, state)
    with run_lock(options):
        finetune(options, state, device, dtype)


def finetune(options: Options, state, device, dtype) -> None:
    """Base, data, run, and what came of it."""
    torch.manual_seed(options.seed)
    say(options, f"reading  {options.ckpt} and {options.data}")
    weights = "float32" if options.dtype == "float32" else "auto"
    model, tokenizer = open_model(options.ckpt, device, weights)
    options = with_recipe(options, model.config)
    with main_process_first():
        lesson = read_data(options, tokenizer)
    options = with_steps(options, lesson)
    digest = f"{lesson.digest} {fingerprint(model)}"
    if state and (state["text"] != digest or state["tokenizer"] != tokenizer.to_str()):
        raise UsageError(f"--data {options.data} or --ckpt {options.ckpt} is not that of the run")

    base = None
    if options.rehearsal:  # adapters leave the weights as they are, so the base shares them
        base = copy.deepcopy(model, {} if options.full else {id(p): p for p in model.parameters()})
    if options.full:
        model.float().requires_grad_(True)  # Adam's small steps would be lost in bf16
    else:
        names = options.target_modules
        add_lora(model, options.lora_rank, options.alpha, names, options.dropout)
    loaded = sum(p.nbytes for p in model.parameters())  # they lie on the device already
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    more = fixed_memory(model) - loaded
    pieces, memory = plan_pieces(options, model.config, more, device, dtype)
    options = replace(options, grad_accum=pieces)
    kept = "best.pt" if options.full else "adapter_model.safetensors, adapter_config.json"
    lines = [
        f"model    {options.ckpt}: {total:,} parameters, {trained:,} trained"
        f" ({trained / total:.1%})",
        f"text     {options.data}: {lesson.about}",
        f"step     {options.batch_size} x up to {options.seq_len} tokens, {lesson.per_epoch:,} an"
        " epoch",
        f"machine  {device}, {str(dtype).removeprefix('torch.')}, memory {memory}",
        f"writes   {kept}, ckpt.pt, log.jsonl, curves.png in {options.out}",
    ]
    if state:
        lines.append(f"resumes  after step {state['step']}")
    say(options, "\n".join(lines))
    keep = None
    if base:
        say(options, f"rehearse the base writes {DOCUMENTS} texts first (--rehearsal 0: none)")
        keep = Rehearsal(base, tokenizer, options.rehearsal, options.seq_len, options.seed)

    # Adapters begin at zero: this is the base.
    before = evaluate_all(model, tokenizer, lesson, device, dtype)
    if state:
        try:
            model.load_state_dict(state["model"], strict=options.full)
        except (KeyError, RuntimeError, TypeError) as error:
            raise UsageError(f"the checkpoint in {options.out} does not fit its base") from error
    notes = {"text": lesson.about}
    trainer = Trainer(
        options, model, tokenizer, digest, device, dtype, state, notes,
        keep and (lambda *part: {"rehearsal": keep.loss(model, *part)}),
    )  # fmt: skip
    del state  # its tensors are in use now, or not needed
    trainer.fit(
        lesson.get_batch,
        lambda: evaluate(model, lesson.held_out, device, dtype),
        lambda: example(model, tokenizer, lesson.question),
        lambda: save_best(trainer),
    )
    if trainer.stop and trainer.step < (trainer.steps or math.inf):
        if trainer.best == math.inf:  # sample.py needs the adapters
            save_best(trainer)
        again = f"python finetune.py --resume --out {options.out}"
        say(options, f"stopped after step {trainer.step}, saved; {again} goes on")
        return

    load_best(trainer)  # of the step that did best, not of the last
    after = evaluate_all(model, tokenizer, lesson, device, dtype)
    summary = {"step": trainer.step, "trainable": trained, "total": total}
    for name in ("right", "by_kind", "val_loss", "val_bpb", "plain_loss"):
        if name in after:
            summary |= {f"{name}_before": before[name], f"{name}_after": after[name]}
    if lesson.tasks:
        summary["by_kind"] = summary.pop("by_kind_after")
        say(options, score_table(lesson.tasks, before, after))
    if lesson.retention_set and not options.full:
        remove_lora(model)
        off = evaluate(model, lesson.retention_set, device, dtype)
        summary["plain_loss_off"] = off["val_loss"]
    trainer.log.write(summary)
    say(options, "\n" + summarise(summary))
    model_is = f"{options.out}/best.pt" if options.full else f"{options.ckpt} --lora {options.out}"
    say(options, f"next: python sample.py --ckpt {model_is}{' --chat' if lesson.question else ''}")


if __name__ == "__main__":
    run_script(main)
