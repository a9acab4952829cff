"""speed.py: what it compares is what it says. No time is asserted."""

import types
from importlib.metadata import version
from unittest.mock import Mock, call

import pytest
import torch
from conftest import random_model, small

from benchmarks import speed
from deepseek import PRESETS

pytest.importorskip("transformers")
CPU = torch.device("cpu")


def test_contenders_take_turns_and_one_that_fails_is_left_out(monkeypatch, capsys):
    calls, clock = [], iter(range(100))
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(clock) ** 2)
    fail = Mock(side_effect=RuntimeError("there is no compiler\nmore of it"))
    turns = {name: lambda name=name: lambda: calls.append(name) for name in "ab"}
    # c begins at 0; a takes from 1 to 2, b from 3 to 4, both unmeasured; a from 5 to 6
    seconds = speed.interleave({"c": lambda: fail, **turns}, CPU, 3)
    assert seconds == {"a": [11, 19, 27], "b": [15, 23, 31]} and calls == ["a", "b"] * 4
    speed.print_ratios("step", 8, {"a": [2, 1, 4], "b": [4, 4, 4]}, [("a", "b"), ("a", "c")])
    out, err = capsys.readouterr()
    assert out.split() == "| 2.00 (1.00 to 4.00) | step | a: 4 tok/s | b: 2 tok/s |".split()
    assert err == "note: without c: there is no compiler\n"


@torch.no_grad()
@pytest.mark.parametrize("rank", [None, 10])
def test_the_twin_in_transformers_gives_the_same_logits_and_text(rank):
    model = random_model(small(q_lora_rank=rank))
    twin, ids = speed.transformers_twin(model), speed.random_ids(model.config, 1, 9, CPU)
    assert torch.allclose(model(ids).logits, twin.eval()(ids).logits, atol=1e-5)
    ours, theirs = (speed.decoding(m, ids)() for m in (model, twin))
    assert torch.equal(torch.cat(ours), theirs[0, 9:]) and len(ours) == speed.NEW_TOKENS


@pytest.mark.parametrize("part", speed.PARTS)
def test_every_part_runs_in_a_small_form(part, run, monkeypatch):
    """Little models of all sizes are trained, as on a card; memory is of a process and real."""
    for size in speed.BATCHES:
        little = dict(num_hidden_layers=2, n_routed_experts=8, vocab_size=128)
        monkeypatch.setitem(PRESETS, size, PRESETS[size] | little)
        monkeypatch.setitem(speed.BATCHES, size, (2, 16))
    monkeypatch.setitem(speed.TRAINED, "cpu", list(speed.BATCHES))
    monkeypatch.setattr(speed, "NEW_TOKENS", 5)
    monkeypatch.setattr(speed, "MEMORY", [("tiny", False, 22.5)])
    monkeypatch.setattr(speed, "choose_dtype", lambda name, device: torch.bfloat16)
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda f, **options: compiled.append(f) or f)
    code, out, err = run(f"speed --only {part} --device cpu --rounds 1")
    assert (code, "note" in err) == (0, False), err
    command, machine, _, *table = out.splitlines()
    assert command == f"python -m benchmarks.speed --only {part} --device cpu --rounds 1"
    assert f"torch {version('torch')}, transformers " in machine
    rows = dict(train=36, decode=5, context=2, memory=1)[part]
    assert len(table) == 2 + rows and all(row.count("|") == 5 for row in table)
    assert all("1 at once" in row for row in table if part == "decode" and "transformers" in row)
    makers = {type(getattr(f, "__self__", f)).__module__.split(".")[0] for f in compiled}
    assert makers == ({"deepseek", "transformers"} if rows > 2 else set())


def test_a_card_is_capped_to_its_share(monkeypatch):
    card, cap = types.SimpleNamespace(total_memory=28 * 2**30), Mock()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", cap)
    took, _ = speed.second_step("tiny", CPU, False, 14.0)
    assert cap.call_args == call(0.5, CPU) and 0.1 < float(took.split()[-2]) < 10  # GiB
    speed.second_step("tiny", CPU, False, 40.0)  # more than there is
    assert cap.call_args == call(1.0, CPU)
