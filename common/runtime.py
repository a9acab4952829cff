"""
What every script needs around its work: flags made from dataclasses, errors of one sentence,
devices and dtypes, and the processes that torchrun starts.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import field, fields
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args, get_type_hints

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

from deepseek import Config, ConfigError

OLDEST_TORCH = 2, 11  # which has grouped products on every device
DTYPES = ("float32", "bfloat16", "float16")
Options = TypeVar("Options")


class UsageError(ValueError):
    """Something the user can mend; the message is one sentence."""


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main(), turning what a user can mend into one sentence and exit code 2. With
    DEEPSEEK_DEBUG=1 in the environment the sentence comes with the traceback."""
    keep_freed_memory()
    for stream in (sys.stdin, sys.stdout, sys.stderr):  # what a console cannot say becomes a '?'
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")

    def leave(message: str, code: int = 2) -> NoReturn:
        if os.environ.get("DEEPSEEK_DEBUG"):
            traceback.print_exc()
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr, flush=True)
        sys.exit(code)

    if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST_TORCH:
        needed = ".".join(map(str, OLDEST_TORCH))
        leave(f"torch {torch.__version__} is too old: install torch {needed} or later")
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
            sys.stdout.flush()
            # At once: one of gloo's threads may still hold a tensor, and where Python has ended by
            # the time it lets go of it, the process is aborted (pytorch's pull request 179291).
            os._exit(0)
    except (UsageError, ConfigError, FloatingPointError) as error:
        if rank() > 0:
            time.sleep(2)  # most likely the first process says the same, and torchrun ends us
        leave(str(error))
    except KeyboardInterrupt:
        leave("interrupted", 130)
    except BrokenPipeError:  # the reader of our output (head, less) has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except torch.OutOfMemoryError as error:
        what = first_line(error)
        leave(f"{what} Take less at a time: more --grad_accum, a shorter --seq_len or prompt.")
    except OSError as error:  # a disk that is full, or fails
        leave(first_line(error))
    except Exception as error:
        if not is_compile_error(error):
            raise
        leave(f"torch.compile fails here ({first_line(error)}): leave --compile out")


def is_compile_error(error: Exception) -> bool:
    """Whether torch.compile itself has failed, not the code that it made: the exception is of its
    kind, or was raised within it."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    places = type(error).__module__, *(f.f_globals.get("__name__", "") for f in frames[-1:])
    its_own, made = ("torch._dynamo", "torch._inductor"), "torch._inductor.runtime.compile_tasks"
    return any(p.startswith(its_own) and not p.startswith(made) for p in places)


def first_line(error: Exception) -> str:
    """What an error says, without what follows."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks of up to 32 MiB, as the next step asks for the same again.

    Without fetching their pages anew, a step of tiny takes 5 to 10% less on a CPU.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # macOS, musl, Windows
        return
    trim_threshold, mmap_threshold = -1, -3  # as malloc.h numbers them
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(mmap_threshold, 2**25)  # the most that every version takes


# ----------------------------------------------------------------------------------------------
# Flags. A script's flags are the fields of a frozen dataclass.
# ----------------------------------------------------------------------------------------------

# What a flag may do when a run is resumed:
SAME = "same"  # it changes what is learned: a value that differs is refused
ROUNDING = "rounding"  # it changes rounding or random draws: taken, said, without promise of bits
MORE = "more"  # it may grow: the run trains on
FREE = "free"  # it changes neither


