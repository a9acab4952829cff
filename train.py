"""
Pretrain a DeepSeek-V2 of any size.

    python train.py                                        # tiny, built-in stories, five minutes
    python train.py --data my.txt --out out/mine           # your own text
    python train.py --resume --out out/mine                # go on where it stopped
    torchrun --nproc_per_node=8 train.py --size 1b --data tinystories
"""

# What the scripts share is written here once: errors, flags, device and dtype, checkpoints, the log
# and its picture, the schedule, evaluation, the loop.

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import lzma
import math
import os
import pickle
import platform
import shutil
import signal
import statistics
import struct
import sys
import tempfile
import time
import traceback
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import tokenizers
import torch
import torch.distributed as dist
from filelock import FileLock, Timeout  # comes with torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves, tree_map
from tqdm import tqdm

import data
from data import Batches, DataError, Windows
from deepseek import (
    PRESETS,
    CheckpointError,
    Config,
    ConfigError,
    DeepSeek,
    find_checkpoint,
    lora_state,
)

DTYPES = ("float32", "bfloat16", "float16")
FORMAT = 2  # of ckpt.pt
PARTS: dict[str, type] = {  # of ckpt.pt, and what they are
    **dict.fromkeys(("model", "optimizer", "scaler", "config", "rng", "args", "versions"), dict),
    **dict.fromkeys(("tokenizer", "text", "dtype"), str),
    **dict.fromkeys(("step", "tokens"), int),
    **{"adapters": bool, "best_val_loss": float},
}
DAMAGE = (  # what zipfile, pickle and torch raise on a file that is no checkpoint, or not whole
    *(OSError, EOFError, RuntimeError, LookupError, TypeError, ValueError, AttributeError),
    *(pickle.UnpicklingError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error),
)
BEST = "the best so far"  # what `keep` of a trainer writes
SAVE_MINUTES = 15  # a checkpoint is never older
SKIPS_IN_A_ROW = 5  # steps with a loss that is not finite, which end a run
CROWDED_STEPS = 200  # steps in which one expert is visited by nearly all, until that is said
SUMS = "SHA256SUMS"  # of the files of an adapter or an export; `sha256sum -c` reads it, too
SETTLED = (  # flags that a run has always settled
    *("batch_size", "grad_accum", "seq_len", "vocab_size"),
    *("lr", "warmup", "beta2", "schedule"),
)
RUN_FILES = [  # what a run may leave in --out
    *("ckpt.pt", "log.jsonl", "curves.png", "best.pt"),
    *("adapter_model.safetensors", "adapter_config.json", SUMS),
]

# What each size is trained with unless told otherwise; of the official sizes, what the paper says
# (5.7T and 8.1T tokens), less the growing of V2's batch. piece: rows that a process computes at a
# time, where all of its share would not fit on a card (4 of 1b's 1,024 tokens fit into 24 GB).
RECIPES: dict[str, dict[str, Any]] = {
    "tiny": dict(batch_size=8, lr=3e-3, beta2=0.99, schedule="linear", warmup=100, minutes=5.0),
    "small": dict(batch_size=32, lr=1e-3, warmup=200, steps=5_000),
    "1b": dict(batch_size=64, piece=4, lr=4e-4, warmup=2_000, steps=50_000),
    "v2-lite": dict(batch_size=4608, piece=1, seq_len=4096, lr=4.2e-4, warmup=2_000, steps=302_000),
    "v2": dict(batch_size=9216, piece=1, seq_len=4096, lr=2.4e-4, warmup=2_000, steps=215_000),
}

ROUNDS = 10  # that a recipe goes through a text at most


# ----------------------------------------------------------------------------------------------
# Errors and flags
# ----------------------------------------------------------------------------------------------


