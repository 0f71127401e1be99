"""The plumbing. It tells of what ends a command while `python -m` loads its libraries, which takes
seconds, and takes an empty HOME for none."""

import os
import sys
from typing import Any


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


if os.environ.get("HOME") == "":  # as where it is not set: the home that the system knows
    del os.environ["HOME"]
if sys.argv[:1] == ["-m"]:  # so it is while `python -m` imports the command's packages
    sys.excepthook = tell
