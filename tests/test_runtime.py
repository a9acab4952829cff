"""Flags, also of a run that goes on; bad input; how scripts end; checkpoint, log, sample.py."""

import errno
import io
import platform
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import fields
from unittest.mock import Mock

import pytest
import torch
from conftest import MODEL, ROOT, load

import deepseek
import finetune
import sample
import train
from common import chat, checkpoint, data, formats, runlog, runtime, stories, trainer
from common.runtime import UsageError
from deepseek import Config, DeepSeek

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture
def begun(trained, tmp_path):
    """A run of two steps, to go on with."""
    return shutil.copytree(trained.parent, tmp_path / "begun")


def test_rounding_may_change_and_is_said_and_all_else_stays(run, begun):
    before = load(begun)["args"]
    changes = {"dtype": "bfloat16", "grad_accum": 2, "device": "cpu"}
    said = "".join(f" --{name} {value}" for name, value in changes.items())
    line = f"train --resume --out {begun}"
    code, out, _ = run(f"{line} --steps 4{said} --checkpoint_activations --save_every 2")
    assert code == 0 and "in 2 pieces" in out and "cpu, bfloat16" in out
    changes["checkpoint_activations"] = True
    for name, value in changes.items():
        flag, old = (f"--{name} ", before[name]) if name != "dtype" else ("", "float32")
        assert out.count(f"note     {flag}{value} in place of {old}: results may round") == 1
    changes |= {"steps": 4, "save_every": 2, "resume": True, "out": str(begun)}
    assert load(begun)["args"] == before | changes and out.count("in place of") == 5
    assert "--steps 4 in place of 2: the learning rate is that of a run of this length" in out
    code, out, _ = run(f"{line} --steps 5")  # as it was typed last
    assert code == 0 and out.count("in place of") == 1 and "cpu, bfloat16" in out
    assert run(f"{line} --steps 6 --log_level quiet") == (0, "", "")
    assert "finished: 6 steps" in run(f"{line} --log_level info")[1]


def test_a_run_of_the_time_when_there_was_only_adamw_goes_on_with_it(run, corpus, tmp_path):
    line = f"train {MODEL} --data {corpus} --steps 1 --optimizer adamw --out {tmp_path}/o"
    assert run(line)[0] == 0
    state = load(tmp_path / "o")
    del state["args"]["optimizer"]
    checkpoint.save_checkpoint(tmp_path / "o" / "ckpt.pt", state)
    assert run(f"train --resume --steps 2 --optimizer adamw --out {tmp_path}/o")[0] == 0
    state = load(tmp_path / "o")
    assert state["step"] == 2 and state["args"]["optimizer"] == "adamw"
    assert "exp_avg" in state["optimizer"]["state"][0]
    code, _, err = run(f"train --resume --steps 3 --optimizer muon --out {tmp_path}/o")
    assert code == 2 and "--optimizer muon differs from the run's adamw" in err


def test_what_is_learned_may_not_change(run, begun):
    flags = (
        "--lr 0.5,--batch_size 8,--seq_len 16,--warmup 3,--schedule cosine,--beta2 0.9,--seed 3"
        ",--weight_decay 0.2,--clip 2.0,--size small,--low_memory True,--minutes 3.0"
        ",--induction_init 0.1,--optimizer adamw"
    ).split(",")
    names = {flag.split()[0].removeprefix("--") for flag in flags}
    kinds = {f.name: f.metadata["on_resume"] for f in fields(train.Options) if f.metadata}
    assert names == {name for name, kind in kinds.items() if kind == runtime.SAME}
    flags += ["--steps 1", "--hidden_size 64", "--vocab_size 384", "--norm_topk_prob True"]
    before = (begun / "ckpt.pt").read_bytes()
    for flag in flags:
        code, _, err = run(f"train --resume --out {begun} {flag.replace('memory True', 'memory')}")
        assert code == 2 and f"{flag} differs from the run's" in err, (flag, err)
    assert (begun / "ckpt.pt").read_bytes() == before


