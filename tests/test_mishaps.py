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
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from conftest import MODEL, ROOT, log_of, random_model, same, small
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import finetune
import sample
import train
from common import chat, checkpoint, data, formats
from deepseek import Config, add_lora

KILLER = Path(__file__).with_name("killer.py")
SWEEP = pytest.mark.slow  # of the full number of cases


@pytest.fixture
def rows(tmp_path):
    """Instructions to fine-tune with."""
    some = [{"instruction": f"Where is cat {n}?", "output": f"On mat {n}."} for n in range(60)]
    (tmp_path / "rows.json").write_text(json.dumps(some))
    return tmp_path / "rows.json"


def sweep(few: int, many: int):
    """Run a test with a few seeded cases, and under `pytest -m slow` with many."""
    return pytest.mark.parametrize("cases", [few, pytest.param(many, marks=SWEEP)])


# --- killed --------------------------------------------------------------------------------------


def moments(cases: int, seconds: float) -> list:
    """Moments of a run: half of them drawn, the others in the middle of writing or evaluating."""
    rng = random.Random(cases)
    calls = [["torch.save", 2], ["trainer.evaluate", 3], ["os.replace", 3], ["os.fsync", 2]]
    calls += [["trainer.draw_curves", 1]]
    named = (calls * cases)[: -(-cases // 2)]
    return named + [rng.uniform(0, seconds) for _ in range(cases - len(named))]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the killer forks")
@sweep(5, 20)
@pytest.mark.parametrize("kind", ["float32", pytest.param("bfloat16", marks=SWEEP), "finetune"])
def test_a_run_killed_anywhere_ends_with_the_same_bits(
    corpus, trained, rows, tmp_path, kind, cases
):
    steps = 24 if cases == 5 else 400  # the more often killed, the further it gets
    out = tmp_path / "o"
    line = f"--steps {steps} --eval_every 6 --save_every 1 --log_level quiet --out {out}"
    if kind == "finetune":
        line += f" --ckpt {trained} --data {rows} --batch_size 4 --dtype float32"
    else:
        line += f" {MODEL.replace('float32', kind)} --data {corpus}"
    script = "finetune" if kind == "finetune" else "train"
    ends = []
    for when in ([], moments(cases, 2.0)):
        command = [sys.executable, str(KILLER), script, json.dumps(line.split()), json.dumps(when)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
        state = checkpoint.load_checkpoint(out / "ckpt.pt", mmap=False)
        log = [{k: v for k, v in r.items() if k != "tok_per_s"} for r in log_of(out)[1:]]
        ends.append((state, log, [p.read_bytes() for p in sorted(out.glob("adapter_*"))]))
        if not when:
            out.rename(tmp_path / "untouched")
    killed, resumed = (int(word) for word in re.findall(r"\d+", done.stdout))
    assert killed >= cases // 2 and resumed >= 2  # the last ones may find it finished
    (a, *rest), (b, *rest_b) = ends
    for key in ("model", "optimizer", "rng", "step", "tokens", "best_val_loss"):
        assert same(a[key], b[key]), key
    assert rest == rest_b
    assert [r["step"] for r in rest[0] if "loss" in r] == list(range(1, steps + 1))


# --- the disk ------------------------------------------------------------------------------------


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
    stuffing = fill(out.parent, 300_000)  # room for the curves
    code, _, err = run(f"train --resume --steps 12 --out {out}")
    assert code == 2 and "ckpt.pt cannot be written" in err, err
    assert "it takes 0.5 MB and" in err and "the checkpoint before it" in err
    assert same(checkpoint.load_checkpoint(out / "ckpt.pt", mmap=False), before)
    assert not [path for path in out.iterdir() if "tmp" in path.name]
    stuffing.unlink()
    assert run(f"train --resume --steps 12 --out {out}")[0] == 0
    assert [r["step"] for r in log_of(out)[1:]] == list(range(1, 13))  # no half line, none twice
    assert checkpoint.load_checkpoint(out / "ckpt.pt")["step"] == 12


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


def test_an_adapter_that_finds_no_room(run, trained, rows, small_disk):
    out = small_disk(1000) / "o"
    fill(out.parent, 30_000)
    line = f"finetune --ckpt {trained} --data {rows} --batch_size 4 --steps 4 --eval_every 2"
    code, _, err = run(f"{line} --out {out}")
    assert code == 2 and "adapter_model.safetensors cannot be written" in err, err


def test_a_half_written_cache_is_never_read(corpus, tmp_path):
    cache = tmp_path / "cache"
    program = (
        "import os, signal; from common import data; from pathlib import Path\n"
        "data.np.save = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"data.prepare({str(corpus)!r}, 320, Path({str(cache)!r}))"
    )
    killed = subprocess.run([sys.executable, "-c", program], cwd=ROOT)
    assert killed.returncode == -9 and list(cache.glob("*.partial/*/tokenizer.json"))
    whole = data.prepare(str(corpus), 320, tmp_path / "other")
    again = data.prepare(str(corpus), 320, cache)
    assert (again.train.ids == whole.train.ids).all() and len(again.val.ids)


# --- files from strangers ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def places(corpus, trained, tmp_path_factory):
    """What sample.py reads: name -> (folder, files of it, command line with {} for the folder)."""
    folder = tmp_path_factory.mktemp("places")
    shutil.copytree(trained.parent, folder / "run")
    model = checkpoint.build_model(checkpoint.load_checkpoint(trained))
    tokenizer = data.load_tokenizer(checkpoint.load_checkpoint(trained)["tokenizer"])
    formats.export(model, tokenizer, folder / "hf", chat.CHAT_TEMPLATE)
    add_lora(model, 4, 8.0, ["q_proj", "o_proj"])
    formats.save_lora(model, folder / "lora")
    files = {
        "run": ["ckpt.pt"],
        "hf": ["config.json", "model.safetensors", "tokenizer.json"],
        "lora": ["adapter_config.json", "adapter_model.safetensors"],
    }
    lines = {"run": "{}/ckpt.pt", "hf": "{}", "lora": f"{trained} --lora {{}}"}
    end = "--prompt The --temperature 0 --max_new_tokens 12 --device cpu"
    return {n: (folder / n, files[n], f"sample --ckpt {lines[n]} {end}") for n in files}


@sweep(12, 400)
@pytest.mark.parametrize("place", ["run", "hf", "lora"])
def test_a_damaged_file_is_refused_or_does_no_harm(run, places, tmp_path, place, cases):
    """Cut at a random length, or with one byte changed at a random place: what changes a number in
    a *.safetensors, or a letter of a .json, nobody can notice."""
    folder, files, line = places[place]
    copy = shutil.copytree(folder, tmp_path / "copy")
    code, right, err = run(line.format(copy))
    assert code == 0, err
    rng, refused = random.Random(place), 0
    for case in range(cases):
        path, is_cut = copy / files[case % len(files)], rng.random() < 0.4
        content = path.read_bytes()
        at = rng.randrange(len(content))
        changed = bytes([content[at] ^ rng.randrange(1, 256)]) + content[at + 1 :]
        path.write_bytes(content[:at] + (b"" if is_cut else changed))
        code, out, err = run(line.format(copy))
        path.write_bytes(content)
        where = f"{path.name}, case {case}, byte {at}, cut {is_cut}: {code} {out} {err}"
        unnoticed = code == 0 and not is_cut and place != "run"
        assert (code, out) == (0, right) or code == 2 or unnoticed, where
        if code == 2:
            refused += 1
            assert err.startswith("sample.py: ") and err.count("\n") == 1, where
    assert refused > cases // 4


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
    """Of what sample.py reads, and of the parts that the optimizer and the generator check; stored
    flags and counters are taken as they are: chance does not get past the archive's sums."""
    state = checkpoint.load_checkpoint(trained, mmap=False)
    (tmp_path / "o").mkdir()
    sample_it = f"sample --ckpt {tmp_path}/o/ckpt.pt --temperature 0 --max_new_tokens 5"
    resume = f"train --resume --steps 3 --out {tmp_path}/o"
    rng, refused = random.Random(1), 0
    for case in range(cases):
        key = rng.choice(["program", "format", "model", "config", "tokenizer", "optimizer", "rng"])
        value, spot = rng.choice(STRANGE), key
        changed = target = dict(state)
        if isinstance(state[key], dict) and rng.random() < 0.7:
            target, spot = dict(state[key]), rng.choice(list(state[key]))
            changed[key] = target
        if rng.random() < 0.1:
            del target[spot]
        else:
            target[spot] = value
        torch.save(changed, tmp_path / "o" / "ckpt.pt")
        for line in (sample_it, resume):
            code, _, err = run(line)
            what = f"case {case}, {key} {spot} = {value!r}: {line.split()[0]} {code} {err}"
            assert code == 0 or (code == 2 and len(err.strip().splitlines()) == 1), what
            refused += code == 2
    assert refused > cases // 2


@sweep(30, 1000)
def test_a_config_with_absurd_numbers_is_refused_or_works(run, places, tmp_path, cases):
    folder, _, line = places["hf"]
    copy = shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    values = [1, 10**30, 1e-300, 1e300, math.inf, *STRANGE[:-1]]
    rng = random.Random(2)
    for case in range(cases):
        name, value = rng.choice(list(config)), rng.choice(values)
        (copy / "config.json").write_text(json.dumps(config | {name: value}))
        code, out, err = run(line.format(copy))
        what = f"case {case}, {name} = {value!r}: {code} {out} {err}"
        assert code in (0, 2) and "Traceback" not in err, what
        assert code == 0 or err.count("\n") == 1, what


# --- typing --------------------------------------------------------------------------------------

WORDS = st.one_of(
    st.integers(-3, 300).map(str),
    st.floats().map(str),
    st.sampled_from(
        ["", "0", "1", "1e9", "-1", "none", "true", "auto", "cpu", "tiny", "stories:1"]
    ),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
)


# What would take long, or read the whole disk, or is given
LEFT_OUT = {"out", "compile", "steps", "minutes", "low_memory", "device", "data", "ckpt"}
LEFT_OUT |= {"num_hidden_layers", "num_samples", "judge", "max_new_tokens"}
QUIET = dict(deadline=None, suppress_health_check=list(HealthCheck), database=None)


def flags_of(options) -> st.SearchStrategy[list[str]]:
    """Some of a script's flags, with values that may fit or not."""
    flags = []
    known = [*fields(options), *(fields(Config) if hasattr(options(), "config") else ())]
    for f in known:
        if not f.metadata or f.name in LEFT_OUT:
            continue
        choices = f.metadata.get("choices")
        value = st.sampled_from(choices) | WORDS if choices else WORDS
        flags.append(value.map(lambda v, n=f.name: [f"--{n}={v}"]))
        if f.default is False:
            flags[-1] = st.just([f"--{f.name}"])
    return st.lists(st.one_of(flags), max_size=3).map(lambda some: [f for one in some for f in one])


@pytest.mark.parametrize("cases", [15, pytest.param(300, marks=SWEEP)])
@pytest.mark.parametrize("script", [train, finetune, sample], ids=lambda script: script.__name__)
def test_a_script_takes_or_refuses_any_flags(
    run, corpus, trained, rows, tmp_path, monkeypatch, script, cases
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    run_it = ["--out", "o", "--overwrite", "--steps", "2"]
    begin = {
        train: ["train", *MODEL.split(), "--data", str(corpus), *run_it],
        finetune: ["finetune", "--ckpt", str(trained), "--data", str(rows), *run_it],
        sample: ["sample", "--ckpt", str(trained), "--max_new_tokens=3"],
    }[script]

    @settings(max_examples=cases, derandomize=True, **QUIET)
    @given(flags_of(script.Options))
    def fuzz(flags):
        code, _, err = run([*begin, *flags])
        assert code in (0, 2) and "Traceback" not in err, (flags, code, err)
        assert code == 0 or err.strip(), flags

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


@settings(max_examples=50, derandomize=True, **QUIET)
@given(st.text() | st.sampled_from([data.BOS, data.EOS, f"x{data.EOS}y", "a\0b", "a" * 100_000]))
def test_what_a_user_types_never_becomes_a_special_token(trained, text):
    tokenizer = data.load_tokenizer(checkpoint.load_checkpoint(trained)["tokenizer"])
    specials = {tokenizer.token_to_id(data.BOS), tokenizer.token_to_id(data.EOS)}
    ids = chat.encode_chat(tokenizer, [(text, None)])
    assert ids[0] in specials and not specials & set(ids[1:])
    assert tokenizer.decode(ids) == chat.TEMPLATE.format(question=text)


# --- platforms -----------------------------------------------------------------------------------

PROGRAMS = [p for folder in (".", "common", "benchmarks") for p in (ROOT / folder).glob("*.py")]


def test_every_program_is_python_3_10_and_depends_on_no_unix():
    """No module that other systems lack, and no fork."""
    unix = {"fcntl", "pwd", "grp", "termios", "pty", "tty", "posix", "syslog"}
    assert len(PROGRAMS) > 15
    for path in PROGRAMS:
        tree = ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 10))
        for node in ast.walk(tree):
            names = {alias.name for alias in getattr(node, "names", []) if hasattr(alias, "name")}
            names |= {getattr(node, "module", ""), getattr(node, "attr", "")}
            assert not names & {*unix, "fork"}, f"{path.name} line {node.lineno}"


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
    modules = [p.relative_to(ROOT).with_suffix("").parts for p in PROGRAMS]
    strict = [f"-Werror::EncodingWarning:{'.'.join(parts)}" for parts in modules]
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


def test_a_chat_survives_bytes_that_are_no_text(trained):
    program = [sys.executable, str(ROOT / "sample.py"), "--ckpt", str(trained), "--chat"]
    done = subprocess.run(program, input=b"\xff\xfe hello\n", capture_output=True)
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr


def test_a_check_of_nothing(run, trained):
    code, out, err = run(f"sample --ckpt {trained} --judge 2 --max_new_tokens 0")
    assert code == 0 and "0 of 2" in out, err
