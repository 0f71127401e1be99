"""Converts a released EDM checkpoint without executing anything in it:
python -m imagenet64.pickles IN.pkl OUT.safetensors

To unpickle is to call what a file names, and EDM's carry Python source to be run besides. Here the
few names that those files have stand for functions of ours, which keep what they are given; any
other is refused. Storages, pickles of torch.save's, are read by torch.load(weights_only=True).
"""

import io
import math
import os
import pickle
import pickletools
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import disback
from runtime import command, files
from runtime.errors import must

SOURCE = "source_sha256"  # in the metadata of what is written here


def convert(source: str | Path, target: str | Path) -> str:
    """Write the tensors of the EMA network in the pickle `source` to `target`, under the names of
    its state dict, bit for bit; returns the source's SHA-256, which the metadata record as well.

    Raises disback.Refusal where `source` is anything but an EDM checkpoint; nothing is written.
    """
    target = Path(target)
    if target.suffix != ".safetensors":
        raise disback.Refusal(f"{target} must be named .safetensors, as that is what it will hold")
    if os.path.lexists(target):
        with files.blame(f"{target} is in the way: name another OUT.safetensors"), \
                safe_open(target, "pt") as held:
            must(not target.is_symlink() and SOURCE in (held.metadata() or {}), "not made here")
    tensors, digest = load(Path(source))
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    files.atomically(target, lambda f: save_file(tensors, f, {SOURCE: digest}))
    return digest


def load(source: Path) -> tuple[dict[str, Tensor], str]:
    """The tensors of the EMA network in the pickle `source`, and the file's SHA-256, or Refusal."""
    if not source.is_file():
        raise disback.Refusal(f"{source} is no file: name EDM's checkpoint")
    with files.blame(f"{source} is not an EDM checkpoint that can be read: "
                     f"{files.remedy(source, 'download it again')}"), open(source, "rb") as handle:
        return read(handle), files.sha256(source)


def read(handle: BinaryIO) -> dict[str, Tensor]:
    """The state dict of the EMA network in a checkpoint; any Exception where it is none."""
    survey(handle)
    network, tensors = Reader(handle).load()["ema"], {}
    if handle.read(1):
        raise ValueError("it goes on after its end")
    collect(network, "", tensors, set())
    if not tensors:
        raise ValueError("its network has no tensor")
    return tensors


def survey(handle: BinaryIO) -> None:
    """Refuse what Python's unpickler does not survive: tuples nested too deep to be hashed, and
    memory for things that are not there. A network of ImageNet-64's size has 3,400."""
    tuples, places = 0, 0
    for opcode, value, _ in pickletools.genops(handle):
        tuples += opcode.name.startswith("TUPLE")
        places += "PUT" in opcode.name
        if tuples > 2**14 or "PUT" in opcode.name and int(value) > places:
            raise ValueError("too many tuples, or a place in the memo far beyond the others")
    handle.seek(0)


class Held:
    """What a pickle gets for an object: a value, which none of its opcodes can reach or change. A
    module that is still empty takes the state that it is given."""

    value: Any = None

    def __init__(self, value: Any = None):
        self.value = value

    def __setstate__(self, state: Any) -> None:
        if self.value is not None:
            raise ValueError("it sets the state of what has one")
        self.value = state


class Function(Held):
    """What a pickle gets for a function: BUILD could change a real one."""

    def __call__(self, *args: Any) -> Any:
        return self.value(*args)


def storage(raw: bytes) -> Held:
    """The numbers [n] in what torch.save wrote of a storage."""
    kept = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    if not isinstance(kept, torch.TypedStorage):
        raise ValueError("it has something else for a storage")
    return Held(torch.empty(0, dtype=kept.dtype).set_(kept))


def tensor(numbers: Held, offset: int, size: tuple, stride: tuple, *_: Any) -> Held:
    """The tensor [*size] of that offset and those strides; as_strided looks at what lies beyond."""
    if math.prod(size) > len(numbers.value):
        raise ValueError("it has a tensor that is larger than its storage")
    return Held(numbers.value.as_strided(size, stride, offset))


NOTHING = Function(lambda *_: Held())  # for numbers of numpy's, as no weight is one
KNOWN = {
    "__builtin__.set": Function(set), "builtins.set": Function(set),
    "_codecs.encode": Function(lambda text, _: text.encode("latin1")),
    "collections.OrderedDict": Function(dict), "numpy.dtype": NOTHING,
    "numpy.core.multiarray.scalar": NOTHING, "numpy._core.multiarray.scalar": NOTHING,
    "torch._utils._rebuild_parameter": Function(lambda tensor, *_: tensor),
    "torch._utils._rebuild_tensor_v2": Function(tensor),
    "torch.nn.modules.container.ModuleDict": Held,
    "torch.storage._load_from_bytes": Function(storage),
    "torch_utils.persistence._reconstruct_persistent_obj": Function(
        lambda meta: Held(meta["state"]))}


class Reader(pickle.Unpickler):
    """Knows the names above and no other."""

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in KNOWN:
            raise ValueError(f"it refers to {module}.{name}"[:99])
        return KNOWN[f"{module}.{name}"]


def collect(module: Held, prefix: str, tensors: dict, seen: set[int]) -> None:
    """Add the tensors of `module` to `tensors`, in the order and under the names of state_dict.
    A module that occurs twice would let a small file stand for a network without end."""
    if id(module) in seen:
        raise ValueError(f"{prefix} occurs twice")
    seen.add(id(module))
    hidden = module.value["_non_persistent_buffers_set"]
    for kind in ("_parameters", "_buffers", "_modules"):
        for name, held in module.value[kind].items():
            if held is None or kind == "_buffers" and name in hidden:
                continue
            if kind == "_modules":
                collect(held, f"{prefix}{name}.", tensors, seen)
            elif isinstance(held.value, Tensor):
                tensors[prefix + name] = held.value
            else:
                raise ValueError(f"{prefix}{name} is not a tensor")


def main(argv: list[str]) -> None:
    parser = command.parser("python -m imagenet64.pickles", __doc__)
    parser.add_argument("source", type=command.path, metavar="IN.pkl",
                        help="a checkpoint as EDM releases them")
    parser.add_argument("target", type=command.path, metavar="OUT.safetensors",
                        help="its weights")
    args = parser.parse_args(argv)
    print(f"{convert(args.source, args.target)}  {args.source}")


if __name__ == "__main__":
    command.run(main)
