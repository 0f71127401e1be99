"""Converts a released EDM checkpoint without executing anything in it:
python -m imagenet64.pickles IN.pkl OUT.safetensors

A pickle is a program for a small stack machine, and EDM's carry Python source to be run besides.
The machine here knows only the opcodes that build plain data. What a pickle would call or make an
instance of is matched, arguments and all, against the few forms that those files consist of, and
stays inert. No unpickler runs, not even on the storages, which are pickles of torch.save's.
"""

import dataclasses
import hashlib
import math
import pickle
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import save_file
from torch import Tensor

import disback
from runtime import command, files

LARGEST = 2**31  # bytes of a file; the released ones have up to 1.2e9
OPERATIONS = 2**20  # of the machine; the ImageNet-64 file takes about 100,000
STORAGES = {"torch.FloatStorage": torch.float32, "torch.DoubleStorage": torch.float64,
            "torch.HalfStorage": torch.float16, "torch.LongStorage": torch.int64}
NAMES = {"_codecs.encode", "__builtin__.set", "builtins.set", "collections.OrderedDict",
         "numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar",
         "torch._utils._rebuild_parameter", "torch._utils._rebuild_tensor_v2",
         "torch.nn.modules.container.ModuleDict", "torch.storage._load_from_bytes",
         "torch_utils.persistence._reconstruct_persistent_obj"}
NUMBERS = {"b1", "f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"}  # of numpy's


def convert(source: str | Path, target: str | Path) -> str:
    """Write the tensors of the EMA network in the pickle `source` to `target`, under the names of
    its state dict, bit for bit; returns the source's SHA-256, which the metadata record as well.

    Raises disback.Refusal where `source` is anything but an EDM checkpoint; nothing is written.
    """
    target = Path(target)
    if target.suffix != ".safetensors":
        raise disback.Refusal(f"{target} must be named .safetensors, as that is what it will hold")
    tensors, digest = load(Path(source))
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    files.atomically(target, lambda f: save_file(tensors, f, {"source_sha256": digest}))
    return digest


def load(source: Path) -> tuple[dict[str, Tensor], str]:
    """The tensors of the EMA network in the pickle `source`, and the file's SHA-256, or Refusal."""
    try:
        if not source.is_file() or source.stat().st_size > LARGEST:
            refuse(f"is not a file of at most {LARGEST} bytes")
        data = bytearray(source.stat().st_size)
        with open(source, "rb") as handle:
            handle.readinto(data)
        return read(data), hashlib.sha256(data).hexdigest()
    except (disback.Refusal, OSError) as error:
        raise disback.Refusal(f"{source} is not an EDM checkpoint that can be read: {error}; "
                              f"{files.remedy(source, 'download it again')}") from error


def read(data: bytearray) -> dict[str, Tensor]:
    """The state dict of the EMA network in the checkpoint `data`, whose memory it shares."""
    machine, tensors = Machine(memoryview(data)), {}
    try:
        match machine.run():
            case {"ema": Module() as network} if machine.at == len(data):
                collect(network, "", machine.once, tensors)
            case _:
                refuse("it holds something else, or more, than a dict with a network 'ema'")
    except disback.Refusal:
        raise
    except (LookupError, TypeError, ValueError, RuntimeError, struct.error) as error:
        refuse(f"malformed at byte {machine.at} ({type(error).__name__})", error)
    return tensors if tensors else refuse("its network has no tensor")


def refuse(reason: str, cause: Exception | None = None) -> NoReturn:
    raise disback.Refusal(reason) from cause


@dataclasses.dataclass(eq=False)
class Name:
    """A function or a class that the pickle refers to."""
    full: str


@dataclasses.dataclass(eq=False)
class Module:
    """A module of the network: its __dict__, or None where that is still to come."""
    state: dict | None = None


@dataclasses.dataclass(eq=False)
class Storage:
    """The numbers of a tensor, in one dimension."""
    values: Tensor


class Numpy:
    """A dtype or a number of numpy's; no weight is one."""


