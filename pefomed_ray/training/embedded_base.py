"""Make the embedded base: a tiny `pefomed` model trained whole, from nothing, on phantoms drawn by this package.

    python -m pefomed_ray.training.embedded_base OUTPUT [--images N] [--passes N] [--seed N]

It sees phantoms only, and their questions only in the `general` wording, so what an adapter later learns about any
corpus is learnt from that corpus. Each picture is shown once with many texts in one sequence: the texts share the
visual prefix, and a mask keeps them from seeing each other, which gives the same loss as separate rows while the
prefix is run once.

Letters: B pictures, T tokens of a sequence, V visual tokens, C channels, H and W pixels.
"""

import argparse
import json
import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F

from pefomed_ray.artifacts.records import Task
from pefomed_ray.artifacts.storage import sha256_file, write_json
from pefomed_ray.data.phantom import LEXICON, Balancer, Scene, caption, draw, make_scene, questions, report
from pefomed_ray.model.pefomed import PefomedConfig, PefomedForConditionalGeneration
from pefomed_ray.rendering.batches import IGNORED_LABEL
from pefomed_ray.rendering.images import ImageSpec, image_pixels, normalise
from pefomed_ray.rendering.renderer import IMAGE_SPEC_FILE, Renderer
from pefomed_ray.rendering.templates import template_named

log = logging.getLogger("embedded_base")

SPECIAL = ("<pad>", "<s>", "</s>", "<image>")
TOKEN_IDS = (0, 1, 2, 3)
"""Of SPECIAL, in order: padding, beginning, end, image."""
TAGS = ("[INST]", "[/INST]", "<Img>", "</Img>", "[vqa]", "[caption]", "[report]")
VOCABULARY = 1536
SIZE_PX = 96
QUESTIONS_PER_PICTURE = 6
PEAK_LEARNING_RATE = 1.5e-3
BATCH_PICTURES = 16


@dataclass(frozen=True)
class Text:
    """One thing said about a picture."""

    task: Task
    question: str
    answer: str


def texts_about(scene: Scene, rng: np.random.Generator, balancer: Balancer) -> list[Text]:
    """Questions without favourite answers, a caption or a report, and an exercise in plain words."""
    picked = balancer.pick(questions(scene, rng, "general"), QUESTIONS_PER_PICTURE)
    texts = [Text("vqa", question.question, question.answer) for question in picked]
    texts.append(
        Text("caption", "", caption(scene, rng)) if rng.random() < 0.5 else Text("report", "", report(scene, rng))
    )
    return [*texts, _word_exercise(rng)]


def _word_exercise(rng: np.random.Generator) -> Text:
    """Reading a list: teaches every word of the lexicon, and to copy from the question."""
    words = [LEXICON[i] for i in rng.choice(len(LEXICON), size=int(rng.integers(2, 5)), replace=False)]
    kind = int(rng.integers(4))
    if kind == 0:
        return Text("vqa", f"Repeat: {', '.join(words)}", ", ".join(words))
    if kind == 1:
        return Text("vqa", f"Which word is first: {' or '.join(words)}?", words[0])
    if kind == 2:
        return Text("vqa", f"Which word is last: {' or '.join(words)}?", words[-1])
    asked = words[0] if rng.random() < 0.5 else LEXICON[int(rng.integers(len(LEXICON)))]
    listed = rng.permutation(words).tolist()
    return Text("vqa", f"Is {asked} in the list {', '.join(listed)}?", "Yes" if asked in listed else "No")


