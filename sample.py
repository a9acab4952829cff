"""
Let a trained model speak, score a text, have its stories judged, or write it out for others.

    python sample.py --ckpt out/ckpt.pt --prompt "Once upon a time"
    python sample.py --ckpt out/ckpt.pt --num_samples 5 --temperature 0.7 --top_p 0.9
    python sample.py --ckpt out/ckpt.pt --score my.txt
    python sample.py --ckpt out/ckpt.pt --check 200
    python sample.py --ckpt out/ckpt.pt --lora out/lora --chat
    python sample.py --ckpt out/ckpt.pt --export out/hf
    python sample.py --ckpt deepseek-ai/DeepSeek-V2-Lite-Chat --chat
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from pathlib import Path

import torch
from tokenizers import Tokenizer, processors
from tokenizers.decoders import DecodeStream

import data
from deepseek import DeepSeek, load_lora, merge_lora
from stories import NotAStory, parse
from train import (
    DTYPES,
    Parser,
    UsageError,
    check_seal,
    choose_device,
    evaluate,
    number,
    open_model,
    run_script,
    sealing,
)

LONGEST = 2048  # new tokens unless told otherwise: the cache for V2's context would take 11 GB


def make_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument
    places = "of train.py, or a folder or hub name in the official format (default: out/ckpt.pt)"
    add("--ckpt", default="out/ckpt.pt", help=places)
    add("--lora", metavar="FOLDER", help="adapter of finetune.py or PEFT to add (default: none)")
    add("--prompt", help="text to continue (default: the beginning of a document)")
    add("--num_samples", type=number(int, 1), default=1, help="how many (default: 1)")
    longest = f"(default: until the context is full, at most {LONGEST})"
    add("--max_new_tokens", type=number(int, 0), help=longest)
    temperatures = "0 = greedy (default: 0.8; with --check 1)"
    add("--temperature", type=number(float, 0), help=temperatures)
    add("--top_k", type=number(int, 1), help="draw from the k most probable (default: all)")
    add(
        "--top_p",
        type=number(float, 0, 1, above=True),
        help="draw from the fewest that hold this probability (default: all)",
    )
    add("--seed", type=number(int, 0, 2**63 - 1), help="for the same text again (default: random)")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--chat", action="store_true", help="talk; with --prompt one answer (default: off)")
    add("--score", metavar="FILE", help="print the loss on a text instead (default: off)")
    judged = "judge N sampled stories of a model of the built-in stories (default: off)"
    add("--check", metavar="N", type=number(int, 1), help=judged)
    add("--export", metavar="FOLDER", help="write it in the official format (default: off)")
    add = parser.add_argument
    add("--device", default="auto", help="cpu, cuda, mps (default: auto, the best there is)")
    compiled = "torch.compile for a minute, then sample 3 to 4 times as fast (default: off)"
    add("--compile", action="store_true", help=compiled)
    dtypes = "of the weights (default: auto, as they are stored)"
    add("--dtype", choices=["auto", *DTYPES], default="auto", help=dtypes)
    return parser


def main() -> None:
    args = make_parser().parse_args()
    if args.compile and (args.score or args.export):
        raise UsageError("--compile is for sampling: leave it out with --score and --export")
    # Files are written from the CPU's memory: a card would only have to hold the model, too.
    device = choose_device("cpu" if args.export else args.device)
    model, tokenizer = open_model(args.ckpt, device, args.dtype)
    if args.lora:
        check_seal(args.lora)
        load_lora(model, args.lora)
    if args.export:
        merge_lora(model)
        export(model, tokenizer, Path(args.export))
        return
    if args.score:
        score(model, tokenizer, args.score, device)
        return
    generator = torch.Generator(device)
    generator.seed() if args.seed is None else generator.manual_seed(args.seed)
    if args.temperature is None:
        args.temperature = 1.0 if args.check else 0.8
    if args.compile:
        warm_up(model)
    if args.chat and args.prompt is None:
        chat(model, tokenizer, args, generator)
        return
    text = args.prompt or ""
    prompt = data.dialogue(tokenizer, [(text, None)]) if args.chat else data.begin(tokenizer, text)
    check_length(model, prompt)
    if args.check:
        check(model, tokenizer, args, prompt, generator)
        return
    for i in range(args.num_samples):
        if i:
            print("\n---")
        print("" if args.chat else text, end="", flush=True)
        speak(model, tokenizer, args, prompt, generator)


def warm_up(model) -> None:
    """Compile before anybody waits for the next word. After texts of two lengths any length will
    do; only many texts at once, as in --check, are compiled anew."""
    print("compiling, about a minute", file=sys.stderr, flush=True)
    for length in (1, 2):
        for _ in model.generate([[0] * length], 4, temperature=0, compile=True):
            pass


def check_length(model, prompt: list[int]) -> None:
    """Raise UsageError for a prompt that leaves no room for an answer."""
    limit = model.config.max_position_embeddings
    if len(prompt) >= limit:
        raise UsageError(
            f"the prompt has {len(prompt)} tokens and the context {limit}: shorten the prompt"
        )


def speak(model, tokenizer, args, prompt: list[int], generator: torch.Generator) -> str:
    """Print the continuation of a prompt as it comes; return it."""
    words, said = DecodeStream(skip_special_tokens=True), []  # waits for the rest of a character
    for token in write(model, tokenizer, args, [prompt], generator):
        if word := words.step(tokenizer, int(token)):
            if args.chat and not said:  # the template has it before the answer
                word = word.removeprefix(" ")
            said.append(word)
            print(word, end="", flush=True)
    print()
    return "".join(said)


def chat(model, tokenizer, args, generator: torch.Generator) -> None:
    """Answer line after line until the input ends. The oldest turns are forgotten once the
    dialogue takes more than half of the context."""
    turns: list[tuple[str, str | None]] = []
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            print()
            return
        if not question:
            continue
        turns.append((question, None))
        prompt = data.dialogue(tokenizer, turns)
        while len(turns) > 1 and len(prompt) > model.config.max_position_embeddings // 2:
            del turns[0]
            prompt = data.dialogue(tokenizer, turns)
        try:
            check_length(model, prompt)
        except UsageError as error:
            print(error)
            turns.clear()
            continue
        turns[-1] = (question, speak(model, tokenizer, args, prompt, generator))


def write(model, tokenizer, args, prompts: list[list[int]], generator: torch.Generator):
    """`model.generate` as the flags say."""
    return model.generate(
        prompts,
        LONGEST if args.max_new_tokens is None else args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        stop=model.config.eos_token_id,
        vocab_size=tokenizer.get_vocab_size(),
        generator=generator,
        compile=args.compile,
    )


def score(model, tokenizer, path: str, device: torch.device) -> None:
    """Print how well the model predicts a text: every byte once, each document from its start."""
    tokens = data.tokenize_file(path, tokenizer)
    seq_len = min(4096, model.config.max_position_embeddings)
    text = data.windows(tokens, tokenizer, seq_len, batch_size=8)
    result = evaluate(model, text, device, torch.float32)
    loss, bpb = result["val_loss"], result["val_bpb"]
    print(
        f"{loss:.4f} nats/token, perplexity {math.exp(loss):.3f}, {bpb:.4f} bits per byte"
        f" ({text.tokens:,} tokens, {text.bytes:,} bytes)"
    )


def check(model, tokenizer, args, prompt: list[int], generator: torch.Generator) -> None:
    """Print which share of sampled stories the judge of stories.py accepts, and what is wrong
    with the rest: the kind of the first mistake, and how far into the text it stands."""
    valid, mistakes, places, left = 0, Counter(), [], args.check
    while left:
        rows = min(left, 50)
        stream = write(model, tokenizer, args, [prompt] * rows, generator)
        for row in zip(*(token.tolist() for token in stream), strict=True):
            text = (args.prompt or "") + tokenizer.decode(list(row))  # without the special tokens
            try:
                parse(text)
                valid += 1
            except NotAStory as error:
                mistakes[error.kind] += 1
                places.append(error.position / max(1, len(text)))
        left -= rows
    print(f"{valid} of {args.check} stories are valid ({valid / args.check:.1%})")
    if mistakes:
        kinds = ", ".join(f"{kind} {n}" for kind, n in mistakes.most_common())
        middle = sorted(places)[len(places) // 2]
        print(f"first mistakes: {kinds}; in the median after {middle:.0%} of the text")


def export(model: DeepSeek, tokenizer: Tokenizer, folder: Path) -> None:
    """Write model and tokenizer so that transformers loads them: config.json, weights,
    tokenizer.json, tokenizer_config.json, generation_config.json; and SHA256SUMS. Raises UsageError
    where something lies already, CheckpointError for a model that the format cannot express."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        kind = "is not empty" if folder.is_dir() else "is a file"
        raise UsageError(f"{folder} {kind}: give another folder")
    config = model.config
    bos, eos = map(tokenizer.id_to_token, (config.bos_token_id, config.eos_token_id))
    mine = Tokenizer.from_str(tokenizer.to_str())
    mine.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, config.bos_token_id)]
    )
    files = {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": bos,
            "eos_token": eos,
            "pad_token": eos,
            "model_max_length": config.max_position_embeddings,
            "clean_up_tokenization_spaces": False,
            "chat_template": data.CHAT_TEMPLATE,
        },
        "generation_config.json": {
            "bos_token_id": config.bos_token_id,
            "eos_token_id": config.eos_token_id,
            "pad_token_id": config.eos_token_id,
        },
    }
    with sealing(folder):
        model.save_pretrained(folder)
        (folder / "tokenizer.json").write_text(mine.to_str(pretty=True), encoding="utf-8")
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder}: {size / 1e6:,.1f} MB in the official format")


if __name__ == "__main__":
    run_script(main)
