"""Runs a script again and again, each time killed, resumed, and at last run to its end.

    python killer.py train '["--data", ..., "--out", ...]' '[0.3, ["os.replace", 2], ...]'

A moment is a number of seconds, or the n-th call of a function: half a file is written in
torch.save, the others are not reached. Prints how many runs were killed and how many resumed. The
process that imports everything forks one for each run, so that a run begins in no time.
"""

import contextlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import matplotlib.pyplot  # noqa: E402, F401
import torch  # noqa: E402

import finetune  # noqa: E402
import train  # noqa: E402
from common import runtime, trainer  # noqa: E402


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def half_a_file(state, file):
    file.write(random.Random(0).randbytes(2000))
    file.flush()
    die()


def arm(name: str, n: int) -> None:
    """Let the n-th call of a function end the process."""
    module, _, name_there = name.partition(".")
    # what one of these modules has of another is there under its own name
    modules = {"os": [os], "torch": [torch], "trainer": [trainer, train, finetune]}[module]
    function, calls = getattr(modules[0], name_there), []

    def counting(*args, **kwargs):
        calls.append(1)
        last = half_a_file if name == "torch.save" else die
        return (last if len(calls) == n else function)(*args, **kwargs)

    for module in modules:
        if hasattr(module, name_there):
            setattr(module, name_there, counting)


def run(script, argv: list[str], moment) -> int:
    """The status of a forked run; moment None lets it end."""
    if (child := os.fork()) == 0:
        torch.set_num_threads(1)
        if isinstance(moment, list):
            arm(*moment)
        sys.argv = [f"{script.__name__}.py", *argv]
        code = 0
        try:
            runtime.run_script(script.main)
        except SystemExit as error:
            code = error.code
        sys.stdout.flush()
        os._exit(code)
    if isinstance(moment, float):
        time.sleep(moment)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


if __name__ == "__main__":
    name, argv, moments = sys.argv[1], *map(json.loads, sys.argv[2:])
    out = Path(argv[argv.index("--out") + 1])
    killed = resumed = 0
    for moment in [*moments, None]:
        begun = (out / "ckpt.pt").exists()
        line = ["--resume", "--out", str(out)] if begun else [*argv, "--overwrite"]
        status = run({"train": train, "finetune": finetune}[name], line, moment)
        killed += os.WIFSIGNALED(status)
        resumed += begun
        if not os.WIFSIGNALED(status) and status:
            sys.exit(f"moment {moment}: status {status}")
    print(f"killed {killed}, resumed {resumed}")
