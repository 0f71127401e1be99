"""What a user has said wrong, and what fails on files and folders, in a user's words."""

import contextlib
import errno
import os
import pathlib
import re
import shutil
from collections.abc import Iterator
from typing import Any, get_args

import torch

from disback import Refusal

UNFINISHED = ".unfinished"  # ends the name of a folder in which a file is being written
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of a full disk, a quota, a limit on files


@contextlib.contextmanager
def blame(what: str) -> Iterator[None]:
    """Refuse, in the words of `what`, to go on with what fails inside: a file, mostly."""
    try:
        yield
    except Refusal:
        raise
    except Exception as error:  # a file that is broken can fail in any way
        if out_of_memory(error):
            raise
        raise Refusal(in_words(error, what)) from error


@contextlib.contextmanager
def asking_for_room(folder: str) -> Iterator[None]:
    """Where a writer into `folder` fails for want of room, say so: not every writer does."""
    try:
        yield
    except Exception:
        with open(pathlib.Path(folder, "room"), "wb") as handle:
            handle.write(bytes(2**20))
        raise


def must(holds: bool, why: str) -> None:
    """Fail where a file says what cannot be. An `assert` would not, under `python -O`."""
    if not holds:
        raise ValueError(why)


def in_words(error: Exception, what: str = "") -> str:
    """The cause, and what helps: the system's own where it says it, else that in `what`."""
    name, number = getattr(error, "filename", None) or what, getattr(error, "errno", None)
    if told := re.search(r"\(os error (\d+)\)", str(error)):  # safetensors tells it in words
        number = int(told[1])
    in_cache = re.search(rf"(?<!\S){re.escape(cache())}(/|[:;,\s]|$)", f"{name} {what}")
    of_hub = re.search(r", by (HF_\w+)\)", what)
    flag = re.search(r"(?:another|by) (--[a-z]+)", what)
    another = (f"name another place by {of_hub[1]}" if of_hub else
               "name another cache by DISBACK_CACHE" if in_cache else
               f"name another {flag[1] if flag else 'place'}")
    if isinstance(error, FileNotFoundError) and not error.filename:  # safetensors: it cannot read
        name = str(error).partition(": ")[2]
        number = errno.EACCES if os.path.lexists(name) else number
    if number == errno.EACCES or isinstance(error, PermissionError):
        place = pathlib.Path(name)
        for part in (place, *place.parents):
            place = part.parent if part.name.endswith(UNFINISHED) else place
        return f"permission denied: {place}: change its mode, if it is yours, or {another}"
    why = getattr(error, "strerror", None) or str(error)[:300]
    if number in NO_ROOM:
        place = what or name or "a file, maybe a temporary one, whose folder TMPDIR names"
        return f"{place}: {why}: make room, or {another}"
    if any(advice in str(error) for advice in ("weights_only", "allow_pickle", "torch.save")):
        why = "it is of another kind, or holds more than tensors"
    if not what and number and name:
        return f"{name}: {why}: move what is there, or name another place"
    return f"{what} ({type(error).__name__}: {why})" if what else str(error)


def out_of_memory(error: Exception) -> bool:
    """Whether memory was short; torch has no class of its own for that on the CPU."""
    return (isinstance(error, (MemoryError, torch.OutOfMemoryError))
            or isinstance(error, RuntimeError) and any(words in str(error) for words in (
                "can't allocate memory", "Storage size calculation overflowed")))


def cache() -> str:
    """The folder of what is fetched or made once: $DISBACK_CACHE or ~/.cache/disback."""
    folder = os.path.expanduser(os.environ.get("DISBACK_CACHE") or "~/.cache/disback")
    return folder if folder.startswith("~") else os.path.abspath(folder)


def must_take_files(folder: pathlib.Path, flag: str, room: int = 0) -> None:
    """Refuse a folder that cannot be made, or written to, or has fewer bytes free."""
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(p))
    if not there.is_dir():
        raise Refusal(f"{there} is no folder: name another {flag}")
    if not os.access(there, os.W_OK | os.X_OK):
        raise Refusal(f"permission denied: {there}: change its mode, or name another {flag}")
    if room and shutil.disk_usage(there).free < room:
        raise Refusal(f"{there} has less than {room / 1e6:g} MB of free space: make room, or name "
                      f"another {flag}")


def must_be_allowed(flag: str, value: Any, kind: Any, zero: bool = False,
                    below: float = 1e18) -> None:
    """Refuse what the Literal `kind` does not name, and a number of another kind or range."""
    choices = get_args(kind)
    if kind not in (int, float, str) and {*map(type, choices)} != {str}:
        raise TypeError(f"{flag} is of {kind!r}: a setting is an int, a float, a str or a "
                        "Literal of strings")
    if choices and value not in choices:
        raise Refusal(f"{flag} must be one of {', '.join(choices)}, not {value!r}")
    if kind not in (int, float):
        return
    if type(value) not in (int, kind) or not (1e-18 < value < below or zero and value == 0):
        least = f"at least {1 - zero}" if kind is int else f"{'0 or ' * zero}above 1e-18"
        raise Refusal(f"{flag} must be {least} and below {below:g}, not {value!r}")
