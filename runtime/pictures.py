"""Pictures that commands make, and by which they know them again: they replace no others."""

from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from runtime import files
from runtime.errors import must

MADE_BY = "DisBack"
ARRAYS = ["arr_0", "arr_1"]  # of an .npz: images and their classes


def save(file: Path, image: Image.Image) -> None:
    made = PngInfo()
    made.add_text("Software", MADE_BY)
    files.atomically(file, lambda beside: image.save(beside, format="PNG", pnginfo=made))


def must_be_ours(file: Path, flag: str) -> None:
    """Refuse to replace a PNG without our mark, or an .npz that has other arrays than ours."""
    with files.blame(f"{file} is in the way: name another {flag}"):
        if file.suffix == ".npz" and file.exists():
            with np.load(file) as held:
                must(held.files == ARRAYS, "it was not made here")
        elif file.exists():
            with Image.open(file) as image:
                by = image.info.get("Software", "")
                must(by.startswith(MADE_BY), "it was not made here")
