"""What several tests need: small models, the independent implementation, runs of the scripts."""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # such small models gain nothing by a second thread

# Imported within a run, matplotlib and dynamo would keep the run's frames, and with them its lock.
import matplotlib.pyplot  # noqa: F401
import pytest
import torch
import torch._dynamo  # noqa: F401

import finetune
import sample
import train
from benchmarks import scaling, speed
from common import checkpoint, data, runtime, trainer
from deepseek import YARN_V2, Config, DeepSeek

ROOT = Path(train.__file__).parent

# dn, dr, dv, R all different, two dense layers possible, 8 experts in 4 groups
SMALL = dict(
    vocab_size=96, hidden_size=48, num_hidden_layers=3, num_attention_heads=3, q_lora_rank=None,
    kv_lora_rank=20, qk_nope_head_dim=10, qk_rope_head_dim=8, v_head_dim=14, intermediate_size=80,
    moe_intermediate_size=24, n_routed_experts=8, num_experts_per_tok=3, n_group=1, topk_group=1,
    topk_method="greedy", routed_scaling_factor=1.0, comm_loss_alpha=0.0, rope_scaling=None,
    max_position_embeddings=128, initializer_range=0.06, bos_token_id=0, eos_token_id=1,
)  # fmt: skip
GROUPS = dict(
    n_group=4, topk_group=2, topk_method="group_limited_greedy", routed_scaling_factor=16.0
)
YARN = dict(rope_scaling=YARN_V2 | dict(original_max_position_embeddings=16, factor=8))


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="cuda runs the tests of a device, there")


def pytest_configure(config):
    if config.getoption("--device") == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a card would be taken by --device auto


def pytest_collection_modifyitems(config, items):
    if config.getoption("--device") != "cpu":
        items[:] = [item for item in items if "device" in item.fixturenames]


@pytest.fixture(scope="session")
def device(pytestconfig):
    return runtime.choose_device(pytestconfig.getoption("--device"))


def small(**overrides) -> Config:
    return Config(**SMALL | overrides)


def random_model(config: Config, seed: int = 0) -> DeepSeek:
    """A model whose norm weights are random too: a misplaced norm must show."""
    torch.manual_seed(seed)
    model = DeepSeek(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.uniform_(0.5, 1.5)
    return model.eval()


def oracle(config: Config):
    """transformers' DeepSeek-V2 of the same configuration, which we have no part in."""
    transformers = pytest.importorskip("transformers")
    names = set(transformers.DeepseekV2Config().to_dict()) - {"rope_scaling"}
    same = {k: v for k, v in vars(config).items() if k in names}
    rope = {"rope_type": "default", **(config.rope_scaling or {}), "rope_theta": config.rope_theta}
    rope["rope_type"] = rope.pop("type", rope["rope_type"])
    other = transformers.DeepseekV2Config(
        **same, rope_parameters=rope, attention_bias=False, tie_word_embeddings=False
    )
    other._attn_implementation = "eager"
    other._experts_implementation = "eager"
    return transformers.DeepseekV2ForCausalLM(other).eval()


SCRIPTS = dict(train=train, finetune=finetune, sample=sample, speed=speed, scaling=scaling)
MODEL = (
    "--hidden_size 32 --num_hidden_layers 2 --num_attention_heads 2 --kv_lora_rank 16"
    " --qk_nope_head_dim 8 --qk_rope_head_dim 8 --v_head_dim 16 --intermediate_size 64"
    " --moe_intermediate_size 16 --n_routed_experts 4 --num_experts_per_tok 2 --vocab_size 320"
    " --seq_len 32 --batch_size 4 --eval_tokens 500 --dtype float32"
)


def load(folder):
    return checkpoint.load_checkpoint(folder / "ckpt.pt", mmap=False)


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "cats.txt"
    lines = [
        f"The cat {n} sat on mat {n % 5}. It was {'big' if n % 2 else 'small'}." for n in range(400)
    ]
    path.write_text(data.SEPARATOR.join(lines))
    return path


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    os.environ["DEEPSEEK_CACHE"] = str(tmp_path_factory.getbasetemp() / "cache")


def call(line: str | list[str]) -> None:
    """Run a script in this process: call("train ...")."""
    name, *arguments = line.split() if isinstance(line, str) else line
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{name}.py", *arguments])
        runtime.run_script(SCRIPTS[name].main)


@pytest.fixture(scope="session")
def trained(corpus, tmp_path_factory):
    """A checkpoint of two steps."""
    folder = tmp_path_factory.mktemp("trained")
    call(f"train {MODEL} --data {corpus} --steps 2 --out {folder}")
    return folder / "ckpt.pt"


@pytest.fixture
def undrawn(monkeypatch):
    """Runs draw no curves, which take a second."""
    monkeypatch.setattr(trainer, "draw_curves", lambda log, target: target.touch())


@pytest.fixture
def run(capsys):
    """run("train ...") is the exit code of a call, its stdout and stderr."""

    def run(line: str | list[str]):
        code = 0
        try:
            call(line)
        except SystemExit as exit:
            code = exit.code
        out = capsys.readouterr()
        return code, out.out, out.err

    return run
