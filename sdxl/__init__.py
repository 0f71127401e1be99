"""DisBack on SDXL. See quiet.py; the variables are for what the libraries say while they load."""

import contextlib
import os
import sys
from importlib import metadata
from typing import Any

from packaging.version import Version

OLDEST_PEFT = "0.18"


def tell(kind: type, error: BaseException, *rest: Any) -> None:
    """Say in a line that an interrupt came while the libraries load, or that one does not load."""
    if issubclass(kind, KeyboardInterrupt):
        print("\nerror: interrupted", file=sys.stderr)
    elif issubclass(kind, ImportError):
        remedy = ": pip install -r requirements.txt" * issubclass(kind, ModuleNotFoundError)
        print(f"error: {error}{remedy}", file=sys.stderr, flush=True)
        os._exit(2)  # Python's own would be 1
    else:
        sys.__excepthook__(kind, error, *rest)


if sys.argv[0] == "-m":  # so it is while `python -m sdxl...` comes here
    sys.excepthook = tell

for library in ("DIFFUSERS", "TRANSFORMERS"):
    os.environ.setdefault(f"{library}_VERBOSITY", "error")

with contextlib.suppress(metadata.PackageNotFoundError):  # diffusers imports it where it is there
    if Version(found := metadata.version("peft")) < Version(OLDEST_PEFT):
        raise ImportError(f"peft {found} is too old: pip install -U 'peft>={OLDEST_PEFT}'")
