"""
What deepseek.py costs in time and memory: the table that docs/measurements.md quotes.

    python -m benchmarks.speed                 # on this machine's device
    python -m benchmarks.speed --only decode   # one part of it
    python -m benchmarks.speed --device cuda

A ratio says how many times as fast "this" is as "that". Both take turns in one process; the ratio
is the median over the rounds, with the lowest and the highest, and the speeds are medians as well.
"transformers" is the library's DeepSeek-V2 with the same weights. It gains up to 5% on a CPU by
keeping freed memory as our scripts do. What cannot run here is left out, with a note that says why.
"""

from __future__ import annotations

import functools
import gc
import itertools
import os
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

# On a CPU each number of rows has a kernel of its own, and of those 1,024 are kept by default:
# contenders in one process must not push out each other's.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "65536")

import torch
from torch import Tensor

from common.formats import save_pretrained
from common.optimizers import make_optimizer
from common.runtime import (
    UsageError,
    autocast,
    choose_device,
    choose_dtype,
    flag,
    is_compile_error,
    keep_freed_memory,
    parse_flags,
    run_script,
)
from common.trainer import compile_parts
from deepseek import Config, DeepSeek

BATCHES = {"tiny": (8, 256), "small": (8, 512), "1b": (4, 1024)}  # rows, tokens of each
ON_A_CARD = 8  # times as many rows, where memory is not what is measured
TRAINED = {"cpu": ["tiny"], "mps": ["tiny"], "cuda": list(BATCHES)}
NEW_TOKENS = 100
# Sizes, whether as with --low_memory, and to how many GiB a card is capped.
MEMORY = [("tiny", False, None), ("small", False, None), ("1b", False, 22.5), ("1b", True, 14.0)]
# What is raised where a library, a compiler, memory or /proc is missing.
FAILURES = (ImportError, OSError, RuntimeError, UsageError)


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    """The time of a call, until the device has done all that was asked of it."""
    began = time.perf_counter()
    call()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - began


def interleave(
    contenders: dict[str, Callable], device: torch.device, rounds: int
) -> dict[str, list[float]]:
    """Seconds of what each contender returns, in each round. Every contender is made and called
    once unmeasured; then all take turns."""
    torch.compiler.reset()  # else it would take these shapes for ever changing ones
    ready = {}
    for name, build in contenders.items():
        try:
            call = build()
            seconds_of(call, device)
            ready[name] = call
        except Exception as error:
            if not isinstance(error, FAILURES) and not is_compile_error(error):
                raise
            note(name, error)
    seconds: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(rounds):
        for name, call in ready.items():
            seconds[name].append(seconds_of(call, device))
    return seconds


def note(what: str, error: Exception) -> None:
    """Say beside the table that something is left out, and why."""
    reason = str(error).strip() or type(error).__name__
    print(f"note: without {what}: {reason.splitlines()[0]}", file=sys.stderr)


def print_row(*cells: str) -> None:
    """A row of the table, in Markdown."""
    print("| {:<20} | {:<32} | {:<43} | {:<43} |".format(*cells), flush=True)


def print_ratios(
    what: str, tokens: int, seconds: dict[str, list[float]], pairs: list[tuple[str, str]]
) -> None:
    """A row for each pair of contenders of which both have run; tokens is what a round makes."""
    speeds = {n: f"{n}: {tokens / median(taken):,.0f} tok/s" for n, taken in seconds.items()}
    for this, that in pairs:
        if this in seconds and that in seconds:
            ratios = [b / a for a, b in zip(seconds[this], seconds[that], strict=True)]
            ratio = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            print_row(ratio, what, speeds[this], speeds[that])


OURS, THEIRS, DENSE = "deepseek.py", "transformers", "dense, as many active"
OURS_COMPILED, DENSE_COMPILED = f"{OURS} compiled", f"{DENSE}, compiled"
PEERS = [
    (OURS, THEIRS),
    (OURS_COMPILED, f"{THEIRS} compiled"),
    (OURS_COMPILED, THEIRS),
    (OURS_COMPILED, OURS),
]


def peers(model: DeepSeek, build: Callable[..., Callable]) -> dict[str, Callable]:
    """What build makes of a model and of its twin in transformers, eager and compiled."""
    twin = functools.cache(lambda: transformers_twin(model))
    return {
        OURS: lambda: build(model),
        OURS_COMPILED: lambda: build(model, compiled=True),
        THEIRS: lambda: build(twin()),
        f"{THEIRS} compiled": lambda: build(twin(), compiled=True),
    }


