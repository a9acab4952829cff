"""What a user's machine, disk, files and typing can do wrong: no run is lost, no text misleads."""

import ast
import io
import json
import math
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import MODEL, ROOT, log_of, random_model, same, small
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import finetune
import sample
import train
from common import chat, checkpoint, data, trainer

KILLER = Path(__file__).with_name("killer.py")
SWEEP = pytest.mark.slow  # of the full number of cases


def sweep(few: int, many: int):
    """Run a test with a few seeded cases, and under `pytest -m slow` with many."""
    return pytest.mark.parametrize("cases", [few, pytest.param(many, marks=SWEEP)])


# ----------------------------------------------------------------------------------------------
# Killed
# ----------------------------------------------------------------------------------------------


def moments(cases: int, seconds: float) -> list:
    """Moments of a run: half of them drawn, the others in the middle of writing or evaluating."""
    rng = random.Random(cases)
    calls = ["torch.save", "trainer.evaluate", "os.replace", "os.fsync", "runlog.draw_curves"]
    named = [[name, 2 + rng.randrange(2)] for name in calls * cases][: -(-cases // 2)]
    return named + [rng.uniform(0, seconds) for _ in range(cases - len(named))]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the killer forks")
@sweep(5, 20)
@pytest.mark.parametrize("kind", ["float32", pytest.param("bfloat16", marks=SWEEP), "finetune"])
def test_a_run_killed_anywhere_ends_with_the_same_bits(corpus, trained, tmp_path, kind, cases):
    steps = 24 if cases == 5 else 400  # the more often killed, the further it gets
    line = f"--steps {steps} --eval_every 6 --save_every 1 --log_level quiet --out {tmp_path}/o"
    if kind == "finetune":
        rows = [{"instruction": f"Where is cat {n}?", "output": f"On mat {n}."} for n in range(60)]
        (tmp_path / "rows.json").write_text(json.dumps(rows))
        line += f" --ckpt {trained} --data {tmp_path}/rows.json --batch_size 4 --dtype float32"
    else:
        line += f" {MODEL.replace('float32', kind)} --data {corpus}"
    script = "finetune" if kind == "finetune" else "train"
    ends = []
    for when in ([], moments(cases, 2.0)):
        command = [sys.executable, str(KILLER), script, json.dumps(line.split()), json.dumps(when)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
        state = checkpoint.load_checkpoint(tmp_path / "o" / "ckpt.pt", mmap=False)
        records = [r for r in log_of(tmp_path / "o")[1:] if "loss" in r]
        losses = [(r["step"], r["loss"], r.get("val_loss")) for r in records]
        kept = [p.read_bytes() for p in sorted((tmp_path / "o").glob("adapter_*"))]
        ends.append((state, losses, kept))
        if not when:
            (tmp_path / "o").rename(tmp_path / "untouched")
    killed, resumed = (int(word) for word in re.findall(r"\d+", done.stdout))
    assert killed >= cases // 2 and resumed >= 2  # the last ones may find it finished
    train.check_seal(tmp_path / "o")
    (a, losses, kept), (b, losses_b, kept_b) = ends
    for key in ("model", "optimizer", "rng", "step", "tokens", "best_val_loss"):
        assert same(a[key], b[key]), key
    assert losses == losses_b and [step for step, *_ in losses] == list(range(1, steps + 1))
    assert kept == kept_b


# ----------------------------------------------------------------------------------------------
# The disk
# ----------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """small_disk(kilobytes): a folder that holds no more."""
    mounted = []

    def mount(size: int) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(folder)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("mounting a small disk is not allowed here")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path, leave: int = 0) -> Path:
    """A file that takes all the room of a disk but for so many bytes."""
    stuffing = folder / "stuffing"
    space = os.statvfs(folder)
    stuffing.write_bytes(bytes(max(0, space.f_bavail * space.f_frsize - leave)))
    return stuffing


def test_a_disk_that_fills_up_costs_no_good_checkpoint(run, corpus, small_disk):
    out = small_disk(3000) / "o"
    line = f"train {MODEL} --data {corpus} --save_every 4 --eval_every 4 --out {out}"
    assert run(f"{line} --steps 4")[0] == 0
    before = checkpoint.load_checkpoint(out / "ckpt.pt", mmap=False)
    stuffing = fill(out.parent)
    code, _, err = run(f"train --resume --steps 12 --out {out}")
    assert code == 2 and err.count("ckpt.pt cannot be written") == 2, err  # once, and at the end
    assert "it takes 0.5 MB and 0.0 MB are free; going on" in err and "make room" in err
    assert same(checkpoint.load_checkpoint(out / "ckpt.pt", mmap=False), before)
    steps = [r["step"] for r in log_of(out)[1:]]  # no half line
    assert steps == list(range(1, len(steps) + 1))
    stuffing.unlink()
    assert run(f"train --resume --steps 12 --out {out}")[0] == 0
    assert [r["step"] for r in log_of(out)[1:]] == list(range(1, 13))
    assert checkpoint.load_checkpoint(out / "ckpt.pt")["step"] == 12
    assert not [path for path in out.iterdir() if "tmp" in path.name]


def test_room_made_while_training_brings_everything_in(run, corpus, small_disk, monkeypatch):
    out = small_disk(3000) / "o"
    step, room = trainer.Trainer.train_step, []

    def fill_and_empty(self, *batch):
        if self.step == 2:
            room.append(fill(out.parent))
        if self.step == 37:  # the log had some room left in its last page
            room.pop().unlink()
        return step(self, *batch)

    monkeypatch.setattr(trainer.Trainer, "train_step", fill_and_empty)
    line = f"train {MODEL} --data {corpus} --save_every 20 --eval_every 20 --steps 40 --out {out}"
    code, _, err = run(line)
    assert code == 0 and "log.jsonl cannot be written: No space left on device; going on" in err
    assert "ckpt.pt cannot be written" in err and "curves.png cannot be written" in err
    assert [r["step"] for r in log_of(out)[1:]] == list(range(1, 41))
    assert checkpoint.load_checkpoint(out / "ckpt.pt")["step"] == 40


@pytest.mark.parametrize("room", [2_000, 16_000])  # for not even the tokenizer, for no tokens
def test_a_cache_without_room_is_said_and_leaves_nothing(
    run, corpus, small_disk, tmp_path, monkeypatch, room
):
    cache = small_disk(200)
    fill(cache, room)
    monkeypatch.setenv("DEEPSEEK_CACHE", str(cache / "c"))
    (cache / "c").mkdir()
    code, _, err = run(f"train {MODEL} --data {corpus} --steps 1 --out {tmp_path}/o")
    assert code == 2 and "cannot be written (No space left on device)" in err, err
    assert "DEEPSEEK_CACHE" in err and not list((cache / "c").iterdir())


def test_an_adapter_that_finds_no_room(run, trained, small_disk, tmp_path):
    rows = [{"instruction": f"Where is cat {n}?", "output": f"On mat {n}."} for n in range(60)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    out = small_disk(1000) / "o"
    line = f"finetune --ckpt {trained} --data {tmp_path}/rows.json --batch_size 4 --out {out}"
    fill(out.parent, 30_000)
    code, _, err = run(f"{line} --steps 4 --eval_every 2")
    assert code == 2 and "adapter_model.safetensors cannot be written" in err, err


def test_a_half_written_cache_is_never_read(corpus, tmp_path):
    cache = tmp_path / "cache"
    program = (
        "import os, signal, sys, data; from pathlib import Path; import numpy\n"
        "data.np.save = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"data.prepare({str(corpus)!r}, 320, Path({str(cache)!r}))"
    )
    killed = subprocess.run([sys.executable, "-c", program], cwd=ROOT)
    assert killed.returncode == -9 and list(cache.glob("*.partial/*/tokenizer.json"))
    whole = data.prepare(str(corpus), 320, tmp_path / "other")
    again = data.prepare(str(corpus), 320, cache)
    assert (again.train.ids == whole.train.ids).all() and len(again.val.ids)


# ----------------------------------------------------------------------------------------------
# Files from strangers
# ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def places(corpus, trained, tmp_path_factory):
    """What sample.py reads: name -> (folder, files of it, command line with {} for the folder)."""
    folder = tmp_path_factory.mktemp("places")
    shutil.copytree(trained.parent, folder / "run")
    rows = [{"instruction": f"Where is cat {n}?", "output": f"On mat {n}."} for n in range(60)]
    (folder / "rows.json").write_text(json.dumps(rows))
    cache = str(tmp_path_factory.getbasetemp() / "cache")
    for line in (
        f"finetune.py --ckpt {trained} --data {folder}/rows.json --steps 2 --out {folder}/lora",
        f"sample.py --ckpt {trained} --export {folder}/hf",
    ):
        command = [sys.executable, *line.split()]
        environment = os.environ | {"DEEPSEEK_CACHE": cache}
        subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    files = {
        "run": ["ckpt.pt"],
        "hf": ["config.json", "model.safetensors", "tokenizer.json", "SHA256SUMS"],
        "lora": ["adapter_config.json", "adapter_model.safetensors", "SHA256SUMS"],
    }
    lines = {"run": "{}/ckpt.pt", "hf": "{}", "lora": f"{trained} --lora {{}}"}
    end = "--prompt The --temperature 0 --max_new_tokens 12 --device cpu"
    return {n: (folder / n, files[n], f"sample --ckpt {lines[n]} {end}") for n in files}


def damaged(content: bytes, rng: random.Random, kind: str) -> bytes:
    """Cut at a random length, or with one byte changed at a random place."""
    at = rng.randrange(len(content))
    if kind == "cut":
        return content[:at]
    return content[:at] + bytes([content[at] ^ rng.randrange(1, 256)]) + content[at + 1 :]


@sweep(6, 200)
@pytest.mark.parametrize("kind", ["cut", "changed"])
@pytest.mark.parametrize("place", ["run", "hf", "lora"])
def test_a_damaged_file_is_refused_or_does_no_harm(run, places, tmp_path, place, kind, cases):
    folder, files, line = places[place]
    copy = shutil.copytree(folder, tmp_path / "copy")
    code, right, err = run(line.format(copy))
    assert code == 0, err
    rng = random.Random(f"{place} {kind}")
    refused = 0
    for case in range(cases if kind == "changed" else -(-cases // 4)):
        path = copy / files[case % len(files)]
        content = path.read_bytes()
        path.write_bytes(damaged(content, rng, kind))
        sealed = place == "run" or rng.random() < 0.5 or path.name == "SHA256SUMS"
        if not sealed:  # as strangers' files are: a changed number cannot be noticed
            (copy / "SHA256SUMS").rename(tmp_path / "sums")
        code, out, err = run(line.format(copy))
        path.write_bytes(content)
        if not sealed:
            (tmp_path / "sums").rename(copy / "SHA256SUMS")
        where = f"{path.name}, case {case}, sealed {sealed}: {code} {out} {err}"
        assert (code, out) == (0, right) or code == 2 or (code == 0 and not sealed), where
        if code == 2:
            refused += 1
            assert err.startswith("sample.py: ") and err.count("\n") == 1, where
            assert "Traceback" not in err, where
    assert refused > 0


def test_weights_changed_behind_the_seal_are_noticed(run, places, tmp_path):
    for place, name in (("hf", "model.safetensors"), ("lora", "adapter_model.safetensors")):
        folder, _, line = places[place]
        copy = shutil.copytree(folder, tmp_path / place)
        content = bytearray((copy / name).read_bytes())
        content[-5] ^= 0x40  # in a number, which no format checks
        (copy / name).write_bytes(content)
        code, _, err = run(line.format(copy))
        assert code == 2 and f"{name} is not what was written" in err
        (copy / "SHA256SUMS").unlink()
        assert run(line.format(copy))[0] == 0
    sums = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=folder, capture_output=True)
    assert sums.returncode == 0 and sums.stdout.count(b": OK") == 2


class Bomb:
    def __reduce__(self):
        return open, ("exploded", "w")


def test_code_in_a_checkpoint_is_not_run(run, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = checkpoint.load_checkpoint(trained, mmap=False)
    torch.save({**state, "tokens": Bomb()}, tmp_path / "bomb.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Bomb()))
    for name in ("bomb.pt", "plain.pt"):
        code, _, err = run(f"sample --ckpt {name}")
        assert code == 2 and "cannot be read" in err
        assert not Path("exploded").exists()
    torch.load(tmp_path / "bomb.pt", weights_only=False)
    assert Path("exploded").exists()  # so the bomb is a real one


STRANGE = [None, True, -1, 0, 3, 10**9, math.nan, "x", "", [], {}, {"a": 1}, torch.zeros(2)]


@sweep(20, 500)
def test_a_checkpoint_with_strange_contents_is_refused_or_works(run, trained, tmp_path, cases):
    """A value at a random place of the checkpoint is another one, or is missing."""
    state = checkpoint.load_checkpoint(trained, mmap=False)
    sample = f"sample --ckpt {tmp_path}/o/ckpt.pt --temperature 0 --max_new_tokens 5"
    resume = f"train --resume --steps 3 --out {tmp_path}/o"
    (tmp_path / "o").mkdir()
    rng, refused = random.Random(1), 0
    for case in range(cases):
        changed = dict(state)
        key = rng.choice(list(state))
        value = rng.choice([*STRANGE, "missing"])
        target, spot = changed, key
        if isinstance(state[key], dict) and state[key] and rng.random() < 0.7:
            target, spot = dict(state[key]), rng.choice(list(state[key]))
            changed[key] = target
        if isinstance(value, str) and value == "missing":
            del target[spot]
        elif rng.random() < 0.1:
            target["more"] = value
        else:
            target[spot] = value
        torch.save(changed, tmp_path / "o" / "ckpt.pt")
        for line in (sample, resume):
            code, out, err = run(line)
            what = f"case {case}, {key} {spot} = {value!r}: {line.split()[0]} {code} {err}"
            assert code in (0, 2) and "Traceback" not in err, what
            assert code == 0 or len(err.strip().splitlines()) == 1, what
            refused += code == 2
    assert refused > cases  # of two commands each


@pytest.mark.parametrize(
    "part, name, value",
    [
        ("args", "lr", None),
        ("args", "warmup", None),
        ("args", "batch_size", "many"),
        ("optimizer", "param_groups", []),
        ("optimizer", "state", {0: 1}),
        ("rng", "cpu", torch.zeros(2)),
        ("config", "more", 1),
        (None, "dtype", "float8"),
        (None, "step", -1),
        (None, "format", torch.zeros(2)),
    ],
)
def test_a_part_that_does_not_fit_is_refused(run, trained, tmp_path, part, name, value):
    state = checkpoint.load_checkpoint(trained, mmap=False)
    (state[part] if part else state)[name] = value
    (tmp_path / "o").mkdir()
    torch.save(state, tmp_path / "o" / "ckpt.pt")
    code, _, err = run(f"train --resume --steps 3 --out {tmp_path}/o")
    assert code == 2 and err.count("\n") == 1, err


def test_an_interrupted_sealing_leaves_no_sums(tmp_path):
    with train.sealing(tmp_path):
        (tmp_path / "a").write_text("a")
    train.check_seal(tmp_path)
    with pytest.raises(KeyboardInterrupt), train.sealing(tmp_path):
        (tmp_path / "a").write_text("b")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    train.check_seal(tmp_path)


@sweep(30, 1000)
def test_a_config_with_absurd_numbers_is_refused_or_works(run, places, tmp_path, cases):
    folder, _, line = places["hf"]
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "SHA256SUMS").unlink()
    config = json.loads((copy / "config.json").read_text())
    values = [
        None,
        True,
        -1,
        0,
        1,
        3,
        10**9,
        10**30,
        1e-300,
        1e300,
        math.nan,
        math.inf,
        "x",
        [],
        {},
    ]
    rng = random.Random(2)
    for case in range(cases):
        name, value = rng.choice(list(config)), rng.choice(values)
        (copy / "config.json").write_text(json.dumps(config | {name: value}))
        code, out, err = run(line.format(copy))
        what = f"case {case}, {name} = {value!r}: {code} {out} {err}"
        assert code in (0, 2) and "Traceback" not in err, what
        assert code == 0 or err.count("\n") == 1, what


# ----------------------------------------------------------------------------------------------
# Typing
# ----------------------------------------------------------------------------------------------

WORDS = st.one_of(
    st.integers(-3, 300).map(str),
    st.floats().map(str),
    st.sampled_from(
        ["", "0", "1", "1e9", "-1", "none", "true", "auto", "cpu", "tiny", "stories:1"]
    ),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
)


def flags_of(parser, leave_out=()) -> st.SearchStrategy[list[str]]:
    """Some of a parser's flags, with values that may fit or not."""
    flags = []
    for action in parser._actions:
        if not action.option_strings or action.dest in {"help", *leave_out}:
            continue
        value = st.sampled_from(action.choices) | WORDS if action.choices else WORDS
        name = action.option_strings[0]
        one = st.just([name]) if action.nargs == 0 else value.map(lambda v, n=name: [f"{n}={v}"])
        flags.append(one)
    return st.lists(st.one_of(flags), max_size=3).map(lambda some: [f for one in some for f in one])


# Of training: what would take long, or read the whole disk
LEFT_OUT = ["out", "compile", "steps", "minutes", "low_memory", "device", "data", "ckpt"]
LEFT_OUT += ["num_hidden_layers"]


def check_end(code, err, line) -> None:
    assert code in (0, 2) and "Traceback" not in err, (line, code, err)
    assert code == 0 or err.strip(), line


FUZZ = [15, pytest.param(300, marks=SWEEP)]
QUIET = dict(deadline=None, suppress_health_check=list(HealthCheck), database=None)


@pytest.mark.parametrize("cases", FUZZ)
def test_sample_takes_or_refuses_any_flags(run, trained, tmp_path, monkeypatch, cases):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))

    @settings(max_examples=cases, derandomize=True, **QUIET)
    @given(flags_of(sample.make_parser(), ["ckpt", "device", "num_samples", "check"]))
    def fuzz(flags):
        line = ["sample", "--ckpt", str(trained), "--max_new_tokens=3", *flags]
        check_end(*run(line)[::2], line)

    fuzz()


@pytest.mark.parametrize("cases", FUZZ)
@pytest.mark.parametrize("script", ["train", "finetune"])
def test_training_takes_or_refuses_any_flags(
    run, corpus, trained, tmp_path, monkeypatch, script, cases
):
    monkeypatch.chdir(tmp_path)
    rows = [{"instruction": f"Where is cat {n}?", "output": f"On mat {n}."} for n in range(60)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    begin = {
        "train": ["train", *MODEL.split(), "--data", str(corpus)],
        "finetune": ["finetune", "--ckpt", str(trained), "--data", "rows.json"],
    }[script]
    parser = {"train": train, "finetune": finetune}[script].make_parser()

    @settings(max_examples=cases, derandomize=True, **QUIET)
    @given(flags_of(parser, LEFT_OUT))
    def fuzz(flags):
        line = [*begin, "--out", "o", "--overwrite", "--steps", "2", *flags]
        check_end(*run(line)[::2], line)

    fuzz()


@settings(max_examples=50, derandomize=True, **QUIET)
@given(
    st.lists(st.integers(0, 95), max_size=140),
    st.integers(-2, 140),
    st.floats(0, 1e6) | st.just(math.nan),
    st.integers(-1, 200) | st.none(),
    st.floats(-0.5, 1.5) | st.none(),
)
def test_generate_takes_or_refuses_any_arguments(prompt, n, temperature, top_k, top_p):
    model = random_model(small())
    generator = torch.Generator().manual_seed(0)
    try:
        how = dict(temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
        tokens = list(model.generate([prompt], n, **how))
    except ValueError as error:
        assert "\n" not in str(error) and len(str(error)) > 10
    else:
        assert len(prompt) and 0 <= len(tokens) <= n
        assert all(0 <= int(token) < 96 for token in tokens)


def test_a_prompt_as_long_as_the_context(run, trained):
    full = ["sample", "--ckpt", str(trained), "--prompt", "a" * 31]  # and bos
    assert run(full)[0] == 2 and "shorten the prompt" in run(full)[2]
    assert run([*full[:-1], "a" * 30])[0] == 0
    assert run([*full[:-1], ""])[0] == 0


@settings(max_examples=200, derandomize=True, **QUIET)
@given(st.text() | st.sampled_from([data.BOS, data.EOS, f"x{data.EOS}y", "a\0b", "a" * 100_000]))
def test_what_a_user_types_never_becomes_a_special_token(trained, text):
    tokenizer = data.load_tokenizer(checkpoint.load_checkpoint(trained)["tokenizer"])
    specials = {tokenizer.token_to_id(data.BOS), tokenizer.token_to_id(data.EOS)}
    ids = chat.encode_chat(tokenizer, [(text, None)])
    assert ids[0] in specials and not specials & set(ids[1:])
    assert tokenizer.decode(ids) == chat.TEMPLATE.format(question=text)


# ----------------------------------------------------------------------------------------------
# Platforms
# ----------------------------------------------------------------------------------------------

PROGRAMS = sorted(path for path in ROOT.glob("*.py"))


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_every_program_is_valid_python_3_10(path):
    ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 10))


def test_nothing_depends_on_unix():
    """No module that other systems lack (but for one that bench.py tries), and no fork."""
    unix = {"fcntl", "pwd", "grp", "termios", "pty", "tty", "posix", "syslog"}
    for path in PROGRAMS:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module]
            assert not unix & set(names), f"{path.name} line {node.lineno}"
            assert getattr(node, "attr", "") != "fork", f"{path.name} line {node.lineno}"


def test_no_home_no_network_a_poor_console_and_a_checkout_that_cannot_be_written(corpus, tmp_path):
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    command = ["mount", "--bind", "-o", "ro", str(ROOT), str(checkout)]
    mounted = shutil.which("mount") and not subprocess.run(command, capture_output=True).returncode
    place = checkout if mounted else ROOT
    nowhere = {"HOME": "/proc/nowhere", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    console = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    environment = {k: v for k, v in os.environ.items() if k != "DEEPSEEK_CACHE"}
    environment |= nowhere | console | {"PYTHONWARNDEFAULTENCODING": "1"}
    strict = [f"-Werror::EncodingWarning:{p.stem}" for p in PROGRAMS]
    strict += ["-Werror::EncodingWarning:__main__"]
    out = tmp_path / "o u t"
    try:
        for line in (
            ["train.py", *MODEL.split(), "--data", str(corpus), "--steps", "2", "--out", str(out)],
            ["sample.py", "--ckpt", str(out / "ckpt.pt"), "--prompt", "The"],
            ["sample.py", "--ckpt", str(out / "ckpt.pt"), "--export", str(out / "hf")],
        ):
            program = [sys.executable, *strict, str(place / line[0]), *line[1:]]
            done = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True)
            assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr
            done.stdout.decode("ascii")
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(checkout)], check=True)
    assert (out / "cache").is_dir()  # the fallback where there is no home


def test_resume_reads_stored_flags_as_they_are_typed():
    parser = train.make_parser()
    line = "--norm_topk_prob false --lr 1e-4 --fsdp --q_lora_rank none --first_k_dense_replace 0"
    stored = vars(parser.parse_args([*line.split(), "--rope_scaling", '{"type": "yarn"}']))
    assert parser.check(stored) == stored
    stored = vars(parser.parse_args(["--norm_topk_prob", "true"]))
    assert parser.check(stored) == stored and stored["norm_topk_prob"] is True
    tuned = finetune.make_parser()
    stored = vars(tuned.parse_args("--target_modules q_proj o_proj --full".split()))
    assert tuned.check(stored) == stored


def test_a_chat_survives_bytes_that_are_no_text(trained):
    program = [sys.executable, str(ROOT / "sample.py"), "--ckpt", str(trained), "--chat"]
    done = subprocess.run(program, input=b"\xff\xfe hello\n", capture_output=True)
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr


def test_a_check_of_nothing(run, trained):
    code, out, err = run(f"sample --ckpt {trained} --judge 2 --max_new_tokens 0")
    assert code == 0 and "0 of 2" in out, err
