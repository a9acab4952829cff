"""
Models and adapters in the files of others: official checkpoints (config.json and *.safetensors, as
on the Hugging Face hub) and PEFT's adapters, in and out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import huggingface_hub  # comes with tokenizers
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
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

INDEX = "model.safetensors.index.json"  # which shard holds what
# What this file builds in. A checkpoint that says otherwise is of another model.
BUILT_IN = {
    "model_type": "deepseek_v2",
    "hidden_act": "silu",
    "scoring_func": "softmax",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}


@contextmanager
def written_whole(path: Path, advice: str = "make room") -> Iterator[Path]:
    """A name to write a file under, in a folder that is made; complete and synced, it becomes
    path. So path holds all of it or what it held before. Raises UsageError, as on a full disk."""
    partial = path.with_name(f"{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        partial.touch()
        rights = partial.stat().st_mode
        yield partial
        partial.chmod(rights)  # the usual ones; safetensors lets only the owner read
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):
            raise  # the others are what torch makes of a full disk
        reason = getattr(error, "strerror", None) or "the disk is full or failing"
        raise UsageError(f"{path} cannot be written ({reason}): {advice}") from error
    finally:
        partial.unlink(missing_ok=True)


def write_json(content: dict[str, Any], path: Path) -> None:
    """A .json of an object, indented."""
    with written_whole(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path, advice: str = "give another folder") -> dict[str, Any]:
    """The object in a .json. Raises UsageError."""
    try:
        return {} | json.loads(path.read_bytes())  # a TypeError where it is no object
    except (OSError, ValueError, TypeError) as error:
        missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
        what = "does not exist" if missing else "is damaged"
        raise UsageError(f"{path} {what}: {advice}") from error


def read_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a *.safetensors, one after the other. Raises UsageError."""
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():
                yield name, file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path} is missing, damaged or cut short: fetch it again") from error


def check_fit(folder: str | Path, found: dict[str, Tensor], asked: dict[str, list], advice: str):
    """Raise UsageError unless found has the tensors of these names and shapes, and no others."""
    shapes = {name: list(tensor.shape) for name, tensor in found.items()}
    for name in sorted(shapes.keys() | asked.keys()):
        has, fits = shapes.get(name, "nothing"), asked.get(name, "nothing")
        if has != fits:
            raise UsageError(f"{folder} has {has} for {name}, where {fits} fits: {advice}")


def find_checkpoint(source: str | Path) -> Path:
    """The folder itself, or that of a hub name in the hub's cache, fetched when it is not there."""
    if Path(source).is_dir():
        return Path(source)
    wanted = ["config.json", "tokenizer.json", "model*.safetensors"]
    try:
        return Path(huggingface_hub.snapshot_download(str(source), allow_patterns=wanted))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{source} is not a folder here and cannot be fetched from the hub: check the name and"
            " the network"
        ) from error


def read_config(folder: Path) -> Config:
    """config.json as DeepSeek released it or as transformers 5 writes it, as a Config. Raises
    UsageError or ConfigError."""
    record = read_json(folder / "config.json")
    heads = record.get("num_attention_heads")  # in MLA there are as many keys and values
    only = BUILT_IN | {"num_key_value_heads": heads, "quantization_config": None}
    for name, value in only.items():
        given = record.get(name)
        if given != value and (given is not None or name == "model_type"):
            raise UsageError(f"{folder} has {name} = {given!r}; this program builds {value!r}")
    rope = record.get("rope_parameters") or record.get("rope_scaling")
    if isinstance(rope, dict):  # transformers 5 spells it "rope_type", and puts theta here too
        record["rope_theta"] = rope.pop("rope_theta", record.get("rope_theta"))
        kind = rope.pop("rope_type", rope.get("type", "default"))
        rope = None if kind == "default" else rope | {"type": kind}
    record["rope_scaling"] = rope
    names = {f.name for f in fields(Config)}
    null = "q_lora_rank"  # where that means something; any other field that is null is not there
    given = {k: v for k, v in record.items() if k in names and (v is not None or k == null)}
    return Config.from_dict(given)


