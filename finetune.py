"""
Teach a trained model to do what it is told, with LoRA: small matrices beside frozen weights.

    python finetune.py --ckpt out/ckpt.pt                        # built-in instructions, scored
    python finetune.py --ckpt out/ckpt.pt --data my.json         # Alpaca's form, or .jsonl, alpaca
    python finetune.py --ckpt out/ckpt.pt --data my.txt          # more pretraining, on raw text
    python sample.py --ckpt out/ckpt.pt --lora out/lora --chat   # talk to it
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor

import data
import stories
from data import DataError, Windows
from deepseek import MLA_PROJECTIONS, Config, DeepSeek, add_lora, detach_lora, load_lora, save_lora
from train import (
    Parser,
    Trainer,
    UsageError,
    add_common_flags,
    check_memory,
    check_pieces,
    choose_device,
    choose_dtype,
    estimate_memory,
    evaluate,
    evaluating,
    first_process_first,
    join_processes,
    load_checkpoint,
    number,
    open_model,
    open_run,
    print_unless_quiet,
    rank,
    read_log,
    run_script,
    sealing,
    world,
    write_sample,
)

RECIPE = dict(batch_size=16, grad_accum=1, lr=4e-3, beta2=0.99, schedule="linear")
FULL_RECIPE = RECIPE | dict(lr=2e-3)
WARMUP = 20  # steps, or a tenth of all if that is less
EPOCHS = 3  # unless --steps or --minutes say otherwise
BUILT_IN_MINUTES = 4.0  # for the built-in instructions, instead of EPOCHS; scoring comes on top
TASKS, HELD_OUT_TASKS = 20_000, 300  # of the built-in instructions
LONGEST_ANSWER = 100  # tokens; the stories that built-in instructions ask for have up to 60
# the attention's, and the MLPs' of dense layers and shared experts; routed experts lie stacked
TARGETS = [*MLA_PROJECTIONS, "gate_proj", "up_proj", "down_proj"]


def make_parser() -> Parser:
    parser = Parser(__doc__)
    add, positive = parser.add_argument, number(int, 1)
    bases = "of train.py, or a folder or hub name in the official format (default: out/ckpt.pt)"
    add("--ckpt", default="out/ckpt.pt", help=f"the model to start from: {bases}")
    sources = "stories, stories:N, alpaca; .json or .jsonl of instructions; .txt (default: stories)"
    add("--data", default="stories", help=sources)
    add("--rank", type=positive, default=16, help="of an adapter (default: 16)")
    add("--alpha", type=number(float, 0, above=True), default=32.0, help="its scale (default: 32)")
    add("--dropout", type=number(float, 0, 0.99), default=0.0, help="before it (default: 0)")
    targets = f"layers to adapt, by name (default: {' '.join(TARGETS)})"
    add("--targets", nargs="+", metavar="NAME", default=TARGETS, help=targets)
    add("--full", action="store_true", help="train all weights, without LoRA (default: off)")
    add_common_flags(parser, out="out/lora")
    return parser


# ----------------------------------------------------------------------------------------------
# What it is taught: instructions, or raw text
# ----------------------------------------------------------------------------------------------


class Lesson(NamedTuple):
    """What is to be learned, whatever kind of text it is."""

    batch_at: Callable[[int], tuple[Tensor, Tensor]]
    batches: int  # in an epoch
    held_out: Windows
    digest: str  # of the text
    about: str  # a line for the screen
    question: str | None = None  # held out, and answered while training; None for raw text
    tasks: list[stories.Task] = []  # held-out instructions that the world's own judge can score
    plain: Windows | None = None  # of the built-in instructions: stories, to see what is forgotten


def read_lesson(args: argparse.Namespace, tokenizer: Tokenizer) -> Lesson:
    """What --data names. Raises DataError or UsageError."""
    name = args.data.partition(":")[0]
    if name == "stories":
        return built_in(args, tokenizer)
    if name in data.HUB_INSTRUCTIONS or Path(name).suffix in (".json", ".jsonl"):
        train, held_out = data.hold_out(data.read_instructions(args.data))
        return instructions(args, tokenizer, train, held_out)
    if name.endswith(".txt") or Path(name).is_dir():
        return raw_text(args, tokenizer)
    raise UsageError(
        f"--data {args.data!r} must be stories, {', '.join(data.HUB_INSTRUCTIONS)}, a .json or"
        " .jsonl of instructions, or a .txt"
    )


def instructions(
    args: argparse.Namespace, tokenizer: Tokenizer, train: list, held_out: list
) -> Lesson:
    """A lesson of (question, answer) pairs."""
    whole = hashlib.blake2b(repr((train, held_out)).encode()).hexdigest()
    taught, counts = data.make_examples(train, tokenizer, args.seq_len)
    kept, _ = data.make_examples(held_out, tokenizer, args.seq_len)
    if not taught or not kept:
        raise DataError(
            f"of the {len(train)} instructions in {args.data}, {len(taught)} have an answer and fit"
            f" into {args.seq_len} tokens, of the {len(held_out)} held out {len(kept)}: give more"
            " or shorter ones, or a larger --seq_len"
        )
    batches = data.AnswerBatches(taught, args.batch_size, args.seed)
    remarks = {"cut": "answers cut", "empty": "left out without an answer"}
    remarks["no room"] = "left out with too long a question"
    about = [f"{len(taught):,} instructions, {len(kept):,} held out"]
    about += [f"{counts[kind]:,} {text}" for kind, text in remarks.items() if counts[kind]]
    rows = max(8, args.batch_size // args.grad_accum)  # an evaluation has room for eight at least
    windows = data.answer_windows(kept, tokenizer, rows, args.eval_tokens)
    question = kept[0].question
    return Lesson(batches.at, batches.per_epoch, windows, whole, ", ".join(about), question)


def built_in(args: argparse.Namespace, tokenizer: Tokenizer) -> Lesson:
    """The instructions of stories.py; held out are combinations of hero and thing."""
    count = args.data.partition(":")[2] or str(TASKS)
    if not count.isdecimal() or not 1 <= int(count) <= 10**7:
        raise DataError(f"data {args.data!r} must be stories, or stories:N with N from 1 to 10**7")
    taught = itertools.islice(stories.instructions(args.seed), int(count))
    tasks = list(itertools.islice(stories.instructions(0, held_out=True), HELD_OUT_TASKS))
    pairs = [[(task.instruction, task.answer) for task in some] for some in (taught, tasks)]
    need = 1 + max(len(data.dialogue(tokenizer, [(question, None)])) for question, _ in pairs[1])
    if args.seq_len < need:
        raise UsageError(
            f"the built-in instructions need a context of {need} tokens, but there are"
            f" {args.seq_len}: train a model with a longer --seq_len"
        )
    # These are told beyond all seeds that a training text takes.
    texts = ((i, stories.tell(10**9 + i).text) for i in range(100))
    plain = data.windows(data.tokenize(texts, tokenizer), tokenizer, args.seq_len, 16)
    return instructions(args, tokenizer, *pairs)._replace(tasks=tasks, plain=plain)


def raw_text(args: argparse.Namespace, tokenizer: Tokenizer) -> Lesson:
    """Domain adaptation: documents as in pretraining, cut by the model's own tokenizer."""
    corpus = data.prepare(args.data, tokenizer, data.cache_folder(Path(args.out)))
    batches = data.Batches(corpus.train, args.batch_size, args.seq_len, args.seed)
    rows = max(8, args.batch_size // args.grad_accum)
    held_out = data.windows(corpus.val, tokenizer, args.seq_len, rows, args.eval_tokens)
    if not held_out.tokens:
        raise DataError(f"{args.data} is too short to hold anything out: give more text")
    about = f"{len(corpus.train.ids):,} tokens, {len(corpus.val.ids):,} held out"
    epoch = -(-len(batches.starts) // args.batch_size)
    return Lesson(batches.at, epoch, held_out, corpus.digest, about)


# ----------------------------------------------------------------------------------------------
# How well it does what it is told
# ----------------------------------------------------------------------------------------------


def answer(
    model: DeepSeek, tokenizer: Tokenizer, questions: list[str], rows: int = 50
) -> list[str]:
    """The greedy answers to questions, of at most LONGEST_ANSWER tokens, so many at a time.

    Where the context ends earlier, it ends for a batch when its longest question is out of room.
    """
    prompts = [data.dialogue(tokenizer, [(question, None)]) for question in questions]
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


def judge(model: DeepSeek, tokenizer: Tokenizer, tasks: list[stories.Task]) -> dict[str, Any]:
    """The share of tasks answered right, in all and by kind, and the answers."""
    answers = answer(model, tokenizer, [task.instruction for task in tasks])
    right, asked = Counter(), Counter(task.kind for task in tasks)
    for task, text in zip(tasks, answers, strict=True):
        right[task.kind] += stories.is_right(task, text)
    by_kind = {kind: round(right[kind] / n, 4) for kind, n in sorted(asked.items())}
    return {"right": round(right.total() / len(tasks), 4), "by_kind": by_kind, "answers": answers}


def measure(model: DeepSeek, tokenizer: Tokenizer, lesson: Lesson, device, dtype) -> dict[str, Any]:
    """Everything that is compared before and after."""
    result = evaluate(model, lesson.held_out, device, dtype)
    if lesson.tasks:
        result |= judge(model, tokenizer, lesson.tasks)
        result["plain_loss"] = evaluate(model, lesson.plain, device, dtype)["val_loss"]
    return result


def example(model: DeepSeek, tokenizer: Tokenizer, question: str | None) -> str:
    """What the model says now, on one line."""
    if question is None:
        return " ".join(write_sample(model, tokenizer, model.lm_head.weight.device).split())
    said = " ".join(answer(model, tokenizer, [question])[0].split())
    return f"{' '.join(question.split())[:100]} -> {said[:100]}"


def print_scores(tasks: list[stories.Task], before: dict, after: dict) -> None:
    """A table by kind, and of each kind one task with the answer before and after."""
    print(f"\n{'held-out tasks':<16}{'asked':>6}{'before':>9}{'after':>9}")
    for kind in [*after["by_kind"], "all"]:
        asked = sum(kind in (task.kind, "all") for task in tasks)
        shares = [s["right"] if kind == "all" else s["by_kind"][kind] for s in (before, after)]
        print(f"{kind:<16}{asked:>6}{shares[0]:>9.1%}{shares[1]:>9.1%}")
    for kind in after["by_kind"]:
        i = [task.kind for task in tasks].index(kind)
        print(f"\n{tasks[i].instruction}")
        for when, score in (("before", before), ("after", after)):
            text = " ".join(score["answers"][i].split())
            mark = "right" if stories.is_right(tasks[i], score["answers"][i]) else "wrong"
            print(f"  {when}, {mark}: {text[:200]}{'...' if len(text) > 200 else ''}")


def print_summary(args: argparse.Namespace, summary: dict[str, Any], chat: bool) -> None:
    """The losses before and after, and how to go on."""
    names = {"val_loss": "held out, nats/token", "val_bpb": "held out, bits/byte"}
    names |= {"plain_loss": "plain stories, nats/token"}
    print()
    for name, meaning in names.items():
        if f"{name}_before" in summary:
            off = summary.get(f"{name}_off")
            print(
                f"{meaning}: {summary[f'{name}_before']:.4f} before,"
                f" {summary[f'{name}_after']:.4f} after"
                + (f", {off:.4f} with the adapter off" if off else "")
            )
    model = f"{args.out}/best.pt" if args.full else f"{args.ckpt} --lora {args.out}"
    print(f"next: python sample.py --ckpt {model}{' --chat' if chat else ''}")


# ----------------------------------------------------------------------------------------------
# The run
# ----------------------------------------------------------------------------------------------


def check_flags(args: argparse.Namespace, typed: set[str]) -> None:
    """Raise UsageError for flags that do not go together."""
    base, out = Path(args.ckpt).resolve(), Path(args.out).resolve()
    if out in (base, base.parent):
        raise UsageError(f"--out {args.out} holds the base {args.ckpt}: give another --out")
    for name in ("rank", "alpha", "dropout", "targets"):
        if args.full and name in typed:
            raise UsageError(f"--{name} is of adapters, and --full trains none: leave one out")


def choose_recipe(args: argparse.Namespace, config: Config) -> None:
    """Fill in what was not typed, but for the number of steps."""
    for name, value in (FULL_RECIPE if args.full else RECIPE).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    # no more than 4096 unless typed: V2's context would take a large card for a single row
    args.seq_len = args.seq_len or min(4096, config.max_position_embeddings)
    if args.seq_len > config.max_position_embeddings:
        raise UsageError(
            f"--seq_len {args.seq_len} is more than the model's context: give at most"
            f" {config.max_position_embeddings}"
        )
    check_pieces(args)


def weights_digest(model: DeepSeek) -> str:
    """A hash of all weights, by which a resumed run knows its base."""
    whole = hashlib.blake2b()
    for name, tensor in model.state_dict().items():
        whole.update(name.encode())
        whole.update(tensor.cpu().contiguous().view(torch.uint8).numpy())
    return whole.hexdigest()


def keep(trainer: Trainer) -> None:
    """Write down what has done best so far on what is held out."""
    if trainer.args.full:
        trainer.save("best.pt")
    elif rank() == 0:
        with sealing(trainer.out, "adapter_*"):
            save_lora(trainer.model, trainer.out, base=trainer.args.ckpt)


def take_kept(trainer: Trainer) -> None:
    """Go back to what `keep` wrote."""
    with first_process_first():  # which wrote it
        if trainer.args.full:
            trainer.model.load_state_dict(load_checkpoint(trainer.out / "best.pt")["model"])
        else:
            detach_lora(trainer.model)
            load_lora(trainer.model, trainer.out)


def main() -> None:
    # 1. What is asked for, and does it go on from something?
    parser = make_parser()
    args, typed = parser.parse_args(), parser.explicit()
    check_flags(args, typed)
    state = open_run(args, typed, parser)
    scored = any("val_loss_after" in record for record in read_log(Path(args.out) / "log.jsonl"))
    if state and scored and state["step"] >= (args.steps or math.inf):
        print_unless_quiet(args, f"finished: {state['step']} steps are done; more --steps go on")
        return
    device = choose_device(args.device)
    dtype = choose_dtype(state["dtype"] if state else args.dtype, device)
    join_processes(device)

    # 2. The base, and what it is to learn
    torch.manual_seed(args.seed)
    print_unless_quiet(args, f"reading  {args.ckpt} and {args.data}")
    weights = "float32" if args.dtype == "float32" else "auto"
    model, tokenizer = open_model(args.ckpt, device, weights)
    choose_recipe(args, model.config)
    with first_process_first():
        lesson = read_lesson(args, tokenizer)
    if not args.steps and not args.minutes:
        args.steps = None if lesson.tasks else EPOCHS * lesson.batches
        args.minutes = BUILT_IN_MINUTES if lesson.tasks else None
    if args.warmup is None:
        args.warmup = min(WARMUP, (args.steps or 10**9) // 10)
    digest = lesson.digest + weights_digest(model) + tokenizer.to_str()
    digest = hashlib.blake2b(digest.encode()).hexdigest()
    if state and state["text"] != digest:
        raise UsageError(
            f"--data {args.data} or --ckpt {args.ckpt} has changed since the run began: start"
            " another run"
        )

    # 3. What is trained, and is there room for it?
    if args.full:
        model.float().requires_grad_(True)  # Adam's small steps would be lost in bf16
    else:
        add_lora(model, args.rank, args.alpha, args.targets, args.dropout)
    loaded = sum(p.nbytes for p in model.parameters())  # they lie on the device already
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    piece = args.batch_size // (args.grad_accum * world())
    needed = estimate_memory(model, piece, args.seq_len, args.checkpoint_activations, dtype)
    needed -= loaded
    memory = check_memory(needed, device)
    kept = "best.pt" if args.full else "adapter_model.safetensors, adapter_config.json"
    for line in (
        f"model    {args.ckpt}: {total:,} parameters, {trained:,} trained ({trained / total:.1%})",
        f"text     {args.data}: {lesson.about}",
        f"step     {args.batch_size} x up to {args.seq_len} tokens, {lesson.batches:,} an epoch",
        f"machine  {device}, {str(dtype).removeprefix('torch.')}, memory {memory}",
        f"writes   {kept}, ckpt.pt, log.jsonl, curves.png in {args.out}",
        *([f"resumes  after step {state['step']}"] if state else []),
    ):
        print_unless_quiet(args, line)

    # 4. How good is it before? (Adapters begin at zero: this is the base.) Then train
    before = measure(model, tokenizer, lesson, device, dtype)
    if state:
        try:
            model.load_state_dict(state["model"], strict=args.full)
        except (RuntimeError, TypeError) as error:
            raise UsageError(f"the checkpoint in {args.out} does not fit its base") from error
    trainer = Trainer(args, model, tokenizer, digest, device, dtype, state, {"text": lesson.about})
    del state  # its tensors are in use now, or not needed
    trainer.fit(
        lesson.batch_at,
        lambda: evaluate(model, lesson.held_out, device, dtype),
        lambda: example(model, tokenizer, lesson.question),
        lambda: keep(trainer),
    )
    if trainer.stop and trainer.step < (args.steps or math.inf):
        again = f"python finetune.py --resume --out {args.out}"
        print_unless_quiet(args, f"stopped after step {trainer.step}, saved; {again} goes on")
        return

    # 5. What came out: of the step that did best, not of the last
    take_kept(trainer)
    after = measure(model, tokenizer, lesson, device, dtype)
    summary = {"step": trainer.step, "trainable": trained, "total": total}
    for name in ("right", "by_kind", "val_loss", "val_bpb", "plain_loss"):
        if name in after:
            summary |= {f"{name}_before": before[name], f"{name}_after": after[name]}
    if lesson.tasks:
        summary["by_kind"] = summary.pop("by_kind_after")
    if lesson.plain and not args.full:
        detach_lora(model)
        summary["plain_loss_off"] = evaluate(model, lesson.plain, device, dtype)["val_loss"]
    trainer.log.write(summary)
    if args.log_level != "quiet" and rank() == 0:
        if lesson.tasks:
            print_scores(lesson.tasks, before, after)
        print_summary(args, summary, chat=lesson.question is not None)


if __name__ == "__main__":
    run_script(main)
