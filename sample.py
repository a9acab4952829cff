"""
Let a trained model speak, score a text, or have its stories judged.

    python sample.py --ckpt out/ckpt.pt --prompt "Once upon a time"
    python sample.py --ckpt out/ckpt.pt --num_samples 5 --temperature 0.7 --top_p 0.9
    python sample.py --ckpt out/ckpt.pt --score my.txt
    python sample.py --ckpt out/ckpt.pt --check 200
"""

from __future__ import annotations

import math
from collections import Counter

import torch
from tokenizers.decoders import DecodeStream

import data
from stories import NotAStory, parse
from train import (
    Parser,
    UsageError,
    build_model,
    choose_device,
    evaluate,
    load_checkpoint,
    number,
    run_script,
)


def make_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--ckpt", default="out/ckpt.pt", help="checkpoint of train.py (default: out/ckpt.pt)")
    add("--prompt", default="", help="text to continue (default: the beginning of a document)")
    add("--num_samples", type=number(int, 1), default=1, help="how many (default: 1)")
    add("--max_new_tokens", type=number(int, 0), help="(default: until the context is full)")
    temperatures = "0 = greedy (default: 0.8; with --check 1)"
    add("--temperature", type=number(float, 0), help=temperatures)
    add("--top_k", type=number(int, 1), help="draw from the k most probable (default: all)")
    add("--top_p", type=number(float, 0, 1, above=True), help="... of this mass (default: all)")
    add("--seed", type=number(int, 0, 2**63 - 1), help="for the same text again (default: random)")
    add("--score", metavar="FILE", help="print the loss on a text instead (default: off)")
    judged = "judge N sampled stories of a model of the built-in stories (default: off)"
    add("--check", metavar="N", type=number(int, 1), help=judged)
    add("--device", default="auto", help="cpu, cuda, mps (default: auto, the best there is)")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    device = choose_device(args.device)
    state = load_checkpoint(args.ckpt)
    tokenizer = data.load_tokenizer(state["tokenizer"])
    model = build_model(state).to(device)
    if args.score:
        score(model, tokenizer, args.score, device, state["args"]["seq_len"])
        return
    try:
        args.prompt.encode()
    except UnicodeEncodeError as error:
        raise UsageError("the prompt is not valid Unicode: it holds half a character") from error
    prompt = [tokenizer.token_to_id(data.BOS), *tokenizer.encode(args.prompt).ids]
    limit = model.config.max_position_embeddings
    if len(prompt) >= limit:
        raise UsageError(
            f"the prompt has {len(prompt)} tokens and the context {limit}: shorten the prompt"
        )
    generator = torch.Generator(device)
    generator.seed() if args.seed is None else generator.manual_seed(args.seed)
    if args.temperature is None:
        args.temperature = 1.0 if args.check else 0.8
    if args.check:
        check(model, tokenizer, args, prompt, generator)
        return
    for i in range(args.num_samples):
        if i:
            print("\n---")
        print(args.prompt, end="", flush=True)
        stream = write(model, tokenizer, args, [prompt], generator)
        words = DecodeStream(skip_special_tokens=True)  # holds half characters back
        for token in stream:
            print(words.step(tokenizer, int(token)) or "", end="", flush=True)
        print()


def write(model, tokenizer, args, prompts: list[list[int]], generator: torch.Generator):
    """`model.generate` as the flags say; without --max_new_tokens until the context is full."""
    limit = model.config.max_position_embeddings
    return model.generate(
        prompts,
        limit if args.max_new_tokens is None else args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        stop=tokenizer.token_to_id(data.EOS),
        vocab_size=tokenizer.get_vocab_size(),
        generator=generator,
    )


def score(model, tokenizer, path: str, device: torch.device, seq_len: int) -> None:
    """Print how well the model predicts a text: every byte once, each document from its start."""
    tokens = data.tokenize_file(path, tokenizer)
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
        for row in torch.stack(list(stream), 1).tolist():  # rows n
            text = args.prompt + tokenizer.decode(row)  # without the special tokens
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


if __name__ == "__main__":
    run_script(main)
