"""
Let a trained model speak, score a text, have its stories judged, or write it out for others.

    python sample.py --ckpt out/ckpt.pt --prompt "Once upon a time"
    python sample.py --ckpt out/ckpt.pt --num_samples 5 --temperature 0.7 --top_p 0.9
    python sample.py --ckpt out/ckpt.pt --score my.txt
    python sample.py --ckpt out/ckpt.pt --judge 200
    python sample.py --ckpt out/ckpt.pt --lora out/lora --chat
    python sample.py --ckpt out/ckpt.pt --export out/hf                      # for transformers
    python sample.py --ckpt out/ckpt.pt --dtype bfloat16 --export tiny.pt    # model alone, small
    python sample.py --ckpt deepseek-ai/DeepSeek-V2-Lite-Chat --chat
"""

from __future__ import annotations

import itertools
import math
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from common import chat, data, stories
from common.checkpoint import open_model, save_model
from common.formats import export, load_lora
from common.runtime import DTYPES, UsageError, choose_device, flag, parse_flags, run_script
from common.trainer import evaluate
from deepseek import DeepSeek, merge_lora

TOGETHER = 50  # stories that are sampled at once
LONGEST = 2048  # new tokens unless told otherwise: the cache for V2's context would take 11 GB


@dataclass(frozen=True)
class Options:
    """The flags of sample.py."""

    ckpt: str = flag("out/ckpt.pt", "of train.py, or a folder or hub name in official format")
    lora: str | None = flag(None, "adapter of finetune.py or PEFT to add")
    prompt: str | None = flag(None, "text to continue (default: the beginning of a document)")
    num_samples: int = flag(1, "how many", low=1)
    max_new_tokens: int | None = flag(
        None, f"(default: until the context is full, at most {LONGEST})", low=0
    )
    temperature: float | None = flag(None, "0 = greedy (default: 0.8; with --judge 1)", low=0)
    top_k: int | None = flag(None, "draw from the k most probable (default: all)", low=1)
    top_p: float | None = flag(
        None, "draw from the fewest that hold this probability (default: all)",
        low=0, high=1, above=True,
    )  # fmt: skip
    seed: int | None = flag(
        None, "for the same text again (default: random)", low=0, high=2**63 - 1
    )
    chat: bool = flag(False, "talk; with --prompt one answer")
    score: str | None = flag(None, "print the loss on a text file instead")
    judge: int | None = flag(None, "sample so many stories and check each by the grammar", low=1)
    export: str | None = flag(None, "folder to write the model to in the official format, or a .pt")
    device: str = flag("auto", "cpu, cuda, cuda:1, mps; auto is the best there")
    compile: bool = flag(False, "torch.compile for half a minute, then many texts go faster")
    dtype: str = flag(
        "auto", "of the weights; auto is as they are stored", choices=["auto", *DTYPES]
    )


def main() -> None:
    options, typed = parse_flags(Options, __doc__, {"check": "judge"})
    modes = [f"--{name}" for name in ("chat", "score", "judge", "export") if name in typed]
    if len(modes) > 1:
        raise UsageError(f"{' and '.join(modes)} exclude each other: give one")
    if options.compile and (options.score or options.export):
        raise UsageError("--compile is for sampling: leave it out with --score and --export")
    # Files are written from the CPU's memory: a card would only have to hold the model, too.
    device = choose_device("cpu" if options.export else options.device)
    model, tokenizer = open_model(options.ckpt, device, options.dtype)
    if options.chat and options.lora is None and options.ckpt.endswith(".pt"):
        said = "without --lora, only a model of finetune.py --full answers questions"
        print(f"note: {said}", file=sys.stderr)
    if options.lora is not None:
        base = load_lora(model, options.lora)
        if base and Path(base).resolve() != Path(options.ckpt).resolve():
            said = (
                f"{options.lora} was trained beside {base}: beside other weights it talks nonsense"
            )
            print(f"note: {said}", file=sys.stderr)
        if options.compile:  # or each token would sum the weights anew
            merge_lora(model)
    if options.export is not None:
        merge_lora(model)
        path = Path(options.export)
        if path.suffix.lower() == ".pt":
            save_model(path, model, tokenizer)
        else:
            export(model, tokenizer, path, chat.CHAT_TEMPLATE)
        return
    if options.score is not None:
        score(model, tokenizer, options.score, device)
        return
    generator = torch.Generator(device)
    generator.seed() if options.seed is None else generator.manual_seed(options.seed)
    if options.temperature is None:
        options = replace(options, temperature=1.0 if options.judge else 0.8)
    speaker = Speaker(model, tokenizer, options, generator)
    if options.chat and options.prompt is None:
        speaker.warm_up([0])
        converse(speaker)
        return
    text = options.prompt or ""
    if options.chat:
        prompt = chat.encode_chat(tokenizer, [(text, None)])
    else:
        prompt = data.encode_with_bos(tokenizer, text)
    speaker.check_length(prompt)
    speaker.warm_up(prompt)
    if options.judge:
        judge(speaker, prompt)
        return
    for i in range(options.num_samples):
        if i:
            print("\n---")
        print("" if options.chat else text, end="", flush=True)
        speaker.speak(prompt)