def flag(
    default: Any, help: str, on_resume: str = SAME, *, low: float | None = None,
    high: float = math.inf, above: bool = False, choices: list[str] | None = None,
) -> Any:  # fmt: skip
    """A field that is a flag. low, high: its limits, low itself excluded with above. The help text
    ends with the default, unless it speaks of it."""
    if "(default:" not in help:
        said = " ".join(default) if type(default) is list else default
        said = "none" if default is None else "off" if default is False else said
        help = f"{help} (default: {said})"
    data = dict(help=help, on_resume=on_resume, low=low, high=high, above=above, choices=choices)
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=data)
    return field(default=default, metadata=data)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that answers bad input with one sentence."""

    def __init__(self, doc: str):
        super().__init__(
            description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False, argument_default=argparse.SUPPRESS,
        )  # fmt: skip

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help lists the flags)\n")


def parse_flags(
    options: type[Options], doc: str, renamed: dict[str, str] | None = None
) -> tuple[Options, dict[str, Any]]:
    """What the command line says, and those of its flags that were typed. Where the dataclass has a
    field `config`, each field of Config is a flag as well, and what was typed of them is there."""
    parser = Parser(doc)
    kinds = get_type_hints(options)
    for f in fields(options):
        if not f.metadata:
            continue
        given, kind = f.metadata, kinds[f.name]
        how: dict[str, Any] = dict(help=given["help"].replace("%", "%%"))
        if kind is bool:
            how["action"] = "store_true"
        else:
            plain = next(k for k in get_args(kind) or (kind,) if k is not type(None))
            many = kind == list[str]
            how |= dict(nargs="+", metavar="NAME") if many else dict(choices=given["choices"])
            if plain in (int, float):
                how["type"] = number(plain, given["low"] or 0, given["high"], given["above"])
        parser.add_argument(f"--{f.name}", **how)
    if with_config := "config" in kinds:
        group = parser.add_argument_group("model: the fields of Config (default: the size's)")
        hints = get_type_hints(Config)
        for f in fields(Config):
            if f.name not in ("bos_token_id", "eos_token_id"):  # the tokenizer knows them
                convert = config_value(hints[f.name])
                help = f.metadata["meaning"]
                group.add_argument(f"--{f.name}", type=convert, metavar="X", help=help)
    for old, new in (renamed or {}).items():
        parser.add_argument(f"--{old}", nargs="*", action=renamed_flag(new), help=argparse.SUPPRESS)
    typed = vars(parser.parse_args())
    if with_config:
        names = [f.name for f in fields(Config) if f.name in typed]
        typed["config"] = {name: typed.pop(name)[0] for name in names}
    return options(**typed), typed


def renamed_flag(new: str) -> type[argparse.Action]:
    """What answers a flag that has another name now."""

    class Renamed(argparse.Action):
        def __call__(self, parser, namespace, values, option_string=None):
            parser.error(f"{option_string} is called --{new} now")

    return Renamed


def number(kind: type, low: float, high: float = math.inf, above: bool = False) -> Callable:
    """An argparse type: a finite int or float in [low, high], or in (low, high]."""

    def parse(text: str):
        try:
            value = kind(text)
            if not (low < value if above else low <= value) or not value <= min(high, 1e30):
                raise ValueError
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {limits}") from None
        return value

    limits = "a whole number" if kind is int else "a number"
    limits += f" above {low}" if above else f" of at least {low}"
    limits += f" and at most {high}" if high < math.inf else ""
    return parse


def config_value(kind: Any) -> Callable[[str], list]:
    """An argparse type for a field of Config: [value], as None is a value too."""
    wanted = {bool: "true or false", float: "a number", dict | None: "JSON, or none"}

    def convert(text: str):
        try:
            if text.lower() in ("none", "null") and type(None) in get_args(kind):
                return [None]
            if kind is bool:
                return [{"true": True, "false": False}[text.lower()]]
            if kind == dict | None:
                return [json.loads(text)]
            return [(int if kind == int | None else kind)(text)]
        except (KeyError, ValueError):
            what = wanted.get(kind, "a whole number")
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}") from None

    return convert


def resume_options(stored: dict[str, Any], options: Options, typed: dict[str, Any]) -> Options:
    """The options of a stored run with what was typed anew, as the flags' classes allow. Raises
    UsageError for a flag that must stay as it was."""
    changed, notes = {}, []
    for f in fields(options):
        if f.name not in typed or not f.metadata:
            continue
        value, old, how = typed[f.name], stored.get(f.name), f.metadata["on_resume"]
        if how == SAME and value != old:
            refuse_change(f.name, value, old)
        if how == MORE and old is not None and value < old:
            refuse_change(f.name, value, old)
        if how == MORE and old is not None and value > old:
            notes.append(
                f"note     --{f.name} {value} in place of {old}: the learning rate is that of a run"
                " of this length, so it may rise"
            )
        if how == ROUNDING and value != old:
            notes.append(
                f"note     --{f.name} {value} in place of {old}: results may round otherwise"
            )
        changed[f.name] = value
    known = {f.name for f in fields(options)}
    resumed = type(options)(**{n: v for n, v in stored.items() if n in known} | changed)
    for note in notes:
        say(resumed, note)
    return resumed


def refuse_change(name: str, value: Any, old: Any) -> NoReturn:
    """Raise UsageError: a run goes on with what it began with."""
    raise UsageError(
        f"--{name} {value} differs from the run's {old}: leave it out, or start another run in"
        " another --out"
    )


def say(options: Any, text: str) -> None:
    """Information for the user, once, unless --log_level quiet."""
    if options.log_level != "quiet" and rank() == 0:
        print(text, flush=True)


# ----------------------------------------------------------------------------------------------
# Several processes, as torchrun starts them
# ----------------------------------------------------------------------------------------------


def is_launched() -> bool:
    """Whether torchrun has started this process: it says all that is needed to meet the others."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def init_distributed(device: torch.device) -> None:
    """Meet the other processes of torchrun; without it nothing happens."""
    if is_launched() and not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        card = device if device.type == "cuda" else None  # nccl asks for it before it can wait
        hours = timedelta(hours=6)  # one may cut a long text
        dist.init_process_group(backend, timeout=hours, device_id=card)


