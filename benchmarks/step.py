"""Our training step beside a transformers Trainer with PEFT, on one thread.

All arms take the same steps on the same batches in float32, from the same initial adapters, and must have the same
loss at each. The Trainer is what its users write: `get_peft_model`, its default AdamW (fused), logging and saving off.
Two of them: `hf_trainer` trains a model whose `forward` is written as those of transformers are, with logits at all
positions; `hf_trainer_our_forward` trains ours, with logits where there are labels, and shows what is left without.

What all logits cost depends on the vocabulary beside the rest of the language model, and on how little of a row is
answer.
"""

import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import typer
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from benchmarks._measure import (
    JsonOption,
    QuickOption,
    Sample,
    a_a,
    cpu_seconds,
    finish,
    per_arm,
    ratio,
    run_rounds,
    timed,
)
from benchmarks._small import LORA, make_base, make_batches, open_trainable
from pefomed_ray.config.schema import OptimizerConfig
from pefomed_ray.model.base import Base
from pefomed_ray.model.lora import parameter_counts
from pefomed_ray.model.pefomed import PefomedForConditionalGeneration, PefomedOutput
from pefomed_ray.rendering.batches import IGNORED_LABEL, Batch
from pefomed_ray.training.step import build_optimizer, count_answer_tokens, train_step, trainable

BATCH_ROWS = 8
OPTIMIZER = OptimizerConfig(learning_rate=1e-3)
"""Of both; the learning rate stays where it is."""
MAX_LOSS_DIFFERENCE = 1e-5
"""Nats: the arms add up the same numbers in another order, no more, and are seen 1e-6 apart. Without weight decay they
would be 8e-5 apart, with norms clipped to 0.9 2e-4, with a hundredth more learning rate 7e-3."""

Losses = list[float]
Arm = Callable[[], tuple[Losses, Sample]]


class AllLogits(PefomedForConditionalGeneration):
    """The same model with the loss as transformers' own image-text models have it (`LlavaForConditionalGeneration`)."""

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        patch_features: Tensor | None = None,
        **kwargs: Any,
    ) -> PefomedOutput:
        """Logits at all positions; the language model's own loss."""
        embeds = self.embed(input_ids, patch_features if pixel_values is None else self.patch_features(pixel_values))
        done = self.language_model(inputs_embeds=embeds, attention_mask=attention_mask, labels=labels, **kwargs)
        return PefomedOutput(loss=done.loss, logits=done.logits)


class Recorder(Trainer):
    """A Trainer that keeps the loss of each step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.losses: Losses = []

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As it is."""
        loss = super().training_step(*args, **kwargs)
        self.losses.append(float(loss))
        return loss


class Stopwatch(TrainerCallback):
    """What the loop alone takes, without what `Trainer.train` does before it and after it."""

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """The first batch has not been asked for."""
        self._cpu, self._wall = cpu_seconds(), time.perf_counter()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """The last step has been taken."""
        self.sample = Sample(time.perf_counter() - self._wall, cpu_seconds() - self._cpu)


