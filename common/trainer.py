"""
A run of training, for pretraining and fine-tuning alike: its flags, evaluation, the loop, and what
it leaves in --out.
"""

from __future__ import annotations

import itertools
import math
import os
import platform
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import tokenizers
import torch
from filelock import FileLock, Timeout  # comes with torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from common.checkpoint import load_checkpoint, save_checkpoint
from common.data import IGNORE, EvalSet, cache_folder, encode_with_bos
from common.formats import lora_state
from common.memory import numbers_of_pieces
from common.optimizers import LowMemoryAdamW, adamw_update, learning_rate, make_optimizer
from common.runlog import Log, draw_curves, rounded
from common.runtime import (
    DTYPES,
    FREE,
    MORE,
    ROUNDING,
    UsageError,
    all_reduce_sum,
    autocast,
    first_line,
    flag,
    gather_full,
    is_compile_error,
    rank,
    resume_options,
    say,
    shard_optimizer_state,
    world_size,
)
from deepseek import DeepSeek

SAVE_MINUTES = 15  # a checkpoint is never older
DRAW_MINUTES = 1  # between two drawings of the curves
SMALL_PIECE = 8192  # tokens of a process; with fewer, a card waits for the CPU
LONG_RUN = 2000  # a run of more steps takes a recipe's long_lr, if it has one
SKIPS_IN_A_ROW = 5  # steps with a loss that is not finite, which end a run
RUN_FILES = [  # what a run may leave in --out
    *("ckpt.pt", "log.jsonl", "curves.png", "best.pt"),
    *("adapter_model.safetensors", "adapter_config.json"),
]


@dataclass(frozen=True)
class RunOptions:
    """The flags that train.py and finetune.py share."""

    steps: int | None = flag(None, "optimizer steps (default: the recipe's)", MORE, low=1)
    minutes: float | None = flag(
        None, "instead of --steps: time (default: the recipe's)", low=0, above=True
    )
    batch_size: int | None = flag(None, "sequences per step (default: the recipe's)", low=1)
    seq_len: int | None = flag(None, "tokens per sequence (default: the model's context)", low=2)
    grad_accum: int | None = flag(
        None, "pieces that a batch is cut into (default: the recipe's)", ROUNDING, low=1
    )
    lr: float | None = flag(None, "highest rate (default: the recipe's)", low=0, above=True)
    long_lr: float | None = None  # in place of lr in a run of more than LONG_RUN steps; no flag
    warmup: int | None = flag(None, "steps of linear warm-up (default: the recipe's)", low=0)
    schedule: str | None = flag(
        None,
        "step: x0.316 at 60% and 90%, as the paper; cosine: to a tenth; linear: to nothing"
        " (default: step, or the recipe's)",
        choices=["step", "cosine", "linear", "constant"],
    )
    beta2: float | None = flag(
        None, "memory of AdamW's squares (default: 0.95, the paper's, or the recipe's)",
        low=0, high=0.99999,
    )  # fmt: skip
    weight_decay: float = flag(0.1, "on matrices", low=0)
    clip: float = flag(1.0, "gradient norm", low=0, above=True)
    eval_every: int | None = flag(
        None, "steps between evaluations (default: a tenth of all)", FREE, low=1
    )
    eval_tokens: int = flag(50_000, "held-out tokens in an evaluation", FREE, low=1)
    save_every: int | None = flag(
        None, f"steps between checkpoints, at most {SAVE_MINUTES} minutes (default: --eval_every)",
        FREE, low=1,
    )  # fmt: skip
    seed: int = flag(0, "of weights and data", low=0, high=2**31)
    resume: bool = flag(False, "go on with the run in --out", FREE)
    overwrite: bool = flag(False, "replace the run in --out", FREE)
    device: str = flag("auto", "cpu, cuda, cuda:1, mps; auto is the best there", ROUNDING)
    dtype: str = flag(  # `set_up` says what it comes to on another machine
        "auto", "of the matrix products; auto is bfloat16 where the machine computes it", FREE,
        choices=["auto", *DTYPES],
    )  # fmt: skip
    compile: str = flag(
        "auto", "torch.compile for blocks, loss; auto: if it works and the run is long", ROUNDING,
        choices=["auto", "on", "off"],
    )  # fmt: skip
    checkpoint_activations: bool = flag(False, "less memory, slower", ROUNDING)
    log_level: str = flag("info", "quiet: errors only", FREE, choices=["quiet", "info"])