def test_the_command_that_began_a_run_goes_on_with_it_unless_the_text_has_changed(
    run, corpus, tmp_path
):
    (tmp_path / "mine.txt").write_text(corpus.read_text())
    line = f"train {MODEL} --vocab_size 300 --data {tmp_path}/mine.txt --out {tmp_path}/o"
    assert run(f"{line} --steps 1")[0] == 0
    code, _, err = run(f"{line} --steps 2 --resume")
    assert code == 0, err
    state = load(tmp_path / "o") | {"dtype": "bfloat16"}  # as auto may mean on another machine
    checkpoint.save_checkpoint(tmp_path / "o" / "ckpt.pt", state)
    _, out, _ = run(f"{line} --steps 3 --resume")
    assert "note     float32 in place of bfloat16: results may round otherwise" in out
    (tmp_path / "mine.txt").rename(tmp_path / "moved.txt")
    resume = f"train --resume --out {tmp_path}/o --data {tmp_path}/moved.txt"
    assert run(f"{resume} --steps 4")[0] == 0  # the same text at another place
    (tmp_path / "mine.txt").write_text(corpus.read_text().replace("small", "great"))
    code, _, err = run(f"{line} --steps 5 --resume")
    assert code == 2 and "has changed since the run began" in err


@pytest.mark.parametrize(
    "line, message",
    [
        ("train --size huge", "invalid choice: 'huge'"),
        ("train --optimizer sgd", "invalid choice: 'sgd'"),
        (
            "train --data {text} --steps 1 --optimizer muon --low_memory",
            "do not go with --optimizer muon",
        ),
        ("train --data {text} --steps 0", "--steps: '0' is not a whole number of at least 1"),
        ("train --data {text} --minutes 0", "--minutes: '0' is not a number above 0"),
        ("train --data {text} --lr nan", "--lr: 'nan' is not a number above 0"),
        ("train --data {text} --steps 3 --minutes 3", "exclude each other"),
        ("train --data {text} --dtype float16 --device cpu", "float16 needs a CUDA card"),
        ("train --data {text} --rope_scaling nonsense", "'nonsense' is not JSON, or none"),
        ("train --hidden_size 6.5", "'6.5' is not a whole number"),
        ("train --minuts 3", "unrecognized arguments: --minuts 3 (--help lists the flags)"),
        ("train --data {text} --batch_size 5 --grad_accum 2", "multiple of --grad_accum 2"),
        ("train --data {text} --max_position_embeddings 16 --seq_len 32", "--seq_len 32 is more"),
        ("train --data {text} --out {tmp}/file", "cannot be written"),
        ("train --data {text} --size v2", "GiB of memory are needed"),
        ("train --data {text} --fsdp", "start them with torchrun"),
        ("train --resume --out {tmp}/nothing", "nothing to resume"),
        ("train --resume --steps 3 --out {tmp}/optimizer", "its parts do not fit"),
        ("finetune --ckpt {ckpt} --rehearsal 301", "of at least 0 and at most 300"),
        ("sample --ckpt {tmp}/none.pt", "does not exist"),
        ("sample --ckpt {tmp}/file", "is damaged, or was not written by train.py"),
        ("sample --ckpt {tmp}/changed", "is damaged, or was not written by train.py"),
        ("sample --ckpt {tmp}/program/ckpt.pt", "not a checkpoint of train.py"),
        ("sample --ckpt {tmp}/format/ckpt.pt", "has format 2, this program 3"),
        ("sample --ckpt {tmp}/config/ckpt.pt", "is not a checkpoint of train.py"),
        ("sample --ckpt {tmp}/model/ckpt.pt", "do not fit its own configuration"),
        ("sample --ckpt {tmp}/tokenizer/ckpt.pt", "is not a checkpoint of train.py"),
        ("sample --ckpt {tmp}", "has neither ckpt.pt nor config.json"),
        ("sample --ckpt {ckpt} --lora {tmp}/file", "adapter_config.json does not exist"),
        ("sample --ckpt {ckpt} --top_p 2", "--top_p: '2' is not a number above 0 and at most 1"),
        ("sample --ckpt {ckpt} --prompt {long}", "tokens and the context 32"),
        ("sample --ckpt {ckpt} --score x --compile", "leave it out"),
    ],
)
def test_bad_input_ends_in_one_sentence(run, corpus, tmp_path, trained, line, message):
    (tmp_path / "file").write_text("")
    weights = load(trained.parent)["model"]["lm_head.weight"].numpy().tobytes()
    (tmp_path / "changed").write_bytes(trained.read_bytes().replace(weights[:9], b"different"))
    strange = dict(program="?", format=2, config=None, model={}, tokenizer=None, optimizer={})
    for part, value in strange.items():
        (tmp_path / part).mkdir()
        torch.save(load(trained.parent) | {part: value}, tmp_path / part / "ckpt.pt")
    line = line.format(tmp=tmp_path, text=corpus, ckpt=trained, long="x" * 31)  # and bos
    if line.startswith("train") and "--out" not in line:
        line += f" --out {tmp_path}/out"
    code, _, err = run(line)
    assert code == 2
    assert message in err and err.count("\n") == 1 and "Traceback" not in err
    assert not (tmp_path / "out" / "ckpt.pt").exists()


