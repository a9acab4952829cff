"""
What deepseek.py costs in time and memory, against its peers and the machine's limits.

    python -m benchmarks.speed                        # on this machine's device, some minutes
    python -m benchmarks.speed --only decode,context  # parts of it
    python -m benchmarks.speed --device cuda


Where things are compared, all are timed alternately in one run; the table has the medians.
"transformers" is the library's DeepSeek-V2 of the same shape, as it comes, and in decoding with the
same weights; without the library those lines are left out.

Where the time of a training step of tiny goes (torch.profiler, November 2026, torch 2.13): on an
AMD EPYC without bf16, two threads, fp32: matrix products 54%, a fifth of them the experts'; element
by element (norms, SwiGLU, residuals) 14%; flash attention 10%, two thirds of that backward; softmax
of the cross-entropy 9%; routing, sorting and gathering 3%; AdamW 1%. On one with bf16 but without
AMX, one thread: matrix products 41%, attention's among them 6%; element by element 15%; softmax
of the cross-entropy 14%, of attention 4%; casts and copies 9%; routing, sorting and gathering 3%;
AdamW 1%. There a step with experts takes almost a third longer than a dense one: half of that is
because 16 small products take twice as long as a large one, the rest routing, gathering and adding.
Decoding a token takes some hundred calls of operations per layer, each over in microseconds: the
time goes into the calls. torch.compile leaves a seventh of them at most, and less than a third of
the time.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.formats import save_pretrained
from common.runtime import (
    UsageError,
    autocast,
    choose_device,
    choose_dtype,
    flag,
    keep_freed_memory,
    parse_flags,
    run_script,
)
from common.trainer import make_optimizer
from deepseek import Config, DeepSeek

TRAINING = dict(batch=8, length=256)  # of tiny, as train.py trains it
CONTEXTS = (256, 512, 1024, 2048, 4096, 8192)


class Line(NamedTuple):
    """A line of the table."""

    part: str
    what: str
    value: float
    unit: str
    ratio: float | None = None  # times as fast as `to`; in context and cache, times as much
    to: str = ""


# ----------------------------------------------------------------------------------------------
# How it is measured
# ----------------------------------------------------------------------------------------------


def wait(device: torch.device) -> None:
    """Until the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def interleave(
    contenders: dict[str, Callable[[], Any]], device: torch.device, rounds: int
) -> dict[str, float]:
    """Median seconds of each function: all are called once unmeasured, then in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(-1, rounds):
        for name, call in contenders.items():
            wait(device)
            began = time.perf_counter()
            call()
            wait(device)
            if turn >= 0:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(times) for name, times in seconds.items()}


def compared(
    part: str, unit: str, amount: float, seconds: dict[str, float], to: str
) -> Iterator[Line]:
    """Lines of amount per second, and how many times as fast as the contender `to` each is."""
    for name, time_taken in seconds.items():
        ratio = seconds[to] / time_taken if to in seconds and name != to else None
        yield Line(part, name, amount / time_taken, unit, ratio, to if ratio else "")


def flops_per_token(model: DeepSeek, length: int) -> float:
    """Of training: 6 for each active parameter, 3 times the forward pass for each pair of tokens
    that attend (half of all), nothing for what checkpointing repeats."""
    pairs = 0
    for layer in model.model.layers:  # the widths of all heads' queries and values
        attention = layer.self_attn
        query = attention.q_b_proj if hasattr(attention, "q_b_proj") else attention.q_proj
        pairs += 2 * (query.out_features + attention.o_proj.in_features)
    return 6 * model.num_parameters()[1] + 3 * pairs * length / 2


def has_transformers() -> bool:
    """Whether the library can be imported; if not, it says so."""
    try:
        import transformers  # noqa: F401
    except ImportError:
        print("note: its lines are left out without transformers: pip install transformers")
        return False
    return True


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

    def dense(width: int) -> Config:
        return replace(config, first_k_dense_replace=layers, intermediate_size=width)

    one, two = count(dense(1)), count(dense(2))
    return dense(1 + round((count(config) - one) / (two - one)))


# ----------------------------------------------------------------------------------------------
# The parts
# ----------------------------------------------------------------------------------------------


def peak(device: torch.device, rounds: int) -> Iterator[Line]:
    """What the machine can do at most: a large matrix product."""
    n = 8192 if device.type == "cuda" else 2048
    for dtype in dtypes_of(device):
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        seconds = interleave({"product": lambda a=a, b=b: a @ b}, device, rounds)["product"]
        yield Line("peak", name_of(dtype), 2 * n**3 / seconds / 1e12, "TFLOP/s")


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def training_step(
    model: torch.nn.Module,
    loss_of: Callable[[], Tensor],
    device: torch.device,
    dtype: torch.dtype,
    low_memory: bool = False,
) -> Callable[[], None]:
    """A whole step: forward, backward, clipping, AdamW."""
    optimizer = make_optimizer(model.to(device).train(), 1e-4, 0.1, 0.95, low_memory)

    def step() -> None:
        with autocast(device, dtype):
            loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def our_step(
    config: Config,
    ids: Tensor,
    device: torch.device,
    dtype: torch.dtype,
    compiled: bool = False,
    low_memory: bool = False,
) -> Callable[[], None]:
    model = DeepSeek(config).to(torch.bfloat16 if low_memory else torch.float32)
    forward = torch.compile(model) if compiled else model

    def loss() -> Tensor:
        out = forward(ids[:, :-1], ids[:, 1:], checkpoint_activations=low_memory)
        return out.loss + out.aux_loss

    return training_step(model, loss, device, dtype, low_memory)


def dtypes_of(device: torch.device) -> list[torch.dtype]:
    """fp32, and what train.py would take."""
    return list(dict.fromkeys([torch.float32, choose_dtype("auto", device)]))


def random_ids(config: Config, rows: int, length: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(2, config.vocab_size, (rows, length), generator=generator).to(device)


def hf_worker(
    pipe: Any, device: str, dtype: torch.dtype, keep: bool, compiled: bool = False
) -> None:
    """In a process of its own: a training step of transformers' tiny for each message in pipe."""
    if keep:
        keep_freed_memory()
    config, place = Config.preset("tiny"), torch.device(device)
    ids = random_ids(config, TRAINING["batch"], TRAINING["length"], place)
    twin = transformers_twin(DeepSeek(config))
    forward = torch.compile(twin) if compiled else twin

    def loss() -> Tensor:  # it shifts the labels itself
        return forward(input_ids=ids, labels=ids, use_cache=False).loss

    step = training_step(twin, loss, place, dtype)
    with suppress(EOFError, KeyboardInterrupt):  # until nobody asks any more
        while True:
            pipe.recv()
            step()
            wait(place)
            pipe.send(None)