Options = TypeVar("Options", bound=RunOptions)


def open_run(options: Options, typed: dict[str, Any]) -> tuple[Options, dict[str, Any] | None]:
    """Check --out; the options of the run, and the checkpoint to go on from, or None for a new run.

    With --resume the stored flags hold, and what was typed anew as the flags' classes allow. Raises
    UsageError when that cannot be done without harm.
    """
    if {"steps", "minutes"} <= typed.keys():
        raise UsageError("--steps and --minutes exclude each other: give one")
    if options.resume and options.overwrite:
        raise UsageError("--resume and --overwrite exclude each other: give one")
    out = Path(options.out)
    checkpoint = out / "ckpt.pt"
    if options.resume:
        if not checkpoint.is_file():
            raise UsageError(f"there is nothing to resume: {checkpoint} does not exist")
        # mmap: the others share its pages; the first process replaces the file
        state = load_checkpoint(checkpoint, mmap=rank() > 0)
        stored = state.get("args")
        if not isinstance(stored, dict) or not isinstance(state.get("step"), int):
            raise UsageError(f"checkpoint {checkpoint} is damaged: it has no flags, or no step")
        if ("ckpt" in stored) != hasattr(options, "ckpt"):
            script = "finetune.py" if "ckpt" in stored else "train.py"
            raise UsageError(f"{checkpoint} is of a run of {script}: resume it with that")
        stored |= {"out": options.out, "resume": True, "overwrite": False}
        stored["fsdp"] = getattr(options, "fsdp", False)  # as the processes are now
        stored.setdefault("optimizer", "adamw")  # there was no other
        return resume_options(stored, options, typed), state
    if not options.overwrite:
        for name in RUN_FILES:
            if (out / name).exists():
                raise UsageError(
                    f"{out} holds another run: give --resume, --overwrite, or another --out"
                )
    return options, None


@contextmanager
def run_lock(options: RunOptions) -> Iterator[None]:
    """The folder of a run, made and held for this run alone. Raises UsageError."""
    out, folder = options.out, Path(options.out)
    if rank() > 0:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"--out {out} cannot be written: {error.strerror}") from error
    lock = FileLock(folder / "run.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UsageError(
            f"another run is writing to {out}: wait for it, or give another --out"
        ) from error
    except OSError as error:  # some file systems have no locks
        say(
            options, f"note     {out} cannot be locked ({error.strerror}): start no other run there"
        )
    try:
        yield
    finally:
        lock.release()


# ----------------------------------------------------------------------------------------------
# torch.compile
# ----------------------------------------------------------------------------------------------


def choose_compile(options: RunOptions, device, dtype) -> tuple[bool, str]:
    """Whether to use torch.compile, and why."""
    if options.compile != "auto":
        return options.compile == "on", "--compile on"
    if (options.minutes or 0) < 4 and (options.steps or 0) < 1000:
        return False, "a short run"
    if dtype == torch.float32:  # grouped products are not traced then
        return False, "it gains little in fp32"
    return device.type in ("cpu", "cuda"), "--compile off leaves it out"


def compiled_parts(model: DeepSeek) -> list[torch.nn.Module]:
    """What is compiled, each by itself: one graph serves the dense blocks, one the MoE blocks, and
    one the loss (two, if its last chunk is shorter)."""
    return [*model.model.layers, model.summed_loss]


def compile_parts(model: DeepSeek, dynamic: bool | None = False) -> None:
    """torch.compile for them, in place; dynamic: whether shapes change, None = find out."""
    # Sums of up to 16 numbers, as over the K experts of a token, are written out (by default of up
    # to 7, and 1b has K = 8). As reductions they take several times as long on a card.
    options = {"unroll_reductions_threshold": 17}
    for part in compiled_parts(model):
        part.compile(dynamic=dynamic, options=options)


