"""`pefomed-ray export`: a bundle for those who do not have this package."""

from typing import Annotated

import typer

from pefomed_ray.cli.console import exits_with_code, finish


@exits_with_code
def export(
    bundle: str,
    output: str,
    merged: Annotated[bool, typer.Option("--merged", help="A whole model, the adapter in its weights.")] = False,
    dtype: Annotated[str | None, typer.Option(help="Of a whole model: bfloat16 (default) or float32.")] = None,
    metrics: Annotated[
        str | None, typer.Option(help="metrics.json of an evaluation of this bundle, for the model card.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="End stdout with one JSON object.")] = False,
) -> None:
    """Verify a bundle and write it to OUTPUT as a PEFT folder, or with --merged as a whole model, with a model card."""
    from pefomed_ray.artifacts.manifests import verify_bundle
    from pefomed_ray.artifacts.storage import check_output_is_free, local_path
    from pefomed_ray.errors import ConfigError

    folder, target = local_path(bundle), local_path(output)
    evaluation = local_path(metrics) if metrics else None
    if dtype is not None and not merged:
        raise ConfigError("--dtype is for --merged: an adapter stays in the float32 it was trained in")
    if dtype not in (None, "bfloat16", "float32"):
        raise ConfigError(f"--dtype {dtype!r} is not one of bfloat16, float32")
    check_output_is_free(target)
    verify_bundle(folder)
    from pefomed_ray.model.export import export_merged, export_peft

    if merged:
        found = export_merged(folder, target, "float32" if dtype == "float32" else "bfloat16", evaluation)
    else:
        found = export_peft(folder, target, evaluation)
    finish(found, as_json=json)
