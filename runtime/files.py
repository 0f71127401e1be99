"""Files: written whole or not at all, read strictly, and the cache."""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from disback import Refusal, load_strictly
from runtime.errors import UNFINISHED, asking_for_room, blame, cache, must_take_files
from runtime.place import gathered
from runtime.ranks import rank

UMASK = os.umask(0o022)  # it can only be read by setting it
os.umask(UMASK)
ROOM_OF_CACHE = 10**7  # bytes: the teachers that are trained have 3 MB at most
ASKED_FOR: set[pathlib.Path] = set()  # of the cache; other files in its folder are the user's


def atomically(file: pathlib.Path, write: Callable[[pathlib.Path], Any]) -> None:
    """Write in a new folder beside `file`, then rename: whatever happens, `file` is whole, the old
    or the new, with the modes that umask asks for. Only the first rank writes."""
    if rank() > 0:
        return
    kept = "; what it held is kept" if file.exists() else ""
    with blame(f"cannot write {file}{kept}"):
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(UNFINISHED, f".{file.name}.", file.parent) as folder, \
                asking_for_room(folder):
            beside = pathlib.Path(folder, file.name)
            write(beside)
            with open(beside, "rb+") as handle:
                os.fsync(handle.fileno())
            os.chmod(beside, 0o666 & ~UMASK)  # some writers leave 0600
            os.replace(beside, file)


def sweep(folder: pathlib.Path, name: str = "*") -> None:
    """Remove what killed processes left half written of files of that name, as far as we may."""
    for torn in folder.glob(f".{name}.{'?' * 8}{UNFINISHED}"):  # as tempfile ends names
        shutil.rmtree(torn, ignore_errors=True)  # which leaves what is no folder, or a link to one


def save_tensors(file: pathlib.Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors, whole where they are in shards: every rank must call it."""
    found = {}
    for name, tensor in tensors.items():
        tensor = gathered(tensor)
        if rank() == 0:
            found[name] = tensor.cpu().clone(memory_format=torch.contiguous_format)
    atomically(file, lambda beside: save_file(found, beside))


def load_net(file: pathlib.Path, net: nn.Module, remedy: str = "make it again") -> None:
    """Copy the weights in `file` over those of `net`, in place: all and only those, or Refusal."""
    with blame(f"{file} does not hold this network: {remedy}"):
        file.open("rb").close()  # safetensors calls missing what it must not read
        load_strictly(net, load_file(file))


def remedy(file: pathlib.Path, otherwise: str) -> str:
    """What helps against a broken file: who made it decides. `otherwise` it is the user's."""
    return f"remove {file}, and it is made or fetched again" if file in ASKED_FOR else otherwise


def save_json(file: pathlib.Path, value: Any) -> None:
    atomically(file, lambda beside: beside.write_text(json.dumps(value, indent=1) + "\n"))


def load_json(file: pathlib.Path, remedy: str, constant: Callable = int) -> dict:
    """`constant` reads NaN and infinities; int refuses them."""
    with blame(f"{file} cannot be read: {remedy}"):
        return dict(json.loads(file.read_text(), parse_constant=constant))


def sha256(file: pathlib.Path) -> str:
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def cached(name: str) -> pathlib.Path:
    """The file of that name in the cache; Refusal where it is not there and could not be."""
    if cache().startswith("~"):
        raise Refusal(f"{cache()} is in no home: name the cache's folder by DISBACK_CACHE")
    file = pathlib.Path(cache(), name)
    ASKED_FOR.add(file)
    if name and not file.exists():
        must_take_files(file.parent, "cache by DISBACK_CACHE", ROOM_OF_CACHE)
    return file


@contextlib.contextmanager
def lost(what: str) -> Iterator[None]:
    """Say what an interrupt takes with it."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(what) from None