def spawn_worker(target: Callable[..., None], *args: Any) -> Callable[[], Any]:
    """target(pipe, *args) in a process of its own; what is returned asks it once, and waits."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    spawn.Process(target=target, args=(there, *args), daemon=True).start()
    there.close()

    def ask() -> Any:
        try:
            here.send(None)
            return here.recv()
        except (EOFError, OSError) as error:
            message = f"the process of {target.__name__} has ended: see above, or use --only"
            raise UsageError(message) from error

    return ask


def train(device: torch.device, rounds: int) -> Iterator[Line]:
    """Steps of tiny against transformers (both in fp32 and in the dtype that train.py takes), and
    against a dense model of as many active parameters; and its TFLOP/s, to hold against `peak`.

    transformers runs in a process of its own, once as it comes and on a CPU once more with
    `keep_freed_memory`, which the scripts call for themselves.
    """
    config, dtype = Config.preset("tiny"), choose_dtype("auto", device)
    ids = random_ids(config, TRAINING["batch"], TRAINING["length"] + 1, device)
    contenders, peers, theirs = {}, [], has_transformers()
    for kind in dtypes_of(device):
        contenders[f"deepseek.py, {name_of(kind)}"] = our_step(config, ids, device, kind)
        if theirs:
            peers.append(f"transformers, {name_of(kind)}")
            contenders[peers[-1]] = spawn_worker(hf_worker, str(device), kind, False)
        if theirs and device.type == "cpu":
            kept = spawn_worker(hf_worker, str(device), kind, True)
            contenders[f"{peers[-1]}, memory kept"] = kept
    contenders["dense, as many active"] = our_step(dense_twin(config), ids, device, dtype)
    seconds = interleave(contenders, device, rounds)
    tokens = TRAINING["batch"] * TRAINING["length"]
    yield from compared("train", "tok/s", tokens, seconds, min(peers, key=seconds.get, default=""))
    ours = seconds[f"deepseek.py, {name_of(dtype)}"]
    overhead = ours / seconds["dense, as many active"]
    yield Line("train", "MoE step over dense step", overhead, "times")
    rate = flops_per_token(DeepSeek(config), TRAINING["length"]) * tokens / ours / 1e12
    yield Line("train", f"deepseek.py, {name_of(dtype)}", rate, "TFLOP/s")


def compiled_steps(device: torch.device, rounds: int) -> Iterator[Line]:
    """The same step through torch.compile, against transformers' step as it comes, and compiled
    with its freed memory kept as the scripts keep theirs. Before them the time of our first step,
    which compiles, or finds that in PyTorch's cache on disk."""
    config, dtype = Config.preset("tiny"), choose_dtype("auto", device)
    ids = random_ids(config, TRAINING["batch"], TRAINING["length"] + 1, device)
    compiled = our_step(config, ids, device, dtype, compiled=True)
    began = time.perf_counter()
    compiled()
    yield Line("compile", "first step", time.perf_counter() - began, "s")
    contenders = {"deepseek.py": our_step(config, ids, device, dtype)}
    contenders["deepseek.py, compiled"] = compiled
    if has_transformers():
        cpu = device.type == "cpu"
        contenders["transformers"] = spawn_worker(hf_worker, str(device), dtype, False)
        compiled_peer = spawn_worker(hf_worker, str(device), dtype, cpu, True)
        contenders["transformers, compiled"] = compiled_peer
    seconds = interleave(contenders, device, rounds)
    tokens = TRAINING["batch"] * TRAINING["length"]
    yield from compared("compile", "tok/s", tokens, seconds, "transformers")
    gain = seconds["deepseek.py"] / seconds["deepseek.py, compiled"]
    yield Line("compile", "our step over our compiled step", gain, "times")
    if "transformers" in seconds:
        gain = seconds["transformers, compiled"] / seconds["deepseek.py, compiled"]
        yield Line("compile", "their compiled step over ours", gain, "times")


