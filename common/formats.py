"""
Models and adapters in the files of others: official checkpoints (config.json and *.safetensors, as
on the Hugging Face hub) and PEFT's adapters, in and out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, processors
from torch import Tensor, nn

from common.runtime import UsageError
from deepseek import (
    LOCAL,
    Config,
    ConfigError,
    DeepSeek,
    LoRALinear,
    add_lora,
    inference_parameters,
    modules_of,
)

# What this file builds in. A checkpoint that says otherwise is of another model.
BUILT_IN = {
    "model_type": "deepseek_v2",
    "hidden_act": "silu",
    "scoring_func": "softmax",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}


def find_checkpoint(source: str | Path) -> Path:
    """The folder itself, or that of a hub name in the hub's cache, fetched when it is not there."""
    if Path(source).is_dir():
        return Path(source)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise UsageError(
            f"{source} is neither a folder nor a hub name such as deepseek-ai/DeepSeek-V2-Lite"
        )
    import huggingface_hub  # comes with tokenizers
    from huggingface_hub.errors import HfHubHTTPError

    wanted = ["config.json", "tokenizer.json", "*.safetensors", "*.safetensors.index.json"]
    try:
        return Path(huggingface_hub.snapshot_download(str(source), allow_patterns=wanted))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise UsageError(
            f"{source} does not exist here and cannot be fetched from the hub"
            f" ({type(error).__name__}): check the name and the network"
        ) from error


def read_config(folder: Path) -> Config:
    """config.json as DeepSeek released it or as transformers 5 writes it, as a Config."""
    path = folder / "config.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{folder} has no config.json: give a model's folder") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: it is damaged") from error
    if not isinstance(record, dict):
        raise UsageError(f"{path} holds no object of fields and values")
    for name, value in BUILT_IN.items():
        if record.get(name, None if name == "model_type" else value) != value:
            raise UsageError(
                f"{path} has {name} = {record.get(name)!r}; this program builds {value!r} only"
            )
    if record.get("quantization_config"):
        raise UsageError(f"{path} is of quantised weights: give those in bf16, fp16 or fp32")
    heads = record.get("num_attention_heads")
    if record.get("num_key_value_heads") not in (None, heads):
        raise UsageError(
            f"{path} has num_key_value_heads = {record['num_key_value_heads']}: in MLA they are"
            f" as many as num_attention_heads = {heads}"
        )
    rope = record.get("rope_parameters") or record.get("rope_scaling")
    if isinstance(rope, dict):  # transformers 5 spells it "rope_type", and puts theta here too
        record["rope_theta"] = rope.pop("rope_theta", record.get("rope_theta"))
        kind = rope.pop("rope_type", rope.get("type", "default"))
        rope = None if kind == "default" else rope | {"type": kind}
    record["rope_scaling"] = rope
    if not record.get("q_lora_rank", 1):
        record["q_lora_rank"] = None  # 0 says the same as null
    names = {f.name for f in fields(Config)}
    may_be_none = ("q_lora_rank", "rope_scaling")  # null in another field: it is not there
    given = {k: v for k, v in record.items() if k in names and (v is not None or k in may_be_none)}
    try:
        return Config.from_dict(given)
    except ConfigError as error:
        raise UsageError(f"{path} cannot be built: {error}") from error


