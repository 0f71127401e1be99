"""A released checkpoint is converted bit for bit; nothing in a file that claims to be one ever
runs, and whatever is wrong with it is refused in one line."""

import collections
import contextlib
import io
import os
import pickle
import pickletools
import random
import resource
import struct
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, refusal
from safetensors import safe_open
from safetensors.torch import load_file

import disback
from imagenet64 import edm, pickles
from runtime import files

DATA = ROOT / "tests" / "data"
FIXTURE = DATA / "edm_pkl_fixture_adm.pkl"
TINY = dict(img_resolution=8, label_dim=3, model_channels=8, channel_mult=(1, 2),
            channel_mult_emb=2, num_blocks=1, attn_resolutions=())


@pytest.fixture(autouse=True)
def tripwire(tmp_path, monkeypatch):
    """Runs a test in a folder of its own, where every hostile payload writes this file."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path / "TRIPWIRE_EXECUTED"
    assert not (tmp_path / "TRIPWIRE_EXECUTED").exists()


@contextlib.contextmanager
def at_most(extra_bytes):
    """Let the process take no more memory than now and `extra_bytes`: beyond, it fails."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("needs Linux to bound memory")
    now = int(statm.read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + extra_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


# ----------------------------------------------------------------------------- the released format


def test_the_fixture_is_converted_bit_for_bit_and_loads_strictly_into_its_network(tmp_path):
    expected = np.load(DATA / "edm_pkl_fixture_adm_expected.npz")
    digest = pickles.convert(FIXTURE, tmp_path / "ema.safetensors")
    found = load_file(tmp_path / "ema.safetensors")
    assert list(pickles.read(bytearray(FIXTURE.read_bytes()))) == list(expected["__order__"])
    assert sorted(found) == sorted(expected["__order__"])
    for name, tensor in found.items():
        assert tensor.shape == expected[name].shape and tensor.numpy().dtype == expected[name].dtype
        assert tensor.numpy().tobytes() == expected[name].tobytes(), name
    with safe_open(tmp_path / "ema.safetensors", "pt") as file:
        assert file.metadata() == {"source_sha256": digest}
    assert digest == files.sha256(FIXTURE)
    net = edm.Denoiser(**TINY)
    files.load_net(tmp_path / "ema.safetensors", net)
    assert all(torch.equal(found[name], weight) for name, weight in net.state_dict().items())
    other = edm.Denoiser(**TINY | {"label_dim": 4})
    assert "does not hold this network" in refusal(
        files.load_net, tmp_path / "ema.safetensors", other)


def test_the_command_line_converts_and_names_the_hash_and_has_help(capsys, tmp_path):
    pickles.main([str(FIXTURE), str(tmp_path / "new" / "ema.safetensors")])
    assert files.sha256(FIXTURE) in capsys.readouterr().out
    assert (tmp_path / "new" / "ema.safetensors").exists()
    with pytest.raises(SystemExit) as ended:
        pickles.main(["--help"])
    said = capsys.readouterr().out
    assert ended.value.code == 0 and "IN.pkl OUT.safetensors" in said and "executing" in said


@pytest.mark.parametrize("argv", [[], ["a.pkl"], ["no.pkl", "b.safetensors"],
                                  [".", "b.safetensors"], [str(FIXTURE), "b.pkl"]])
def test_a_wrong_command_line_ends_with_one_line_and_status_2(argv, refused, tmp_path):
    assert refused(pickles.main, argv)
    assert not list(tmp_path.iterdir())


class Persistent:
    """Pickles as EDM's persistence does: a call with a dict that holds the class's source."""

    def __init__(self, module):
        self.state = {"training": False, "_parameters": collections.OrderedDict(module._parameters)}
        self.state |= {"_buffers": dict(module._buffers), "_non_persistent_buffers_set": set(),
                       "_modules": {name: persistent(m) for name, m in module._modules.items()},
                       "scale": np.sqrt(1 / 3), "names": {"one", "two"}, "sigma_max": float("inf")}

    def __reduce__(self):
        function = sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj
        return function, ({"type": "class", "version": 6, "module_src": TRIPWIRE,
                           "class_name": "Anything", "state": self.state},)


def persistent(module):
    if not isinstance(module, torch.nn.ModuleDict):
        return Persistent(module)
    copy = torch.nn.ModuleDict()
    copy.__dict__["_modules"] = {name: persistent(m) for name, m in module.items()}
    return copy


def dump(net, file, protocol=4):
    """Write `net` as a released checkpoint holds it, by Python's and torch's own picklers."""
    package = types.ModuleType("torch_utils.persistence")
    package._reconstruct_persistent_obj = types.FunctionType((lambda meta: 0).__code__, {})
    package._reconstruct_persistent_obj.__name__ = "_reconstruct_persistent_obj"
    package._reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    package._reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch_utils", types.ModuleType("torch_utils"))
        patch.setitem(sys.modules, "torch_utils.persistence", package)
        pickle.dump({"ema": persistent(net), "loss_fn": None, "augment_pipe": None,
                     "dataset_kwargs": {"path": "here", "max_size": None}}, file, protocol)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_what_python_and_torch_pickle_is_read_back_under_every_protocol(protocol):
    torch.manual_seed(0)
    net, file = edm.Denoiser(**TINY), io.BytesIO()
    dump(net, file, protocol)
    found = pickles.read(bytearray(file.getvalue()))
    assert list(found) == list(net.state_dict())
    assert all(torch.equal(found[name], t) for name, t in net.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64])