@dataclass
class Speaker:
    """A model that continues texts as the flags say."""

    model: DeepSeek
    tokenizer: Tokenizer
    options: Options
    generator: torch.Generator

    def check_length(self, prompt: list[int]) -> None:
        """Raise UsageError for a prompt that leaves no room for an answer."""
        limit = self.model.config.max_position_embeddings
        if len(prompt) >= limit:
            raise UsageError(
                f"the prompt has {len(prompt)} tokens and the context {limit}: shorten the prompt"
            )

    def warm_up(self, prompt: list[int]) -> None:
        """With --compile, compile before anybody waits for the next word."""
        if self.options.compile:
            print("compiling, about half a minute", file=sys.stderr, flush=True)
            rows, state = min(self.options.judge or 1, TOGETHER), self.generator.get_state()
            for _ in itertools.islice(self.stream([prompt] * rows), 4):  # then a card replays
                pass
            self.generator.set_state(state)  # --seed draws the same numbers as without

    def stream(self, prompts: list[list[int]]) -> Iterator[torch.Tensor]:
        """`DeepSeek.generate` with the flags."""
        options = self.options
        return self.model.generate(
            prompts,
            LONGEST if options.max_new_tokens is None else options.max_new_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            stop=self.model.config.eos_token_id,
            vocab_size=self.tokenizer.get_vocab_size(),
            generator=self.generator,
            compiled=options.compile,
        )

    def speak(self, prompt: list[int]) -> str:
        """Print the continuation of a prompt as it comes; return it. In a dialogue Ctrl-C ends the
        answer alone."""
        words, ids, said = DecodeStream(skip_special_tokens=True), [], ""
        in_template = " " if self.options.chat else ""  # which has it before the answer
        try:
            for token in self.stream([prompt]):
                ids.append(int(token))
                word = words.step(self.tokenizer, ids[-1]) or ""  # waits for whole characters
                print(word if said else word.removeprefix(in_template), end="", flush=True)
                said += word
            rest = self.tokenizer.decode(ids)[len(said) :]  # half a character, at the end
            print(rest, end="")
            said += rest
        except KeyboardInterrupt:
            if not self.options.chat or self.options.prompt is not None:
                raise
        print()
        return said.removeprefix(in_template)


def converse(speaker: Speaker) -> None:
    """Answer line after line until the input ends. The oldest turns are forgotten once the
    dialogue takes more than half of the context."""
    if sys.stdin.isatty():
        print("Ctrl-D ends the chat", file=sys.stderr)
    turns: list[tuple[str, str | None]] = []
    half = speaker.model.config.max_position_embeddings // 2
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            print()
            return
        if not question:
            continue
        turns.append((question, None))
        prompt = chat.encode_chat(speaker.tokenizer, turns)
        while len(turns) > 1 and len(prompt) > half:
            del turns[0]
            prompt = chat.encode_chat(speaker.tokenizer, turns)
        try:
            speaker.check_length(prompt)
        except UsageError as error:
            print(error)
            turns.clear()
            continue
        turns[-1] = (question, speaker.speak(prompt))


def score(model: DeepSeek, tokenizer: Tokenizer, path: str, device: torch.device) -> None:
    """Print how well the model predicts a text: every byte once, each document from its start. In
    one longer than the context each token is predicted from half a context at least."""
    documents = data.encode_documents(data.read_documents([Path(path)]), tokenizer)
    seq_len = min(4096, model.config.max_position_embeddings)
    text = data.build_eval_set(documents, tokenizer, seq_len, 8, overlap=seq_len // 2)
    result = evaluate(model, text, device, torch.float32)
    loss, bpb = result["val_loss"], result["val_bpb"]
    print(
        f"{loss:.4f} nats/token, perplexity {math.exp(loss):.3f}, {bpb:.4f} bits per byte"
        f" ({text.tokens:,} tokens, {text.bytes:,} bytes)"
    )


def judge(speaker: Speaker, prompt: list[int]) -> None:
    """Print which share of sampled stories their grammar accepts, and what is wrong with the rest:
    the kind of the first mistake, and how far into the text it stands."""
    asked = left = speaker.options.judge
    valid, mistakes, places = 0, Counter(), []
    while left:
        rows = min(left, TOGETHER)
        tokens = list(speaker.stream([prompt] * rows))  # none with --max_new_tokens 0
        for row in torch.stack(tokens, 1).tolist() if tokens else [[]] * rows:
            text = (speaker.options.prompt or "") + speaker.tokenizer.decode(row)
            try:
                stories.parse(text)
                valid += 1
            except stories.ParseError as error:
                mistakes[error.kind] += 1
                places.append(error.position / max(1, len(text)))
        left -= rows
    print(f"{valid} of {asked} stories are valid ({valid / asked:.1%})")
    if mistakes:
        kinds = ", ".join(f"{kind} {n}" for kind, n in mistakes.most_common())
        middle = sorted(places)[len(places) // 2]
        print(f"first mistakes: {kinds}; in the median after {middle:.0%} of the text")


if __name__ == "__main__":
    run_script(main)
