"""What a training run leaves for people: metrics.jsonl, TensorBoard events, curves.png and a model card."""

import json
import math
from pathlib import Path
from types import TracebackType
from typing import Any

METRICS_NAME, TENSORBOARD_NAME, CURVES_NAME = "metrics.jsonl", "tensorboard", "curves.png"


class Metrics:
    """Lines of JSON and TensorBoard events, one per step that is logged; use as a context manager.

    A run that goes on after `start` steps first drops what a later step has left.
    """

    def __init__(self, folder: Path, *, start: int):
        from tensorboardX import SummaryWriter

        path = folder / METRICS_NAME
        kept = [line for line in read_metrics(folder) if 0 < start >= line["step"]]
        path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a")
        self._events = SummaryWriter(str(folder / TENSORBOARD_NAME), purge_step=start + 1, flush_secs=10)

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._events.close()

    def add(self, step: int, values: dict[str, float]) -> None:
        """Write what was measured at a step; what is not a number is null in JSON."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._events.add_scalar(name, value, step)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last one that was cut off is left out."""
    path = folder / METRICS_NAME
    if not path.exists():
        return []
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def draw_curves(folder: Path) -> Path:
    """Losses and correlation over the steps, as curves.png."""
    from matplotlib.figure import Figure

    lines = read_metrics(folder)
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, series in (
        (
            left,
            {"train/loss": "trained on", "held_out/loss": "held out", "held_out/constant_loss": "constant"},
        ),
        (right, {"held_out/correlation": "held out"}),
    ):
        for name, label in series.items():
            points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
            if points:
                style = "--" if name.endswith("constant_loss") else "-"
                axes.plot(*zip(*points, strict=True), style, label=label)
        axes.set_xlabel("step")
        axes.legend(frameon=False)
    left.set_ylabel("cross-entropy (nats per token)")
    right.set_ylabel("correlation of expected and real levels")
    path = folder / CURVES_NAME
    figure.savefig(path, dpi=150)
    return path
