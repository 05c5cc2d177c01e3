"""How a training run is shown: what learns, a bar of steps, a line an epoch, and how to go on after a stop."""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pefomed_ray.cli.console import err, percent, say
from pefomed_ray.training.progress import step_of_newest
from pefomed_ray.training.report import write_report
from pefomed_ray.training.trainer import Watch

GIB = 2**30


def start_line(start: dict[str, Any]) -> str:
    """What a run trains (`model.lora.what_learns`), and what its workers will send each other in a step."""
    trainable, total = start["trainable_parameters"], start["parameters"]
    line = (
        f"LoRA on {start['modules']} modules of {start['language_model']} ({', '.join(start['targets'])}); "
        f"{trainable:,} of {total:,} parameters learn ({100 * trainable / total:.2f} %)"
    )
    traffic = start["traffic"]
    if traffic["strategy"] == "alone":
        return line
    fsdp, ddp = traffic["fsdp_bytes"], traffic["ddp_bytes"]
    return (
        f"{line}\nstrategy {traffic['strategy']}: a step sends {fsdp / GIB:.4f} GiB a worker under fsdp, "
        f"{ddp / GIB:.4f} under ddp ({fsdp / max(ddp, 1):.0f} times fewer)"
    )


def step_line(row: dict[str, Any]) -> str:
    """The latest step in one line."""
    memory = f", {row['max_memory_gib']:.1f} GiB" if "max_memory_gib" in row else ""
    return (
        f"step {row['step']}/{row['of']}: loss {row['loss']:.3f}, {row['tokens_per_s']:.0f} answer tokens/s, "
        f"waiting for data {percent(row['data_wait_share'])} %{memory}"
    )


def epoch_line(epoch: int, row: dict[str, Any]) -> str:
    """One epoch in one line."""
    bad = f", {row['bad_steps']} steps left out" if row["bad_steps"] else ""
    return (
        f"epoch {epoch}: loss {row['train_loss']:.3f}, validation exact match {percent(row['exact_match'])}, "
        f"rougeL {percent(row['rougeL'])}, loss {row['loss']:.3f} (n={row['n']:.0f}); {row['rows_per_s']:.0f} rows/s, "
        f"waiting for data {percent(row['data_wait_share'])} %, learning rate {row['learning_rate']:.2e}{bad}"
    )


def resumed_lines(start: dict[str, Any]) -> list[str]:
    """Where a run goes on, and what it could not use; nothing for one that begins."""
    lines = [f"passed over a damaged checkpoint: {what}" for what in start["passed_over"]]
    if start["step"]:
        lines.append(f"going on after step {start['step']}, {start['micro_batch_size']} rows a micro-batch")
    return lines


def _begun(start: dict[str, Any]) -> None:
    for line in (start_line(start), *resumed_lines(start)):
        say(line)


def _failed(failure: dict[str, Any]) -> None:
    say(f"worker {failure['rank']} gave up: {failure['error']}")


LINES = Watch(start=_begun, epoch=lambda epoch, row: say(epoch_line(epoch, row)), failure=_failed)
"""No more than lines; what a terminal that nobody watches gets."""


@contextmanager
def watching() -> Iterator[Watch]:
    """Yield whom to tell: on a terminal a bar of steps moves below the lines."""
    if not err.is_terminal:
        yield LINES
        return
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=err, transient=True) as progress:
        task = progress.add_task("starting", total=None)

        def step(row: dict[str, Any]) -> None:
            progress.update(task, completed=row["step"], total=row["of"], description=step_line(row).partition(": ")[2])

        yield Watch(LINES.start, step, LINES.epoch, LINES.failure)


@contextmanager
def reporting(output: Path) -> Iterator[None]:
    """Write the run's page when the block ends, and say how to go on where it ends early with a checkpoint there."""
    try:
        yield
    except BaseException:
        if step := step_of_newest(output):
            say(f"stopped after a checkpoint at step {step}; to go on:\n  {resume_command(output)}")
            write_report(output)
        raise
    write_report(output)


def resume_command(output: Path) -> str:
    """What to type."""
    return f"pefomed-ray train {shlex.quote(str(output / 'run.yaml'))} --resume"
