"""`report.html`: a run's curves on one page without a second file, from what its journal holds."""

import io
import json
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from pefomed_ray.artifacts.storage import read_json, write_bytes
from pefomed_ray.training.journal import EPOCHS_FILE, STEPS_FILE
from pefomed_ray.training.keeper import START_FILE

REPORT_FILE = "report.html"
STEP_CURVES = {
    "Loss": ("loss", "nats an answer token"),
    "Gradient norm": ("grad_norm", "before clipping"),
    "Learning rate": ("learning_rate", ""),
    "Answer tokens a second": ("tokens_per_s", ""),
    "Share of time waiting for data": ("data_wait_share", ""),
    "GPU memory": ("max_memory_gib", "GiB, the most so far"),
}
"""Title -> field of `steps.jsonl`, what its axis says. A field that no step has is left out."""
EPOCH_CURVES = {
    "Validation: exact match": ("exact_match", ""),
    "Validation: ROUGE-L": ("rougeL", ""),
    "Validation: loss": ("loss", "nats an answer token"),
}
INCHES = (5.2, 2.6)


def write_report(output: Path) -> Path:
    """Write the page of the run in `output`, finished or not, beside what it is made from."""
    steps = _steps(output / STEPS_FILE)
    nothing: dict[str, Any] = {"best": 0, "epochs": []}
    epochs: dict[str, Any] = read_json(output / EPOCHS_FILE) if (output / EPOCHS_FILE).is_file() else nothing
    ends = [sum(row["steps"] for row in epochs["epochs"][: i + 1]) for i in range(len(epochs["epochs"]))]
    curves = [
        (title, _curve([row["step"] for row in having], [row[field] for row in having], unit))
        for title, (field, unit) in STEP_CURVES.items()
        if (having := [row for row in steps if field in row])
    ]
    curves += [
        (title, _curve(ends, [row[field] for row in epochs["epochs"]], unit, points=True))
        for title, (field, unit) in EPOCH_CURVES.items()
        if ends
    ]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, autoescape=True, trim_blocks=True
    )
    page = environment.get_template("report.html.j2").render(
        config=yaml.safe_load((output / "run.yaml").read_text(encoding="utf-8")),
        start=read_json(output / START_FILE) if (output / START_FILE).is_file() else None,
        curves=curves,
        epochs=epochs["epochs"],
        best=epochs["best"],
        done=steps[-1]["step"] if steps else 0,
        of=steps[-1]["of"] if steps else None,
    )
    write_bytes(output / REPORT_FILE, page.encode())
    return output / REPORT_FILE


def _steps(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def _curve(steps: list[int], values: list[float], unit: str, *, points: bool = False) -> str:
    """A line over steps as SVG; the same values give the same bytes."""
    figure = Figure(figsize=INCHES, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, values, marker="o" if points else None, linewidth=1.2, color="#2b6cb0")
    axes.set_xlabel("step")
    axes.set_ylabel(unit)
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]