@pytest.mark.parametrize("script", [train, finetune, sample], ids=lambda script: script.__name__)
def test_help_tells_of_every_flag_and_its_default(run, script):
    code, out, _ = run(f"{script.__name__} --help")
    named = [f for f in fields(script.Options) if f.metadata]
    assert code == 0 and " ".join(out.split()).count("(default: ") >= len(named)
    names = {f.name for f in [*named, *(fields(Config) if script is train else ())]}
    assert {f"--{name}" for name in names - {"bos_token_id", "eos_token_id"}} <= set(out.split())


@pytest.mark.parametrize(
    "module, is_theirs",
    [
        ("torch._dynamo.a", True),
        ("deepseek", False),
        ("torch._inductor.runtime.compile_tasks.a", False),  # what it has made
    ],
)
def test_a_failed_assertion_of_torch_compile_is_not_taken_for_ours(module, is_theirs):
    torch_compile, made = {"__name__": "torch._dynamo.b"}, {"__name__": module}
    exec("def fail(): assert False", made)
    exec("def call(f): f()", torch_compile)  # what fails may have been called by it
    with pytest.raises(AssertionError) as caught:
        torch_compile["call"](made["fail"])
    assert runtime.is_compile_error(caught.value) == is_theirs


@pytest.mark.parametrize(
    "error, code, said",
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), 2, "CUDA out of memory. Tried"),
        (OSError(28, "No space left on device"), 2, "[Errno 28] No space"),
        (torch._inductor.exc.InvalidCxxCompiler(), 2, "torch.compile fails here (No working C++"),
        (UsageError("no"), 2, "no"),
    ],
)
def test_how_a_script_ends_and_that_debug_shows_the_traceback(
    run, begun, monkeypatch, error, code, said
):
    def fail(*_):
        raise error

    monkeypatch.setattr(trainer.Trainer, "load_state_dict", fail)
    for debug in ("", "1"):
        monkeypatch.setenv("DEEPSEEK_DEBUG", debug)
        ended, _, err = run(f"train --resume --steps 4 --log_level quiet --out {begun}")
        assert ended == code and err.splitlines()[-1].startswith(f"train.py: {said}")
        assert ("Traceback" in err) == bool(debug) == (err.count("\n") > 1)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told")