def main(json_: JsonOption = False, quick: QuickOption = False) -> None:
    """Measure and report."""
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="pfb-", dir="/tmp"))
    try:
        make_base(folder / "base")
        measure(folder, steps=3 if quick else 6, rounds=1 if quick else 5, as_json=json_, quick=quick)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def measure(folder: Path, steps: int, rounds: int, *, as_json: bool, quick: bool) -> None:
    """All arms; they must learn, and all the same."""
    base = open_trainable(folder / "base")
    batches = make_batches(base, steps, BATCH_ROWS)
    arms: dict[str, Arm] = {
        "ours": ours(base, batches),
        "hf_trainer": hf_trainer(AllLogits, base, batches, folder),
        "hf_trainer_our_forward": hf_trainer(PefomedForConditionalGeneration, base, batches, folder),
    }
    expected, _ = arms["ours"]()
    if not np.mean(expected[-2:]) < expected[0]:
        raise AssertionError(f"the steps do not learn: losses {expected}")
    differences: dict[str, float] = {}

    def check(arm: str, losses: Losses) -> None:
        if not np.allclose(losses, expected, rtol=0, atol=MAX_LOSS_DIFFERENCE):
            raise AssertionError(f"{arm}: losses {losses}, expected {expected}")
        differences[arm] = max(abs(a - b) for a, b in zip(losses, expected, strict=True))

    done = run_rounds(arms, check, rounds)
    learning, parameters = parameter_counts(base.model)
    rows = steps * BATCH_ROWS
    finish(
        "step",
        {
            "vs_hf_trainer": ratio(done, "hf_trainer", "cpu_s"),
            "vs_hf_trainer_our_forward": ratio(done, "hf_trainer_our_forward", "cpu_s"),
            "vs_hf_trainer_wall": ratio(done, "hf_trainer", "wall_s"),
        },
        {"cpu": a_a(done, "cpu_s"), "wall": a_a(done, "wall_s")},
        {
            "rows_per_cpu_s": {arm: round(rows / took["cpu_s"], 2) for arm, took in per_arm(done).items()},
            "largest_loss_difference": differences,
            "losses": [round(loss, 4) for loss in expected],
            "steps": steps,
            "batch_rows": BATCH_ROWS,
            "tokens_per_row": round(median(batch.mask_BT.sum().item() / BATCH_ROWS for batch in batches), 1),
            "answer_tokens_per_row": round(median(count_answer_tokens(batch) / BATCH_ROWS for batch in batches), 1),
            "logit_columns": [int((batch.labels_BT != IGNORED_LABEL).any(dim=0).sum()) for batch in batches],
            "parameters": parameters,
            "trainable_parameters": learning,
        },
        as_json=as_json,
        quick=quick,
    )


def ours(base: Base, batches: list[Batch]) -> Arm:
    """Our step, from the adapters as they are now."""
    start = [parameter.detach().clone() for parameter in trainable(base.model)]

    def steps(optimizer: torch.optim.Optimizer) -> Losses:
        rate, norm = OPTIMIZER.learning_rate, OPTIMIZER.max_grad_norm
        return [train_step(base.model, optimizer, [batch], base.renderer, rate, norm).loss for batch in batches]

    def arm() -> tuple[Losses, Sample]:
        put_back(trainable(base.model), start)
        return timed(partial(steps, build_optimizer(base.model, OPTIMIZER)))

    return arm


def hf_trainer(kind: type[PefomedForConditionalGeneration], base: Base, batches: list[Batch], folder: Path) -> Arm:
    """A Trainer's loop over the same steps on a model of its own, from the adapters that `base` has now."""
    plain = kind.from_pretrained(folder / "base", dtype=torch.float32)
    wanted = PeftLoraConfig(
        r=LORA.rank,
        lora_alpha=LORA.alpha,
        lora_dropout=LORA.dropout,
        target_modules=r"language_model\..*_proj",
        modules_to_save=["projector"],
    )
    model: Any = get_peft_model(plain, wanted)
    learning = {plain_name(name): value for name, value in model.named_parameters() if value.requires_grad}
    theirs = {name: value for name, value in base.model.named_parameters() if value.requires_grad}
    if set(learning) != set(theirs):
        raise AssertionError(f"{kind.__name__}: other parameters learn: {sorted(set(learning) ^ set(theirs))[:3]}")
    start = [theirs[name].detach().clone() for name in learning]
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        num_train_epochs=1,
        per_device_train_batch_size=1,  # a batch, which is whole
        train_sampling_strategy="sequential",
        learning_rate=OPTIMIZER.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=OPTIMIZER.weight_decay,
        adam_beta1=OPTIMIZER.betas[0],
        adam_beta2=OPTIMIZER.betas[1],
        max_grad_norm=OPTIMIZER.max_grad_norm,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=True,
    )

    def collate(items: list[Batch]) -> dict[str, Tensor]:
        (batch,) = items
        return base.renderer.inputs(batch) | {"labels": batch.labels_BT}

    def arm() -> tuple[Losses, Sample]:
        put_back(learning.values(), start)
        watch = Stopwatch()
        trainer = Recorder(model=model, args=arguments, train_dataset=batches, data_collator=collate, callbacks=[watch])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return trainer.losses, watch.sample

    return arm


def plain_name(name: str) -> str:
    """A parameter's name without PEFT's wrappers, as it is in a model that adapters were put into."""
    return name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")


@torch.no_grad()
def put_back(parameters: Iterable[nn.Parameter], start: list[Tensor]) -> None:
    """Undo an arm's learning."""
    for parameter, value in zip(parameters, start, strict=True):
        parameter.copy_(value)


if __name__ == "__main__":
    typer.run(main)