def transformers_twin(model: DeepSeek) -> Any:
    """transformers' model with the same weights."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder)
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def dense_twin(config: Config, equal: str = "active") -> Config:
    """The same model without experts, its feed-forward layers so wide that as many parameters
    are active, or with equal = "total" that it has as many in all."""
    layers, which = config.num_hidden_layers, ("total", "active").index(equal)

    def count(config: Config) -> int:
        with torch.device("meta"):
            return DeepSeek(config).num_parameters()[which]

    dense = replace(config, first_k_dense_replace=layers, intermediate_size=1)
    one_wider = 3 * config.hidden_size * layers  # a row or column of three matrices in each layer
    more = round((count(config) - count(dense)) / one_wider)
    return replace(dense, intermediate_size=1 + more)


def new_model(config: Config, device: torch.device) -> DeepSeek:
    """A model with random weights, made on the device."""
    with device:
        return DeepSeek(config)


def random_ids(config: Config, rows: int, length: int, device: torch.device) -> Tensor:
    """Random ids [rows, length]."""
    return torch.randint(2, config.vocab_size, (rows, length), device=device)


# ----------------------------------------------------------------------------------------------
# The parts
# ----------------------------------------------------------------------------------------------


def training_step(
    model: torch.nn.Module, ids: Tensor, dtype: torch.dtype, compiled: bool = False
) -> Callable[[], None]:
    """A whole step of our model or of transformers': forward, backward, clipping, AdamW (though
    train.py has Muon for tiny, which takes longer). Ours is compiled as train.py does it, and
    weights in bf16 are trained as with its --low_memory."""
    low_memory = next(model.parameters()).dtype == torch.bfloat16
    kind = "low_memory" if low_memory else "adamw"
    model.to(ids.device).train()
    optimizer = make_optimizer(model, 1e-4, 0.1, 0.95, kind, compiled=compiled)
    forward, inputs, targets = model, ids[:, :-1], ids[:, 1:]
    if compiled and isinstance(model, DeepSeek):
        compile_parts(model)
    elif compiled:
        forward = torch.compile(model)
    stance = "default" if compiled else "force_eager"  # the same model may be measured both ways

    def step() -> None:
        with torch.compiler.set_stance(stance):  # for what is recomputed backward, too
            with autocast(ids.device, dtype):
                if isinstance(model, DeepSeek):
                    out = forward(inputs, targets, checkpoint_activations=low_memory)
                    loss = out.loss + out.aux_loss
                else:  # it shifts the labels itself
                    loss = forward(input_ids=inputs, labels=inputs, use_cache=False).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def train(device: torch.device, rounds: int) -> None:
    """Steps against transformers (on a card only for tiny, and only eager), and against a dense
    model of as many active parameters; in train.py's dtype, and on a CPU in fp32 too."""
    dtype, cuda = choose_dtype("auto", device), device.type == "cuda"
    dtypes = dict.fromkeys([dtype] if cuda else [torch.float32, dtype])
    for size, dtype in itertools.product(TRAINED[device.type], dtypes):
        config, (rows, length) = Config.preset(size), BATCHES[size]
        rows *= ON_A_CARD if cuda else 1
        ids = random_ids(config, rows, length + 1, device)
        step = functools.partial(training_step, ids=ids, dtype=dtype)
        contenders = peers(new_model(config, device), step)
        left_out = {f"{THEIRS} compiled", *([THEIRS] if size != "tiny" else [])} if cuda else {}
        contenders = {name: c for name, c in contenders.items() if name not in left_out}
        dense = new_model(dense_twin(config), device)
        contenders[DENSE] = functools.partial(step, dense)
        contenders[DENSE_COMPILED] = functools.partial(step, dense, compiled=True)
        seconds = interleave(contenders, device, rounds)
        what = f"train {size}, {rows} x {length}, {str(dtype).removeprefix('torch.')}"
        pairs = [*PEERS, (OURS, DENSE), (OURS_COMPILED, DENSE_COMPILED)]
        print_ratios(what, rows * length, seconds, pairs)


