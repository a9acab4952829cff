"""log.jsonl, an object per step, and the curves drawn from it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from common.formats import written_whole
from common.runtime import UsageError, rank


class Log:
    """log.jsonl, written by the first process alone: a header, then an object per step."""

    def __init__(self, folder: Path, header: dict[str, Any], resume_at: int | None = None):
        self.path = folder / "log.jsonl"
        if rank() > 0:
            return
        before = read_log(self.path) if resume_at is not None else ()
        # without the summary of an earlier end, and without steps that will be taken again
        kept = [r for r in before if r.get("step", 0) <= resume_at and "val_loss_after" not in r]
        lines = [json.dumps(record) + "\n" for record in kept or [header]]
        with written_whole(self.path) as partial:
            partial.write_text("".join(lines), encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        """Append a line. Raises UsageError, as on a full disk."""
        if rank() > 0:
            return
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise UsageError(
                f"{self.path} cannot be written ({error.strerror}): make room, then --resume"
            ) from error


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a log, if there is one; a last line that a crash cut short is left out."""
    with suppress(FileNotFoundError, ValueError), open(path, encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)


def rounded(value: float, digits: int = 6) -> float:
    """To significant digits, which is what a log needs."""
    return float(f"{value:.{digits}g}")


def draw_curves(log: Path, target: Path) -> None:
    """curves.png from log.jsonl: loss, and below it what else the log knows."""
    from matplotlib.figure import Figure  # takes a second

    header, *records = [*read_log(log)] or [{}]
    records = [r for r in records if "loss" in r]  # without a summary at the end
    if not records or "args" not in header:  # somebody has removed the log
        return
    panels = {draw_loss: 3}  # and their heights
    if any("val_recall_by_kind" in r for r in records):
        panels[draw_recall] = 2
    panels[draw_rate] = 1
    if any(r.get("expert_load") for r in records):  # none where all layers are dense
        panels[draw_load] = 2
    heights = [*panels.values()]
    figure = Figure(figsize=(8, 1.5 * sum(heights)), layout="constrained")
    axes = figure.subplots(len(panels), height_ratios=heights, sharex=True)
    for axis, draw in zip(axes, panels, strict=True):
        draw(axis, records, header)
    axes[-1].set_xlabel("step")
    with written_whole(target) as partial:
        figure.savefig(partial, dpi=110, format="png")


def draw_loss(axis, records: list[dict[str, Any]], header: dict[str, Any]) -> None:
    """Training loss and its running mean, held-out loss, and the entropy where it is known."""
    steps, losses = [r["step"] for r in records], np.array([r["loss"] for r in records])
    span = max(1, len(losses) // 100)
    smooth = np.convolve(losses, np.ones(span) / span, "valid")
    axis.plot(steps, losses, color="tab:blue", alpha=0.2, lw=0.7)
    axis.plot(steps[span - 1 :], smooth, color="tab:blue", label="training, running mean")
    held_out = [(r["step"], r["val_loss"]) for r in records if "val_loss" in r]
    if held_out:
        axis.plot(*zip(*held_out, strict=True), "o-", color="tab:orange", ms=4, label="held out")
    if floor := header.get("entropy_floor"):
        axis.axhline(floor, color="tab:red", ls="--", lw=1, label="entropy of the stories")
    # in logarithms, as the last tenths take most of the time
    axis.set(yscale="log", ylabel="cross-entropy (nats per token)")
    axis.yaxis.get_major_locator().set_params(subs=(1, 2, 3, 5))
    axis.yaxis.set(major_formatter="{x:g}", minor_formatter="")
    axis.legend(frameon=False)
    args = header["args"]
    how = args.get("size") or ("all weights" if args["full"] else "LoRA")
    axis.set_title(f"{how} on {Path(args['data']).name}")


def draw_rate(axis, records: list[dict[str, Any]], header: dict[str, Any]) -> None:
    """The learning rate."""
    axis.plot([r["step"] for r in records], [r["lr"] for r in records], color="tab:green")
    axis.set(ylabel="learning rate", ylim=(0, None))


def draw_recall(axis, records: list[dict[str, Any]], header: dict[str, Any]) -> None:
    """Facts of stories that are recalled, in all and by kind, the best kind first in the legend."""
    records = [r for r in records if "val_recall_by_kind" in r]
    steps, last = [r["step"] for r in records], records[-1]["val_recall_by_kind"]
    for i, kind in enumerate(sorted(last, key=last.get, reverse=True)):
        shares = [100 * r["val_recall_by_kind"].get(kind, math.nan) for r in records]
        axis.plot(steps, shares, "-" if i < 8 else "--", color=f"C{i % 8}", lw=1, label=kind)
    every = [100 * r["val_recall"] for r in records]
    axis.plot(steps, every, color="tab:gray", lw=3, alpha=0.6, label="all")
    axis.set(ylim=(0, 102), ylabel="facts recalled (%)")
    axis.legend(frameon=False, fontsize="x-small", bbox_to_anchor=(1, 1), loc="upper left")


def draw_load(axis, records: list[dict[str, Any]], header: dict[str, Any]) -> None:
    """The load of each expert of each layer over the run, as a heat map."""
    loads = [r for r in records if r.get("expert_load")]
    layers, experts = np.shape(loads[0]["expert_load"])
    grid = experts * np.array([np.concatenate(r["expert_load"]) for r in loads]).T  # layers*E times
    edges = [0] + [r["step"] for r in loads]
    rows = np.arange(len(grid) + 1)
    mesh = axis.pcolormesh(edges, rows, grid, cmap="RdBu_r", vmin=0, vmax=2, rasterized=True)
    label = f"{layers} MoE layers x {experts} experts"
    axis.set(yticks=rows[::experts], yticklabels=[], ylabel=label)
    axis.invert_yaxis()
    beside = axis.inset_axes([1.02, 0, 0.025, 1])
    axis.figure.colorbar(mesh, cax=beside, label="load / average", extend="max")
