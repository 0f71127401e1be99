"""DisBack on SDXL. See quiet.py; the variables are for what the libraries say while they load."""

import contextlib
import os
from importlib import metadata

from packaging.version import Version

import runtime  # noqa: F401  (it tells of an interrupt while the rest loads)

OLDEST_PEFT = "0.18"

for library in ("DIFFUSERS", "TRANSFORMERS"):
    os.environ.setdefault(f"{library}_VERBOSITY", "error")

with contextlib.suppress(metadata.PackageNotFoundError):  # diffusers imports it where it is there
    if Version(found := metadata.version("peft")) < Version(OLDEST_PEFT):
        raise ImportError(f"peft {found} is too old: pip install -U 'peft>={OLDEST_PEFT}'")
