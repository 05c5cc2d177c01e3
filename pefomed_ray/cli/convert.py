"""`pefomed-ray convert ...`: models of elsewhere into bases and bundles, and back."""

from typing import Annotated

import typer

from pefomed_ray.cli.console import exits_with_code, finish

convert_app = typer.Typer(no_args_is_help=True, help="Models of elsewhere into bases and bundles, and back.")

Json = Annotated[bool, typer.Option("--json", help="End stdout with one JSON object.")]
LanguageModel = Annotated[str, typer.Option(help="Folder or Hub id of a causal language model, in safetensors.")]


@convert_app.command("assemble")
@exits_with_code
def assemble(
    output: str,
    vision: Annotated[str, typer.Option(help="Folder or Hub id of a vision tower, in safetensors.")],
    language_model: LanguageModel,
    image_size: Annotated[int | None, typer.Option(help="px; by default the tower's own.", min=1)] = None,
    patches_per_token: Annotated[int, typer.Option(help="Patches joined to one visual token.", min=1)] = 4,
    seed: Annotated[int, typer.Option(help="Of the projector's weights.", min=0)] = 42,
    json: Json = False,
) -> None:
    """Join a vision tower and a language model by a fresh projector to a base in OUTPUT."""
    from pefomed_ray.artifacts.storage import local_path
    from pefomed_ray.model.assemble import assemble as join

    result = join(
        vision,
        language_model,
        local_path(output),
        image_size=image_size,
        patches_per_token=patches_per_token,
        seed=seed,
    )
    finish(result, as_json=json)


@convert_app.command("published")
@exits_with_code
def published(
    checkpoint: Annotated[str, typer.Option(help="A PeFoMed or MiniGPT-v2 .pth.")],
    vision: Annotated[str, typer.Option(help="eva_vit_g.pth.")],
    language_model: LanguageModel,
    base_out: Annotated[str, typer.Option(help="Base to write: tower, projector, language model.")],
    bundle_out: Annotated[str, typer.Option(help="Adapter bundle to write.")],
    task: Annotated[str, typer.Option(help="What it was trained for: vqa, report or caption.")] = "vqa",
    image_size: Annotated[
        int | None, typer.Option(help="px. Default: as the checkpoint says, else 448.", min=1)
    ] = None,
    vision_layers: Annotated[int, typer.Option(help="Blocks of the tower that are used.", min=1)] = 39,
    vision_heads: Annotated[int, typer.Option(help="Attention heads of the tower.", min=1)] = 16,
    lora_alpha: Annotated[float | None, typer.Option(help="By default the checkpoint's, else 16.")] = None,
    json: Json = False,
) -> None:
    """A published checkpoint, its tower and its language model, to a base and an adapter bundle."""
    from pefomed_ray.artifacts.storage import local_path
    from pefomed_ray.cli.options import task_named
    from pefomed_ray.model.published import Settings, convert_published

    settings = Settings(task_named(task), image_size, vision_layers, vision_heads, lora_alpha)
    result = convert_published(
        local_path(checkpoint),
        local_path(vision),
        language_model,
        local_path(base_out),
        local_path(bundle_out),
        settings,
    )
    finish(result, as_json=json)


@convert_app.command("to-published")
@exits_with_code
def to_published(bundle: str, output: str, json: Json = False) -> None:
    """A bundle's adapter and projector as a .pth that the published code loads."""
    from pefomed_ray.artifacts.storage import local_path
    from pefomed_ray.model.checkpoint import to_published as write

    finish(write(local_path(bundle), local_path(output)), as_json=json)
