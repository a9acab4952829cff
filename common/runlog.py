"""
log.jsonl, an object per step, and the curves drawn from it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from common.runtime import UsageError, rank


class Log:
    """log.jsonl: a header with arguments, config and versions, then an object per step; written by
    the first process alone."""

    def __init__(self, folder: Path, header: dict[str, Any], resume_at: int | None = None):
        self.path = folder / "log.jsonl"
        if rank() > 0:
            return
        kept = 0
        if resume_at is not None:  # steps after the checkpoint will be taken again
            for record, end in _log_lines(self.path):
                if record.get("step", 0) > resume_at or "val_loss_after" in record:
                    break  # the latter is the summary of an earlier end
                kept = end
        if kept:
            os.truncate(self.path, kept)
        else:
            self.path.unlink(missing_ok=True)
            self.write(header)

    def write(self, record: dict[str, Any]) -> None:
        """Append a line. Raises UsageError, as on a full disk."""
        if rank() > 0:
            return
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise UsageError(
                f"{self.path} cannot be written ({error.strerror}): make room, then --resume goes"
                " on from the last checkpoint"
            ) from error


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a log; a last line that a crash cut short is left out."""
    return (record for record, _ in _log_lines(path))


def _log_lines(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    end = 0
    try:
        with open(path, "rb") as file:
            for line in file:
                end += len(line)
                try:
                    record = json.loads(line)
                except ValueError:
                    return
                if not line.endswith(b"\n"):
                    return
                yield record, end
    except FileNotFoundError:
        return


def rounded(value: float, digits: int = 6) -> float:
    """To significant digits, which is what a log needs."""
    return float(f"{value:.{digits}g}")


def draw_curves(log: Path, target: Path) -> None:
    """curves.png from log.jsonl: loss, share of tagged tokens recalled, learning rate, load of the
    experts."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    import matplotlib.pyplot as plt

    header, *records = read_log(log)
    records = [r for r in records if "loss" in r]  # without a summary at the end
    if not records:
        return
    panels = [(draw_loss, 3), (draw_rate, 1)]
    if any("val_recall_by_kind" in r for r in records):
        panels.insert(1, (draw_recall, 2))
    if any(r.get("expert_load") for r in records):  # none where all layers are dense
        panels.append((draw_load, 2))
    heights = [height for _, height in panels]
    size = (8, 1.5 * sum(heights))
    fig, axes = plt.subplots(
        len(panels), figsize=size, height_ratios=heights, sharex=True, layout="constrained"
    )
    for axis, (draw, _) in zip(axes, panels, strict=True):
        draw(axis, records, header)
    axes[-1].set_xlabel("step")
    temporary = target.with_suffix(".tmp.png")
    try:
        fig.savefig(temporary, dpi=110)
        os.replace(temporary, target)
    except OSError as error:
        raise UsageError(f"{target} cannot be written ({error.strerror}): make room") from error
    finally:
        plt.close(fig)
        temporary.unlink(missing_ok=True)


def draw_loss(axis, records: list[dict[str, Any]], header: dict[str, Any]) -> None:
    """Training loss and its running mean, held-out loss, and the entropy where it is known."""
    from matplotlib.ticker import LogLocator, NullFormatter

    steps, losses = [r["step"] for r in records], np.array([r["loss"] for r in records])
    span = max(1, len(losses) // 100)
    smooth = np.convolve(losses, np.ones(span) / span, "valid")
    axis.plot(steps, losses, color="tab:blue", alpha=0.2, lw=0.7)
    axis.plot(steps[span - 1 :], smooth, color="tab:blue", label="training, running mean")
    held_out = [(r["step"], r["val_loss"]) for r in records if "val_loss" in r]
    axis.plot(*zip(*held_out, strict=True), "o-", color="tab:orange", ms=4, label="held out")
    if floor := header.get("entropy_floor"):
        axis.axhline(floor, color="tab:red", ls="--", lw=1, label="entropy of the stories")
    axis.set_ylabel("cross-entropy (nats per token)")
    axis.set_yscale("log")  # the last tenths take most of the time
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.legend(frameon=False)
    args = header["args"]
    how = args.get("size") or ("all weights" if args["full"] else "LoRA")
    axis.set_title(f"{how} on {Path(args['data']).name}")


def draw_rate(axis, records: list[dict[str, Any]], header: dict[str, Any]) -> None:
    """The learning rate."""
    axis.plot([r["step"] for r in records], [r["lr"] for r in records], color="tab:green")
    axis.set_ylabel("learning rate")
    axis.set_ylim(bottom=0)


def draw_recall(axis, records: list[dict[str, Any]], header: dict[str, Any]) -> None:
    """Facts of stories that are recalled, in all and by kind, the best kind first in the legend."""
    records = [r for r in records if "val_recall_by_kind" in r]
    steps, last = [r["step"] for r in records], records[-1]["val_recall_by_kind"]
    for i, kind in enumerate(sorted(last, key=last.get, reverse=True)):
        shares = [100 * r["val_recall_by_kind"].get(kind, math.nan) for r in records]
        axis.plot(steps, shares, "-" if i < 8 else "--", color=f"C{i % 8}", lw=1, label=kind)
    every = [100 * r["val_recall"] for r in records]
    axis.plot(steps, every, color="tab:gray", lw=3, alpha=0.6, label="all")
    axis.set_ylim(0, 102)
    axis.set_ylabel("facts recalled (%)")
    axis.legend(frameon=False, fontsize="x-small", ncols=1, bbox_to_anchor=(1, 1), loc="upper left")


def draw_load(axis, records: list[dict[str, Any]], header: dict[str, Any]) -> None:
    """The load of each expert of each layer over the run, as a heat map."""
    loads = [r for r in records if r.get("expert_load")]
    experts = len(loads[0]["expert_load"][0])
    grid = experts * np.array([np.concatenate(r["expert_load"]) for r in loads]).T  # layers*E times
    edges = [0] + [r["step"] for r in loads]
    rows = np.arange(len(grid) + 1)
    mesh = axis.pcolormesh(edges, rows, grid, cmap="RdBu_r", vmin=0, vmax=2, rasterized=True)
    axis.set_yticks(np.arange(0, len(grid) + 1, experts))
    axis.set_yticklabels([])
    axis.set_ylabel(f"{len(grid) // experts} MoE layers x {experts} experts")
    axis.invert_yaxis()
    beside = axis.inset_axes([1.02, 0, 0.025, 1])
    axis.figure.colorbar(mesh, cax=beside, label="load / average", extend="max")
