"""Pictures that commands make, and by which they know them again: they replace no others."""

from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from runtime import files

MADE_BY = "DisBack"
ARRAYS = ["arr_0", "arr_1"]  # of an .npz: images and their classes


def save(file: Path, image: Image.Image) -> None:
    made = PngInfo()
    made.add_text("Software", MADE_BY)
    files.atomically(file, lambda beside: image.save(beside, format="PNG", pnginfo=made))


def must_be_ours(file: Path, flag: str) -> None:
    """Refuse to replace a PNG that no command of ours made, or an .npz that no such can be."""
    with files.blame(f"{file} is in the way: name another {flag}"):
        if file.exists() and not (
                np.load(file).files == ARRAYS if file.suffix == ".npz" else
                Image.open(file).info.get("Software", "").startswith(MADE_BY)):
            raise ValueError("it was not made here")