class Machine:
    """Runs the pickles in `data`, one a call of run.

    `outer` is the machine for which this one reads a storage; the two share the bounds on time and
    memory. Every value is of a plain type or of those above.
    """

    def __init__(self, data: memoryview, outer: "Machine | None" = None):
        self.data, self.at, self.inner, self.outer = data, 0, outer is not None, outer or self
        self.operations, self.held, self.seen = 0, 0, set()

    def run(self) -> Any:
        self.stack, self.marks, self.memo = [], [], {}
        while (opcode := self.data[self.at]) != pickle.STOP[0]:
            self.at += 1
            self.outer.operations += 1
            if self.outer.operations > OPERATIONS:
                refuse("it takes too many operations")
            if opcode in PUSHES:
                self.stack.append(PUSHES[opcode](self))
            elif opcode in ACTS:
                ACTS[opcode](self)
            else:
                refuse(f"opcode 0x{opcode:02x} at byte {self.at - 1}")
        self.at += 1
        (value,) = self.stack
        return value

    def number(self, layout: str) -> int | float:
        (value,) = struct.unpack_from(layout, self.data, self.at)
        self.at += struct.calcsize(layout)
        return value

    def chunk(self, layout: str) -> memoryview:
        start = self.at + struct.calcsize(layout)
        self.at = start + self.number(layout)
        if self.at > len(self.data):
            refuse("it claims more bytes than it has")
        return self.data[start:self.at]

    def text(self, layout: str) -> str:
        raw = self.chunk(layout)
        wide = re.search(rb"[\xc4-\xff]", raw)  # beyond Latin-1 Python may take 4 bytes a letter
        self.hold(len(raw) * (4 if wide else 1))
        return str(raw, "utf-8")

    def hold(self, count: int) -> None:
        self.outer.held += count
        if self.outer.held > 2 * len(self.outer.data):
            refuse("it holds more text than it has bytes")

    def pop(self, count: int | None = None) -> list:
        """The last `count` values, or those since the last mark, off the stack."""
        start = self.marks.pop() if count is None else len(self.stack) - count
        if not 0 <= start <= len(self.stack):
            refuse("it takes more values than there are")
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def fill(self, count: int | None = None) -> None:
        values = self.pop(count)
        match self.stack[-1]:
            case list() as target:
                target.extend(values)
            case set() as target if only_text(values):
                target.update(values)
            case dict() as target if only_text(values[::2]):
                target.update(zip(values[::2], values[1::2], strict=True))
            case _:
                refuse("it fills what cannot be filled, or with keys that are not text")

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def check(self, layout: str, least: int, most: int) -> None:
        if not least <= self.number(layout) <= most:
            refuse("its protocol is unknown, or a frame larger than the file")

    def lines(self) -> list[str]:
        module, name, _ = bytes(self.data[self.at:self.at + 200]).split(b"\n", 2)
        self.at += len(module) + len(name) + 2
        return [module.decode("ascii"), name.decode("ascii")]

    def name(self, module: Any, name: Any) -> Name:
        full = f"{module}.{name}" if type(module) is type(name) is str else "no name"
        if full not in (STORAGES if self.inner else NAMES):
            refuse(f"it refers to {full[:99]!r}")
        return Name(full)

    def call(self, function: Any, args: Any) -> Any:
        """What stands for function(*args), or for an instance of it."""
        match function, args:
            case _, list() | memoryview():  # the patterns below are of tuples
                pass
            case Name("collections.OrderedDict"), ():
                return {}
            case Name("__builtin__.set" | "builtins.set"), (list() as items,) if only_text(items):
                return set(items)
            case Name("_codecs.encode"), (str() as text, "latin1"):
                self.hold(len(text))
                return memoryview(bytearray(text, "latin1"))
            case Name("numpy.dtype"), (str() as kind, int(), int()) if kind in NUMBERS:
                return Numpy()
            case Name("numpy.core.multiarray.scalar" | "numpy._core.multiarray.scalar"), (
                    Numpy(), memoryview()):
                return Numpy()
            case Name("torch.nn.modules.container.ModuleDict"), ():
                return Module()
            case Name("torch_utils.persistence._reconstruct_persistent_obj"), ({
                    "type": "class", "version": 6, "class_name": str(), "state": dict() as state},):
                return Module(state)
            case Name("torch.storage._load_from_bytes"), (memoryview() as payload,):
                return storage(Machine(payload, self))
            case Name("torch._utils._rebuild_tensor_v2"), (
                    Storage(values), int() as offset, tuple() as size, tuple() as stride, bool(),
                    dict()):
                self.once(values.data_ptr())
                return strided(values, offset, size, stride)
            case Name("torch._utils._rebuild_parameter"), (Tensor() as tensor, bool(), dict()):
                return tensor
        refuse("it makes a call that no EDM checkpoint makes")

    def build(self, target: Any, state: Any) -> Any:
        """`target` after its __setstate__(state)."""
        match target, state:
            case Module(None), dict():
                target.state = state
            case Numpy(), tuple():
                pass
            case _:
                refuse("it sets the state of what has none")
        return target

    def once(self, identity: int) -> None:
        """Sharing would let a small file stand for a huge network, or for one without end."""
        if identity in self.seen:
            refuse("a module or a tensor occurs twice in it")
        self.seen.add(identity)