def test_tensors_of_other_types_strides_and_offsets_keep_their_numbers(dtype):
    net = torch.nn.Module()
    numbers = torch.arange(48).to(dtype)
    net.register_buffer("a", numbers[5:29].reshape(2, 3, 4).transpose(0, 2))
    net.register_buffer("b", torch.tensor(3).to(dtype))
    with open("in.pkl", "wb") as file:
        dump(net, file)
    pickles.convert("in.pkl", "out.safetensors")
    found = load_file("out.safetensors")
    assert torch.equal(found["a"], net.a) and torch.equal(found["b"], net.b)
    assert found["a"].dtype == dtype


def test_buffers_that_a_state_dict_omits_and_empty_entries_are_omitted():
    module = assembled(parameters=items(weight=tensor(size=(2, 2), stride=(2, 1), offset=1),
                                        bias=b"N"),
                       buffers=items(kept=tensor(), omitted=tensor()),
                       hidden=b"\x8f(" + text("omitted") + text("weight") + b"\x90",
                       modules=items(gone=b"N"))
    found = pickles.read(checkpoint(module))
    assert list(found) == ["weight", "kept"] and found["weight"].tolist() == [[1, 2], [3, 4]]


# ------------------------------------------------------- an assembler of pickles, and what attacks


TRIPWIRE = "open('TRIPWIRE_EXECUTED', 'w').write('x')"
STOP, NONE, MARK = b".", b"N", b"("


def text(string):
    raw = string.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def raw(data):
    return b"B" + struct.pack("<I", len(data)) + data


def name(full):
    module, _, attribute = full.rpartition(".")
    return text(module) + text(attribute) + b"\x93"


