"""Memory of one device that trains one adapter, or a pack of them, over a frozen base, by formulas.

What a decoder layer keeps for its backward pass is counted tensor by tensor, as Korthikanti et al. do it (arXiv
2205.05198, section 4.1), for what LoRA leaves of it: a frozen matrix needs no input, so what is kept is what norms,
attention and activation need, and what adapters do. Bytes for a token of a layer, in a base of e bytes a number:

- norms: 4 W each over W numbers, which are kept in float32;
- attention that keeps no scores (FlashAttention, arXiv 2205.14135): query, key, value and output, each as wide as the
  query, since keys and values are repeated for the heads that share them, 4 A e; its mask, T e;
- MLP: gate, its activation, and up, 3 F e;
- adapters, in float32: of a base in 16 bits each one's input, 4 I, and where it drops out what was drawn, 4 I more; in
  a float32 base those without dropout that read the same share it; and 4 r each.

Where layers are recomputed a layer keeps W e alone, and one at a time all of it.

Measured on a CPU, packed steps of random bases of 4 and 8 layers in float32 and bfloat16, one adapter and several, with
dropout and without: of what autograd keeps the formula gives 0.99 to 1.02 times, and 1.18 where recomputed layers leave
so little that features which adapters share count (the tests hold it to 0.9 .. 1.25); of the highest that a step
allocates, beside weights, 0.98 to 1.15 times. The peak of a step on a GPU was never compared: CONTEXT_BYTES and MARGIN
stand for what is not counted, such as fragments of the allocator and working memory of kernels.

Letters: K adapters, B rows of one, T tokens, S columns with labels, V vocabulary, W width, A width of all heads, F
width of the MLP, I inputs of an adapted layer, r the largest rank of the pack.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from pefomed_ray.config import TrainConfig
from pefomed_ray.jobs.sizes import BYTES, BaseSizes, Linear, count, trained_numbers
from pefomed_ray.jobs.texts import Texts

BYTES_LEARNING = 4 * 4
"""Of a trained number: itself, its gradient and AdamW's two moments, in float32."""
GIB = 2**30
CONTEXT_BYTES = GIB
"""CUDA's context and libraries, or on a CPU the process with its imports."""
GRADIENTS = 0.25
"""What gradients on their way through the layers take, in layers: fitted to what was measured."""
MARGIN = 0.15
"""Of what is neither weights nor optimizer, added to it."""
SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("down_proj",))
"""Layers that read one tensor, which nobody else keeps. What `o_proj` reads is kept by attention."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one device, by what takes them; a step and validation come one after the other."""

    base: dict[str, float]
    """Frozen, by part."""
    learning: float
    """Weights, gradients and moments of all adapters, ranks padded to the largest."""
    activations: float
    """Kept for the backward pass, and gradients on their way."""
    logits: float
    """At the columns with labels: as they come, in float32, as probabilities and as gradients."""
    tower: float
    """What the tower needs while it runs, before any of that."""
    validation: float
    """Keys and values of all layers, and what a pass without gradients needs."""

    @property
    def total(self) -> float:
        """At its highest."""
        passing = max(self.activations + self.logits, self.tower, self.validation)
        return sum(self.base.values()) + self.learning + (1 + MARGIN) * passing + CONTEXT_BYTES


def device_memory(
    config: TrainConfig,
    sizes: BaseSizes,
    texts: Texts,
    targets: Iterable[str],
    adapters: int,
    *,
    with_tower: bool,
    is_sharded: bool,
) -> Memory:
    """Of a device that trains so many adapters of rank `lora.rank`; smaller ones are padded to it.

    `targets`: what `sizes.lora_targets` gives; `with_tower`: no feature cache stands in for it; `is_sharded`: by FSDP2,
    a device holds its part of the base, and two layers as they are gathered.
    """
    names = list(targets)
    each = BYTES[config.base.dtype]
    base = sizes.frozen_bytes(config.base)
    if config.projector.train:
        base["projector"] = 4.0 * count(sizes.projector)
    if not with_tower:
        base["tower"] = 0.0
    learning = float(
        adapters * BYTES_LEARNING * trained_numbers(sizes, config.lora, names, train_projector=config.projector.train)
    )
    if is_sharded:
        gathered = 2 * base["layers"] / sizes.depth
        share = 0.0 if config.resources.cpu_offload else 1 / config.resources.fewest_workers
        base = {part: taken * share for part, taken in base.items()} | {"gathered": gathered}
        learning *= share if adapters == 1 else 1.0
    rows = adapters * config.training.micro_batch_size
    layer = layer_bytes(sizes, config, names, texts.longest)
    return Memory(
        base=base,
        learning=learning,
        activations=kept_bytes(sizes, config, names, rows, texts.longest, texts.images_per_row)
        + GRADIENTS * rows * texts.longest * layer,
        logits=float(rows * texts.most_columns * sizes.vocabulary * (12 + each)),
        tower=rows * texts.images_per_row * _tower_bytes(sizes, each) if with_tower else 0.0,
        validation=_validation_bytes(config, sizes, texts, adapters),
    )


