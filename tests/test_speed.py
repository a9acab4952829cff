"""speed.py: what it counts and compares is what it says. No time is asserted."""

import json
import queue
import sys

import pytest
import torch
from conftest import small

from benchmarks import speed
from common import runtime
from deepseek import Config, DeepSeek, Output

CPU = torch.device("cpu")


def test_contenders_take_turns_and_the_first_call_of_each_is_not_measured(monkeypatch):
    calls, clock = [], iter(range(100))
    monkeypatch.setattr(speed.time, "perf_counter", lambda: float(next(clock) ** 3))
    seconds = speed.take_turns(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, CPU, rounds=3
    )
    assert calls == ["a", "b"] * 4
    # 3 k^2 + 3 k + 1: a is measured from k = 2, 6 and 10, b from 4, 8 and 12
    assert seconds == {"a": 127, "b": 217}  # medians: means would be 159 and 249


def count(pipe, first):
    for n in (first, first + 1):
        pipe.recv()
        pipe.send(n)


def test_one_apart_is_asked_once_a_call_in_a_process_of_its_own():
    ask = speed.apart(count, 5)
    assert (ask(), ask()) == (5, 6)
    with pytest.raises(runtime.UsageError, match="the process of count has ended"):
        ask()


def test_training_is_held_against_the_better_transformers_as_it_comes(monkeypatch):
    seconds = {
        "deepseek.py, float32": 1,
        "transformers, float32": 4,
        "transformers, float32, memory kept": 2,
        "deepseek.py, bfloat16": 2,
        "transformers, bfloat16": 3,
        "transformers, bfloat16, memory kept": 1,
        "dense, as many active": 0.5,
    }
    asked = []

    def take_turns(contenders, device, rounds):
        assert list(contenders) == list(seconds)
        return seconds

    monkeypatch.setattr(speed, "our_step", lambda *args: len)
    monkeypatch.setattr(speed, "apart", lambda *args: asked.append(args[1:]) or len)
    monkeypatch.setattr(speed, "has_transformers", lambda: True)
    monkeypatch.setattr(speed, "dtypes_of", lambda device: [torch.float32, torch.bfloat16])
    monkeypatch.setattr(speed, "choose_dtype", lambda auto, device: torch.bfloat16)
    monkeypatch.setattr(speed, "take_turns", take_turns)
    *lines, overhead, _ = speed.train(CPU, 1)
    assert {line.to for line in lines if line.to} == {"transformers, bfloat16"}
    assert [line.ratio for line in lines] == [3, 0.75, 1.5, 1.5, None, 3, 6]
    assert overhead == speed.Line("train", "MoE step over dense step", 4, "times")
    kinds = (torch.float32, torch.bfloat16)
    assert asked == [("cpu", kind, keep) for kind in kinds for keep in (False, True)]


def test_compiled_steps_are_held_against_each_other_and_against_transformers(monkeypatch):
    asked = []
    seconds = {
        "deepseek.py": 3,
        "deepseek.py, compiled": 2,
        "transformers": 6,
        "transformers, compiled": 5,
    }

    def take_turns(contenders, device, rounds):
        assert rounds == 7
        for name, call in contenders.items():
            if name.startswith("deepseek"):
                call()
                assert called[-1] == name.endswith("compiled")
        return {name: seconds[name] for name in contenders}

    def our_step(config, ids, device, dtype, compiled=False):
        assert ids.shape == (8, 257) and dtype == torch.bfloat16
        return lambda: called.append(compiled)

    monkeypatch.setattr(speed, "our_step", our_step)
    monkeypatch.setattr(speed, "apart", lambda *args: asked.append(args) or len)
    monkeypatch.setattr(speed, "choose_dtype", lambda auto, device: torch.bfloat16)
    monkeypatch.setattr(speed, "take_turns", take_turns)
    for there in (True, False):
        called = []
        monkeypatch.setattr(speed, "has_transformers", lambda there=there: there)
        first, *lines = speed.compile(CPU, 7)
        assert first.unit == "s" and called == [True, False, True]
        assert lines[1].value == 8 * 256 / 2
        speeds = [(li.what, li.ratio) for li in lines if li.unit == "tok/s"]
        gains = [li.value for li in lines if li.unit == "times"]
        if there:
            assert dict(speeds) == {
                "deepseek.py": 2,
                "deepseek.py, compiled": 3,
                "transformers": None,
                "transformers, compiled": 1.2,
            }
            assert gains == [1.5, 2.5]
        else:
            assert speeds == [("deepseek.py", None), ("deepseek.py, compiled", None)]
            assert gains == [1.5]
    theirs = speed.their_steps, "cpu", torch.bfloat16
    assert asked == [(*theirs, False), (*theirs, True, True)]


