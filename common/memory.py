"""
Memory: what is free, what training needs, and how few pieces a batch is cut into for it.

On a CUDA card running out is an exception, so there it is tried (see `Trainer.fit_memory`). On a
CPU and on MPS the process would be killed, so there an estimate decides beforehand.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from common.runtime import UsageError, world_size
from deepseek import Config, DeepSeek

CGROUP = Path("/sys/fs/cgroup")  # where Linux says what a container may take


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be had on the device; None where nobody tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        free = 1024 * read_number(Path("/proc/meminfo"), "MemAvailable:")
    except (OSError, ValueError):
        try:  # macOS
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (AttributeError, ValueError, OSError):
            return None
    for limit, stat, used in (
        (CGROUP / "memory.max", CGROUP / "memory.stat", "anon"),
        (CGROUP / "memory/memory.limit_in_bytes", CGROUP / "memory/memory.stat", "total_rss"),
    ):
        try:
            free = min(free, int(limit.read_text(encoding="ascii")) - read_number(stat, used))
        except (OSError, ValueError):  # another version of them, or "max": no limit
            continue
    return free


def read_number(file: Path, name: str) -> int:
    """The number behind a name at the beginning of a line. Raises OSError or ValueError."""
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.split()[:1] == [name]:
            return int(line.split()[1])
    raise ValueError(f"{file} has no line {name}")


def fixed_memory(model: DeepSeek) -> int:
    """Bytes of the weights, and of the gradients and two moments of those that are trained."""
    weights = sum(p.nbytes for p in model.parameters())
    return weights + 3 * sum(p.nbytes for p in model.parameters() if p.requires_grad)


def activation_memory(
    config: Config, rows: int, seq_len: int, checkpointing: bool, dtype: torch.dtype
) -> int:
    """Bytes that the backward pass needs of so many rows, roughly. With `fixed_memory`, it was
    within 25% of what an H100 took for 1b."""
    c = config
    heads = c.num_attention_heads * (2 * c.qk_head_dim + 3 * c.v_head_dim)
    chosen = c.num_experts_per_tok * (2 * c.hidden_size + 5 * c.moe_intermediate_size)
    layer = 14 * c.hidden_size + 2 * heads + 2 * c.n_routed_experts + chosen
    layers = c.num_hidden_layers
    if checkpointing:
        layers = 1 + layers * c.hidden_size / layer
    logits = 4 * min(rows * seq_len * c.vocab_size, 2**25)
    return int(dtype.itemsize * rows * seq_len * layer * layers + 4 * logits + 3e8)


def numbers_of_pieces(batch_size: int) -> list[int]:
    """Into how many pieces of equal rows for each process a batch can be cut. Raises UsageError."""
    rows, rest = divmod(batch_size, world_size())
    if rest:
        raise UsageError(
            f"--batch_size {batch_size} must be a multiple of the {world_size()} processes"
        )
    return [n for n in range(1, rows + 1) if rows % n == 0]


def plan_pieces(
    options, config: Config, fixed: int, device: torch.device, dtype: torch.dtype
) -> tuple[int, str]:
    """Into how many pieces a batch is cut, unless that was typed, and what is said of the memory.

    options: a run's, with batch_size and seq_len; fixed: bytes that are needed whatever the pieces,
    see `fixed_memory`. On a card it is only where trying begins. Raises UsageError where a run
    cannot fit.
    """
    choices = numbers_of_pieces(options.batch_size)
    if typed := options.grad_accum:
        if typed not in choices:
            raise UsageError(
                f"--batch_size {options.batch_size} must be a multiple of --grad_accum {typed}"
                f" times the {world_size()} processes"
            )
        choices = [typed]
    copies = world_size() if device.type == "cpu" else 1  # all processes in one memory
    is_sharded = getattr(options, "fsdp", False)
    fixed = fixed * copies // (world_size() if is_sharded else 1)

    def needed(pieces: int) -> int:
        rows = options.batch_size // world_size() // pieces
        checkpointing = options.checkpoint_activations
        each = activation_memory(config, rows, options.seq_len, checkpointing, dtype)
        return fixed + copies * each

    free = free_memory(device)
    if free is None:
        return choices[0], f"about {needed(choices[0]) / 2**30:.2f} GiB"
    pieces, least = choices[0], fixed
    if device.type != "cuda" or is_sharded:  # where it is not tried
        pieces = next((n for n in choices if needed(n) <= free), choices[-1])
        least = needed(pieces)
    if least > free:
        less = " or --seq_len, more --grad_accum, or --checkpoint_activations"
        raise UsageError(
            f"about {least / 2**30:.1f} GiB of memory are needed and {free / 2**30:.1f} GiB are"
            f" free: take a smaller model{less if fixed <= free else ''}"
        )
    return pieces, f"about {least / 2**30:.2f} GiB needed, {free / 2**30:.1f} free"
