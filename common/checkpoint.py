"""
ckpt.pt: all that is needed to go on with a run exactly where it stood, and to sample. One dict of
plain values and tensors, written whole or not at all, and loaded without running any code.
"""

from __future__ import annotations

import lzma
import os
import pickle
import shutil
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils._pytree import tree_leaves

from common.data import load_tokenizer
from common.formats import find_checkpoint, load_pretrained
from common.runtime import UsageError
from deepseek import Config, DeepSeek

FORMAT = 3
DAMAGE = (  # what zipfile, pickle and torch raise on a file that is no checkpoint, or not whole
    *(OSError, EOFError, RuntimeError, LookupError, TypeError, ValueError, AttributeError),
    *(pickle.UnpicklingError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error),
)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write next to path, sync, rename: whatever happens, path holds a complete checkpoint.

    Raises UsageError, as on a full disk.
    """
    temporary = path.with_suffix(".tmp")
    state = {"program": "deepseek.py", "format": FORMAT} | state
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
        raise UsageError(
            f"{path} cannot be written ({reason}): it takes {needed / 1e6:.1f} MB and"
            f" {free / 1e6:.1f} MB are free; the checkpoint before it, if there was one, is whole"
        ) from error


def load_checkpoint(path: str | Path, mmap: bool = True) -> dict[str, Any]:
    """A checkpoint, read once to compare its sums; with mmap its tensors then stay on disk until
    they are used.

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
    if not isinstance(state, dict) or str(state.get("program")) != "deepseek.py":
        raise UsageError(f"{path} is not a checkpoint of train.py")
    if str(state.get("format")) != str(FORMAT):
        raise UsageError(f"checkpoint {path} has format {state['format']}, this program {FORMAT}")
    return state


def stored_config(state: dict[str, Any]) -> Config:
    """The Config of a checkpoint; a field that it does not know has its neutral value. Raises
    UsageError or ConfigError."""
    try:
        return Config.from_dict(state["config"])
    except (AttributeError, KeyError, TypeError) as error:
        raise UsageError("the checkpoint is damaged: it has no configuration") from error


def build_model(state: dict[str, Any]) -> DeepSeek:
    """The model of a checkpoint, on the CPU, in eval mode. Raises UsageError."""
    if state.get("adapters"):
        raise UsageError(
            "the checkpoint is of adapters alone: give their folder as --lora, their base as --ckpt"
        )
    config = stored_config(state)
    with torch.device("meta"):
        model = DeepSeek(config)
    try:
        model.load_state_dict(state["model"], assign=True)
    except (KeyError, RuntimeError, TypeError) as error:
        raise UsageError("the checkpoint's tensors do not fit its own configuration") from error
    return model.eval()


def open_model(source: str, device: torch.device, dtype: str) -> tuple[DeepSeek, Tokenizer]:
    """A model and its tokenizer: of a checkpoint of train.py (any file, or a name in .pt), or of
    a folder or hub name in the official format. Raises UsageError."""
    kind = None if dtype == "auto" else getattr(torch, dtype)
    if Path(source).is_file() or source.endswith(".pt") or (Path(source) / "ckpt.pt").exists():
        state = load_checkpoint(source)
        try:
            tokenizer = load_tokenizer(state["tokenizer"])
        except (KeyError, TypeError) as error:
            raise UsageError(f"checkpoint {source} is damaged: it has no tokenizer") from error
        return build_model(state).to(device, kind), tokenizer
    folder = find_checkpoint(source)
    if not (folder / "config.json").exists():
        raise UsageError(
            f"{folder} has neither ckpt.pt nor config.json: give a model's folder or file"
        )
    try:
        stored = (folder / "tokenizer.json").read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        where = "that of its base model, or the one that --export wrote"
        raise UsageError(f"{folder} has no tokenizer.json that can be read: add {where}") from error
    return load_pretrained(folder, kind, device), load_tokenizer(stored)