def test_every_script_keeps_freed_memory_for_the_next_step():
    program = """
import resource, torch
from common import runtime
runtime.run_script(lambda: None)
for step in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    several = [torch.ones(2**18) for _ in range(16)]  # of a MiB each
    del several
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert int(done.stdout) < 400  # given back, 16 MiB are 4,096 pages


def test_a_cpu_takes_bfloat16_only_where_it_computes_it(monkeypatch):
    for able, expected in (
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True, "avx512_bf16": False}, torch.bfloat16),
        ({"avx512_f": True}, torch.float32),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda a=able: a, raising=False)
        assert runtime.choose_dtype("auto", torch.device("cpu")) == expected
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # torch 2.11 cannot tell
    assert runtime.choose_dtype("auto", torch.device("cpu")) == torch.float32


def test_two_runs_cannot_write_to_one_folder(tmp_path):
    options = train.Options(out=str(tmp_path))
    for _ in range(2):
        with trainer.run_lock(options), pytest.raises(UsageError, match="another run"):
            trainer.run_lock(options).__enter__()


def test_where_there_are_no_locks_a_run_goes_on_and_says_so(run, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(
        trainer.FileLock, "acquire", Mock(side_effect=OSError(errno.ENOLCK, "No locks available"))
    )
    code, out, _ = run(f"train {MODEL} --data {corpus} --steps 1 --out {tmp_path}/o")
    assert code == 0 and f"note     {tmp_path}/o cannot be locked (No locks available)" in out


def test_a_rank_without_torchrun_is_no_rank(monkeypatch):
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "1")
    runtime.init_distributed(torch.device("cpu"))
    assert (runtime.rank(), runtime.world_size()) == (0, 1)


def test_an_old_torch_is_refused(monkeypatch, capsys):
    for version, code in (("2.9.1+cu128", 2), ("2.10.0", 2), ("2.11.0", None), ("3.0.0a1", None)):
        monkeypatch.setattr(torch, "__version__", version)
        with pytest.raises(SystemExit) if code else nullcontext() as ended:
            runtime.run_script(lambda: None)
        assert (ended and ended.value.code) == code
        assert (f"torch {version} is too old: install torch 2.11" in capsys.readouterr().err) == (
            code == 2
        )


def test_ctrl_c_ends_an_answer_and_not_the_dialogue(trained, monkeypatch, capsys):
    model, tokenizer = checkpoint.open_model(str(trained), torch.device("cpu"), "auto")
    ids, asked = tokenizer.encode(" The cat").ids, []

    def stream(self, prompts):
        asked.extend(prompts)
        yield from map(torch.tensor, ids)
        raise KeyboardInterrupt

    monkeypatch.setattr(sample.Speaker, "stream", stream)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\nGo\n"))
    sample.converse(sample.Speaker(model, tokenizer, sample.Options(chat=True), None))
    assert capsys.readouterr().out == "> The cat\n> The cat\n> \n"
    half = model.config.max_position_embeddings // 2
    turns = [("Hi", "The cat"), ("Go", None)]
    whole = chat.encode_chat(tokenizer, turns)
    assert asked[1] == (whole if len(whole) <= half else chat.encode_chat(tokenizer, turns[1:]))
    with pytest.raises(KeyboardInterrupt):
        sample.Speaker(model, tokenizer, sample.Options(), None).speak([0])


def test_half_a_character_at_the_end_is_not_swallowed(trained, monkeypatch, capsys):
    tokenizer = data.load_tokenizer(checkpoint.load_checkpoint(trained)["tokenizer"])
    ids = tokenizer.encode("a猫").ids
    for count, expected in ((len(ids), "a猫"), (len(ids) - 1, "a\ufffd")):
        row = [torch.tensor(i) for i in ids[:count]]
        monkeypatch.setattr(sample.Speaker, "stream", lambda self, prompts, row=row: iter(row))
        said = sample.Speaker(None, tokenizer, sample.Options(), None).speak([0])
        assert said == expected and capsys.readouterr().out == f"{expected}\n"


def test_resuming_drops_log_lines_behind_the_checkpoint(tmp_path):
    log = runlog.Log(tmp_path, {"args": {}})
    for step in range(1, 6):
        log.write({"step": step})
    path = tmp_path / "log.jsonl"
    path.write_bytes(path.read_bytes()[:-1])  # the last line is cut, if only by its end
    assert [r.get("step") for r in runlog.read_log(path)] == [None, 1, 2, 3, 4]
    runlog.Log(tmp_path, {"args": {}}, resume_at=3).write({"step": 4, "again": True})
    *_, before, last = runlog.read_log(path)
    assert before == {"step": 3} and last == {"step": 4, "again": True}


def test_the_judge_counts_valid_stories_and_names_mistakes(monkeypatch, capsys):
    right, wrong = stories.tell(0).text, stories.tell(1).text
    start, end, _ = [f for f in stories.tell(1).facts if f[2] == "name"][-1]
    name = next(name for name in ("Mia", "Ada", "Zoe") if name not in wrong)
    wrong = wrong[:start] + name + wrong[end:]
    tokenizer = data.train_tokenizer([right, wrong], 600)
    rows = [[*tokenizer.encode(text).ids, 1] for text in (right, wrong, right)]
    longest = max(map(len, rows))
    steps = torch.tensor([row + [1] * (longest - len(row)) for row in rows]).T
    monkeypatch.setattr(sample.Speaker, "stream", lambda self, prompts: iter(steps))
    sample.judge(sample.Speaker(None, tokenizer, sample.Options(judge=3), None), [0])
    out = capsys.readouterr().out
    assert "2 of 3 stories are valid (66.7%)" in out
    assert "first mistakes: name 1" in out and f"after {start / len(wrong):.0%}" in out


def test_a_model_alone_is_written_small_and_speaks_but_does_not_go_on(run, trained, tmp_path):
    path = tmp_path / "new" / "small.pt"
    assert run(f"sample --ckpt {trained} --dtype bfloat16 --export {path}")[0] == 0
    state, whole = (checkpoint.load_checkpoint(p) for p in (path, trained))
    assert {"model", "config", "tokenizer"} <= state.keys() and "optimizer" not in state
    assert path.stat().st_size < 0.3 * trained.stat().st_size
    for name, weight in whole["model"].items():
        assert torch.equal(state["model"][name], weight.bfloat16())
    assert run(f"sample --ckpt {path} --prompt cat --max_new_tokens 5")[1].startswith("cat")
    shutil.copy(path, tmp_path / "ckpt.pt")
    code, _, err = run(f"train --resume --out {tmp_path}")
    assert code == 2 and "it has no flags" in err


def test_compiled_sampling_has_its_adapter_merged(run, trained, tmp_path, monkeypatch):
    model, _ = checkpoint.open_model(str(trained), torch.device("cpu"), "auto")
    deepseek.add_lora(model)
    formats.save_lora(model, tmp_path)
    adapted = []

    def generate(self, *_, **__):
        adapted.append(len(deepseek.modules_of(self, deepseek.LoRALinear)) > 0)
        return iter([])

    monkeypatch.setattr(DeepSeek, "generate", generate)
    for more in ("", " --compile"):
        assert run(f"sample --ckpt {trained} --lora {tmp_path} --prompt cat{more}")[0] == 0
    assert adapted == [True, False, False]


def test_sample_hands_its_flags_on(run, trained, monkeypatch):
    asked, drawn, taken = [], [], []

    def generate(self, prompts, new, **options):
        drawn.append(torch.rand(1, generator=options["generator"]).item())
        asked.append((len(prompts[0]), new, options))
        taken.append([len(prompts), 0])
        for _ in range(6):
            taken[-1][1] += 1
            yield torch.full([len(prompts)], 5)

    monkeypatch.setattr(DeepSeek, "generate", generate)
    flags = f"--prompt {'x' * 30} --max_new_tokens 9 --temperature 0.5 --top_k 3 --top_p 0.7"
    for more in (" --seed 1", " --seed 1 --compile"):
        assert run(f"sample --ckpt {trained} {flags}{more}")[0] == 0
    assert len(set(drawn)) == 1  # a seed gives the same text with and without
    (plain, warm, compiled) = asked  # what is compiled first is what is used then
    for (length, new, options), compile in ((plain, False), (warm, True), (compiled, True)):
        assert (length, new, options.pop("compiled")) == (31, 9, compile)
        assert options.pop("generator")
        assert options.pop("vocab_size") < 320  # the tokenizer's, without padding
        assert options == dict(temperature=0.5, top_k=3, top_p=0.7, stop=1)
    assert taken == [[1, 6], [1, 4], [1, 6]]  # the third step replays what the second recorded
    assert run(f"sample --ckpt {trained} --judge 60 --compile")[0] == 0
    assert [rows for rows, _ in taken[3:]] == [50, 50, 10]