def official_config(config: Config, dtype: torch.dtype) -> dict[str, Any]:
    """The content of config.json for a Config. Raises UsageError for what it cannot say."""
    values = asdict(config)
    for f in fields(Config):
        # others might know its name in another sense
        if f.metadata["role"] == LOCAL and values.pop(f.name) != f.metadata["absent"]:
            raise UsageError(
                f"{f.name} = {getattr(config, f.name)!r} cannot be exported: transformers would"
                f" compute as if it were {f.metadata['absent']!r}"
            )
    return {
        "architectures": ["DeepseekV2ForCausalLM"],
        **BUILT_IN,
        **values,
        # vLLM limits groups whatever topk_method says; all groups allowed is greedy again
        "topk_group": config.n_group if config.topk_method == "greedy" else config.topk_group,
        "seq_aux": True,
        "num_key_value_heads": config.num_attention_heads,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def official_tensors(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A parameter under its official name; of stacked experts, a view of each expert's matrix. It
    serves tensors from files as well: some store experts stacked, as here."""
    stem, _, kind = name.rpartition(".")
    if not stem.endswith(".mlp.experts") or tensor.dim() != 3:
        yield name, tensor
        return
    kinds = ["gate_proj", "up_proj"] if kind == "gate_up_proj" else [kind]
    for e, matrix in enumerate(tensor):
        for kind, part in zip(kinds, matrix.tensor_split(len(kinds)), strict=True):
            yield f"{stem}.{e}.{kind}.weight", part  # I D; of down_proj D I


def official_state(model: DeepSeek) -> dict[str, Tensor]:
    """The parameters under their official names, as views: to write to them writes to the model."""
    parameters = ((name, p.detach()) for name, p in inference_parameters(model))
    return dict(pair for parameter in parameters for pair in official_tensors(*parameter))


def load_pretrained(
    source: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> DeepSeek:
    """The model of a folder in the official format, or of a name on the Hugging Face hub, in eval
    mode. dtype None takes that of the stored lm_head. Raises UsageError or ConfigError."""
    folder = find_checkpoint(source)
    with torch.device("meta"):  # neither memory nor random numbers for weights to be replaced
        model = DeepSeek(read_config(folder))
    read_weights(model, folder, dtype, device)
    return model.eval()


def read_weights(model: DeepSeek, folder: Path, dtype, device) -> None:
    """Fill a model built on the meta device. Raises UsageError before memory is taken. What is
    stored is read when it is copied, so that at any time there are the model and a shard."""
    stored: dict[str, Tensor] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        for pair in read_tensors(file):
            for name, tensor in official_tensors(*pair):
                if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
                    raise UsageError(f"{file} holds {name} in {tensor.dtype}: give it in bf16")
                if name in stored:
                    raise UsageError(f"{file} holds {name}, as another file does: remove one")
                stored[name] = tensor
    asked = {name: list(place.shape) for name, place in official_state(model).items()}
    if not stored:
        raise UsageError(
            f"{folder} has no model*.safetensors: *.bin and other pickles are not read"
        )
    check_fit(folder, stored, asked, "config.json and the weights do not belong together")
    model.to(dtype or stored["lm_head.weight"].dtype).to_empty(device=device)
    needed = {name for name, _ in inference_parameters(model)}
    for name, p in model.named_parameters():
        if name not in needed:  # of training alone, so in no file: memory as it was found
            nn.init.normal_(p, 0.0, model.config.initializer_range)
    places = official_state(model)
    while stored:
        name, tensor = stored.popitem()
        places[name].copy_(tensor)


def save_pretrained(model: DeepSeek, folder: str | Path, shard_bytes: int = 5 * 10**9) -> None:
    """Write config.json and *.safetensors, in shards of at most shard_bytes (if a tensor allows),
    for transformers and `load_pretrained`. Existing model*.safetensors in folder are deleted.
    Raises UsageError for a model that the format cannot express, or on a full disk."""
    folder = Path(folder)
    config = official_config(model.config, model.lm_head.weight.dtype)
    if model.lm_head.weight.is_meta or modules_of(model, LoRALinear):
        raise UsageError(
            "a model with adapters or on the meta device cannot be saved: merge or load it first"
        )
    tensors = official_state(model)
    shards = huggingface_hub.split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )
    for file, names in shards.filename_to_tensors.items():
        with written_whole(folder / file) as partial:
            save_file({name: tensors[name] for name in names}, partial, {"format": "pt"})
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        write_json(index, folder / INDEX)
    written = {*shards.filename_to_tensors, INDEX if shards.is_sharded else ""}
    for file in folder.glob("model*.safetensors*"):  # those before, once the new ones are there
        if file.name not in written:
            file.unlink()
    write_json(config, folder / "config.json")


def export(model: DeepSeek, tokenizer: Tokenizer, folder: Path, chat_template: str) -> None:
    """Write model and tokenizer so that transformers loads them: config.json, weights,
    tokenizer.json, tokenizer_config.json, generation_config.json. Raises UsageError where something
    lies already, or for a model that the format cannot express."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is a file or is not empty: give another folder")
    config = model.config
    ids = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    bos, eos = map(tokenizer.id_to_token, ids.values())
    mine = Tokenizer.from_str(tokenizer.to_str())
    mine.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, config.bos_token_id)]
    )
    save_pretrained(model, folder)
    (folder / "tokenizer.json").write_text(mine.to_str(pretty=True), encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": eos,
        "padding_side": "left",  # prompts of different length are continued at their ends
        "model_max_length": config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
        "chat_template": chat_template,
    }
    write_json(settings, folder / "tokenizer_config.json")
    ids["pad_token_id"] = config.eos_token_id
    write_json(ids, folder / "generation_config.json")
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder}: {size / 1e6:,.1f} MB in the official format")