def train_tokenizer(rng: np.random.Generator) -> Tokenizer:
    """Byte-level BPE on phantom texts and the lexicon: any string can be written, the corpus's words are short."""
    balancer = Balancer()
    lines = [f"{t.question} {t.answer}" for _ in range(4000) for t in texts_about(make_scene(rng), rng, balancer)]
    lines += [word for word in LEXICON for _ in range(40)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(TAGS),
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    return tokenizer


def new_model(vocabulary: int) -> PefomedForConditionalGeneration:
    """The architecture, at a size that fits 8 MB in half precision."""
    config = PefomedConfig(
        vision_config={
            "model_type": "blip_2_vision_model",
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 5,
            "num_attention_heads": 4,
            "image_size": SIZE_PX,
            "patch_size": 8,
            "initializer_range": 0.02,
        },
        text_config={
            "model_type": "llama",
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "vocab_size": vocabulary,
            "max_position_embeddings": 1024,
            "tie_word_embeddings": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        image_token_id=3,
    )
    return PefomedForConditionalGeneration(config)


@dataclass(frozen=True)
class Sequence:
    """A picture's visual prefix and its texts, with the block each token belongs to (0: the prefix)."""

    ids: list[int]
    labels: list[int]
    positions: list[int]
    blocks: list[int]


def pack(renderer: Renderer, texts: list[Text]) -> Sequence:
    """Prompts that begin with the same image share it; every text continues at the position after the prefix."""
    prompts = [renderer.prompt_ids(text.task, text.question, 1) for text in texts]
    last_image = max(i for i, token in enumerate(prompts[0]) if token == renderer.image_token_id)
    prefix = prompts[0][: last_image + 1]
    ids, labels = list(prefix), [IGNORED_LABEL] * len(prefix)
    positions, blocks = list(range(len(prefix))), [0] * len(prefix)
    for block, (prompt, text) in enumerate(zip(prompts, texts, strict=True), start=1):
        answer = renderer.answer_ids(text.answer, max_tokens=96)
        rest = prompt[len(prefix) :]
        ids += rest + answer
        labels += [IGNORED_LABEL] * len(rest) + answer
        positions += range(len(prefix), len(prefix) + len(rest) + len(answer))
        blocks += [block] * (len(rest) + len(answer))
    return Sequence(ids, labels, positions, blocks)


def packed_loss(model: PefomedForConditionalGeneration, sequences: list[Sequence], pixels_BCHW: Tensor) -> Tensor:
    """Mean nats an answer token."""
    longest = max(len(sequence.ids) for sequence in sequences)

    def padded(values: list[list[int]], fill: int) -> Tensor:
        return torch.tensor([row + [fill] * (longest - len(row)) for row in values])

    ids_BT = padded([s.ids for s in sequences], 0)
    labels_BT = padded([s.labels for s in sequences], IGNORED_LABEL)
    positions_BT = padded([s.positions for s in sequences], 0)
    blocks_BT = padded([s.blocks for s in sequences], -1)
    same_BTT = (blocks_BT[:, :, None] == blocks_BT[:, None, :]) | (blocks_BT[:, None, :] == 0)
    causal_TT = torch.ones(longest, longest, dtype=torch.bool).tril()
    mask_B1TT = torch.zeros(len(sequences), 1, longest, longest).masked_fill(~(same_BTT & causal_TT)[:, None], -1e9)
    embeds = model.embed(ids_BT, model.patch_features(pixels_BCHW))
    language_model = model.language_model
    hidden = language_model.model(
        inputs_embeds=embeds, attention_mask=mask_B1TT, position_ids=positions_BT, use_cache=False
    )[0]
    # The token before an answer's first is the last of its own block, so shifting by one stays inside the block.
    wanted_BT = labels_BT[:, 1:] != IGNORED_LABEL
    logits = language_model.lm_head(hidden[:, :-1][wanted_BT])
    return F.cross_entropy(logits, labels_BT[:, 1:][wanted_BT])


def train(output: Path, images: int, passes: int, seed: int) -> None:
    """Draw, train, check on held-out phantoms, save in half precision with log and sha256."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(rng)
    model = new_model(tokenizer.get_vocab_size())
    log.info("parameters %s", {n: sum(p.numel() for p in m.parameters()) for n, m in model.named_children()})
    spec = ImageSpec(SIZE_PX)
    template = template_named("short")
    renderer = Renderer(tokenizer, spec, template, *TOKEN_IDS, tokens_per_image=model.config.visual_tokens)
    started = time.monotonic()
    scenes = [make_scene(rng) for _ in range(images)]
    pixels_BCHW = torch.stack([_pixels(scene, spec) for scene in scenes])
    log.info("drew %d phantoms in %.0f s", images, time.monotonic() - started)
    held_out = max(images // 50, 64)
    balancer = Balancer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=0.05, betas=(0.9, 0.98))
    steps_per_pass = (images - held_out) // BATCH_PICTURES
    total = steps_per_pass * passes
    for step in range(total):
        if step % steps_per_pass == 0:
            order = held_out + rng.permutation(images - held_out)
        rows = order[(step % steps_per_pass) * BATCH_PICTURES :][:BATCH_PICTURES]
        learning_rate = (
            PEAK_LEARNING_RATE
            * min(1.0, (step + 1) / 200)
            * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / total)))
        )
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        sequences = [pack(renderer, texts_about(scenes[i], rng, balancer)) for i in rows]
        loss = packed_loss(model, sequences, _augment(normalise(pixels_BCHW[rows], spec), rng))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0 or step == total - 1:
            log.info(
                "step %d/%d loss %.4f lr %.2e %.0f s",
                step,
                total,
                float(loss.detach()),
                learning_rate,
                time.monotonic() - started,
            )
        if step % 500 == 499:
            log.info(
                "held-out loss %.4f", held_out_loss(model, renderer, scenes[:held_out], pixels_BCHW[:held_out], spec)
            )
    log.info("held-out loss %.4f", held_out_loss(model, renderer, scenes[:held_out], pixels_BCHW[:held_out], spec))
    save(output, model, renderer)


def held_out_loss(
    model: PefomedForConditionalGeneration,
    renderer: Renderer,
    scenes: list[Scene],
    pixels_BCHW: Tensor,
    spec: ImageSpec,
) -> float:
    """Loss on phantoms never trained on, the same texts each time."""
    rng, balancer = np.random.default_rng(0), Balancer()
    with torch.no_grad():
        sequences = [pack(renderer, texts_about(scene, rng, balancer)) for scene in scenes[:64]]
        return float(packed_loss(model, sequences, normalise(pixels_BCHW[:64], spec)))


def save(output: Path, model: PefomedForConditionalGeneration, renderer: Renderer) -> None:
    """Half precision halves the package; loading makes it float32 again."""
    model.half().save_pretrained(output)
    renderer.tokenizer.save(str(output / "tokenizer.json"))
    write_json(output / IMAGE_SPEC_FILE, renderer.image_spec.to_json())
    names = sorted(p.name for p in output.iterdir() if p.suffix in {".json", ".safetensors"})
    sums = {name: sha256_file(output / name) for name in names}
    (output / "SHA256SUMS").write_text(
        "".join(f"{digest}  {name}\n" for name, digest in sums.items()), encoding="utf-8"
    )
    log.info("saved %s", json.dumps({name: (output / name).stat().st_size for name in names}))


def _pixels(scene: Scene, spec: ImageSpec) -> Tensor:
    return image_pixels(Image.fromarray(draw(scene, spec.size_px)).convert("RGB"), spec)


def _augment(pixels_BCHW: Tensor, rng: np.random.Generator) -> Tensor:
    """Brightness, contrast and noise; no flips or crops: side and place are asked about."""
    shape = (len(pixels_BCHW), 1, 1, 1)
    gain = torch.from_numpy(rng.uniform(0.8, 1.25, shape)).float()
    offset = torch.from_numpy(rng.uniform(-0.3, 0.3, shape)).float()
    sigma = torch.from_numpy(rng.uniform(0, 0.15, shape)).float()
    return pixels_BCHW * gain + offset + sigma * torch.randn_like(pixels_BCHW)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--images", type=int, default=24_000)
    parser.add_argument("--passes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=42)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    handlers: list[logging.Handler] = [
        logging.StreamHandler(),
        logging.FileHandler(arguments.output / "train.log", mode="w"),
    ]
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=handlers)
    log.info("images %d passes %d seed %d", arguments.images, arguments.passes, arguments.seed)
    train(arguments.output, arguments.images, arguments.passes, arguments.seed)


if __name__ == "__main__":
    main()
