"""A folder that is a bundle as far as its manifest goes."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pefomed_ray.artifacts.manifests import BundleManifest, save_document
from pefomed_ray.artifacts.storage import sha256_file


@pytest.fixture(scope="session")
def make_bundle() -> Callable[[Path, str], str]:
    """`make_bundle(folder, content)` writes one, with weights of that content in a sub-folder; gives its digest."""

    def make(folder: Path, content: str) -> str:
        (folder / "inner").mkdir(parents=True)
        (folder / "inner" / "weights.safetensors").write_text(content)
        (folder / "run.yaml").write_text("task: vqa\n")
        files = {p.relative_to(folder).as_posix(): sha256_file(p) for p in folder.rglob("*") if p.is_file()}
        manifest = BundleManifest(
            base="embedded",
            base_digest="0" * 64,
            template="short",
            template_digest="1" * 64,
            image_size=96,
            files=files,
        )
        save_document(manifest, folder / "bundle.json")
        return manifest.digest

    return make