def official_config(config: Config, dtype: torch.dtype) -> dict[str, Any]:
    """The content of config.json for a Config. Raises UsageError for what it cannot say."""
    roles = {f.name: f.metadata["role"] for f in fields(Config)}
    for f in fields(Config):
        value, neutral = getattr(config, f.name), f.metadata["absent"]
        if roles[f.name] == LOCAL and value != neutral:
            raise UsageError(
                f"{f.name} = {value!r} cannot be exported: transformers would compute as if it were"
                f" {neutral!r}"
            )
    # vLLM limits groups whatever topk_method says; all groups allowed is greedy again
    reach = config.n_group if config.topk_method == "greedy" else config.topk_group
    return {
        "architectures": ["DeepseekV2ForCausalLM"],
        **BUILT_IN,
        # LOCAL fields are neutral here, and others might know their names in another sense
        **{name: value for name, value in asdict(config).items() if roles[name] != LOCAL},
        "topk_group": reach,
        "seq_aux": True,
        "num_key_value_heads": config.num_attention_heads,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def official_tensors(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A parameter under its official name; stacked experts as a view of each expert's matrix.

    It serves tensors from files as well: some store experts stacked, as here.
    """
    stem, _, kind = name.rpartition(".")
    if not stem.endswith(".mlp.experts") or tensor.dim() != 3 or tensor.numel() == 0:
        yield name, tensor
        return
    for e, matrix in enumerate(tensor):
        if kind == "gate_up_proj":
            gate, up = matrix.tensor_split(2)
            yield f"{stem}.{e}.gate_proj.weight", gate  # I D
            yield f"{stem}.{e}.up_proj.weight", up  # I D
        else:
            yield f"{stem}.{e}.{kind}.weight", matrix  # D I


def weight_files(folder: Path) -> list[Path]:
    """The *.safetensors of a checkpoint; where there is an index, those that it names."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        if files := sorted(folder.glob("*.safetensors")):
            return files
        raise UsageError(f"{folder} has no *.safetensors: other formats are not read")
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        files = [folder / name for name in sorted(names)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{index} cannot be read: it is damaged") from error
    if not files:
        raise UsageError(f"{index} names no file: it is damaged")
    for path in files:
        if not path.is_file():
            raise UsageError(f"{path} is missing, though {index.name} names it")
    return files


def stored_tensors(path: Path) -> Iterator[tuple[str, Any]]:
    """Names and still unread tensors of one *.safetensors: .get_shape(), .get_dtype(), [:]."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():
                yield name, file.get_slice(name)
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path} cannot be read: it is damaged or cut short") from error


def read_weights(model: DeepSeek, files: list[Path], dtype, device) -> None:
    """Fill a model built on the meta device, one tensor after the other.

    First the headers are compared with the model, so that a checkpoint that does not fit ends in
    a sentence before memory is taken. Then there are at any time the model and a shard.
    """

    def official() -> dict[str, Tensor]:  # views: writing to them writes to the model
        pairs = ((name, p.detach()) for name, p in inference_parameters(model))
        return dict(pair for p in pairs for pair in official_tensors(*p))

    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    wanted, found = official(), {}
    for path in files:
        for stored_name, stored in stored_tensors(path):
            if stored.get_dtype() not in dtypes:
                raise UsageError(
                    f"{path} holds {stored_name} in {stored.get_dtype()}: only"
                    f" {', '.join(dtypes)} are read"
                )
            shape = torch.empty(stored.get_shape(), device="meta")
            for name, part in official_tensors(stored_name, shape):
                if name not in wanted:
                    raise UsageError(f"{path} holds {name}, which config.json has no place for")
                if name in found:
                    raise UsageError(f"{path} holds {name}, which was there before")
                if part.shape != wanted[name].shape:
                    raise UsageError(
                        f"{path} holds {name} of shape {list(part.shape)}, but config.json asks"
                        f" for {list(wanted[name].shape)}"
                    )
                found[name] = dtypes[stored.get_dtype()]
    if missing := [name for name in wanted if name not in found]:
        raise UsageError(
            f"{missing[0]} is missing in {files[0].parent}"
            + (f", and {len(missing) - 1} more" if missing[1:] else "")
        )
    model.to(dtype or found["lm_head.weight"]).to_empty(device=device)
    needed = {name for name, _ in inference_parameters(model)}
    for name, p in model.named_parameters():
        if name not in needed:  # of training alone, so in no file: memory as it was found
            nn.init.normal_(p, 0.0, model.config.initializer_range)
    places = official()
    with torch.no_grad():
        for path in files:
            for stored_name, stored in stored_tensors(path):
                for name, part in official_tensors(stored_name, stored[:]):
                    places[name].copy_(part)


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """One *.safetensors, whole or not at all. Raises UsageError, as on a full disk."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    partial = path.with_suffix(".partial")
    try:
        partial.touch()  # with the usual rights; safetensors itself lets only the owner read
        rights = partial.stat().st_mode
        tensors = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
        save_file(tensors, partial, {"format": "pt"})
        partial.chmod(rights)
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{path} cannot be written: {reason}") from error
    finally:
        partial.unlink(missing_ok=True)


def write_weights(model: DeepSeek, folder: Path, shard_bytes: int) -> None:
    """One model.safetensors, or an index and shards of at most shard_bytes (if a tensor allows).

    The shards are written one after the other, so that memory is taken for one.
    """
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for own, p in inference_parameters(model):
        for name, tensor in official_tensors(own, p.detach()):
            size += tensor.nbytes
            if size > shard_bytes and shards[-1]:
                shards.append({})
                size = tensor.nbytes
            shards[-1][name] = tensor
    for stale in folder.glob("model*.safetensors*"):
        stale.unlink()
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        many = f"-{i:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        weight_map |= dict.fromkeys(shard, f"model{many}.safetensors")
        write_tensors(shard, folder / f"model{many}.safetensors")
    if len(shards) > 1:
        total = sum(p.nbytes for _, p in inference_parameters(model))
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        path = folder / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def load_pretrained(
    source: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> DeepSeek:
    """The model of a folder in the official format, or of a name on the Hugging Face hub, in eval
    mode. dtype None takes that of the stored lm_head. Raises UsageError or ConfigError."""
    folder = find_checkpoint(source)
    config = read_config(folder)
    with torch.device("meta"):  # neither memory nor random numbers for weights to be replaced
        model = DeepSeek(config)
    read_weights(model, weight_files(folder), dtype, device)
    return model.eval()


def save_pretrained(model: DeepSeek, folder: str | Path, shard_bytes: int = 5 * 10**9) -> None:
    """Write config.json and *.safetensors as official checkpoints have them, for transformers and
    `load_pretrained`. Existing model*.safetensors in folder are deleted.

    Raises UsageError for a model that the official format cannot express, or a folder that
    cannot be written.
    """
    config = official_config(model.config, model.lm_head.weight.dtype)
    if model.lm_head.weight.is_meta:
        raise UsageError("a model on the meta device has no weights to save: load it first")
    if modules_of(model, LoRALinear):
        raise UsageError("a model with adapters has no official format: merge or remove them first")
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_weights(model, folder, shard_bytes)
        text = json.dumps(config, indent=2) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{folder} cannot be written: {error.strerror}") from error


# PEFT's settings that leave y = W x + (alpha / r) B A x as it is, whatever they say: those that are
# read, say where adapters are (each tensor's name says so too), keep records, or do nothing alone.
PEFT_FREE = {
    "r", "lora_alpha", "lora_dropout",
    "target_modules", "target_parameters", "exclude_modules", "layers_to_transform",
    "layers_pattern",
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode",
    "megatron_core", "qalora_group_size",
}  # fmt: skip
# Those that do so with these values; any other, known or not, must be off. Most other starts change
# W itself.
PEFT_ONLY = {
    "peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": (True, False, "gaussian"),
}  # fmt: skip
PEFT_OFF = (None, False, {}, [])
PEFT_PREFIX = "base_model.model."  # in front of each tensor's name


def lora_state(model: DeepSeek) -> dict[str, Tensor]:
    """The adapters' own tensors, lora_A and lora_B of each layer, under the model's names."""
    return {k: v for k, v in model.state_dict().items() if ".lora_" in k}


def save_lora(model: DeepSeek, folder: str | Path, base: str | None = None) -> None:
    """Write adapter_model.safetensors and adapter_config.json as PEFT does; base: where the
    model comes from. The dropout, which acts in training only, is kept if no MLP has adapters.
    Raises ConfigError without adapters, UsageError if that fails."""
    layers = modules_of(model, LoRALinear)
    if not layers:
        raise ConfigError("the model has no adapters to save: call add_lora first")
    some = next(iter(layers.values()))
    # PEFT takes the names of an MLP's layers, even full ones, for its stacked routed experts; of
    # their weights it takes full names as they are, but then allows no dropout.
    weights = [f"{name}.weight" for name in layers if ".mlp." in name]
    record = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": some.lora_A.out_features,
        "lora_alpha": some.alpha,
        "lora_dropout": 0.0 if weights else some.dropout.p,
        "target_modules": sorted({n.rpartition(".")[2] for n in layers if ".mlp." not in n}),
        "target_parameters": weights,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        state = {PEFT_PREFIX + k: v for k, v in lora_state(model).items()}
        write_tensors(state, folder / "adapter_model.safetensors")
        text = json.dumps(record, indent=2) + "\n"
        (folder / "adapter_config.json").write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{folder} cannot be written: {error.strerror}") from error


def load_lora(model: DeepSeek, folder: str | Path) -> None:
    """Freeze the model and give it the adapters of a folder written by `save_lora` or by PEFT.

    Raises UsageError for a damaged file, another kind of adapter, or one of another base;
    ConfigError where the model has adapters already.
    """
    folder = Path(folder)
    try:
        record = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        rank, alpha = int(record["r"]), float(record["lora_alpha"])
        dropout = float(record.get("lora_dropout") or 0.0)
    except FileNotFoundError:
        raise UsageError(f"{folder} has no adapter_config.json: give an adapter's folder") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{folder / 'adapter_config.json'} cannot be read") from error
    for name, value in ({"peft_type": None} | record).items():
        if name not in PEFT_FREE and value not in PEFT_ONLY.get(name, PEFT_OFF):
            raise UsageError(
                f"{folder} has {name} = {value!r}: only plain LoRA is read, so train without it"
            )
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise UsageError(f"{file} is missing: other formats are not read")
    state = {name.removeprefix(PEFT_PREFIX): t[:] for name, t in stored_tensors(file)}
    linear = modules_of(model, nn.Linear)
    names = sorted({name.rpartition(".lora_")[0] for name in state})
    if not names:
        raise UsageError(f"{file} holds no adapter")
    for name in names:
        found = [state.get(f"{name}.lora_{half}.weight") for half in "AB"]
        shapes = [None if t is None else list(t.shape) for t in found]
        base = linear.get(name)
        if base is None or shapes != [[rank, base.in_features], [base.out_features, rank]]:
            raise UsageError(
                f"{folder} does not fit the model at {name}: give the base that it was trained on,"
                " and adapters of linear layers only"
            )
    if len(state) != 2 * len(names):
        raise UsageError(f"{file} holds tensors that are no lora_A or lora_B weights")
    add_lora(model, rank, alpha, names, dropout)
    model.load_state_dict(state, strict=False)


def export(model: DeepSeek, tokenizer: Tokenizer, folder: Path, chat_template: str) -> None:
    """Write model and tokenizer so that transformers loads them: config.json, weights,
    tokenizer.json, tokenizer_config.json, generation_config.json. Raises UsageError where something
    lies already, or for a model that the format cannot express."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        kind = "is not empty" if folder.is_dir() else "is a file"
        raise UsageError(f"{folder} {kind}: give another folder")
    config = model.config
    bos, eos = map(tokenizer.id_to_token, (config.bos_token_id, config.eos_token_id))
    mine = Tokenizer.from_str(tokenizer.to_str())
    mine.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, config.bos_token_id)]
    )
    ids = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    files = {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": bos,
            "eos_token": eos,
            "pad_token": eos,
            "model_max_length": config.max_position_embeddings,
            "clean_up_tokenization_spaces": False,
            "chat_template": chat_template,
        },
        "generation_config.json": ids | {"pad_token_id": config.eos_token_id},
    }
    save_pretrained(model, folder)
    (folder / "tokenizer.json").write_text(mine.to_str(pretty=True), encoding="utf-8")
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder}: {size / 1e6:,.1f} MB in the official format")