class UsageError(ValueError):
    """Something the user can mend; the message is one sentence."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that shows defaults and answers bad input with one sentence."""

    def __init__(self, description: str):
        super().__init__(
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")

    def explicit(self, argv: list[str] | None = None) -> set[str]:
        """The names of the flags that were typed."""
        saved = {action.dest: action.default for action in self._actions}
        for action in self._actions:
            action.default = argparse.SUPPRESS
        typed = set(vars(self.parse_args(argv)))
        for action in self._actions:
            action.default = saved[action.dest]
        return typed

    def check(self, stored: dict[str, Any]) -> dict[str, Any]:
        """The stored flags of an earlier run, read as if they were typed once more."""
        line = []
        for action in self._actions:
            value, name = stored.get(action.dest), action.option_strings[0]
            if action.nargs == 0:
                line += [name] if value else []
            elif isinstance(value, list):
                line += [name, *map(str, value)]
            elif value is not None:
                plain = isinstance(value, (bool, dict))  # as they are typed: true, {"a": 1}
                line.append(f"{name}={json.dumps(value) if plain else value}")
        return vars(self.parse_args(line))


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

    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
            sys.stdout.flush()
            # At once: one of gloo's threads may still hold a tensor, and where Python has ended by
            # the time it lets go of it, the process is aborted (pytorch's pull request 179291).
            os._exit(0)
    except (UsageError, DataError, ConfigError, CheckpointError) as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(2)  # most likely the first process says the same, and torchrun ends us
        leave(str(error))
    except KeyboardInterrupt:
        leave("interrupted", 130)
    except BrokenPipeError:  # the reader of our output (head, less) has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except torch.OutOfMemoryError as error:
        what = str(error).splitlines()[0]
        leave(f"{what} Take less at a time: more --grad_accum, a shorter --seq_len or prompt.")
    except OSError as error:  # a disk that is full, or fails
        leave(str(error).splitlines()[0])
    except RuntimeError as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        what = str(error).strip().splitlines()[0]
        leave(f"torch.compile fails here ({what}): leave --compile out")


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


def add_common_flags(parser: Parser, out: str) -> None:
    """The flags that train.py and finetune.py share; out: the default folder."""
    add, positive = parser.add_argument, number(int, 1)
    add("--steps", type=positive, help="optimizer steps (default: the recipe's)")
    add(
        "--minutes",
        type=number(float, 0, above=True),
        help="instead of --steps: time (default: recipe's)",
    )
    add("--batch_size", type=positive, help="sequences per step (default: the recipe's)")
    add("--seq_len", type=number(int, 2), help="tokens per sequence (default: the model's context)")
    add("--grad_accum", type=positive, help="pieces that a batch is cut into (default: recipe's)")
    add("--lr", type=number(float, 0, above=True), help="highest learning rate (default: recipe's)")
    add("--warmup", type=number(int, 0), help="steps of linear warm-up (default: the recipe's)")
    schedules = (
        "step: x0.316 at 60%% and 90%%, as the paper; cosine: to a tenth; linear: to nothing"
    )
    kinds = ["step", "cosine", "linear", "constant"]
    add("--schedule", choices=kinds, help=f"{schedules} (default: step, or the recipe's)")
    beta2 = "memory of AdamW's squares (default: 0.95, the paper's, unless the recipe has another)"
    add("--beta2", type=number(float, 0, 0.99999), help=beta2)
    add("--weight_decay", type=number(float, 0), default=0.1, help="on matrices (default: 0.1)")
    add("--clip", type=number(float, 0, above=True), default=1.0, help="gradient norm (default: 1)")
    add("--eval_every", type=positive, help="steps between evaluations (default: a tenth of all)")
    held_out = "held-out tokens in an evaluation (default: 50000)"
    add("--eval_tokens", type=number(int, 1), default=50_000, help=held_out)
    saves = f"steps between checkpoints, at most {SAVE_MINUTES} minutes (default: --eval_every)"
    add("--save_every", type=positive, help=saves)
    add("--seed", type=number(int, 0, 2**31), default=0, help="of weights and data (default: 0)")
    add("--out", default=out, help=f"folder for what the run leaves (default: {out})")
    add("--resume", action="store_true", help="go on with the run in --out (default: off)")
    add("--overwrite", action="store_true", help="replace the run in --out (default: off)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps (default: auto, the best there)")
    dtypes = "of the matrix products (default: auto, bfloat16 where the machine computes it)"
    add("--dtype", choices=["auto", *DTYPES], default="auto", help=dtypes)
    add("--compile", action="store_true", help="use torch.compile (default: off)")
    add("--checkpoint_activations", action="store_true", help="less memory, slower (default: off)")
    levels = "quiet: errors only (default: info)"
    add("--log_level", choices=["quiet", "info"], default="info", help=levels)


def add_config_flags(parser: Parser) -> None:
    """A flag for every field of Config that is a choice; unset ones keep the size's value."""
    group = parser.add_argument_group("model: the fields of Config (default: the size's)")
    for name, (kind, meaning) in Config.describe().items():
        if name in ("bos_token_id", "eos_token_id"):
            continue  # the tokenizer knows them
        group.add_argument(f"--{name}", type=_config_type(kind), help=meaning, metavar="X")


def _config_type(kind: Any) -> Callable[[str], Any]:
    def parse(text: str):
        if text.lower() in ("none", "null") and kind in (int | None, dict | None):
            return "none"
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if kind == dict | None:
            return json.loads(text)
        return (int if kind == int | None else kind)(text)

    def convert(text: str):
        try:
            return parse(text)
        except (KeyError, ValueError):
            raise argparse.ArgumentTypeError(f"invalid value {text!r}") from None

    return convert


def config_overrides(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of Config that were given as flags."""
    given = {name: getattr(args, name, None) for name in Config.describe()}
    return {k: None if v == "none" else v for k, v in given.items() if v is not None}


# ----------------------------------------------------------------------------------------------
# Several processes, as torchrun starts them
# ----------------------------------------------------------------------------------------------


def join_processes(device: torch.device) -> None:
    """Meet the other processes of torchrun; without it nothing happens."""
    if "RANK" in os.environ and not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        card = device if device.type == "cuda" else None  # nccl asks for it before it can wait
        hours = timedelta(hours=6)  # one may cut a long text
        dist.init_process_group(backend, timeout=hours, device_id=card)


def rank() -> int:
    """Which process this is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def first_process_first() -> Iterator[None]:
    """What the first process makes, the others find made."""
    if rank() > 0:
        dist.barrier()
    yield
    if rank() == 0 and world() > 1:
        dist.barrier()


def summed(values: Tensor) -> Tensor:
    """The sum of a tensor over all processes."""
    if world() > 1:
        dist.all_reduce(values)
    return values


def whole(tree: Any) -> Any:
    """A tree of tensors with what --fsdp shared out put together again, on the CPU. All processes
    call it."""
    return tree_map(lambda t: t.full_tensor().cpu() if isinstance(t, DTensor) else t, tree)


def share_out(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state dict, its moments cut as its parameters are by --fsdp."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for i, moments in state["state"].items():
        p = parameters[i]
        for name, t in moments.items():
            if isinstance(p, DTensor) and t.shape == p.shape:
                t = t.to(p.device)
                moments[name] = distribute_tensor(t, p.device_mesh, p.placements)
    return state


# ----------------------------------------------------------------------------------------------
# Device, dtype, memory
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
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK") or device.index or 0))
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
        reason = str(error).strip().splitlines()[0]
        raise UsageError(
            f"device {str(device)!r} does not compute ({reason}): try --device cpu"
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


def autocast(device: torch.device, dtype: torch.dtype):
    """The context in which the model is called: mixed precision, or nothing for fp32."""
    return torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext()


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be had on the device; None where nobody tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return None
    except OSError:
        try:
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (AttributeError, ValueError, OSError):
            return None


def estimate_memory(
    model: DeepSeek, micro_batch: int, seq_len: int, checkpointing: bool, dtype: torch.dtype
) -> int:
    """Bytes that training needs, roughly: the weights, gradients and two Adam moments of those that
    are trained (the moments of bf16 weights in 8 bits, see `make_optimizer`), and what the backward
    pass needs of each token, in dtype. Within 25% of what an H100 took for 1b."""
    c = model.config
    weights = sum(p.nbytes for p in model.parameters())
    trained = [p for p in model.parameters() if p.requires_grad]
    moments = sum(p.numel() * (8 if p.dtype == torch.float32 else 2) for p in trained)
    gradients = sum(p.nbytes for p in trained)
    heads = c.num_attention_heads * (2 * c.qk_head_dim + 3 * c.v_head_dim)
    chosen = c.num_experts_per_tok * (2 * c.hidden_size + 5 * c.moe_intermediate_size)
    layer = 14 * c.hidden_size + 2 * heads + 2 * c.n_routed_experts + chosen
    layers = (
        1 + c.num_hidden_layers * c.hidden_size / layer if checkpointing else c.num_hidden_layers
    )
    logits = 4 * min(micro_batch * seq_len * c.vocab_size, 2**25)
    tokens = micro_batch * seq_len
    activations = dtype.itemsize * tokens * layer * layers + 4 * logits
    return int(weights + gradients + moments + activations + 3e8)


# ----------------------------------------------------------------------------------------------
# Checkpoints, log, curves
# ----------------------------------------------------------------------------------------------


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write next to path, sync, rename: whatever happens, path holds a complete checkpoint.

    Raises CheckpointError, as on a full disk.
    """
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):
            raise  # the others are what torch makes of a full disk
        needed = sum(t.nbytes for t in tree_leaves(state) if isinstance(t, Tensor))
        free = shutil.disk_usage(path.parent).free
        reason = getattr(error, "strerror", None) or "the disk is full or failing"
        raise CheckpointError(
            f"{path} cannot be written: {reason}; it takes {needed / 1e6:.1f} MB and"
            f" {free / 1e6:.1f} MB are free"
        ) from error


def load_checkpoint(path: str | Path, mmap: bool = True) -> dict[str, Any]:
    """A checkpoint of train.py, read once to compare its sums; with mmap its tensors then stay on
    disk until they are used.

    Raises UsageError.
    """
    path = Path(path)
    if (path / "adapter_config.json").exists():
        raise UsageError(
            f"{path} is of adapters alone: give it as --lora, and their base as --ckpt"
        )
    if path.is_dir():
        raise UsageError(f"checkpoint {path} is a folder: give the file, {path / 'ckpt.pt'}")
    if not path.is_file():
        raise UsageError(f"checkpoint {path} does not exist: make one with train.py")

    def read() -> Any:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)

    try:
        with zipfile.ZipFile(path) as archive:  # torch writes sums, but does not look at them
            if record := archive.testzip():
                raise zipfile.BadZipFile(record)
        try:
            state = read()
        except pickle.UnpicklingError as error:
            if "torchao" not in str(error):
                raise
            import torchao.optim  # noqa: F401  # of --low_memory; it says that its tensors are safe

            state = read()
    except ImportError as error:
        raise UsageError(f"checkpoint {path} needs torchao: pip install torchao") from error
    except DAMAGE as error:
        kind = type(error).__name__
        raise UsageError(
            f"checkpoint {path} cannot be read: it is damaged or not one ({kind})"
        ) from error
    mark = (state.get("program"), state.get("format")) if isinstance(state, dict) else ("", "")
    program, was = (x if isinstance(x, (str, int)) else None for x in mark)  # a tensor has no ==
    if program != "deepseek.py":
        raise UsageError(f"{path} is not a checkpoint of train.py")
    if was != FORMAT:
        raise UsageError(f"checkpoint {path} has format {was}, this program {FORMAT}")
    for name, kind in PARTS.items():
        value = state.get(name)
        fits = isinstance(value, kind) and isinstance(value, bool) == (kind is bool)
        fits = fits and (name != "dtype" or value in DTYPES)
        if not fits or (kind in (int, float) and not value >= 0):
            raise UsageError(f"checkpoint {path} is damaged: it has {name} = {str(value)[:50]!r}")
    return state


def file_sum(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    whole = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            whole.update(chunk)
    return whole.hexdigest()


@contextmanager
def sealing(folder: Path, pattern: str = "*") -> Iterator[None]:
    """Around the writing of files into a folder: their sums are written last, and those of earlier
    ones removed first, so that a process that is ended in between leaves none that are wrong."""
    (folder / SUMS).unlink(missing_ok=True)
    yield
    files = [path for path in sorted(folder.glob(pattern)) if path.is_file()]
    lines = [f"{file_sum(path)}  {path.name}\n" for path in files]
    temporary = folder / f"{SUMS}.tmp"
    temporary.write_bytes("".join(lines).encode())
    os.replace(temporary, folder / SUMS)


def check_seal(folder: str | Path) -> None:
    """Raise CheckpointError for a file that is not what `sealing` saw; without sums do nothing.

    Neither safetensors nor JSON would notice a digit that has changed.
    """
    sums = Path(folder) / SUMS
    try:
        lines = sums.read_text(encoding="utf-8").splitlines() if sums.exists() else []
        wrong = [line for line in lines if file_sum(sums.with_name(line[66:])) != line[:64]]
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{sums} cannot be compared with its folder ({error}): fetch it again, or remove it"
        ) from error
    if wrong:
        raise CheckpointError(
            f"{sums.with_name(wrong[0][66:])} is not what was written: fetch or write it again, or,"
            f" if you have changed it, remove {SUMS}"
        )


def stored_config(state: dict[str, Any]) -> Config:
    """The Config of a checkpoint. Raises UsageError or ConfigError."""
    stored, known = set(state["config"]), set(Config.describe())
    for names, what in ((known - stored, "lacks"), (stored - known, "has the unknown field")):
        if names:
            raise UsageError(
                f"the checkpoint's configuration {what} {sorted(names)[0]}: it is damaged, or of"
                " another version of this program"
            )
    return Config(**state["config"])


def build_model(state: dict[str, Any]) -> DeepSeek:
    """The model of a checkpoint, on the CPU in fp32, in eval mode. Raises UsageError."""
    if state["adapters"]:
        raise UsageError(
            "the checkpoint is of adapters alone: give their folder as --lora, their base as --ckpt"
        )
    with torch.device("meta"):
        model = DeepSeek(stored_config(state))
    try:
        model.load_state_dict(state["model"], assign=True)
    except (RuntimeError, TypeError) as error:
        raise UsageError("the checkpoint's tensors do not fit its own configuration") from error
    return model.eval()


def open_model(source: str, device: torch.device, dtype: str) -> tuple[DeepSeek, Tokenizer]:
    """A model and its tokenizer: of a checkpoint of train.py (any file, or a name in .pt), or of
    a folder or hub name in the official format. Raises UsageError or CheckpointError."""
    kind = None if dtype == "auto" else getattr(torch, dtype)
    if Path(source).is_file() or source.endswith(".pt") or (Path(source) / "ckpt.pt").exists():
        state = load_checkpoint(source)
        return build_model(state).to(device, kind), data.load_tokenizer(state["tokenizer"])
    folder = find_checkpoint(source)
    if not (folder / "config.json").exists():
        raise UsageError(
            f"{folder} has neither ckpt.pt nor config.json: give a model's folder or file"
        )
    check_seal(folder)
    try:
        text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        where = "that of its base model, or the one that --export wrote"
        raise UsageError(f"{folder} has no tokenizer.json that can be read: add {where}") from error
    return DeepSeek.from_pretrained(folder, kind, device), data.load_tokenizer(text)


class Log:
    """log.jsonl: a header with arguments, config and versions, then an object per step; written by
    the first process alone."""

    def __init__(self, folder: Path, header: dict[str, Any], resume_at: int | None = None):
        self.path, self.header, self.waiting = folder / "log.jsonl", header, ""
        if rank() > 0:
            return
        if resume_at is not None:  # steps after the checkpoint will be taken again
            kept = 0
            for record, end in _log_lines(self.path):
                if record.get("step", 0) > resume_at or "val_loss_after" in record:
                    break  # the latter is the summary of an earlier end
                kept = end
            if kept:
                os.truncate(self.path, kept)
                return
        self.path.unlink(missing_ok=True)
        self.write(header)

    def write(self, record: dict[str, Any]) -> None:
        """Raises OSError, as on a full disk; then the line is written with a later one."""
        if rank() > 0:
            return
        size = self.path.stat().st_size if self.path.exists() else 0
        if not size and not self.waiting and record is not self.header:  # somebody removed it
            self.waiting = json.dumps(self.header) + "\n"
        self.waiting += json.dumps(record) + "\n"
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(self.waiting)
            self.waiting = ""
        except OSError as error:
            os.truncate(self.path, size)  # without half a line
            error.filename = str(self.path)  # which writing does not know
            raise


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a log; a last line that a crash cut short is left out."""
    return (record for record, _ in _log_lines(path))


def _log_lines(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    end = 0
    try:
        with open(path, "rb") as file:
            for line in file:
                end += len(line)
                try:
                    record = json.loads(line)
                except ValueError:
                    return
                if not line.endswith(b"\n"):
                    return
                yield record, end
    except FileNotFoundError:
        return


def rounded(value: float, digits: int = 6) -> float:
    """To significant digits, which is what a log needs."""
    return float(f"{value:.{digits}g}")


def draw_recall(axis, records: list[dict[str, Any]]) -> None:
    """Facts of stories that are recalled, in all and by kind, the kind that is best last on top."""
    steps, last = [r["step"] for r in records], records[-1]["val_recall_by_kind"]
    for i, kind in enumerate(sorted(last, key=last.get, reverse=True)):
        shares = [100 * r["val_recall_by_kind"].get(kind, math.nan) for r in records]
        axis.plot(steps, shares, "-" if i < 8 else "--", color=f"C{i % 8}", lw=1, label=kind)
    every = [100 * r["val_recall"] for r in records]
    axis.plot(steps, every, color="tab:gray", lw=3, alpha=0.6, label="all")
    axis.set_ylim(0, 102)
    axis.set_ylabel("facts recalled (%)")
    axis.legend(frameon=False, fontsize="x-small", ncols=1, bbox_to_anchor=(1, 1), loc="upper left")


def draw_curves(log: Path, target: Path) -> None:
    """curves.png from log.jsonl: loss, learning rate, expert load per layer."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    header, *records = read_log(log)
    records = [r for r in records if "loss" in r]  # without a summary at the end
    if not records:
        return
    steps = np.array([r["step"] for r in records])
    losses = np.array([r["loss"] for r in records])
    evaluated = [r for r in records if "val_loss" in r]
    loads = [r for r in records if r.get("expert_load")]  # none where all layers are dense

    recalls = [r for r in records if "val_recall_by_kind" in r]

    heights = [3, 2, 1, 2] if recalls else [3, 1, 2]
    fig, axes = plt.subplots(
        len(heights), figsize=(8, 1.5 * sum(heights)), height_ratios=heights, sharex=True,
        layout="constrained",
    )  # fmt: skip
    top, *_, middle, bottom = axes
    span = max(1, len(losses) // 100)
    smooth = np.convolve(losses, np.ones(span) / span, "valid")
    top.plot(steps, losses, color="tab:blue", alpha=0.2, lw=0.7)
    top.plot(steps[span - 1 :], smooth, color="tab:blue", label="training, running mean")
    top.plot(
        [r["step"] for r in evaluated],
        [r["val_loss"] for r in evaluated],
        "o-",
        color="tab:orange",
        ms=4,
        label="held out",
    )
    if header.get("floor"):
        top.axhline(header["floor"], color="tab:red", ls="--", lw=1, label="entropy of the stories")
    if recalls:
        draw_recall(axes[1], recalls)
    top.set_ylabel("cross-entropy (nats per token)")
    top.set_yscale("log")  # the last tenths take most of the time
    top.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    top.yaxis.set_major_formatter("{x:g}")
    top.yaxis.set_minor_formatter(NullFormatter())
    top.legend(frameon=False)
    args = header["args"]
    how = args.get("size") or ("all weights" if args["full"] else "LoRA")
    top.set_title(f"{how} on {Path(args['data']).name}")
    middle.plot(steps, [r["lr"] for r in records], color="tab:green")
    middle.set_ylabel("learning rate")
    middle.set_ylim(bottom=0)
    if loads:
        grid = np.array([np.concatenate(r["expert_load"]) for r in loads]).T  # layers*E, times
        experts = len(loads[0]["expert_load"][0])
        grid = grid * experts
        edges = [0] + [r["step"] for r in loads]
        mesh = bottom.pcolormesh(
            edges, np.arange(len(grid) + 1), grid, cmap="RdBu_r", vmin=0, vmax=2, rasterized=True
        )
        bottom.set_yticks(np.arange(0, len(grid) + 1, experts))
        bottom.set_yticklabels([])
        bottom.set_ylabel(f"{len(grid) // experts} MoE layers x {experts} experts")
        bottom.invert_yaxis()
        beside = bottom.inset_axes([1.02, 0, 0.025, 1])
        fig.colorbar(mesh, cax=beside, label="load / average", extend="max")
    bottom.set_xlabel("step")
    temporary = target.with_suffix(".tmp.png")
    fig.savefig(temporary, dpi=110)
    plt.close(fig)
    os.replace(temporary, target)


# ----------------------------------------------------------------------------------------------
# Optimizer, schedule, evaluation
# ----------------------------------------------------------------------------------------------


def make_optimizer(
    model: torch.nn.Module, lr: float, weight_decay: float, beta2: float, low_memory: bool = False
) -> torch.optim.Optimizer:
    """AdamW as the paper uses it ([V2] 3.1.2); weight decay on matrices, not on norm weights.

    low_memory: moments in 8 bits, for weights in bf16, which are rounded up or down at random, so
    that a step smaller than their spacing is taken now and then instead of never.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    if not low_memory:
        return torch.optim.AdamW(groups, lr, (0.9, beta2), fused=True)
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise UsageError("--low_memory needs torchao: pip install torchao") from error
    return AdamW8bit(groups, lr, (0.9, beta2), bf16_stochastic_round=True)


def check_pieces(args: argparse.Namespace) -> None:
    """Raise UsageError where the batch cannot be cut into equal pieces."""
    times = f"--grad_accum {args.grad_accum}"
    if world() > 1:
        times += f" times the {world()} processes"
    if args.batch_size % (args.grad_accum * world()):
        raise UsageError(f"--batch_size {args.batch_size} must be a multiple of {times}")


def learning_rate(step: int, steps: int, peak: float, warmup: int, schedule: str) -> float:
    """The rate of a step (from 0): linear warm-up, then as [V2] 3.1.2, or falling all the time."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = step / steps
    if schedule == "step":
        return peak * (0.316 if done >= 0.6 else 1) * (0.316 if done >= 0.9 else 1)
    if schedule == "linear":
        return peak * (steps - step) / max(1, steps - warmup)
    if schedule == "cosine":
        done = (step - warmup) / max(1, steps - warmup)
        return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * min(done, 1.0))))
    return peak


@contextmanager
def evaluating(model: DeepSeek) -> Iterator[None]:
    """In eval mode and without gradients; afterwards as before."""
    mode = model.training
    model.eval()
    shared_out = isinstance(model, FSDPModule)
    if shared_out:
        model.unshard()  # generation calls the parts one by one, which does not gather them
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(mode)
        if shared_out:
            model.reshard()


def evaluate(model: DeepSeek, held_out: Windows, device, dtype) -> dict[str, float]:
    """val_loss (nats per token, cross-entropy alone) and val_bpb (bits per byte) on held-out
    windows; of stories also val_recall, the share of recalled facts that the model gets right, and
    the same by kind of fact."""
    nats, kinds = 0.0, 1 + len(data.FACT_KINDS)
    right, facts = torch.zeros(2, kinds, dtype=torch.long)
    with evaluating(model), autocast(device, dtype):
        for i, (inputs, targets) in enumerate(held_out.rows):
            inputs, targets = inputs.to(device), targets.to(device)
            if held_out.facts is None:
                loss = model(inputs, targets).loss
                nats += loss.item() * int((targets != data.IGNORE).sum())
                continue
            logits = model(inputs).logits.float()  # B T V
            nats += F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
            hit = (logits.argmax(-1) == targets).cpu()
            right += torch.bincount(held_out.facts[i][hit], minlength=kinds)
            facts += torch.bincount(held_out.facts[i].flatten(), minlength=kinds)
    result = {
        "val_loss": rounded(nats / held_out.tokens),
        "val_bpb": rounded(nats / math.log(2) / max(1, held_out.bytes)),
    }
    right, facts = right.tolist()[1:], facts.tolist()[1:]  # 0: tokens that recall no fact
    if any(facts):
        shares = zip(data.FACT_KINDS, right, facts, strict=True)
        result["val_recall"] = rounded(sum(right) / sum(facts), 4)
        result["val_recall_by_kind"] = {kind: rounded(r / n, 4) for kind, r, n in shares if n}
    return result


def write_sample(model: DeepSeek, tokenizer, device, prompt: str = "", length: int = 60) -> str:
    """A short text from the model, the same random numbers each time."""
    ids = data.begin(tokenizer, prompt)
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
        return prompt + tokenizer.decode([int(t) for t in stream])


# ----------------------------------------------------------------------------------------------
# The training loop, for pretraining and fine-tuning alike
# ----------------------------------------------------------------------------------------------


def open_run(args: argparse.Namespace, typed: set[str], parser: Parser) -> dict[str, Any] | None:
    """Check --out and return the checkpoint to go on from, or None for a new run.

    With --resume the stored flags replace args; typed ones may repeat them, and --steps may
    grow. Raises UsageError when that cannot be done without harm.
    """
    if {"steps", "minutes"} <= typed:
        raise UsageError("--steps and --minutes exclude each other: give one")
    out = Path(args.out)
    checkpoint = out / "ckpt.pt"
    if args.resume:
        if not checkpoint.is_file():
            raise UsageError(f"there is nothing to resume: {checkpoint} does not exist")
        state = load_checkpoint(checkpoint, mmap=False)  # the file will be replaced
        stored = state["args"]
        if ("ckpt" in stored) != ("ckpt" in vars(args)):
            script = "finetune.py" if "ckpt" in stored else "train.py"
            raise UsageError(f"{checkpoint} is of a run of {script}: resume it with that")
        stored = parser.check(stored)
        for name in {*SETTLED} & {*stored}:
            if stored[name] is None:
                raise UsageError(f"checkpoint {checkpoint} is damaged: it lacks --{name}")
        for name in sorted(typed - {"resume", "out", "log_level", "device", "fsdp"}):
            value, old = getattr(args, name), stored.get(name)
            if name == "steps" and value >= (old or 0):
                continue
            if value != old:
                old = state["config"].get(name) if old is None else old  # what the size gave
                longer = " (a larger --steps trains on)" if name == "minutes" else ""
                raise UsageError(
                    f"--{name} {value} differs from the run's {old}: leave it out{longer}, or start"
                    " another run in another --out"
                )
        keep = {"resume", "out", "fsdp"} | (typed & {"steps", "device", "log_level"})
        for name, value in stored.items():
            if name not in keep:
                setattr(args, name, value)
        return state
    if not args.overwrite:
        for name in RUN_FILES:
            if (out / name).exists():
                raise UsageError(
                    f"{out} holds another run: give --resume, --overwrite, or another --out"
                )
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            return None
    except OSError as error:
        raise UsageError(f"--out {out} cannot be written: {error.strerror}") from error


class Trainer:
    """One run: a model, its optimizer, where it stands, and how it goes on.

    text: the digest of what it is trained on. state: the checkpoint to go on from, or None.
    notes: what else the header of the log holds. The run leaves ckpt.pt, log.jsonl and curves.png
    in args.out.
    """

    def __init__(
        self, args, model: DeepSeek, tokenizer, text: str, device, dtype, state=None, notes=None
    ):
        self.args, self.tokenizer, self.text = args, tokenizer, text
        self.device, self.dtype = device, dtype
        self.forward = self.model = model.train()
        self.out = Path(args.out)
        if rank() == 0:
            self.lock = FileLock(self.out / "run.lock")  # held as long as the trainer lives
            try:
                self.lock.acquire(timeout=0)
            except Timeout as error:
                raise UsageError(
                    f"another run is writing to {self.out}: wait for it, or give another --out"
                ) from error
        shared_out = vars(args).get("fsdp", False)
        if shared_out:  # before it moves: the whole may not fit on the device
            mesh = init_device_mesh(device.type, (world(),))  # not that of a card beside the CPU
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
        model.to(device)
        if world() > 1 and not shared_out:
            self.forward = DistributedDataParallel(model)
        low_memory = vars(args).get("low_memory", False)
        self.optimizer = make_optimizer(model, args.lr, args.weight_decay, args.beta2, low_memory)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.step, self.tokens, self.best = 0, 0, math.inf
        self.unwritten: dict[str, str] = {}  # files that could not be written, and why
        self.skips, self.crowded = 0, 0  # steps in a row: left out, one expert visited by most
        self.asked, self.stop = False, False  # Ctrl-C was pressed here; all processes stop
        self.saved_at, self.overdue = time.perf_counter(), False  # the last checkpoint
        if state:
            try:
                self.take_up(state)
            except torch.OutOfMemoryError:  # a RuntimeError, too, but not one of the checkpoint
                raise
            except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
                raise UsageError(
                    f"the checkpoint in {self.out} cannot be gone on with: its parts do not fit"
                ) from error
        elif args.overwrite and rank() == 0:
            for name in RUN_FILES:
                (self.out / name).unlink(missing_ok=True)
        if rank() > 0:  # dropping is drawn for other sequences here
            torch.manual_seed(args.seed + 1000 * self.step + rank())
        self.versions = {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "tokenizers": tokenizers.__version__,
        }
        header = {
            "args": vars(args),
            "config": asdict(model.config),
            "versions": self.versions,
            "parameters": model.num_parameters(),
            **(notes or {}),
        }
        self.log = Log(self.out, header, self.step if state else None)
        if args.compile:
            self.forward = torch.compile(self.forward)

    def take_up(self, state: dict[str, Any]) -> None:
        """Stand where a checkpoint was made."""
        self.optimizer.load_state_dict(share_out(self.optimizer, state["optimizer"]))
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.step, self.tokens = state["step"], state["tokens"]
        self.best = state["best_val_loss"]
        torch.set_rng_state(state["rng"]["cpu"])
        if self.device.type == "cuda" and state["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(state["rng"]["cuda"], self.device)

    def save(self, name: str = "ckpt.pt") -> None:
        """All that is needed to go on exactly here, and to sample."""
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        adapters = lora_state(self.model)  # their base stays where it came from
        weights = whole(adapters or self.model.state_dict())
        moments = whole(self.optimizer.state_dict())
        if rank() > 0:
            return
        state = {
            "program": "deepseek.py",
            "format": FORMAT,
            "model": weights,
            "adapters": bool(adapters),
            "optimizer": moments,
            "scaler": self.scaler.state_dict(),
            "config": asdict(self.model.config),
            "tokenizer": self.tokenizer.to_str(),
            "text": self.text,
            "dtype": str(self.dtype).removeprefix("torch."),  # what auto meant
            "step": self.step,  # also the position in the data: batches depend on it alone
            "tokens": self.tokens,
            "best_val_loss": self.best,
            "rng": {"cpu": torch.get_rng_state(), "cuda": cuda},
            "args": vars(self.args),
            "versions": self.versions,
        }
        save_checkpoint(self.out / name, state)

    def train_step(self, inputs: Tensor, targets: Tensor) -> tuple[dict[str, Any], Tensor]:
        """One optimizer step on a batch [B, T], in --grad_accum pieces of which each process takes
        its rows: log record, expert load."""
        args, began = self.args, time.perf_counter()
        lr = learning_rate(self.step, args.steps or 10**9, args.lr, args.warmup, args.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = torch.full_like(group["lr"], lr) if torch.is_tensor(group["lr"]) else lr
        inputs, targets = inputs.to(self.device), targets.to(self.device)
        counted = (targets != data.IGNORE).sum()
        loss, aux_loss, load = 0.0, 0.0, 0.0
        pieces = [t.chunk(args.grad_accum) for t in (inputs, targets)]
        for i, piece in enumerate(zip(*pieces, strict=True), 1):
            x, y = (t.chunk(world())[rank()] for t in piece)
            with self.only_sum_up(i < args.grad_accum):
                with autocast(self.device, self.dtype):  # the backward pass follows by itself
                    out = self.forward(x, y, checkpoint_activations=args.checkpoint_activations)
                share = (y != data.IGNORE).sum() / counted  # all tokens of a batch count the same
                piece_loss = out.loss * share
                piece_aux = out.aux_loss / (args.grad_accum * world())
                # world(): the engines take the mean of the processes' gradients
                self.scaler.scale((piece_loss + piece_aux) * world()).backward()
            loss, aux_loss = loss + piece_loss.detach(), aux_loss + piece_aux.detach()
            load = load + out.expert_load / (args.grad_accum * world())
        late = time.perf_counter() - self.saved_at > 60 * SAVE_MINUTES
        asked, late = torch.full_like(loss, self.asked), torch.full_like(loss, late)
        numbers = summed(torch.cat([torch.stack([loss, aux_loss, asked, late]), load.flatten()]))
        (loss, aux_loss, asked, late), load = numbers[:4], numbers[4:].view_as(load)
        self.scaler.unscale_(self.optimizer)
        norm = whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), args.clip)).to(loss)
        busiest = load.max() * load.shape[-1] if load.numel() else torch.zeros_like(norm)
        # one wait for the device, for all numbers
        numbers = torch.stack([loss, aux_loss, norm, busiest, asked, late])
        loss, aux_loss, norm, busiest, asked, late = numbers.tolist()
        # In fp16 a norm out of range is usual: the scaler leaves the step out and scales less.
        sound = math.isfinite(loss) and (math.isfinite(norm) or self.scaler.is_enabled())
        if sound:
            self.scaler.step(self.optimizer)
            self.model.update_bias(load)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.stop, self.overdue = asked > 0, late > 0  # the same in all processes
        self.step += 1
        self.tokens += inputs.numel()
        record = {"step": self.step, "tokens": self.tokens, "lr": rounded(lr)}
        if not sound:
            return record | {"skipped": True}, load
        record |= {
            "loss": rounded(loss),
            "aux_loss": rounded(aux_loss),
            "grad_norm": rounded(norm),
            "tok_per_s": rounded(inputs.numel() / (time.perf_counter() - began), 4),
            "expert_load_max": rounded(busiest, 4),
        }
        return record, load

    def check_health(self, record: dict[str, Any], bar: tqdm) -> None:
        """Warn of a step that was left out and of experts that starve. Raises UsageError after
        SKIPS_IN_A_ROW steps left out: the weights are as they were before them."""
        self.skips = self.skips + 1 if "skipped" in record else 0
        if self.skips == SKIPS_IN_A_ROW:
            bar.close()
            raise UsageError(
                f"loss or gradient was not finite in {self.skips} steps in a row, up to step"
                f" {self.step}: the last checkpoint is kept; try a lower --lr or --dtype float32"
            )
        if self.skips and rank() == 0:
            bar.write(f"step {self.step}: loss or gradient not finite, left out", file=sys.stderr)
        c = self.model.config
        most = c.n_routed_experts / c.num_experts_per_tok  # every token visits the expert
        crowded = record.get("expert_load_max", 0) > 0.75 * most and most > 2
        self.crowded = self.crowded + 1 if crowded else 0
        if self.crowded == CROWDED_STEPS:
            record["warning"] = (
                f"for {CROWDED_STEPS} steps, three of four tokens and more visited one expert of a"
                " layer: try a higher --aux_loss_alpha"
            )
            if rank() == 0:
                bar.write(f"step {self.step}: {record['warning']}", file=sys.stderr)

    @contextmanager
    def writing(self, what: str) -> Iterator[None]:
        """Around the writing of a file. Where that fails, as on a full disk, the run goes on: it is
        said once, and tried again at the next occasion."""
        try:
            yield
            self.unwritten.pop(what, None)
        except (OSError, CheckpointError) as error:
            message = str(error)
            if isinstance(error, OSError):
                message = f"{what} cannot be written: {error.strerror}"
            if what not in self.unwritten:
                tqdm.write(f"step {self.step}: {message}; going on", file=sys.stderr)
            self.unwritten[what] = message

    def sum_of(self, value: float) -> float:
        """Of a number that each process has."""
        return summed(torch.tensor(float(value), device=self.device)).item()

    def only_sum_up(self, yes: bool):
        """The context of a backward pass after which the processes need not exchange gradients."""
        return self.forward.no_sync() if yes and hasattr(self.forward, "no_sync") else nullcontext()

    def fit(
        self,
        batch_at: Callable[[int], tuple[Tensor, Tensor]],
        evaluate: Callable[[], dict[str, float]],
        show: Callable[[], str],
        keep: Callable[[], None] = lambda: None,
    ) -> dict[str, Any]:
        """Train until --steps are done or Ctrl-C; return the last log record.

        batch_at(step) gives inputs and targets; evaluate() val_loss and what to log beside it;
        show() a line for the screen; keep() is called whenever val_loss is lower than ever. With
        --minutes the first 20 steps tell how many there will be.
        """
        args, began, steps_began = self.args, time.perf_counter(), self.step
        seconds: list[float] = []
        record: dict[str, Any] = {}

        def ask_to_stop(*_: Any) -> None:  # a second Ctrl-C does not wait for the step to end
            if self.asked:
                raise KeyboardInterrupt
            self.asked = True
            if args.log_level != "quiet":  # os.write: print may have been interrupted itself
                os.write(2, b"\nfinishing the step and saving; Ctrl-C again leaves without\n")

        handlers = {s: signal.signal(s, ask_to_stop) for s in (signal.SIGINT, signal.SIGTERM)}
        if self.step == 0:  # where it starts from; it also shows how long an evaluation takes
            print_unless_quiet(args, f"before the first step: {_describe(evaluate())}")
        pause = time.perf_counter() - began
        # None: off where no terminal is
        quiet = True if args.log_level == "quiet" or rank() > 0 else None
        bar = tqdm(total=args.steps, initial=self.step, unit="step", disable=quiet)
        self.stop = self.sum_of(self.asked) > 0
        while not self.stop and self.step < (args.steps or math.inf):
            tick = time.perf_counter()
            record, load = self.train_step(*batch_at(self.step))
            self.check_health(record, bar)
            seconds.append(time.perf_counter() - tick)
            if args.steps is None and self.step == steps_began + 20:
                left = 60 * args.minutes - (time.perf_counter() - began) - 10 * (pause + 1)
                # Machines slow down once they are warm, by a tenth where this was measured.
                more = max(1, int(0.9 * left / statistics.median(seconds)))
                args.steps = self.step + int(self.sum_of(more if rank() == 0 else 0))
                bar.total = args.steps
            last = self.step == args.steps
            every = args.eval_every or max(1, (args.steps or 10**9) // 10)
            if last or self.step % every == 0:
                record |= evaluate()
                record["expert_load"] = [[rounded(v, 3) for v in row] for row in load.tolist()]
                if record["val_loss"] < self.best:
                    with self.writing(BEST):
                        keep()
                        self.best = record["val_loss"]
            with self.writing("log.jsonl"):
                self.log.write(record)
            bar.update()
            if "loss" in record:
                bar.set_postfix_str(f"loss {record['loss']:.3f}, {record['tok_per_s']:,.0f} tok/s")
            if "val_loss" in record:
                said = "" if args.log_level == "quiet" else show()  # by all, as --fsdp needs
                if rank() == 0:
                    with self.writing("curves.png"):
                        draw_curves(self.log.path, self.out / "curves.png")
                if not quiet:
                    left = ""
                    if args.steps:
                        pace = (time.perf_counter() - began) / (self.step - steps_began)
                        left = tqdm.format_interval(pace * (args.steps - self.step))
                        left = f", {left} left"
                    bar.write(f"step {self.step}: {_describe(record)}{left} | {said}")
            due = last or self.stop or self.overdue or self.step % (args.save_every or every) == 0
            # Without what did best, --resume could not bring that in again.
            if due and not self.skips and BEST not in self.unwritten:
                self.saved_at = time.perf_counter()  # also of an attempt: none of these each step
                with self.writing("ckpt.pt"):
                    self.save()
        bar.close()
        if self.stop and self.step == 0:  # before the first step there was nothing to save yet
            self.save()
        for which, handler in handlers.items():
            signal.signal(which, handler)
        self.unwritten.pop("curves.png", None)  # can be drawn again from the log
        if self.sum_of(len(self.unwritten)) > 0:  # so that all processes end
            raise UsageError(
                f"{'; '.join(self.unwritten.values()) or 'a file was not written'}: make room, then"
                " --resume goes on from the last checkpoint, if there is one"
            )
        return record


def print_unless_quiet(args: argparse.Namespace, text: str) -> None:
    """Information for the user, once, unless --log_level quiet."""
    if args.log_level != "quiet" and rank() == 0:
        print(text, flush=True)


def _describe(record: dict[str, Any]) -> str:
    loss = f"loss {record['loss']:.4f}, " if "loss" in record else ""
    bpb = f", {record['val_bpb']:.4f} bits/byte" if "val_bpb" in record else ""
    recall = f", {record['val_recall']:.1%} of facts recalled" if "val_recall" in record else ""
    return f"{loss}held out {record['val_loss']:.4f} nats/token{bpb}{recall}"


# ----------------------------------------------------------------------------------------------
# Pretraining
# ----------------------------------------------------------------------------------------------


def make_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--size", choices=list(PRESETS), default="tiny", help="of the model (default: tiny)")
    sources = ".txt, .jsonl, folder of .txt, stories, stories:N, tinystories (default: stories)"
    add("--data", default="stories", help=sources)
    add_common_flags(parser, out="out")
    fsdp = "under torchrun, share out weights and optimizer over the processes (default: off)"
    add("--fsdp", action="store_true", help=fsdp)
    low = "bf16 weights, 8-bit AdamW (needs torchao), --checkpoint_activations (default: off)"
    add("--low_memory", action="store_true", help=low)
    add_config_flags(parser)
    return parser


def choose_recipe(args: argparse.Namespace, overrides: dict[str, Any]) -> None:
    """Fill in what was not typed from the size's recipe."""
    recipe = RECIPES[args.size]
    base = Config.preset(args.size, **{"bos_token_id": 0, "eos_token_id": 1} | overrides)
    if not args.steps and not args.minutes:
        args.steps, args.minutes = recipe.get("steps"), recipe.get("minutes")
    if args.warmup is None:
        args.warmup = min(recipe["warmup"], (args.steps or 10**9) // 10)
    args.batch_size = args.batch_size or recipe["batch_size"]
    args.lr = args.lr or recipe["lr"]
    args.beta2 = args.beta2 if args.beta2 is not None else recipe.get("beta2", 0.95)
    args.schedule = args.schedule or recipe.get("schedule", "step")
    rows = max(1, args.batch_size // world())
    pieces = (
        n for n in range(1, rows + 1) if rows % n == 0 and rows // n <= recipe.get("piece", rows)
    )
    args.grad_accum = args.grad_accum or next(pieces)
    args.seq_len = args.seq_len or recipe.get("seq_len", base.max_position_embeddings)
    args.checkpoint_activations |= args.low_memory
    args.vocab_size = base.vocab_size


def limit_rounds(args: argparse.Namespace, typed: set[str], tokens: int) -> float:
    """How often --steps go through so many tokens; 0 with --minutes. The recipe's steps are cut
    to ROUNDS times: what a model of some size has read so often it begins to know by heart."""
    if args.steps is None:
        return 0.0
    most = math.ceil(ROUNDS * tokens / (args.batch_size * args.seq_len))
    if "steps" not in typed and most < args.steps:
        args.steps = most
        args.warmup = args.warmup if "warmup" in typed else min(args.warmup, most // 10)
    return args.steps * args.batch_size * args.seq_len / tokens


def choose_config(args: argparse.Namespace, overrides: dict[str, Any], tokenizer) -> Config:
    """The preset with the flags, the tokenizer's vocabulary and the context of the training."""
    fitted = {
        "vocab_size": -(-tokenizer.get_vocab_size() // 64) * 64,
        "bos_token_id": tokenizer.token_to_id(data.BOS),
        "eos_token_id": tokenizer.token_to_id(data.EOS),
    }
    overrides = {"max_position_embeddings": args.seq_len} | overrides | fitted
    config = Config.preset(args.size, **overrides)
    if args.seq_len > config.max_position_embeddings:
        raise UsageError(
            f"--seq_len {args.seq_len} is more than --max_position_embeddings"
            f" {config.max_position_embeddings}"
        )
    return config


def check_memory(needed: int, device: torch.device) -> str:
    """Say what is needed and free, in GiB. Raises UsageError where it cannot fit."""
    free = free_memory(device)
    if free is None:
        return f"about {needed / 2**30:.2f} GiB"
    if needed > free:
        raise UsageError(
            f"about {needed / 2**30:.1f} GiB of memory are needed and {free / 2**30:.1f} GiB are"
            " free: take a smaller model or --seq_len, more --grad_accum, or"
            " --checkpoint_activations"
        )
    return f"about {needed / 2**30:.2f} GiB needed, {free / 2**30:.1f} free"


def main() -> None:
    # 1. What is asked for, and does it go on from something?
    parser = make_parser()
    args, typed = parser.parse_args(), parser.explicit()
    overrides = config_overrides(args)
    state = open_run(args, typed, parser)
    if state and state["step"] >= (args.steps or math.inf):
        print_unless_quiet(args, f"finished: {state['step']} steps are done; more --steps go on")
        return
    device = choose_device(args.device)
    dtype = choose_dtype(state["dtype"] if state else args.dtype, device)
    join_processes(device)
    if state is None:
        choose_recipe(args, overrides)
    check_pieces(args)
    if args.fsdp and not dist.is_initialized():
        raise UsageError("--fsdp shares a model out over processes: start them with torchrun")
    if args.low_memory and (world() > 1 or overrides.get("bias_update_speed")):
        raise UsageError(
            "--low_memory is for one process, without --bias_update_speed: its rounding is random,"
            " and a bias in bf16 would stand still"
        )
    if args.low_memory and dtype == torch.float32:
        print_unless_quiet(args, "note     --low_memory computes in bf16: very slow on this device")

    # 2. Text
    torch.manual_seed(args.seed)
    print_unless_quiet(args, f"reading  {args.data} (cut into tokens once, then kept)")
    with first_process_first():
        corpus = data.prepare(args.data, args.vocab_size, data.cache_folder(Path(args.out)))
    tokenizer = corpus.tokenizer
    if state and state["text"] != corpus.digest:
        raise UsageError(f"--data {args.data} has changed since the run began: start another run")
    if state and state["tokenizer"] != tokenizer.to_str():
        raise UsageError("this version of tokenizers cuts the text otherwise: start another run")
    batches = Batches(corpus.train, args.batch_size, args.seq_len, args.seed)
    piece = args.batch_size // (args.grad_accum * world())
    stories = args.data.partition(":")[0] == "stories"
    held_out = data.windows(
        corpus.val, tokenizer, args.seq_len, max(8, piece), args.eval_tokens, stories
    )
    if not held_out.tokens:
        raise DataError(f"{args.data} is too short to hold anything out: give more text")
    rounds = 0.0 if state else limit_rounds(args, typed, len(corpus.train.ids))

    # 3. Model
    config = stored_config(state) if state else choose_config(args, overrides, tokenizer)
    weights = torch.bfloat16 if args.low_memory else torch.float32
    with torch.device("meta"):
        needed = DeepSeek(config).to(weights)
    needed = estimate_memory(needed, piece, args.seq_len, args.checkpoint_activations, dtype)
    needed *= world() if device.type == "cpu" else 1  # all in one memory
    needed //= world() if args.fsdp else 1
    memory = check_memory(needed, device)
    model = build_model(state) if state else DeepSeek(config).to(weights)
    notes = {"floor": held_out.floor} if stories else {}
    trainer = Trainer(args, model, tokenizer, corpus.digest, device, dtype, state, notes)
    del state  # its tensors are in use now, or not needed

    # 4. What it will do
    total, active = model.num_parameters()
    note = (
        f"note     the built-in stories have only {tokenizer.get_vocab_size():,} different tokens,"
        f" which makes this {args.size} smaller than at its own vocabulary, and "
        + (
            f"{args.steps:,} steps go {rounds:.0f} times through them"
            if rounds >= 1
            else "little text"
        )
        + ": --data tinystories has more"
    )
    cached = config.cache_per_token()
    tokens = f"{len(corpus.train.ids):,} tokens, {len(corpus.val.ids):,} held out"
    for line in (
        f"model    {args.size}: {total:,} parameters, {active:,} of them active per token",
        f"cache    {cached:,} numbers per token, {4 * cached:,} bytes in fp32",
        f"text     {corpus.name}: {tokens}, vocabulary {tokenizer.get_vocab_size():,}",
        f"step     {args.batch_size} x {args.seq_len} = {args.batch_size * args.seq_len:,} tokens"
        + (f" in {args.grad_accum} pieces" if args.grad_accum > 1 else ""),
        f"machine  {device}, {str(dtype).removeprefix('torch.')}, memory {memory}"
        + (f", {world()} processes" if world() > 1 else ""),
        f"writes   ckpt.pt, log.jsonl, curves.png in {args.out}; tokens in {corpus.folder}",
        *(
            [f"floor    {held_out.floor:.4f} nats/token, the entropy of the stories"]
            if stories
            else []
        ),
        *([f"resumes  after step {trainer.step}"] if trainer.step else []),
        *([note] if stories and args.size != "tiny" else []),
    ):
        print_unless_quiet(args, line)

    # 5. Train
    began = time.perf_counter()
    record = trainer.fit(
        batches.at,
        lambda: evaluate(model, held_out, device, dtype),
        lambda: " ".join(write_sample(model, tokenizer, device).split()),
    )

    # 6. What came out
    if trainer.stop and trainer.step < (args.steps or math.inf):
        again = f"python train.py --resume --out {args.out}"
        print_unless_quiet(args, f"stopped after step {trainer.step}, saved; {again} goes on")
        return
    story = write_sample(model, tokenizer, device, length=200)
    if args.log_level == "quiet" or rank() > 0:
        return
    minutes = (time.perf_counter() - began) / 60
    print(
        f"\n{story}\n\n{trainer.step} steps, {trainer.tokens:,} tokens, {minutes:.1f} minutes:"
        f" {_describe(record)}\nnext: python sample.py --ckpt {Path(args.out) / 'ckpt.pt'}"
        ' --prompt "Once upon a time"'
    )


if __name__ == "__main__":
    run_script(main)