# PEFT's settings that leave y = W x + (alpha / r) B A x as it is, whatever they say: those that are
# read, say where adapters are (each tensor's name says so too), keep records, or do nothing alone
# or where no layer has a bias.
PEFT_FREE = {
    "r", "lora_alpha", "lora_dropout", "bias", "target_modules", "task_type", "peft_version",
    "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern", "auto_mapping",
    "base_model_name_or_path", "revision", "inference_mode", "megatron_core", "qalora_group_size",
}  # fmt: skip
# Those that do so with these values; others must be off. Most other starts change W itself.
PEFT_ONLY = {"peft_type": ["LORA"], "init_lora_weights": [True, False, "gaussian"]}
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
    state = {PEFT_PREFIX + name: tensor for name, tensor in lora_state(model).items()}
    with written_whole(Path(folder) / "adapter_model.safetensors") as partial:
        save_file(state, partial, {"format": "pt"})
    write_json(record, Path(folder) / "adapter_config.json")


def load_lora(model: DeepSeek, folder: str | Path) -> str | None:
    """Freeze the model and give it the adapters of a folder written by `save_lora` or by PEFT; the
    base that these name, if any. Raises UsageError for a damaged file, another kind of adapter, or
    one that does not fit."""
    record = read_json(Path(folder) / "adapter_config.json")
    for name, value in record.items():
        if name not in PEFT_FREE and value not in PEFT_ONLY.get(name, [None, False, {}, []]):
            what = "only plain LoRA is read"
            if "gate_up_proj" in str(value):  # as PEFT does for all-linear, and for gate_proj
                what = "routed experts cannot be adapted, give target_modules of attention"
            raise UsageError(f"{folder} has {name} = {value!r}: {what}")
    rank, alpha, dropout = (record.get(k) or 0 for k in ("r", "lora_alpha", "lora_dropout"))
    numbers = all(type(n) in (int, float) for n in (rank, alpha, dropout))
    if not numbers or not 0 < alpha < 1e9 or not 0 <= dropout < 1:
        raise UsageError(
            f"{folder} has lora_alpha = {alpha!r}, lora_dropout = {dropout!r}: numbers above 0,"
            " and below 1, are needed"
        )
    stored = read_tensors(Path(folder) / "adapter_model.safetensors")
    state = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in stored}
    linear = modules_of(model, nn.Linear)
    names = [name for name in linear if f"{name}.lora_A.weight" in state]
    asked = {}
    for name in names:
        rows, columns = linear[name].weight.shape
        asked |= {f"{name}.lora_A.weight": [rank, columns], f"{name}.lora_B.weight": [rows, rank]}
    base = record.get("base_model_name_or_path")
    advice = f"give its own base ({base}), and adapters of linear layers only"
    check_fit(folder, state, asked, advice)
    add_lora(model, rank, alpha, names, dropout)
    model.load_state_dict(state, strict=False)
    return base