@torch.no_grad()
def decode(device: torch.device, rounds: int) -> Iterator[Line]:
    """Greedy decoding of tiny, one sequence, with a cache; transformers as it comes."""
    new = 100
    config = Config.preset("tiny")
    torch.manual_seed(0)
    model = DeepSeek(config).to(device).eval()
    prompt = random_ids(config, 1, 16, device)

    def ours(compiled: bool) -> list[Tensor]:
        return list(model.generate(prompt, new, temperature=0, compiled=compiled))

    contenders = {"deepseek.py": lambda: ours(False), "deepseek.py, compiled": lambda: ours(True)}
    if has_transformers():
        twin = transformers_twin(model).to(device)
        limits = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
        contenders["transformers"] = lambda: twin.generate(prompt, **limits)
        text = torch.stack(ours(False), 1)
        if not torch.equal(text, contenders["transformers"]()[:, prompt.shape[1] :]):
            print("note: the two texts differ, as near ties in rounding can make them")
    seconds = interleave(contenders, device, rounds)
    yield from compared("decode", "tok/s", new, seconds, "transformers")


@torch.no_grad()
def context(device: torch.device, rounds: int) -> Iterator[Line]:
    """Time of a token over the length of the context, absorbed and expanded: tiny, and one layer
    with V2-Lite's attention, where latent attention is at home."""
    lite = dict(num_hidden_layers=1, vocab_size=64, bos_token_id=0, eos_token_id=1)
    lite |= dict(rope_scaling=None)
    for name, config in (
        ("tiny", Config.preset("tiny", max_position_embeddings=16384)),
        ("V2-Lite layer", Config.preset("v2-lite", intermediate_size=16, **lite)),
    ):
        model = DeepSeek(config).to(device).eval()
        cache = model.new_cache(1, CONTEXTS[-1] + 1)
        cache.latents.normal_()
        token = torch.zeros(1, 1, dtype=torch.long, device=device)

        def step(length: int, absorb: bool, model=model, cache=cache, token=token) -> None:
            for _ in range(5):
                cache.lengths = [length]  # forget the token again
                model(token, cache=cache, absorb=absorb)

        first = None
        for length in CONTEXTS:
            ways = {
                f"{name} absorbed": lambda n=length: step(n, True),
                f"{name} expanded": lambda n=length: step(n, False),
            }
            seconds = interleave(ways, device, rounds)
            first = first or seconds
            for way, taken in seconds.items():
                ratio = taken / first[way]
                yield Line("context", f"{way}, {length}", 1e3 * taken / 5, "ms", ratio, "256")


@torch.no_grad()
def batched_prompts(device: torch.device, rounds: int) -> Iterator[Line]:
    """Sixteen prompts of different lengths at once, against one after the other."""
    config, new = Config.preset("tiny"), 50
    torch.manual_seed(0)
    model = DeepSeek(config).to(device).eval()
    ids = random_ids(config, 16, 100, device).tolist()
    prompts = [row[: 5 + 6 * i] for i, row in enumerate(ids)]

    def together() -> Tensor:
        return torch.stack(list(model.generate(prompts, new, temperature=0)), 1)

    def one_by_one() -> Tensor:
        rows = [list(model.generate([p], new, temperature=0)) for p in prompts]
        return torch.stack([torch.cat(row) for row in rows])

    alike = (together() == one_by_one()).float().mean().item()
    yield Line("batch", "tokens that are the same", 100 * alike, "%")
    seconds = interleave({"together": together, "one by one": one_by_one}, device, rounds)
    yield from compared("batch", "tok/s", new * len(prompts), seconds, "one by one")