PUSHES = {ord(opcode): push for opcode, push in {
    pickle.EMPTY_DICT: lambda m: {},
    pickle.EMPTY_LIST: lambda m: [],
    pickle.EMPTY_TUPLE: lambda m: (),
    pickle.EMPTY_SET: lambda m: set(),
    pickle.NONE: lambda m: None,
    pickle.NEWTRUE: lambda m: True,
    pickle.NEWFALSE: lambda m: False,
    pickle.BININT: lambda m: m.number("<i"),
    pickle.BININT1: lambda m: m.number("<B"),
    pickle.BININT2: lambda m: m.number("<H"),
    pickle.LONG1: lambda m: int.from_bytes(m.chunk("<B"), "little", signed=True),
    pickle.BINFLOAT: lambda m: m.number(">d"),
    pickle.SHORT_BINUNICODE: lambda m: m.text("<B"),
    pickle.BINUNICODE: lambda m: m.text("<I"),
    pickle.BINUNICODE8: lambda m: m.text("<Q"),
    pickle.SHORT_BINBYTES: lambda m: m.chunk("<B"),
    pickle.BINBYTES: lambda m: m.chunk("<I"),
    pickle.BINBYTES8: lambda m: m.chunk("<Q"),
    pickle.TUPLE: lambda m: tuple(m.pop()),
    pickle.TUPLE1: lambda m: tuple(m.pop(1)),
    pickle.TUPLE2: lambda m: tuple(m.pop(2)),
    pickle.TUPLE3: lambda m: tuple(m.pop(3)),
    pickle.BINGET: lambda m: m.memo[m.number("<B")],
    pickle.LONG_BINGET: lambda m: m.memo[m.number("<I")],
    pickle.GLOBAL: lambda m: m.name(*m.lines()),
    pickle.STACK_GLOBAL: lambda m: m.name(*m.pop(2)),
    pickle.REDUCE: lambda m: m.call(*m.pop(2)),
    pickle.NEWOBJ: lambda m: m.call(*m.pop(2)),
    pickle.BUILD: lambda m: m.build(*m.pop(2)),
    pickle.BINPERSID: lambda m: m.pop(1)[0] if m.inner else refuse("it holds a persistent id"),
}.items()}
ACTS = {ord(opcode): act for opcode, act in {
    pickle.PROTO: lambda m: m.check("<B", 2, 5),
    pickle.FRAME: lambda m: m.check("<Q", 0, len(m.data)),
    pickle.MARK: lambda m: m.marks.append(len(m.stack)),
    pickle.BINPUT: lambda m: m.put(m.number("<B")),
    pickle.LONG_BINPUT: lambda m: m.put(m.number("<I")),
    pickle.MEMOIZE: lambda m: m.put(len(m.memo)),
    pickle.APPEND: lambda m: m.fill(1),
    pickle.APPENDS: lambda m: m.fill(),
    pickle.ADDITEMS: lambda m: m.fill(),
    pickle.SETITEM: lambda m: m.fill(2),
    pickle.SETITEMS: lambda m: m.fill(),
}.items()}


def only_text(values: list) -> bool:
    """Text alone is ever hashed: a tuple may be too deep for that, integers be made to collide."""
    return all(type(value) is str for value in values)


def storage(machine: Machine) -> Storage:
    """The numbers in what torch.save wrote before its zip format: five pickles, then raw bytes."""
    match [machine.run() for _ in range(5)]:
        case [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True},
              ("storage", Name(name), str() as key, str(), int() as count, None), [str() as again]
              ] if key == again:
            dtype = STORAGES[name]
            if machine.number("<q") == count == (len(machine.data) - machine.at) / dtype.itemsize:
                return Storage(torch.frombuffer(machine.data, dtype=dtype, offset=machine.at))
    refuse("it holds a storage that torch.save did not write, or not whole")


def strided(values: Tensor, offset: int, size: tuple, stride: tuple) -> Tensor:
    """The tensor [*size] of that offset and those strides, all of it within `values`."""
    numbers = (offset, *size, *stride)
    if not all(type(n) is int and 0 <= n <= len(values) for n in numbers) or len(numbers) > 17:
        refuse("it holds a tensor with an impossible shape")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if not 0 < math.prod(size) <= len(values) or last >= len(values):
        refuse("it holds a tensor that is larger than its storage")
    return values.as_strided(size, stride, offset)


def collect(module: Any, prefix: str, once: Callable[[int], None], tensors: dict) -> None:
    """Add the tensors of `module` to `tensors`, in the order and under the names of state_dict."""
    if type(module) is not Module or module.state is None or prefix.count(".") > 8:
        refuse(f"{prefix[:99]!r} is not a module, or one too deep")
    hidden = module.state["_non_persistent_buffers_set"]
    for kind in ("_parameters", "_buffers", "_modules"):
        members = module.state[kind]
        if type(members) is not dict or type(hidden) is not set:
            refuse(f"the {kind} of {prefix[:99]!r} are malformed")
        once(id(members))
        for name, value in members.items():
            if value is None or kind == "_buffers" and name in hidden:
                continue
            if not re.fullmatch("[A-Za-z0-9][A-Za-z0-9_]{,63}", name) or prefix + name in tensors:
                refuse(f"{(prefix + name)[:99]!r} is no name for a tensor, or occurs twice")
            if kind == "_modules":
                collect(value, f"{prefix}{name}.", once, tensors)
            elif type(value) is not Tensor:
                refuse(f"{prefix + name} is not a tensor")
            else:
                once(id(value))
                tensors[prefix + name] = value


def main(argv: list[str]) -> None:
    if len(argv) != 2:
        raise disback.Refusal("usage: python -m imagenet64.pickles IN.pkl OUT.safetensors")
    print(f"{convert(*argv)}  {argv[0]}")


if __name__ == "__main__":
    command.run(main)
