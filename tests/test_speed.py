"""speed.py: what it counts and compares is what it says. No time is asserted."""

import multiprocessing.dummy

import pytest
import torch
from conftest import small

from benchmarks import speed
from deepseek import PRESETS, Config, DeepSeek

CPU = torch.device("cpu")


def test_contenders_take_turns_and_the_first_call_of_each_is_not_measured(monkeypatch):
    calls, clock = [], iter(range(100))
    monkeypatch.setattr(speed.time, "perf_counter", lambda: float(next(clock) ** 3))
    contenders = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    seconds = speed.interleave(contenders, CPU, rounds=3)
    assert calls == ["a", "b"] * 4
    # 3 k^2 + 3 k + 1: a is measured from k = 2, 6 and 10, b from 4, 8 and 12
    assert seconds == {"a": 127, "b": 217}  # medians: means would be 159 and 249


def test_a_ratio_says_how_many_times_as_fast():
    slow, fast = speed.compared("part", "tok/s", 100, {"slow": 4.0, "fast": 2.0}, to="slow")
    assert slow == speed.Line("part", "slow", 25, "tok/s")
    assert fast == speed.Line("part", "fast", 50, "tok/s", 2, "slow")


@pytest.mark.parametrize("equal", ["total", "active"])
def test_the_dense_twin_has_as_many_parameters_and_no_experts(equal):
    config = Config.preset("1b")
    dense = speed.dense_twin(config, equal)
    with torch.device("meta"):
        wanted = DeepSeek(config).num_parameters()[equal == "active"]
        have = DeepSeek(dense).num_parameters()[equal == "active"]
    assert not any(dense.is_moe(i) for i in range(dense.num_hidden_layers))
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


class Thread(multiprocessing.dummy.Process):
    """In the place of a process, which would not know what the test has made small."""

    def __init__(self, daemon=True, **options):
        super().__init__(**options)
        self.daemon = daemon


@pytest.mark.parametrize("part", speed.PARTS)
def test_every_part_runs_in_a_small_form(part, run, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(multiprocessing.dummy, "Process", Thread)
    monkeypatch.setattr(speed.multiprocessing, "get_context", lambda how: multiprocessing.dummy)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(speed, "choose_dtype", lambda name, device: torch.float32)
    monkeypatch.setattr(speed, "TRAINING", dict(batch=2, length=16))
    monkeypatch.setattr(speed, "CONTEXTS", (8, 16))
    shape = dict(num_hidden_layers=1, first_k_dense_replace=0, vocab_size=128)
    for size in ("tiny", "small", "1b"):
        monkeypatch.setitem(PRESETS, size, PRESETS["tiny"] | shape)
    monkeypatch.setitem(PRESETS, "v2-lite", PRESETS["v2-lite"] | dict(hidden_size=128))
    code, out, err = run(f"speed --only {part} --device cpu --rounds 1")
    assert code == 0, err
    found = [(li[8:45].strip(), *li[45:].split()) for li in out.splitlines() if li.startswith(part)]
    value = {(what, unit): float(number.replace(",", "")) for what, number, unit, *_ in found}
    assert value and min(value.values()) > 0
    if part in ("train", "compile", "decode"):
        assert "x transformers" in out and "differ" not in out  # the greedy texts of the two
    if part == "train":
        expected = speed.flops_per_token(DeepSeek(Config.preset("tiny")), 16) / 1e12
        speeds = [value["deepseek.py, float32", unit] for unit in ("TFLOP/s", "tok/s")]
        assert speeds[0] / speeds[1] == pytest.approx(expected, rel=2e-3)
    if part == "batch":  # of different lengths, together as one by one
        assert value["tokens that are the same", "%"] == 100


@pytest.mark.slow
def test_every_part_runs(run):
    parts = ",".join(part for part in speed.PARTS if part not in ("compile", "memory"))
    code, out, _ = run(f"speed --only {parts} --device cpu --rounds 1")
    assert code == 0 and "transformers" in out and "V2-Lite layer absorbed, 8192" in out