def rank() -> int:
    """Which process this is, from 0."""
    if dist.is_initialized():
        return dist.get_rank()
    return int(os.environ["RANK"] or 0) if is_launched() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def main_process_first() -> Iterator[None]:
    """What the first process makes, the others find made."""
    if rank() > 0:
        dist.barrier()
    yield
    if rank() == 0 and world_size() > 1:
        dist.barrier()


def all_reduce_sum(values: Tensor) -> Tensor:
    """The sum of a tensor over all processes."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def gather_full(tree: Any) -> Any:
    """A tree of tensors with what --fsdp has sharded put together again, in the first process' CPU
    memory; the others, which have to call it too, keep nothing of it."""

    def gather(t: Any) -> Any:
        if not isinstance(t, DTensor):
            return t
        full = t.full_tensor()
        return full.cpu() if rank() == 0 else None

    return tree_map(gather, tree)


def shard_optimizer_state(
    optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> dict[str, Any]:
    """An optimizer's state dict, its moments sharded as its parameters are by --fsdp."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for i, moments in state["state"].items():
        p = parameters[i]
        for name, t in moments.items():
            if isinstance(p, DTensor) and t.shape == p.shape:
                t = t.to(p.device)
                moments[name] = distribute_tensor(t, p.device_mesh, p.placements)
    return state


# ----------------------------------------------------------------------------------------------
# Device and dtype
# ----------------------------------------------------------------------------------------------


def choose_device(name: str) -> torch.device:
    """auto takes cuda, then mps, then cpu. torchrun gives each process a card of its own; without
    it, cuda is the first. Raises UsageError for a device that is not there."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if cuda else "mps" if mps else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"device {name!r} is unknown: use cpu, cuda, cuda:1 or mps") from error
    if not {"cpu": True, "cuda": cuda, "mps": mps}.get(device.type, False):
        raise UsageError(
            f"device {name!r} is not seen by this torch {torch.__version__}: try --device cpu"
        )
    if device.type == "cuda":  # which set_device() wants with a number
        own = os.environ.get("LOCAL_RANK") if is_launched() else None
        device = torch.device("cuda", int(own or device.index or 0))
        if device.index >= torch.cuda.device_count():
            raise UsageError(
                f"device {str(device)!r} is not there: this machine has {torch.cuda.device_count()}"
                " CUDA cards, numbered from 0"
            )
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        torch.zeros(1, device=device).add_(1).item()  # a card too old for this torch fails here
    except RuntimeError as error:
        raise UsageError(
            f"device {str(device)!r} does not compute ({first_line(error)}): try --device cpu"
        ) from error
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """auto: bf16 where the hardware computes it (on a CPU a third faster than fp32), fp16 on older
    CUDA cards, otherwise fp32."""
    if name != "auto":
        if name == "float16" and device.type != "cuda":
            raise UsageError("dtype float16 needs a CUDA card: use float32 or bfloat16")
        return getattr(torch, name)
    if device.type == "cuda":  # is_bf16_supported() would also count emulation
        major, _ = torch.cuda.get_device_capability(device)
        return torch.bfloat16 if major >= 8 else torch.float16
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):  # since 2.12
        able = torch.cpu.get_capabilities()
        if able.get("avx512_bf16") or able.get("amx_bf16"):
            return torch.bfloat16
    return torch.float32


def set_up(options: Any, state: dict[str, Any] | None) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of a run, whose processes meet; state: the checkpoint that it goes on from.
    Says so where that is of another precision."""
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    init_distributed(device)
    name = str(dtype).removeprefix("torch.")
    if state and (old := state.get("dtype")) != name:
        say(options, f"note     {name} in place of {old}: results may round otherwise")
    return device, dtype


def autocast(device: torch.device, dtype: torch.dtype):
    """The context in which the model is called: mixed precision, or nothing for fp32."""
    return torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext()