def decoding(model: Any, prompt: Tensor, compiled: bool = False) -> Callable[[], Any]:
    """Greedy decoding of our model or of transformers'."""
    model.to(prompt.device).eval()
    if isinstance(model, DeepSeek):
        return lambda: list(model.generate(prompt, NEW_TOKENS, temperature=0, compiled=compiled))
    how = dict(max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
    if compiled:
        from transformers import CompileConfig

        how |= dict(cache_implementation="static", compile_config=CompileConfig())
        how["compile_config"]._compile_all_devices = True  # else on cards alone
    return functools.partial(model.generate, prompt, pad_token_id=0, **how)


def decode(device: torch.device, rounds: int) -> None:
    """Greedy decoding of one sequence of tiny against transformers, and of sixteen; on a card of 1b
    in bf16 too."""
    cases = [("tiny", 1), ("tiny", 16), ("1b", 1), ("1b", 16)]
    for size, rows in cases if device.type == "cuda" else cases[:2]:
        model = new_model(Config.preset(size), device)
        model = model.bfloat16() if size == "1b" else model
        prompt = random_ids(model.config, rows, 16, device)
        contenders = peers(model, functools.partial(decoding, prompt=prompt))
        if (size, rows) != ("tiny", 1):
            contenders = {name: contenders[name] for name in (OURS, OURS_COMPILED)}
        seconds = interleave(contenders, device, rounds)
        print_ratios(f"decode {size}, {rows} at once", rows * NEW_TOKENS, seconds, PEERS)


def context(device: torch.device, rounds: int) -> None:
    """A token of tiny behind a long context against one behind a short one, and with absorbed
    attention, which it takes, against expanded."""
    short, long = 256, 8192
    model = DeepSeek(Config.preset("tiny", max_position_embeddings=long)).to(device).eval()
    cache = model.new_cache(1, long)
    token = torch.zeros(1, 1, dtype=torch.long, device=device)

    @torch.no_grad()
    def read(length: int, absorb: bool) -> None:
        for _ in range(5):
            cache.lengths = [length - 1]  # forget the token again
            model(token, cache=cache, absorb=absorb)

    contenders = {
        f"at {short:,}": lambda: lambda: read(short, True),
        f"at {long:,}": lambda: lambda: read(long, True),
        f"at {long:,}, expanded": lambda: lambda: read(long, False),
    }
    near, far, expanded = contenders
    seconds = interleave(contenders, device, rounds)
    print_ratios("a token of tiny", 5, seconds, [(near, far), (far, expanded)])


def peak_memory() -> int:
    """Bytes that this process has taken at most, where Linux tells them."""
    status = Path("/proc/self/status").read_text()  # getrusage would count the parent's memory in
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def second_step(size: str, device: torch.device, low_memory: bool, cap: float | None) -> list[str]:
    """In a process of its own, with no more than cap GiB of a card: what two training steps took at
    most, and the speed of the second."""
    keep_freed_memory()
    cuda = device.type == "cuda"
    if cap:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap * 2**30 / total), device)
    rows, length = BATCHES[size] if cuda else (1, 256)
    model = DeepSeek(Config.preset(size)).to(torch.bfloat16 if low_memory else torch.float32)
    ids = random_ids(model.config, rows, length + 1, device)
    step = training_step(model, ids, choose_dtype("auto", device))
    _, seconds = (seconds_of(step, device) for _ in range(2))  # the first makes AdamW's moments
    peak = torch.cuda.max_memory_reserved(device) if cuda else peak_memory()
    took = f"a step of {rows} x {length}: {peak / 2**30:.1f} GiB"
    return [took, f"{rows * length / seconds:,.0f} tok/s"]


def memory(device: torch.device, rounds: int) -> None:
    """Peak and speed of training steps; of 1b on a card as if that had 24 and 16 GB."""
    gc.collect()
    torch.cuda.empty_cache()  # what the other parts left is wanted by other processes now
    for size, low_memory, cap in MEMORY:
        cap = cap if device.type == "cuda" else None
        what = size + " --low_memory" * low_memory + (f" within {cap} GiB" if cap else "")
        try:
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                cells = pool.submit(second_step, size, device, low_memory, cap).result()
            print_row("", what, *cells)
        except FAILURES as error:
            note(what, error)


PARTS = dict(train=train, decode=decode, context=context, memory=memory)


def machine_name(device: torch.device) -> str:
    """The card's name, or the processor's and how many threads it is given."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    names = re.findall("model name.*: (.*)", info.read_text()) if info.exists() else []
    return f"{[*names, device.type][0]}, {torch.get_num_threads()} threads"


@dataclass(frozen=True)
class Options:
    """The flags."""

    device: str = flag("auto", "cpu, cuda, mps; auto is the best there")
    only: str | None = flag(None, "one part (default: all)", choices=list(PARTS))
    rounds: int = flag(9, "measurements of each", low=1)


def main() -> None:
    options, _ = parse_flags(Options, __doc__)
    device = choose_device(options.device)
    libraries = [f"{n} {version(n)}" for n in ("torch", "transformers") if find_spec(n)]
    print(shlex.join(["python", "-m", "benchmarks.speed", *sys.argv[1:]]))
    print(f"{machine_name(device)}; {', '.join(libraries)}; {time.strftime('%d %B %Y')}\n")
    print_row("times as fast", "what", "this", "as that")
    print_row(*["---"] * 4)
    for name in [options.only] if options.only else PARTS:
        torch.manual_seed(0)
        PARTS[name](device, options.rounds)


if __name__ == "__main__":
    run_script(main)