# ----------------------------------------------------------------------------------------------
# Evaluation
# ----------------------------------------------------------------------------------------------


@contextmanager
def evaluating(model: DeepSeek) -> Iterator[None]:
    """In eval mode and without gradients; afterwards as before."""
    mode = model.training
    model.eval()
    is_sharded = isinstance(model, FSDPModule)
    if is_sharded:
        model.unshard()  # generation calls the parts one by one, which does not gather them
    try:
        # not compiled: its shapes are others, and each would be compiled anew
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        model.train(mode)
        if is_sharded:
            model.reshard()


def eval_rows(vocab_size: int, seq_len: int) -> int:
    """How many rows to evaluate at a time: their logits take 128 MB at most, or one row's."""
    return max(1, min(64, 2**25 // (vocab_size * seq_len)))


def evaluate(model: DeepSeek, held_out: EvalSet, device, dtype) -> dict[str, Any]:
    """val_loss (nats per token, cross-entropy alone) and val_bpb (bits per byte); where tokens have
    tags also val_recall, the share of them that are recalled, and the same by tag.

    A token with a tag is recalled if the model finds it likelier than every other token that has
    this tag anywhere: a name among the names. So what could as well be worded otherwise at this
    place does not count as forgotten. Each process evaluates its share of the rows.
    """
    kinds = 1 + len(held_out.tag_names)  # 0: tokens without a tag
    nats, right, asked = 0.0, [0] * kinds, [0] * kinds
    tags = held_out.tags or [torch.zeros_like(targets) for _, targets in held_out.rows]
    rows = [(*row, t) for row, t in zip(held_out.rows, tags, strict=True)]
    said, tag_of = (torch.cat([row[i].flatten() for row in rows]) for i in (1, 2))
    values = [said[tag_of == tag].unique() for tag in range(kinds)]
    waiting = rows[rank() :: world_size()][::-1]
    if len(waiting) < -(-len(rows) // world_size()):  # with --fsdp all compute equally often
        inputs, targets, tags = rows[0]
        waiting.append((inputs, torch.full_like(targets, IGNORE), torch.zeros_like(tags)))
    with evaluating(model), autocast(device, dtype):
        while waiting:
            inputs, targets, tags = rows = waiting.pop()
            try:
                if held_out.tags is None:  # the loss alone, whose logits are made in chunks
                    loss = model(inputs.to(device), targets.to(device)).loss.item()
                    nats += loss * int((targets != IGNORE).sum())
                    continue
                logits = model(inputs.to(device)).logits.flatten(0, 1)  # b*t V
                wanted = targets.flatten().to(device)
                loss = F.cross_entropy(logits.float(), wanted, reduction="sum").item()
            except torch.OutOfMemoryError:
                if len(inputs) == 1 or isinstance(model, FSDPModule):  # others would wait for it
                    raise
                waiting += zip(*(t.tensor_split(2) for t in rows), strict=True)
                continue
            nats += loss
            for tag in range(1, kinds):
                at = (tags.flatten() == tag).nonzero().flatten()
                if not len(at):
                    continue
                found = values[tag][logits[at.to(device)].cpu()[:, values[tag]].argmax(-1)]
                right[tag] += int((found == targets.flatten()[at]).sum())
                asked[tag] += len(at)
    sums = torch.tensor([nats, *right, *asked], dtype=torch.float64)
    nats, *counts = all_reduce_sum(sums.to(device) if world_size() > 1 else sums).tolist()
    right, asked = counts[1:kinds], counts[kinds + 1 :]
    result = {
        "val_loss": rounded(nats / held_out.tokens),
        "val_bpb": rounded(nats / math.log(2) / max(1, held_out.bytes)),
    }
    if any(asked):
        shares = zip(held_out.tag_names, right, asked, strict=True)
        result["val_recall"] = rounded(sum(right) / sum(asked), 4)
        result["val_recall_by_kind"] = {kind: rounded(r / n, 4) for kind, r, n in shares if n}
    return result


def write_sample(model: DeepSeek, tokenizer, device, prompt: str = "", length: int = 60) -> str:
    """A short text from the model, the same random numbers each time."""
    ids = encode_with_bos(tokenizer, prompt)
    generator = torch.Generator(device).manual_seed(1)
    with evaluating(model):
        stream = model.generate(
            [ids],
            length,
            temperature=0.8,
            stop=model.config.eos_token_id,
            vocab_size=tokenizer.get_vocab_size(),
            generator=generator,
        )
        try:
            return prompt + tokenizer.decode([int(t) for t in stream])
        except FloatingPointError:  # a rate that was too high has left nothing to draw from
            return prompt


def random_state(device: torch.device) -> dict[str, Tensor | None]:
    """The state of the generators that training draws from."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_random_state(device: torch.device, state: dict[str, Tensor | None]) -> None:
    """Put it back."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)


def describe(record: dict[str, Any]) -> str:
    """The figures of an evaluation, for the screen."""
    loss = f"loss {record['loss']:.4f}, " if "loss" in record else ""
    bpb = f", {record['val_bpb']:.4f} bits/byte" if "val_bpb" in record else ""
    recall = f", {record['val_recall']:.1%} of facts recalled" if "val_recall" in record else ""
    return f"{loss}held out {record['val_loss']:.4f} nats/token{bpb}{recall}"


# ----------------------------------------------------------------------------------------------
# The run
# ----------------------------------------------------------------------------------------------


class Trainer:
    """One run: a model, its optimizer, where it stands, and how it goes on.

    digest: of the text that it is trained on. state: the checkpoint to go on from, or None. notes:
    what else the header of the log holds. more_losses(step, piece, pieces): what else is to become
    small, by name, a share of it for each piece. The run leaves ckpt.pt, log.jsonl and curves.png
    in options.out.
    """

    def __init__(
        self, options: RunOptions, model: DeepSeek, tokenizer, digest: str, device, dtype,
        state: dict[str, Any] | None = None, notes: dict[str, Any] | None = None,
        more_losses: Callable[[int, int, int], dict[str, Tensor]] | None = None,
    ):  # fmt: skip
        self.options, self.tokenizer, self.digest = options, tokenizer, digest
        self.device, self.dtype, self.more_losses = device, dtype, more_losses
        self.forward = self.model = model.train()
        self.on_card = device.type == "cuda"  # where running out of memory can be tried
        self.out = Path(options.out)
        self.compiled, self.why = choose_compile(options, device, dtype)
        self.options = replace(options, compile="on" if self.compiled else "off")
        if self.compiled:
            kernels = cache_folder(self.out) / "kernels"
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(kernels))
            compile_parts(model, dynamic=None if "ckpt" in vars(options) else False)
        is_sharded = getattr(options, "fsdp", False)
        if is_sharded:  # before it moves: the whole may not fit on the device
            mesh = init_device_mesh(device.type, (world_size(),))  # not that of a card beside
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
        model.to(device)
        if world_size() > 1 and not is_sharded:
            # without a copy of the gradients
            self.forward = DistributedDataParallel(model, gradient_as_bucket_view=True)
        kind = getattr(options, "optimizer", "adamw")
        kind = "low_memory" if getattr(options, "low_memory", False) else kind
        recipe = options.lr, options.weight_decay, options.beta2, kind, dtype, self.compiled
        self.optimizer = make_optimizer(model, *recipe)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.fewest = options.grad_accum  # pieces
        self.steps = options.steps  # None until --minutes has been measured
        self.step, self.tokens, self.best = 0, 0, math.inf
        self.skipped_steps = 0  # in a row
        self.stop_requested, self.stop = False, False  # Ctrl-C was pressed here; all stop
        self.saved_at, self.overdue = time.perf_counter(), False  # the last checkpoint
        self.drawn_at = -math.inf
        if state:
            self.load_state_dict(state)
        elif options.overwrite and rank() == 0:
            for name in RUN_FILES:
                (self.out / name).unlink(missing_ok=True)
        if rank() > 0:  # dropping is drawn for other sequences here
            torch.manual_seed(options.seed + 1000 * self.step + rank())
        self.versions = {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "tokenizers": tokenizers.__version__,
        }
        header = {
            "args": asdict(self.options),
            "config": asdict(model.config),
            "versions": self.versions,
            "parameters": model.num_parameters(),
            **(notes or {}),
        }
        self.log = Log(self.out, header, self.step if state else None)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Stand where a checkpoint was made. Raises UsageError where its parts do not fit."""
        try:
            self.optimizer.load_state_dict(
                shard_optimizer_state(self.optimizer, state["optimizer"])
            )
            if state["scaler"] and self.scaler.is_enabled():
                self.scaler.load_state_dict(state["scaler"])
            self.step, self.tokens = state["step"], state["tokens"]
            self.best = state["best_val_loss"]
            set_random_state(self.device, state["rng"])
        except torch.OutOfMemoryError:  # a RuntimeError, too, but not one of the checkpoint
            raise
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise UsageError(
                f"the checkpoint in {self.out} cannot be gone on with: its parts do not fit"
            ) from error

    def save(self, name: str = "ckpt.pt") -> None:
        """All that is needed to go on exactly here, and to sample. A file of another name lacks the
        optimizer's state: it is to sample from alone."""
        to_go_on = name == "ckpt.pt"
        if to_go_on:
            self.saved_at = time.perf_counter()
        adapters = lora_state(self.model)  # their base stays where it came from
        weights = gather_full(adapters or self.model.state_dict())
        moments = gather_full(self.optimizer.state_dict()) if to_go_on else None
        if rank() > 0:
            return
        state = {
            "model": weights,
            "adapters": bool(adapters),
            "optimizer": moments,
            "scaler": self.scaler.state_dict(),
            "config": asdict(self.model.config),
            "tokenizer": self.tokenizer.to_str(),
            "text": self.digest,
            "dtype": str(self.dtype).removeprefix("torch."),  # what auto meant
            "step": self.step,  # also the position in the data: batches depend on it alone
            "tokens": self.tokens,
            "best_val_loss": self.best,
            "rng": random_state(self.device),
            "args": asdict(replace(self.options, steps=self.steps)),
            "versions": self.versions,
        }
        save_checkpoint(self.out / name, state)

    def train_step(self, inputs: Tensor, targets: Tensor) -> tuple[dict[str, Any], Tensor]:
        """One optimizer step on a batch [B, T]: log record, expert load."""
        began = time.perf_counter()
        options, peak = self.options, self.options.lr
        if options.long_lr and self.steps and self.steps > LONG_RUN:
            peak = options.long_lr
        steps = self.steps or 10**9  # while they are not known, the rate still rises
        lr = learning_rate(self.step, steps, peak, options.warmup, options.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        while (got := self.forward_backward(self.forward, inputs, targets)) is None:
            if world_size() > 1 or not self.take_less():  # the others have gone on to exchange
                raise UsageError(self.too_large())
        return self.finish_step(lr, *got, inputs.numel(), began)

    def forward_backward(
        self, forward, inputs: Tensor, targets: Tensor, most: int | None = None
    ) -> tuple[dict[str, Tensor], Tensor] | None:
        """Gradients of a batch [B, T] in --grad_accum pieces (of `most` at most), of which each
        process takes its rows: its shares of the losses by name, and of the expert load.

        None where memory runs out; then gradients and random numbers are as they were before.
        """
        options, state = self.options, random_state(self.device)
        shares, losses, load = options.grad_accum * world_size(), {}, 0.0
        try:
            inputs, targets = inputs.to(self.device), targets.to(self.device)
            counted = (targets != IGNORE).sum()
            pieces = zip(*(t.chunk(options.grad_accum) for t in (inputs, targets)), strict=True)
            for i, piece in enumerate(itertools.islice(pieces, most), 1):
                x, y = (t.chunk(world_size())[rank()] for t in piece)
                with self.maybe_no_sync(forward, i < options.grad_accum):
                    with autocast(self.device, self.dtype):  # backward follows by itself
                        out = forward(x, y, checkpoint_activations=options.checkpoint_activations)
                    # All tokens of a batch count the same in the cross-entropy.
                    share = (y != IGNORE).sum() / counted
                    own = {
                        name: loss * share if name == "cross_entropy" else loss / shares
                        for name, loss in out.losses.items()
                    }
                    if self.more_losses:
                        part = (i - 1) * world_size() + rank()
                        with autocast(self.device, self.dtype):
                            own |= self.more_losses(self.step, part, shares)
                    # world_size(): the engines take the mean of the processes' gradients
                    self.scaler.scale(sum(own.values()) * world_size()).backward()
                losses = {n: losses.get(n, 0.0) + v.detach() for n, v in own.items()}
                load = load + out.expert_load / shares
            return losses, load
        except torch.OutOfMemoryError:
            pass  # what the exception holds in memory is free once it has been left
        self.optimizer.zero_grad()
        set_random_state(self.device, state)
        return None

    def fit_memory(self, inputs: Tensor, targets: Tensor) -> None:
        """Take so little at a time that a step fits on a card, by trying two pieces, with the
        optimizer's moments in place. Afterwards everything is as it was. Raises UsageError."""
        while True:
            state, failed = random_state(self.device), False
            # the bare model: a process that fails must not leave others waiting for its gradients
            with torch.compiler.set_stance("force_eager"):
                try:
                    self.allocate_moments()
                except torch.OutOfMemoryError:
                    self.optimizer.state.clear()  # it may be there in part
                    failed = True
                failed = failed or self.forward_backward(self.model, inputs, targets, 2) is None
            self.optimizer.zero_grad()
            set_random_state(self.device, state)
            if not self.agree(failed):
                break
            if not self.take_less():
                raise UsageError(self.too_large())

    def compile_now(self, inputs: Tensor, targets: Tensor) -> None:
        """Compile on one piece of a batch; where that fails, say so and go on without."""
        state, began = random_state(self.device), time.perf_counter()
        say(self.options, f"compile  blocks and loss, for up to a minute or two ({self.why})")
        try:
            self.forward_backward(self.model, inputs, targets, 1)
            say(self.options, f"compile  took {time.perf_counter() - began:.0f} s")
        except Exception as error:
            if not is_compile_error(error):
                raise
            for part in compiled_parts(self.model):
                part._compiled_call_impl = None  # what part.compile() has set
            if isinstance(self.optimizer, LowMemoryAdamW):
                self.optimizer.update = adamw_update
            self.options = replace(self.options, compile="off")
            say(self.options, f"compile  fails here, goes on without: {first_line(error)}")
        self.optimizer.zero_grad()
        set_random_state(self.device, state)

    def allocate_moments(self) -> None:
        """The optimizer's state, as it is before the first step, which would make it."""
        if self.optimizer.state:
            return
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
            for p in group["params"]:
                p.grad = torch.zeros_like(p)
        self.optimizer.step()  # at a rate of 0: it changes no weight
        for group in self.optimizer.param_groups:
            group.pop("step", None)
            for p in group["params"]:
                if "step" in self.optimizer.state[p]:
                    self.optimizer.state[p]["step"].zero_()

    def take_less(self) -> bool:
        """Cut batches into the next larger number of pieces, down to SMALL_PIECE; then recompute
        activations, in as few pieces as the run began with. False where nothing is left."""
        options = self.options
        pieces = numbers_of_pieces(options.batch_size)
        tokens = options.batch_size * options.seq_len // world_size()
        ways = [(False, n) for n in pieces if tokens // n >= SMALL_PIECE]
        ways += [(True, n) for n in pieces if n >= self.fewest]
        left = [way for way in ways if way > (options.checkpoint_activations, options.grad_accum)]
        if not left:
            return False
        self.options = replace(options, checkpoint_activations=left[0][0], grad_accum=left[0][1])
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        names = "grad_accum", "checkpoint_activations"
        self.log.write({name: getattr(self.options, name) for name in names})
        how = f"--grad_accum {self.options.grad_accum}"
        how += " --checkpoint_activations" if self.options.checkpoint_activations else ""
        say(options, f"memory   ran out; goes on with {how}")
        return True

    def too_large(self) -> str:
        """What is said when a step does not fit."""
        return (
            f"memory runs out at --grad_accum {self.options.grad_accum}: take a smaller model, a"
            " shorter --seq_len, more --grad_accum or --checkpoint_activations"
        )

    def finish_step(
        self, lr: float, losses: dict[str, Tensor], load: Tensor, tokens: int, began: float
    ) -> tuple[dict[str, Any], Tensor]:
        """Clip, take the optimizer's step if everything is finite, and tell of it. All processes
        come to the same numbers, waiting for the device once (in fp16, again for its scaler)."""
        loss = losses["cross_entropy"]
        late = time.perf_counter() - self.saved_at > 60 * SAVE_MINUTES
        flags = [torch.full_like(loss, self.stop_requested), torch.full_like(loss, late)]
        scalars = torch.stack([*losses.values(), *flags])
        summed = all_reduce_sum(torch.cat([scalars, load.flatten()]))
        scalars, load = summed[: len(scalars)], summed[len(scalars) :].view_as(load)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip)
        norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).to(loss)
        busiest = load.max() * load.shape[-1] if load.numel() else torch.zeros_like(norm)
        *values, stop, late, norm, busiest = torch.cat(
            [scalars, torch.stack([norm, busiest])]
        ).tolist()
        named = dict(zip(losses, values, strict=True))
        # In fp16 a norm out of range is usual: the scaler leaves the step out and scales less.
        loss = named.pop("cross_entropy")
        is_finite = math.isfinite(loss) and (math.isfinite(norm) or self.scaler.is_enabled())
        if is_finite:
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.stop, self.overdue = stop > 0, late > 0  # the same in all processes
        self.step += 1
        self.tokens += tokens
        record = {"step": self.step, "tokens": self.tokens, "lr": rounded(lr)}
        if not is_finite:
            return record | {"skipped": True}, load
        record |= {
            "loss": rounded(loss),
            "aux_loss": rounded(sum(named.values())),
            **{name: rounded(value) for name, value in named.items()},
            "grad_norm": rounded(norm),
            "tok_per_s": rounded(tokens / (time.perf_counter() - began), 4),
            "expert_load_max": rounded(busiest, 4),
        }
        return record, load

    def check_health(self, record: dict[str, Any], bar: tqdm) -> None:
        """Warn of a step that was left out. Raises UsageError after SKIPS_IN_A_ROW of them: the
        weights are as they were before."""
        self.skipped_steps = self.skipped_steps + 1 if "skipped" in record else 0
        if self.skipped_steps == SKIPS_IN_A_ROW:
            raise UsageError(
                f"loss or gradient was not finite in {self.skipped_steps} steps in a row, up to"
                f" step {self.step}: the last checkpoint is kept; try a lower --lr or"
                " --dtype float32"
            )
        if self.skipped_steps and rank() == 0:
            bar.write(f"step {self.step}: loss or gradient not finite, left out", file=sys.stderr)

    def agree(self, value: float) -> float:
        """The sum of a number that each process has."""
        return all_reduce_sum(torch.tensor(float(value), device=self.device)).item()

    def maybe_no_sync(self, forward, skip: bool):
        """The context of a backward pass after which the processes need not exchange gradients.
        With --fsdp they always do: each would have to keep whole gradients until they did."""
        return forward.no_sync() if skip and hasattr(forward, "no_sync") else nullcontext()

    @contextmanager
    def catching_signals(self) -> Iterator[None]:
        """Ctrl-C ends the run after the step; a second one does not wait for that."""

        def ask_to_stop(*_: Any) -> None:
            if self.stop_requested:
                raise KeyboardInterrupt
            self.stop_requested = True
            if self.options.log_level != "quiet":  # os.write: print may have been interrupted
                os.write(2, b"\nfinishing the step and saving; Ctrl-C again quits at once\n")

        handlers = {s: signal.signal(s, ask_to_stop) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for which, handler in handlers.items():
                signal.signal(which, handler)

    def fit(
        self,
        get_batch: Callable[[int], tuple[Tensor, Tensor]],
        evaluate: Callable[[], dict[str, Any]],
        show: Callable[[], str],
        save_best: Callable[[], None] = lambda: None,
    ) -> dict[str, Any]:
        """Train until --steps are done or Ctrl-C; return the last log record.

        get_batch(step) gives inputs and targets; evaluate() val_loss and what to log beside it;
        show() a line for the screen; save_best() is called whenever val_loss is lower than ever.
        With --minutes the first 20 steps tell how many there will be.
        """
        options, began, first = self.options, time.perf_counter(), self.step
        quiet = True if options.log_level == "quiet" or rank() > 0 else None  # None: no terminal
        bar = tqdm(total=self.steps, initial=self.step, unit="step", disable=quiet)
        seconds: list[float] = []
        record: dict[str, Any] = {}
        with bar, self.catching_signals():
            if self.step == 0:  # where it starts from; it also shows how long an evaluation takes
                say(options, f"before the first step: {describe(evaluate())}")
            pause = time.perf_counter() - began
            if self.on_card and not getattr(options, "fsdp", False):  # whose processes must meet
                self.fit_memory(*get_batch(self.step))
            if self.compiled:
                self.compile_now(*get_batch(self.step))
            self.stop = self.agree(self.stop_requested) > 0
            while not self.stop and self.step < (self.steps or math.inf):
                tick = time.perf_counter()
                inputs, targets = get_batch(self.step)
                record, load = self.train_step(inputs, targets)
                self.check_health(record, bar)
                seconds.append(time.perf_counter() - tick)
                if self.steps is None and self.step == first + 20:
                    # The first steps are slow, as kernels are prepared. In fine-tuning every fourth
                    # is, as it rehearses. Later machines slow down once they are warm, by a tenth
                    # where this was measured.
                    fours = [sum(seconds[i : i + 4]) / 4 for i in (8, 12, 16)]
                    pace = statistics.median(fours) / 0.9
                    # An evaluation takes no longer than training on as many tokens.
                    pause = min(pause, pace * options.eval_tokens / inputs.numel())
                    left = 60 * options.minutes - (time.perf_counter() - began) - 10 * (pause + 1)
                    more = max(1, int(left / pace))
                    self.steps = self.step + int(self.agree(more if rank() == 0 else 0))
                    bar.total = self.steps
                    if self.steps < (options.warmup or 0):
                        fit = f"only {self.steps} steps fit into --minutes {options.minutes}"
                        say(options, f"note     {fit}, so the rate stays low: give more")
                last = self.step == self.steps
                every = options.eval_every or max(1, (self.steps or 10**9) // 10)
                if last or self.step % every == 0:
                    record |= evaluate()
                    record["expert_load"] = [[rounded(v, 3) for v in row] for row in load.tolist()]
                    if record["val_loss"] < self.best:
                        save_best()
                        self.best = record["val_loss"]
                self.log.write(record)
                bar.update()
                if "loss" in record:
                    speed = f"{record['tok_per_s']:,.0f} tok/s"
                    bar.set_postfix_str(f"loss {record['loss']:.3f}, {speed}")
                if "val_loss" in record:
                    said = "" if options.log_level == "quiet" else show()  # by all, for --fsdp
                    if not quiet:
                        left = ""
                        if self.steps:
                            left = statistics.mean(seconds) * (self.steps - self.step)
                            left = f", {tqdm.format_interval(left)} left"
                        bar.write(f"step {self.step}: {describe(record)}{left} | it writes: {said}")
                due = self.overdue or self.step % (options.save_every or every) == 0
                if last or self.stop or (due and not self.skipped_steps):
                    self.save()
                if "val_loss" in record:
                    self.draw(always=False)
        if self.stop and self.step == 0:  # before the first step there was nothing to save yet
            self.save()
        self.draw(always=True)
        return record

    def draw(self, always: bool) -> None:
        """curves.png, not more often than every DRAW_MINUTES unless always."""
        if rank() == 0 and (always or time.perf_counter() - self.drawn_at > 60 * DRAW_MINUTES):
            draw_curves(self.log.path, self.out / "curves.png")
            self.drawn_at = time.perf_counter()
