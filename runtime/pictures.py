"""Pictures that commands make, and by which they know them again: they replace no others."""

import os
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from runtime import files
from runtime.errors import must

MADE_BY = "DisBack"
Image.MAX_IMAGE_PIXELS = None  # of pictures the headers alone are read, and grids are large


def save(file: Path, image: Image.Image) -> None:
    made = PngInfo()
    made.add_text("Software", MADE_BY)
    files.atomically(file, lambda beside: image.save(beside, format="PNG", pnginfo=made))


def save_arrays(file: Path, *arrays: np.ndarray) -> None:
    """An .npz, whose arrays numpy names arr_0, arr_1 and so on."""
    def write(beside: Path) -> None:
        with open(beside, "wb") as handle:  # given a name, numpy would add a suffix of its own
            np.savez(handle, *arrays, made_by=np.array(MADE_BY))

    files.atomically(file, write)


def must_be_ours(file: Path, flag: str) -> None:
    """Refuse to replace a PNG or an .npz without our mark, or what a link leads to."""
    if not os.path.lexists(file):
        return
    with files.blame(f"{file} is in the way: name another {flag}"):
        if file.suffix == ".npz":
            with np.load(file) as held:
                by = str(held.get("made_by"))
        else:
            with Image.open(file) as image:
                by = image.info.get("Software", "")
        must(by.startswith(MADE_BY), "it was not made here")