def kept_bytes(
    sizes: BaseSizes, config: TrainConfig, targets: Iterable[str], rows: int, tokens: int, images_per_row: float
) -> float:
    """What autograd keeps of a forward pass of so many rows, of all adapters; without the probabilities of logits."""
    names = list(targets)
    each = BYTES[config.base.dtype]
    last_norm = 4 * sizes.width
    projected = 0.0
    if config.projector.train:
        inputs = max((shape[-1] for shape in sizes.projector.values() if len(shape) == 2), default=0)
        projected = 4.0 * rows * images_per_row * sizes.image.tokens * inputs
    if config.training.gradient_checkpointing:
        layers = sizes.depth * sizes.width * each + layer_bytes(sizes, config, names, tokens)
    else:
        layers = sizes.depth * layer_bytes(sizes, config, names, tokens)
    return rows * tokens * (layers + last_norm) + projected


def layer_bytes(sizes: BaseSizes, config: TrainConfig, targets: Iterable[str], tokens: int) -> float:
    """What a decoder layer keeps of one token, in a row of so many."""
    each = BYTES[config.base.dtype]
    frozen = _norm_bytes(sizes) + each * (4 * _outputs(sizes, "q_proj") + tokens + 3 * _outputs(sizes, "up_proj"))
    adapted = {linear.name: linear for linear in sizes.adapted(targets) if linear.layer == 0}
    return frozen + _adapter_bytes(config, adapted)


def _adapter_bytes(config: TrainConfig, adapted: dict[str, Linear]) -> float:
    kept = 4.0 * config.lora.rank * len(adapted)
    inputs = sum(linear.inputs for linear in adapted.values())
    if config.lora.dropout:
        return kept + 8 * inputs
    if config.base.dtype != "float32":
        return kept + 4 * inputs
    shared = [[adapted[name].inputs for name in names if name in adapted] for names in SAME_INPUT]
    return kept + 4 * sum(found[0] for found in shared if found)


def _norm_bytes(sizes: BaseSizes) -> float:
    """Of the first layer's norms; those of heads run over all of them."""
    widths = {"q_norm": _outputs(sizes, "q_proj"), "k_norm": _outputs(sizes, "k_proj")}
    norms = [
        (name.split(".")[-2], shape[0])
        for name, shape in sizes.layers.items()
        if ".layers.0." in f".{name}" and len(shape) == 1 and name.endswith("norm.weight")
    ]
    return float(sum(4 * widths.get(name, width) for name, width in norms))


def _outputs(sizes: BaseSizes, name: str) -> int:
    return next(linear.outputs for linear in sizes.linears if linear.layer == 0 and linear.name == name)


def _tower_bytes(sizes: BaseSizes, each: int) -> float:
    """Of one image: what one block has at hand at a time, and the features."""
    matrices = [shape for shape in sizes.tower.values() if len(shape) == 2]
    widest = max((sum(shape) for shape in matrices), default=0)
    return float(sizes.image.tiles * sizes.image.patches * 4 * widest * each)


def _validation_bytes(config: TrainConfig, sizes: BaseSizes, texts: Texts, adapters: int) -> float:
    """Answers are generated for as many rows at once as `validation.batch_size` says, of all adapters together."""
    each = BYTES[config.base.dtype]
    there = min(config.validation.rows, texts.rows["validation"])
    rows = min(max(config.validation.batch_size // adapters, 1), there) * adapters
    length = texts.longest_prompt + config.validation.max_new_tokens
    keys_and_values = rows * length * sizes.depth * 2 * _outputs(sizes, "k_proj") * each
    layer = layer_bytes(sizes, config, (), texts.longest)
    generating = keys_and_values + rows * (texts.longest_prompt * layer + sizes.vocabulary * (4 + each))
    loss = rows * (texts.longest * layer + texts.most_columns * sizes.vocabulary * (8 + each))
    return float(max(generating, loss))