def peak_memory() -> int:
    """Bytes that this process has taken at most."""
    try:  # what getrusage says on Linux counts the parent's memory in
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])
    except (OSError, IndexError):
        try:
            import resource
        except ImportError as error:
            raise UsageError("the part memory needs Linux or macOS: leave it out") from error
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak * (1 if sys.platform == "darwin" else 1024)


def some_steps(size: str, device: str, length: int, low_memory: bool, rounds: int, queue) -> None:
    """In a process of its own: the peak of memory of training steps of one row, and the seconds
    of one."""
    keep_freed_memory()
    place, config = torch.device(device), Config.preset(size)
    config = replace(config, max_position_embeddings=length)
    ids = random_ids(config, 1, length + 1, place)
    dtype = choose_dtype("auto", place)
    step = our_step(config, ids, place, dtype, low_memory=low_memory)
    seconds = interleave({"": step}, place, rounds)[""]
    cuda = place.type == "cuda"
    queue.put((torch.cuda.max_memory_allocated(place) if cuda else peak_memory(), seconds))


def peak_of_steps(device: torch.device, rounds: int) -> Iterator[Line]:
    """The peak and the speed of training steps of one row, in a process of their own."""
    peak_memory()  # where nobody tells, say so now
    length = 1024 if device.type == "cuda" else 256
    spawn = multiprocessing.get_context("spawn")
    for size, low in (("tiny", False), ("small", False), ("1b", False), ("1b", True)):
        if low and not importlib.util.find_spec("torchao"):
            continue
        queue = spawn.Queue()
        task = (size, str(device), length, low, rounds if device.type == "cuda" else 1, queue)
        process = spawn.Process(target=some_steps, args=task)
        process.start()
        while process.is_alive() and queue.empty():
            time.sleep(0.1)
        name = f"{size} --low_memory" if low else size
        if queue.empty():
            print(f"note: a step of {name} did not end, as where memory is short")
            continue
        peak_bytes, seconds = queue.get()
        process.join()
        yield Line("memory", f"{name}, a step of 1 x {length}", peak_bytes / 2**30, "GiB")
        yield Line("memory", f"{name}, speed", length / seconds, "tok/s")
        with torch.device("meta"):
            model = DeepSeek(Config.preset(size))
        rate = flops_per_token(model, length) * length / seconds / 1e12
        yield Line("memory", f"{name}, speed", rate, "TFLOP/s")


PARTS = {
    "peak": peak, "train": train, "compile": compiled_steps, "decode": decode,
    "context": context, "batch": batched_prompts, "memory": peak_of_steps,
}  # fmt: skip


# ----------------------------------------------------------------------------------------------
# What is made of it
# ----------------------------------------------------------------------------------------------


def print_line(line: Line) -> None:
    ratio = f"{line.ratio:.2f} x {line.to}" if line.ratio else ""
    value = f"{line.value:,.4g} {line.unit}"
    print(f"{line.part:<8}{line.what:<37}{value:>18}   {ratio}".rstrip(), flush=True)


def machine_name(device: torch.device) -> str:
    """The card's name, or the processor's and how many threads it is given."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(li.partition(":")[2].strip() for li in lines if li.startswith("model name"))
    except (OSError, StopIteration):
        name = device.type
    return f"{name}, {torch.get_num_threads()} threads"


@dataclass(frozen=True)
class Options:
    """The flags."""

    device: str = flag("auto", "cpu, cuda, mps; auto is the best there")
    only: str = flag(",".join(PARTS), "parts, with commas between them")
    rounds: int = flag(9, "measurements of each", low=1)


def main() -> None:
    options, _ = parse_flags(Options, __doc__)
    chosen = options.only.split(",")
    for name in chosen:
        if name not in PARTS:
            raise UsageError(f"--only {name!r} is no part: choose from {','.join(PARTS)}")
    device = choose_device(options.device)
    print(f"{machine_name(device)}, torch {torch.__version__}, {time.strftime('%B %Y')}")
    for name in chosen:
        torch.compiler.reset()  # else it would take this part's shapes for ever changing ones
        for line in PARTS[name](device, options.rounds):
            print_line(line)


if __name__ == "__main__":
    run_script(main)
