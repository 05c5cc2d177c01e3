"""What is committed is what the script wrote, and small."""

from pefomed_ray.artifacts.base import EMBEDDED_FOLDER
from pefomed_ray.cli.doctor import check_embedded_base

MAX_BYTES = 8_000_000


def test_files_match_their_sha256_and_fit_the_package() -> None:
    check_embedded_base()
    files = [path for path in EMBEDDED_FOLDER.iterdir() if path.is_file()]
    assert {"model.safetensors", "tokenizer.json", "config.json", "train.log", "SHA256SUMS"} <= {p.name for p in files}
    assert sum(path.stat().st_size for path in files) <= MAX_BYTES