def integer(n):
    data = n.to_bytes(n.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def integers(*numbers):
    return MARK + b"".join(map(integer, numbers)) + b"t"


def call(function, *args):
    return name(function) + MARK + b"".join(args) + b"tR"


def items(**entries):
    return b"}(" + b"".join(text(key) + value for key, value in entries.items()) + b"u"


def assembled(parameters=b"}", buffers=b"}", modules=b"}", hidden=b"\x8f", **meta):
    state = items(_parameters=parameters, _buffers=buffers, _modules=modules,
                  _non_persistent_buffers_set=hidden)
    meta = {"type": text("class"), "version": b"K\x06", "class_name": text("Any"),
            "module_src": text(TRIPWIRE), "state": state} | meta
    return call("torch_utils.persistence._reconstruct_persistent_obj", items(**meta))


def checkpoint(ema):
    return bytearray(b"\x80\x04" + items(ema=ema) + STOP)


def saved(value, **how):
    file = io.BytesIO()
    torch.save(value, file, **{"_use_new_zipfile_serialization": False} | how)
    return file.getvalue()


STORAGE = saved(torch.arange(6.0)._typed_storage())


def storage(payload=STORAGE):
    return call("torch.storage._load_from_bytes", raw(payload))


def tensor(of=None, offset=0, size=(6,), stride=(1,)):
    return call("torch._utils._rebuild_tensor_v2", of or storage(), integer(offset),
                integers(*size), integers(*stride), b"\x89", b"}")


def parameter(value):
    return checkpoint(assembled(parameters=items(weight=value)))


RUN = MARK + text(TRIPWIRE) + b"tR"  # calls what is on the stack
DEEP = b")" + b"\x85" * 150_000
HUGE = 2**62


class Code:
    def __reduce__(self):
        return exec, (TRIPWIRE,)


def legacy(change, to):
    assert change in STORAGE
    return STORAGE.replace(change, to)


def nested_modules(depth):
    module = assembled(parameters=items(weight=tensor()))
    for _ in range(depth):
        module = assembled(modules=items(m=module))
    return module


def laughs(levels):
    """Modules that hold the one before twice: a file of levels, a network of 2**levels."""
    module = assembled(parameters=items(weight=tensor())) + b"q\x00"
    for level in range(levels):
        module = assembled(modules=items(a=module, b=b"h" + bytes([level])))
        module += b"q" + bytes([level + 1])
    return checkpoint(module)


def stored(payload):
    return parameter(tensor(storage(payload)))


def shaped(**how):
    return parameter(tensor(**how))


def network(**members):
    return checkpoint(assembled(**members))


# What builds plain data; no other opcode is known, least of all those that call.
PLAIN = """PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT
SHORT_BINUNICODE BINUNICODE BINUNICODE8 SHORT_BINBYTES BINBYTES BINBYTES8 EMPTY_TUPLE TUPLE TUPLE1
TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS EMPTY_SET ADDITEMS BINPUT
LONG_BINPUT BINGET LONG_BINGET MEMOIZE GLOBAL STACK_GLOBAL REDUCE NEWOBJ BUILD BINPERSID"""
OPCODES = {op.name: (parameter(op.code.encode("latin1")), f"opcode 0x{ord(op.code):02x}")
           for op in pickletools.opcodes if op.name not in PLAIN.split()}
NAMES = {full: (parameter(call(full, text(TRIPWIRE))), full) for full in (
    "builtins.exec", "builtins.getattr", "os.system", "copyreg._reconstructor",
    "operator.attrgetter", "torch.load", "torch.nn.modules.linear.Linear",
    "numpy.core.multiarray._reconstruct", "numpy.core.numeric._frombuffer")}
DICT, MODULES = "collections.OrderedDict", "torch.nn.modules.container.ModuleDict"
HOSTILE = OPCODES | NAMES | {
    # calls, by every other road that leads to one
    "exec named by lines": (parameter(b"cbuiltins\nexec\n" + RUN), "builtins.exec"),
    "a name with dots": (parameter(text("torch") + text("storage._load_from_bytes.__globals__")
                                   + b"\x93"), "__globals__"),
    "a name that is no text": (parameter(b"K\x01K\x02\x93"), "no name"),
    "BINPERSID": (parameter(text("x") + b"Q"), "persistent"),
    "a call of a result": (parameter(call(DICT) + RUN), "makes a call"),
    "a call without a tuple": (parameter(name(DICT) + b"]R"), "makes a call"),
    "arguments of a set": (parameter(call("builtins.set", b"]" + b"(K\x01e")), "makes a call"),
    "another codec": (parameter(call("_codecs.encode", text("x"), text("zip"))), "makes a call"),
    "an object dtype": (parameter(call("numpy.dtype", text("O8"), b"\x89\x88")), "makes a call"),
    # states that would change what is there
    "BUILD on a function": (parameter(name("torch.storage._load_from_bytes")
                                      + items(__globals__=b"}") + b"b"), "state of what has none"),
    "BUILD with slots": (parameter(name(MODULES) + b")\x81N" + items(__class__=b"N") + b"\x86b"),
                         "state of what"),
    "BUILD on a module that has a state": (parameter(assembled() + b"}b"), "state of what"),
    # what the stack machine must survive
    "bytes longer than any memory": (parameter(b"\x8e" + b"\xff" * 7 + b"\x7f"), "more bytes than"),
    "a frame longer than the file": (parameter(b"\x95" + b"\xff" * 8), "frame"),
    "a protocol to come": (bytearray(b"\x80\x06}."), "protocol"),
    "a memo slot that is empty": (parameter(b"j\xff\xff\xff\x7f"), "malformed"),
    "a huge memo slot": (parameter(b"K\x01r\xff\xff\xff\xff"), "not a tensor"),
    "a mark that is missing": (parameter(b"ttttt"), "malformed"),
    "a stack that is empty": (bytearray(b"\x80\x04\x87."), "more values than there are"),
    "an odd number of items": (parameter(b"}(" + text("key") + b"u"), "malformed"),
    "items of a number": (parameter(b"K\x01" + text("k") + b"Ns"), "cannot be filled"),
    "text that is no UTF-8": (parameter(b"X\x01\x00\x00\x00\xff"), "malformed"),
    "tuples nested deep for a key": (parameter(b"}" + DEEP + b"Ns"), "keys that are not text"),
    "tuples nested deep in a set": (parameter(b"\x8f(" + DEEP + b"\x90"), "not text"),
    "tuples nested deep for a type": (network(type=DEEP), "makes a call"),
    "integers that collide": (parameter(b"}" + integer(2**61 - 1) + b"Ns"), "not text"),
    "a dict within itself": (bytearray(b"\x80\x04}q\x00" + text("ema") + b"h\x00s."), "something"),
    "operations without end": (parameter(b"(" + b"N" * 2**20 + b"t"), "too many operations"),
    "wide text from few bytes": (parameter(text("\U0001f600" + "a" * 100_000)), "more text than"),
    "one text encoded many times": (parameter(text("a" * 10_000) + b"q\x00" + b"".join(
        call("_codecs.encode", b"h\x00", text("latin1")) for _ in range(9))), "more text"),
    # storages
    "exec within a storage": (stored(pickle.dumps(Code(), 2)), "exec"),
    "exec in torch.save's new format": (stored(saved(
        Code(), _use_new_zipfile_serialization=True)), "opcode 0x50"),
    "a list of storages": (stored(saved([torch.arange(6.0)._typed_storage()])),
                           "torch.save did not write"),
    "a dict for a storage": (shaped(of=b"}"), "makes a call"),
    "text for bytes": (shaped(of=call("torch.storage._load_from_bytes", text("x"))),
                       "makes a call"),
    "a storage within a storage": (stored(b"\x80\x02" + storage() + STOP), "_load_from_bytes"),
    "another type": (stored(legacy(b"FloatStorage", b"FakeStorage")), "FakeStorage"),
    "another device": (stored(legacy(b"X\x03\x00\x00\x00cpu", b"K\x00")), "did not write"),
    "another key": (stored(STORAGE[:-40] + bytes([STORAGE[-40] ^ 1]) + STORAGE[-39:]),
                    "did not write"),
    "more numbers than it has": (stored(legacy(b"K\x06N", b"K\x60N")), "not whole"),
    "another count": (stored(legacy(b"\x06" + bytes(7), b"\x07" + bytes(7))), "not whole"),
    "a storage that is cut off": (stored(STORAGE[:-1]), "not whole"),
    "big-endian numbers": (stored(legacy(b"endianq\x02\x88", b"endianq\x02\x89")), "did not write"),
    "another magic number": (stored(legacy(b"l\xfc\x9c", b"m\xfc\x9c")), "did not write"),
    "a storage that is empty": (stored(b""), "malformed"),
    # tensors
    "an offset beyond the storage": (shaped(offset=1), "larger than its storage"),
    "a negative offset": (shaped(offset=-1), "impossible"),
    "a negative stride": (shaped(stride=(-1,), offset=5), "impossible"),
    "strides that spread few numbers": (shaped(size=(6, 6), stride=(0, 1)), "larger"),
    "a stride of 0 and a huge size": (shaped(size=(HUGE,), stride=(0,)), "impossible"),
    "sizes whose product overflows": (shaped(size=(6,) * 8, stride=(0,) * 8), "larger"),
    "dimensions without end": (shaped(size=(1,) * 99, stride=(1,) * 99), "impossible"),
    "a size that is no number": (parameter(call(
        "torch._utils._rebuild_tensor_v2", storage(), b"K\x00", b"(G" + bytes(8) + b"t",
        integers(1), b"\x89", b"}")), "impossible"),
    "fewer strides than sizes": (shaped(size=(2, 3), stride=(1,)), "malformed"),
    "no numbers": (shaped(size=(0,)), "larger"),
    # networks
    "one tensor twice": (network(parameters=items(a=tensor() + b"q\x00", b=b"h\x00")), "twice"),
    "one storage twice": (network(parameters=items(
        a=tensor(storage() + b"q\x00"), b=tensor(b"h\x00"))), "occurs twice"),
    "one storage's bytes twice": (network(parameters=items(
        a=tensor(call("torch.storage._load_from_bytes", raw(STORAGE) + b"q\x00")),
        b=tensor(call("torch.storage._load_from_bytes", b"h\x00")))), "occurs twice"),
    "modules that double": (laughs(7), "occurs twice"),
    "a module within itself": (checkpoint(name(MODULES) + b")\x81q\x00" + items(
        _parameters=b"}", _buffers=b"}", _modules=items(m=b"h\x00"),
        _non_persistent_buffers_set=b"\x8f") + b"b"), "occurs twice"),
    "modules nested deep": (checkpoint(nested_modules(12)), "too deep"),
    "one name twice": (network(parameters=items(a=tensor()), buffers=items(a=tensor())), "twice"),
    "a name that collides": (network(parameters=items(**{"a.b": tensor()})), "a.b"),
    "a name of the format's": (network(parameters=items(__metadata__=tensor())), "__metadata__"),
    "an endless name": (network(parameters=items(**{"a" * 99: tensor()})), "no name"),
    "a parameter that is none": (parameter(b"K\x01"), "not a tensor"),
    "a module that is none": (network(modules=items(m=b"K\x01")), "not a module"),
    "a module without a state": (network(modules=items(m=name(MODULES) + b")\x81")),
                                 "not a module"),
    "a module of another version": (network(version=b"K\x05"), "makes a call"),
    "a module with half a state": (network(state=items(_buffers=b"}")), "malformed"),
    "parameters in a list": (network(parameters=b"]"), "are malformed"),
    "hidden names in a list": (network(hidden=b"]"), "are malformed"),
    "no tensor at all": (network(), "no tensor"),
    "no ema": (bytearray(b"\x80\x04}."), "something else"),
    "an ema that is a tensor": (checkpoint(tensor()), "something else"),
    "more after its end": (parameter(tensor()) + b"x", "something else"),
    "two values": (bytearray(b"\x80\x04NN."), "malformed"),
    "nothing": (bytearray(), "malformed"),
    "text, no pickle": (bytearray(b"<!DOCTYPE html><html>404</html>"), "opcode 0x3c"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_refused_for_its_own_reason_and_leaves_nothing(case, tmp_path):
    data, reason = HOSTILE[case]
    (tmp_path / "in.pkl").write_bytes(data)
    with at_most(2**28), pytest.raises(disback.Refusal) as refused:
        pickles.convert(tmp_path / "in.pkl", tmp_path / "out.safetensors")
    line = str(refused.value)
    assert reason in line and "\n" not in line and len(line) < 600
    assert os.listdir(tmp_path) == ["in.pkl"]


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda name: os.truncate(
    os.open(name, os.O_CREAT | os.O_RDWR), 2**31 + 1)], ids=["folder", "pipe", "too large"])
def test_what_is_no_file_or_too_large_a_one_is_not_even_opened(make, monkeypatch):
    make("in.pkl")
    monkeypatch.setattr("builtins.open", lambda *args: pytest.fail("opened"))
    with at_most(2**28), pytest.raises(disback.Refusal, match="not a file of at most"):
        pickles.convert("in.pkl", "out.safetensors")


def test_a_real_unpickler_runs_such_a_call_and_writes_the_tripwire(tripwire):
    """Otherwise its absence above would prove nothing."""
    pickle.loads(b"\x80\x04" + name("builtins.exec") + RUN + STOP)
    assert tripwire.exists()
    tripwire.unlink()


# ------------------------------------------------------------------------------ damage by accident


def test_the_fixture_cut_off_anywhere_is_refused():
    data = FIXTURE.read_bytes()
    for end in range(0, len(data), 9973):
        with pytest.raises(disback.Refusal):
            pickles.read(bytearray(data[:end]))


class Small(torch.nn.Module):
    """Of everything in a checkpoint one, so that most of its bytes are structure."""

    def __init__(self):
        super().__init__()
        self.enc = torch.nn.ModuleDict({"8x8": torch.nn.Linear(2, 1), "down": edm.Resample("up")})


def flips(data, count, net):
    """Read `data` with one random byte changed, `count` times: refused, or read as it was, or,
    where a name or a shape was hit, refused by the strict loading that follows a conversion."""
    shapes = {name: t.shape for name, t in net.state_dict().items()}
    rng, counts = random.Random(0), collections.Counter()
    for _ in range(count):
        damaged = bytearray(data)
        damaged[rng.randrange(len(data))] ^= rng.randrange(1, 256)
        try:
            found = pickles.read(damaged)
        except disback.Refusal:
            counts["refused"] += 1
            continue
        if {name: t.shape for name, t in found.items()} == shapes:
            counts["as it was"] += 1
            continue
        counts["other names"] += 1
        with pytest.raises(RuntimeError):
            net.load_state_dict(found, strict=True)
    return counts


def test_a_changed_byte_is_refused_or_changes_no_name_and_no_shape_that_would_load():
    file, net = io.BytesIO(), Small()
    dump(net, file)
    with at_most(2**28):
        counts = flips(file.getvalue(), 250, net)
        assert counts["refused"] > 60 and counts["as it was"] > 25
        flips(FIXTURE.read_bytes(), 10, edm.Denoiser(**TINY))
