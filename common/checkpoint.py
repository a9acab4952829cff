"""
ckpt.pt: all that is needed to go on with a run exactly where it stood, and to sample. One dict of
plain values and tensors, written whole or not at all, and loaded without running any code.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils._pytree import tree_leaves

from common.data import load_tokenizer
from common.formats import find_checkpoint, load_pretrained, read_json, written_whole
from common.runtime import UsageError
from deepseek import Config, DeepSeek

FORMAT = 3


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint; whatever happens, path holds a complete one. Raises UsageError."""
    needed = sum(t.nbytes for t in tree_leaves(state) if isinstance(t, Tensor))
    free = shutil.disk_usage(path.parent).free
    advice = (
        f"it takes {needed / 1e6:.1f} MB and {free / 1e6:.1f} MB are free; the checkpoint before"
        " it, if there was one, is whole"
    )
    with written_whole(path, advice) as partial, open(partial, "wb") as file:
        torch.save({"program": "deepseek.py", "format": FORMAT} | state, file)


def save_model(path: Path, model: DeepSeek, tokenizer: Tokenizer) -> None:
    """Write a checkpoint of model and tokenizer alone, in the dtype of the weights: to sample and
    to fine-tune, not to go on. Raises UsageError, also where a file lies already."""
    if path.exists():
        raise UsageError(f"{path} is there already: give another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        "model": model.state_dict(),
        "config": asdict(model.config),
        "tokenizer": tokenizer.to_str(),
    }
    save_checkpoint(path, state)
    print(f"{path}: {path.stat().st_size / 1e6:,.1f} MB")


def load_checkpoint(path: str | Path, mmap: bool = True) -> dict[str, Any]:
    """A checkpoint, read once to compare its sums; with mmap its tensors then stay on disk until
    they are used. Raises UsageError."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch writes sums, but does not look at them
            if record := archive.testzip():
                raise zipfile.BadZipFile(record)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError as error:
        raise UsageError(
            f"checkpoint {path} does not exist: train one with train.py, or try assets/tiny.pt"
        ) from error
    except Exception as error:  # zipfile, pickle and torch raise a dozen kinds
        raise UsageError(
            f"checkpoint {path} cannot be read ({type(error).__name__}): it is damaged, or was not"
            " written by train.py"
        ) from error
    parts = {"format": int, "model": dict, "config": dict, "tokenizer": str}
    is_ours = isinstance(state, dict) and str(state.get("program")) == "deepseek.py"
    if not is_ours or not all(isinstance(state.get(k), kind) for k, kind in parts.items()):
        raise UsageError(f"{path} is not a checkpoint of train.py")
    if state["format"] != FORMAT:
        raise UsageError(f"checkpoint {path} has format {state['format']}, this program {FORMAT}")
    return state


def build_model(state: dict[str, Any]) -> DeepSeek:
    """The model of a checkpoint, on the CPU, in eval mode. Raises UsageError or ConfigError."""
    if state.get("adapters"):
        raise UsageError(
            "the checkpoint holds adapters alone: give their base as --ckpt, and to sample.py their"
            " folder as --lora"
        )
    with torch.device("meta"):
        model = DeepSeek(Config.from_dict(state["config"]))
    try:
        model.load_state_dict(state["model"], assign=True)
    except RuntimeError as error:
        raise UsageError("the checkpoint's tensors do not fit its own configuration") from error
    return model.eval()


def open_model(source: str, device: torch.device, dtype: str) -> tuple[DeepSeek, Tokenizer]:
    """A model and its tokenizer: of a checkpoint of train.py (any file, or a name in .pt), or of
    a folder or hub name in the official format. Raises UsageError or ConfigError."""
    kind = None if dtype == "auto" else getattr(torch, dtype)
    path = Path(source)
    if (path / "ckpt.pt").exists():
        path = path / "ckpt.pt"
    if path.is_file() or path.suffix == ".pt":
        state = load_checkpoint(path)
        return build_model(state).to(device, kind), load_tokenizer(state["tokenizer"])
    folder = find_checkpoint(source)
    if not (folder / "config.json").exists():
        raise UsageError(
            f"{folder} has neither ckpt.pt nor config.json: give a model's folder or file"
        )
    advice = "add that of the base model, or the one that --export wrote"
    stored = read_json(folder / "tokenizer.json", advice)
    return load_pretrained(folder, kind, device), load_tokenizer(json.dumps(stored))