def test_without_transformers_its_lines_are_left_out(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr(speed, "our_step", lambda *args: len)
    monkeypatch.setattr(speed, "take_turns", lambda names, *_: dict.fromkeys(names, 1.0))
    *lines, _, rate = speed.train(CPU, 1)
    assert "pip install transformers" in capsys.readouterr().out
    assert not any("transformers" in line.what or line.ratio for line in lines)
    operations = speed.flops_per_token(DeepSeek(Config.preset("tiny")), 256) * 8 * 256
    assert rate.value == pytest.approx(operations / 1e12)
    assert {line.what for line in speed.decode(CPU, 1)} == {"deepseek.py", "deepseek.py, compiled"}


@pytest.mark.parametrize("keep, compiled", [(False, False), (True, False), (True, True)])
def test_a_step_of_transformers_for_each_message(monkeypatch, keep, compiled):
    seen, kept, messages, answers = [], [], [None, None], []

    class Twin(torch.nn.Linear):
        def forward(self, input_ids, labels, use_cache):
            dtype = super().forward(torch.ones(1)).dtype
            seen.append((tuple(input_ids.shape), input_ids is labels, use_cache, dtype))
            return Output(None, self.weight.sum(), None, None)

    class Pipe:
        send = answers.append

        def recv(self):
            if not messages:
                raise EOFError
            return messages.pop()

    monkeypatch.setattr(speed, "transformers_twin", lambda model: Twin(1, 1))
    monkeypatch.setattr(speed, "keep_freed_memory", lambda: kept.append(1))
    through = []
    monkeypatch.setattr(torch, "compile", lambda f: lambda **kw: through.append(1) or f(**kw))
    speed.their_steps(Pipe(), "cpu", torch.bfloat16, keep, *[True] * compiled)
    assert len(through) == 2 * compiled
    assert seen == [((8, 256), True, False, torch.bfloat16)] * 2
    assert answers == [None] * 2 and len(kept) == keep


def test_memory_and_speed_of_the_sizes(monkeypatch):
    asked, kept = [], []

    class Here:
        """What multiprocessing would do elsewhere."""

        Queue = queue.Queue

        class Process:
            def __init__(self, target, args):
                self.start = lambda: target(*args)

            def is_alive(self):
                return False

            def join(self):
                pass

    monkeypatch.setattr(speed, "take_turns", lambda some, place, n: asked.append(n) or {"": 0.5})
    monkeypatch.setattr(speed, "our_step", lambda *_, low_memory: asked.append(low_memory))
    monkeypatch.setattr(speed, "keep_freed_memory", lambda: kept.append(1))
    monkeypatch.setattr(speed, "peak_memory", lambda: 2**31)
    monkeypatch.setattr(speed.multiprocessing, "get_context", lambda how: Here)
    monkeypatch.setattr(speed.importlib.util, "find_spec", lambda name: True)
    lines = list(speed.memory(CPU, 9))
    assert [(line.value, line.unit) for line in lines[:2]] == [(2, "GiB"), (512, "tok/s")]
    operations = speed.flops_per_token(DeepSeek(Config.preset("tiny")), 256) * 512
    assert lines[2].value == pytest.approx(operations / 1e12)
    names = ["tiny", "small", "1b", "1b --low_memory"]
    assert [line.what for line in lines[::3]] == [f"{name}, a step of 1 x 256" for name in names]
    assert asked == [False, 1] * 3 + [True, 1] and len(kept) == 4


def test_each_part_compiles_afresh(run, monkeypatch):
    done = []

    def part(device, rounds):
        done.append("part")
        return []

    monkeypatch.setattr(torch.compiler, "reset", lambda: done.append("reset"))
    monkeypatch.setattr(speed, "PARTS", {"a": part, "b": part})
    assert run("speed --only a,b --device cpu")[0] == 0
    assert done == ["reset", "part"] * 2


def test_the_peak_is_measured_in_what_training_takes(monkeypatch):
    monkeypatch.setattr(speed, "choose_dtype", lambda auto, device: torch.bfloat16)
    monkeypatch.setattr(speed, "take_turns", lambda contenders, *_: {"product": 1})
    assert [line.what for line in speed.peak(CPU, 1)] == ["float32", "bfloat16"]


def test_a_ratio_says_how_many_times_as_fast():
    seconds = {"slow": 4.0, "fast": 2.0}
    slow, fast = speed.compared("part", "tok/s", 100, seconds, to="slow")
    assert slow == speed.Line("part", "slow", 25, "tok/s")
    assert fast == speed.Line("part", "fast", 50, "tok/s", 2, "slow")
    assert {line.ratio for line in speed.compared("part", "tok/s", 1, seconds, to="")} == {None}


def test_what_decodes_is_what_the_line_says(monkeypatch, capsys):
    said = []

    class Twin(torch.nn.Module):
        def generate(self, prompt, **limits):
            return torch.cat([prompt, torch.tensor([said[0]])], 1)

    def generate(self, prompt, new, *, temperature, compile):
        asked.append(compile)
        return iter([torch.tensor([7])] * new)

    def take_turns(contenders, device, rounds):
        for name, call in contenders.items():
            asked.append(name)
            call()
        return dict.fromkeys(contenders, 1.0)

    monkeypatch.setattr(speed, "has_transformers", lambda: True)
    monkeypatch.setattr(speed, "transformers_twin", lambda model: Twin())
    monkeypatch.setattr(speed, "take_turns", take_turns)
    monkeypatch.setattr(DeepSeek, "generate", generate)
    for twin, noted in ((7, False), (8, True)):
        said[:], asked = [[twin] * 100], []
        names = [line.what for line in speed.decode(CPU, 1)]
        assert ("the two texts differ" in capsys.readouterr().out) == noted
        assert names == ["deepseek.py", "deepseek.py, compiled", "transformers"]
        assert asked[-5:] == [names[0], False, names[1], True, names[2]]


@pytest.mark.parametrize("equal", ["total", "active"])
@pytest.mark.parametrize("size", ["tiny", "small", "1b"])
def test_the_dense_twin_has_as_many_parameters_and_no_experts(size, equal):
    config = Config.preset(size)
    dense = speed.dense_twin(config, equal)
    with torch.device("meta"):
        wanted = DeepSeek(config).num_parameters()[equal == "active"]
        total, active = DeepSeek(dense).num_parameters()
    assert not any(dense.is_moe(i) for i in range(dense.num_hidden_layers))
    assert total == active + dense.vocab_size * dense.hidden_size
    have = active if equal == "active" else total
    assert abs(have - wanted) <= 1.5 * dense.hidden_size * dense.num_hidden_layers  # half a width


def test_operations_of_training_by_hand():
    model = DeepSeek(small(num_hidden_layers=2, first_k_dense_replace=2))
    # q 3*18*48, kv_a 28*48, kv_b 3*24*20, o 48*42, MLP 3*80*48, norms 2*48 + 20, twice
    active = 2 * (2592 + 1344 + 1440 + 2016 + 11520 + 116) + 4608 + 48  # head 96*48, norm
    pairs = 2 * 2 * 3 * (18 + 14) * 16 / 2  # of 16 tokens each sees half, on the average
    assert speed.flops_per_token(model, 16) == 6 * active + 3 * pairs
    compressed = DeepSeek(small(num_hidden_layers=2, first_k_dense_replace=2, q_lora_rank=10))
    q = 2 * (10 * 48 + 3 * 18 * 10 + 10 - 2592)  # down, up, norm, instead of one matrix
    assert speed.flops_per_token(compressed, 16) == 6 * (active + q) + 3 * pairs


def test_the_cache_is_told_as_the_paper_counts_it(run, tmp_path):
    code, out, _ = run(f"speed --only cache --device cpu --json {tmp_path / 'speed.json'}")
    assert code == 0
    lines = json.loads((tmp_path / "speed.json").read_text())["lines"]
    value = {line["what"]: (line["value"], line["ratio"]) for line in lines}
    assert value["v2, mla counted"] == (4 * 34_560, 1.0)  # [V2] table 1
    assert value["v2, mha counted"] == (4 * 1_966_080, pytest.approx(1_966_080 / 34_560))
    assert "v2-lite, mla counted" in out


def test_bars_of_training_compiled_and_of_decoding_and_curves_of_context(monkeypatch, tmp_path):
    plt, drawn = pytest.importorskip("matplotlib.pyplot"), []
    monkeypatch.setattr(plt, "close", drawn.append)
    names = ("deepseek.py", "deepseek.py, compiled", "transformers")
    lines = [
        speed.Line(part, name, 10 * i + j, "tok/s")
        for i, part in enumerate(("train", "compile", "decode"))
        for j, name in enumerate(names)
        if (part, j) != ("train", 1)
    ]
    lines += [speed.Line("compile", "compiled step", 9, "times")]
    lines += [speed.Line("context", f"tiny absorbed, {n}", n / 100, "ms") for n in (256, 512)]
    speed.draw(lines, "here", tmp_path / "speed.png")
    training, decoding, context = drawn[0].axes
    assert [bar.get_width() for bar in training.patches] == [0, 2, 11]
    assert [bar.get_width() for bar in decoding.patches] == [20, 21, 22]
    assert [line.get_ydata().tolist() for line in context.lines] == [[2.56, 5.12]]


@pytest.mark.slow
def test_every_part_runs_and_is_drawn(run, tmp_path):
    parts = ",".join(part for part in speed.PARTS if part not in ("compile", "memory"))
    command = f"speed --only {parts} --device cpu --rounds 1"
    code, out, _ = run(f"{command} --picture {tmp_path / 'speed.png'}")
    assert code == 0
    assert "transformers" in out and "V2-Lite layer absorbed, 8192" in out
    assert (tmp_path / "speed.png").stat().st_size > 10_000


def test_batched_prompts_of_different_lengths_say_what_they_say_alone(run):
    code, out, _ = run("speed --only batch --device cpu --rounds 1")
    assert code == 0
    same = next(line for line in out.splitlines() if "that are the same" in line)
    assert float(same.split()[-2]) == 100


def test_a_wrong_part_is_a_sentence(run):
    code, _, err = run("speed --only speed")
    assert code == 2
    assert err.strip().startswith("speed.py: --only 'speed' is no part: choose from peak,train")
    code, _, err = run("speed --only cache --json nowhere/speed.json")
    assert code == 2 and "the folder of nowhere/speed.json does not exist" in err
