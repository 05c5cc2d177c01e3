"""Model FLOPs of a training step, by part: two for each multiplication and sum. Arithmetic alone, no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Matrices:
    """Entries of a model's weight matrices by part, and what else its products depend on."""

    patch_embedding: int
    tower: int
    """Of all blocks."""
    projector: int
    layers: int
    """Of all decoder layers, without adapters."""
    adapters: int
    head: int
    tower_depth: int
    tower_width: int
    depth: int
    """Decoder layers."""
    attention_width: int
    """Heads times the width of one."""
    patches: int
    """Of one piece of a picture; the tower also sees a class token."""
    tiles: int
    """Pieces that the tower sees one by one."""
    image_tokens: int
    """That one image becomes in the prompt."""


def step_flops(matrices: Matrices, rows: int, tokens: float, columns: float, images: float) -> dict[str, float]:
    """Of one training step on `rows` rows, padded to `tokens`, of which `columns` have a label in some row, with
    `images` images together.

    A product with a weight matrix of P entries costs 2P for a row that it is applied to; the gradient of its input as
    much again, and that of the weight as much again (arXiv 2001.08361, section 2.1). Nothing asks for gradients of
    frozen weights, nor of the tower's input and output:

    - tower: 2P for each patch (and the class token), 4 S^2 D a block for attention over S positions of width D;
    - projector: 4P for each visual token, it learns and its input does not;
    - layers: 4P for each text and visual token; lora: 6P;
    - attention: 3 * 4 T^2 H a layer over T tokens of width H, not halved for what the mask hides (arXiv 2204.02311,
      appendix B);
    - head: 4P for each position in a column with a label, whoever's it is (`answer_loss`).

    Norms, activations, softmax, rotation and AdamW are left out, as there.
    """
    seen = matrices.patches + 1
    in_blocks = 2 * matrices.tower * seen + 4 * matrices.tower_depth * seen**2 * matrices.tower_width
    return {
        "tower": images * matrices.tiles * (2 * matrices.patch_embedding * matrices.patches + in_blocks),
        "projector": images * 4 * matrices.projector * matrices.image_tokens,
        "layers": rows * 4 * matrices.layers * tokens,
        "lora": rows * 6 * matrices.adapters * tokens,
        "attention": rows * 12 * matrices.depth * tokens**2 * matrices.attention_width,
        "head": rows * 4 * matrices.head * columns,
    }
