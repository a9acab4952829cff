"""
Teach a trained model to do what it is told, with LoRA: small matrices beside frozen weights.

    python finetune.py --ckpt out/ckpt.pt                        # built-in instructions, scored
    python finetune.py --ckpt out/ckpt.pt --data my.json         # Alpaca's form, or .jsonl, alpaca
    python finetune.py --ckpt out/ckpt.pt --data my.txt          # more pretraining, on raw text
    python sample.py --ckpt out/ckpt.pt --lora out/lora --chat   # talk to it
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from common import chat, data, stories
from common.checkpoint import load_checkpoint, open_model
from common.formats import load_lora, save_lora
from common.runlog import read_log
from common.runtime import (
    FREE,
    UsageError,
    choose_device,
    choose_dtype,
    flag,
    init_distributed,
    main_process_first,
    note_dtype,
    parse_flags,
    rank,
    run_script,
    say,
)
from common.trainer import (
    RunOptions,
    Trainer,
    check_memory,
    check_micro_batches,
    estimate_memory,
    evaluate,
    evaluating,
    open_run,
    run_lock,
    write_sample,
)
from deepseek import MLA_PROJECTIONS, Config, DeepSeek, add_lora, remove_lora

RECIPE = dict(batch_size=16, grad_accum=1, lr=4e-3, beta2=0.99, schedule="linear")
FULL_RECIPE = RECIPE | dict(lr=2e-3)
WARMUP = 20  # steps, or a tenth of all if that is less
EPOCHS = 3  # unless --steps or --minutes say otherwise
BUILT_IN_MINUTES = 4.0  # for the built-in instructions, instead of EPOCHS; scoring comes on top
TASKS, HELD_OUT_TASKS = 20_000, 300  # of the built-in instructions
LONGEST_ANSWER = 100  # tokens; the stories that built-in instructions ask for have up to 60
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
    lora_rank: int = flag(16, "of an adapter", low=1)
    alpha: float = flag(32.0, "its scale", low=0, above=True)
    dropout: float = flag(0.0, "before it", low=0, high=0.99)
    target_modules: list[str] = flag(TARGETS, "layers to adapt, by name")
    full: bool = flag(False, "train all weights, without LoRA")


# ----------------------------------------------------------------------------------------------
# What it is taught: instructions, or raw text
# ----------------------------------------------------------------------------------------------


@dataclass
class FinetuneData:
    """What is to be learned, whatever kind of text it is."""

    get_batch: Callable[[int], tuple[Tensor, Tensor]]
    per_epoch: int  # batches
    held_out: data.EvalSet
    digest: str  # of the text
    about: str  # a line for the screen
    question: str | None = None  # held out, and answered while training; None for raw text
    tasks: list[stories.Task] = field(default_factory=list)  # held out, for the world's own judge
    retention_set: data.EvalSet | None = None  # stories, to see what is forgotten


def read_data(options: Options, tokenizer: Tokenizer) -> FinetuneData:
    """What --data names. Raises UsageError."""
    if data.is_stories(options.data):
        return built_in(options, tokenizer)
    if options.data in chat.HUB_INSTRUCTIONS or Path(options.data).suffix in (".json", ".jsonl"):
        train, held_out = chat.hold_out(chat.read_instructions(options.data))
        return instructions(options, tokenizer, train, held_out)
    if options.data.endswith(".txt") or Path(options.data).is_dir():
        return raw_text(options, tokenizer)
    raise UsageError(
        f"--data {options.data!r} must be stories, {', '.join(chat.HUB_INSTRUCTIONS)}, a .json or"
        " .jsonl of instructions, or a .txt"
    )


def instructions(
    options: Options, tokenizer: Tokenizer, train: list, held_out: list
) -> FinetuneData:
    """Of (question, answer) pairs."""
    digest = hashlib.blake2b(repr((train, held_out)).encode()).hexdigest()
    examples, counts = chat.make_examples(train, tokenizer, options.seq_len)
    kept, _ = chat.make_examples(held_out, tokenizer, options.seq_len)
    if not examples or not kept:
        raise UsageError(
            f"of the {len(train)} instructions in {options.data}, {len(examples)} have an answer"
            f" and fit into {options.seq_len} tokens, of the {len(held_out)} held out {len(kept)}:"
            " give more or shorter ones, or a larger --seq_len"
        )
    batches = chat.AnswerBatches(examples, options.batch_size, options.seed)
    remarks = {"cut": "answers cut", "empty": "left out without an answer"}
    remarks["no room"] = "left out with too long a question"
    about = [f"{len(examples):,} instructions, {len(kept):,} held out"]
    about += [f"{counts[kind]:,} {text}" for kind, text in remarks.items() if counts[kind]]
    rows = max(8, options.batch_size // options.grad_accum)
    held_out = chat.answer_eval_set(kept, tokenizer, rows, options.eval_tokens)
    about, question = ", ".join(about), kept[0].question
    return FinetuneData(batches.get_batch, batches.per_epoch, held_out, digest, about, question)


def built_in(options: Options, tokenizer: Tokenizer) -> FinetuneData:
    """The instructions of stories.py; held out are combinations of hero and thing."""
    count = options.data.partition(":")[2] or str(TASKS)
    if not count.isdecimal() or not 1 <= int(count) <= 10**7:
        raise UsageError(f"data {options.data!r} must be stories, or stories:N, N from 1 to 10**7")
    train = itertools.islice(stories.instructions(options.seed), int(count))
    tasks = list(itertools.islice(stories.instructions(0, held_out=True), HELD_OUT_TASKS))
    pairs = [[(task.instruction, task.answer) for task in some] for some in (train, tasks)]
    need = 1 + max(len(chat.encode_chat(tokenizer, [(question, None)])) for question, _ in pairs[1])
    if options.seq_len < need:
        raise UsageError(
            f"the built-in instructions need a context of {need} tokens, but there are"
            f" {options.seq_len}: train a model with a longer --seq_len"
        )
    # These are told beyond all seeds that a training text takes.
    plain = data.tokenize((stories.tell(10**9 + i).text for i in range(100)), tokenizer)
    found = instructions(options, tokenizer, *pairs)
    retention_set = data.build_eval_set(plain, tokenizer, options.seq_len, 16)
    return replace(found, tasks=tasks, retention_set=retention_set)


def raw_text(options: Options, tokenizer: Tokenizer) -> FinetuneData:
    """Domain adaptation: documents as in pretraining, cut by the model's own tokenizer."""
    corpus = data.prepare(options.data, tokenizer, data.cache_folder(Path(options.out)))
    batches = data.Batches(corpus.train, options.batch_size, options.seq_len, options.seed)
    rows = max(8, options.batch_size // options.grad_accum)
    held_out = data.build_eval_set(
        corpus.val, tokenizer, options.seq_len, rows, options.eval_tokens
    )
    if not held_out.tokens:
        raise UsageError(f"{options.data} is too short to hold anything out: give more text")
    about = f"{len(corpus.train.ids):,} tokens, {len(corpus.val.ids):,} held out"
    return FinetuneData(batches.get_batch, batches.per_epoch, held_out, corpus.digest, about)


# ----------------------------------------------------------------------------------------------
# How well it does what it is told
# ----------------------------------------------------------------------------------------------


def answer(
    model: DeepSeek, tokenizer: Tokenizer, questions: list[str], rows: int = 50
) -> list[str]:
    """The greedy answers to questions, of at most LONGEST_ANSWER tokens, so many at a time.

    Where the context ends earlier, it ends for a batch when its longest question is out of room.
    """
    prompts = [chat.encode_chat(tokenizer, [(question, None)]) for question in questions]
    order, said = sorted(range(len(prompts)), key=lambda i: len(prompts[i])), {}
    with evaluating(model):
        for at in range(0, len(order), rows):
            chosen = order[at : at + rows]
            stream = model.generate(
                [prompts[i] for i in chosen],
                LONGEST_ANSWER,
                temperature=0,
                stop=model.config.eos_token_id,
                vocab_size=tokenizer.get_vocab_size(),
            )
            texts = tokenizer.decode_batch(torch.stack(list(stream), 1).tolist())
            said |= dict(zip(chosen, texts, strict=True))
    return [said[i].strip() for i in range(len(prompts))]


def score_tasks(model: DeepSeek, tokenizer: Tokenizer, tasks: list[stories.Task]) -> dict[str, Any]:
    """The share of tasks answered right, in all and by kind, and the answers."""
    answers = answer(model, tokenizer, [task.instruction for task in tasks])
    right, asked = Counter(), Counter(task.kind for task in tasks)
    for task, text in zip(tasks, answers, strict=True):
        right[task.kind] += stories.is_right(task, text)
    by_kind = {kind: round(right[kind] / n, 4) for kind, n in sorted(asked.items())}
    return {"right": round(right.total() / len(tasks), 4), "by_kind": by_kind, "answers": answers}


def evaluate_all(model: DeepSeek, tokenizer, lesson: FinetuneData, device, dtype) -> dict[str, Any]:
    """Everything that is compared before and after."""
    result = evaluate(model, lesson.held_out, device, dtype)
    if lesson.tasks:
        result |= score_tasks(model, tokenizer, lesson.tasks)
        result["plain_loss"] = evaluate(model, lesson.retention_set, device, dtype)["val_loss"]
    return result


def example(model: DeepSeek, tokenizer: Tokenizer, question: str | None) -> str:
    """What the model says now, on one line."""
    if question is None:
        return " ".join(write_sample(model, tokenizer, model.lm_head.weight.device).split())
    said = " ".join(answer(model, tokenizer, [question])[0].split())
    return f"{' '.join(question.split())[:100]} -> {said[:100]}"


def score_table(tasks: list[stories.Task], before: dict, after: dict) -> str:
    """The shares by kind, and of each kind one task with the answer before and after."""
    lines = [f"\n{'held-out tasks':<16}{'asked':>6}{'before':>9}{'after':>9}"]
    for kind in [*after["by_kind"], "all"]:
        asked = sum(kind in (task.kind, "all") for task in tasks)
        shares = [s["right"] if kind == "all" else s["by_kind"][kind] for s in (before, after)]
        lines.append(f"{kind:<16}{asked:>6}{shares[0]:>9.1%}{shares[1]:>9.1%}")
    for kind in after["by_kind"]:
        i = [task.kind for task in tasks].index(kind)
        lines.append(f"\n{tasks[i].instruction}")
        for when, score in (("before", before), ("after", after)):
            text = " ".join(score["answers"][i].split())
            mark = "right" if stories.is_right(tasks[i], score["answers"][i]) else "wrong"
            lines.append(f"  {when}, {mark}: {text[:200]}{'...' if len(text) > 200 else ''}")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------
# The run
# ----------------------------------------------------------------------------------------------


def check_flags(options: Options, typed: dict[str, Any]) -> None:
    """Raise UsageError for flags that do not go together."""
    base, out = Path(options.ckpt).resolve(), Path(options.out).resolve()
    if out in (base, base.parent):
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
        say(options, f"finished: {state['step']} steps are done; more --steps go on")
        return
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    note_dtype(options, state, dtype)
    init_distributed(device)
    with run_lock(options.out):
        finetune(options, state, device, dtype)


def finetune(options: Options, state, device, dtype) -> None:
    """Base, data, run, and what came of it."""
    torch.manual_seed(options.seed)
    say(options, f"reading  {options.ckpt} and {options.data}")
    weights = "float32" if options.dtype == "float32" else "auto"
    model, tokenizer = open_model(options.ckpt, device, weights)
    options = with_recipe(options, model.config)
    micro_batch_size = check_micro_batches(options)
    with main_process_first():
        lesson = read_data(options, tokenizer)
    options = with_steps(options, lesson)
    digest = f"{lesson.digest} {fingerprint(model)}"
    if state and (state["text"] != digest or state["tokenizer"] != tokenizer.to_str()):
        raise UsageError(f"--data {options.data} or --ckpt {options.ckpt} is not that of the run")

    if options.full:
        model.float().requires_grad_(True)  # Adam's small steps would be lost in bf16
    else:
        names = options.target_modules
        add_lora(model, options.lora_rank, options.alpha, names, options.dropout)
    loaded = sum(p.nbytes for p in model.parameters())  # they lie on the device already
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    checkpointing = options.checkpoint_activations
    needed = estimate_memory(model, micro_batch_size, options.seq_len, checkpointing, dtype)
    memory = check_memory(needed - loaded, device)
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

    # Adapters begin at zero: this is the base.
    before = evaluate_all(model, tokenizer, lesson, device, dtype)
    if state:
        try:
            model.load_state_dict(state["model"], strict=options.full)
        except (KeyError, RuntimeError, TypeError) as error:
            raise UsageError(f"the checkpoint in {options.out} does not fit its base") from error
    notes = {"text": lesson.about}
    trainer = Trainer(options, model, tokenizer, digest, device, dtype, state, notes)
    del state  # its tensors are in use now, or not needed
    trainer.fit(
        lesson.get_batch,
        lambda: evaluate(model, lesson.held_out, device, dtype),
        lambda: example(model, tokenizer, lesson.question),
        lambda: save_best(trainer),
    )
    if trainer.stop and trainer.step < (trainer.steps or math.inf):
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


def summarise(summary: dict[str, Any]) -> str:
    """The losses before and after."""
    names = {"val_loss": "held out, nats/token", "val_bpb": "held out, bits/byte"}
    names |= {"plain_loss": "plain stories, nats/token"}
    lines = []
    for name, meaning in names.items():
        if f"{name}_before" in summary:
            line = f"{meaning}: {summary[f'{name}_before']:.4f} before"
            line += f", {summary[f'{name}_after']:.4f} after"
            if off := summary.get(f"{name}_off"):
                line += f", {off:.4f} with the adapter off"
            lines.append(line)
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(main)
