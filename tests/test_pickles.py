"""A released checkpoint is converted bit for bit; nothing in a file that claims to be one ever
runs, and whatever is wrong with it is refused in one line."""

import collections
import contextlib
import io
import os
import pickle
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


def read(data):
    return pickles.read(io.BytesIO(data))


# ----------------------------------------------------------------------------- the released format


def test_the_fixture_is_converted_bit_for_bit_and_loads_strictly_into_its_network(tmp_path):
    expected = np.load(DATA / "edm_pkl_fixture_adm_expected.npz")
    digest = pickles.convert(FIXTURE, tmp_path / "ema.safetensors")
    found = load_file(tmp_path / "ema.safetensors")
    assert list(read(FIXTURE.read_bytes())) == list(expected["__order__"])
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
                                  [".", "b.safetensors"], [str(FIXTURE), "b.pkl"],
                                  ["", "b.safetensors"], [str(FIXTURE), ""]])
def test_a_wrong_command_line_ends_with_one_line_and_status_2(argv, refused, tmp_path):
    assert refused(pickles.main, argv)
    assert not list(tmp_path.iterdir())


def test_what_was_not_converted_here_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for _ in range(2):  # its own it makes again
        pickles.main([str(FIXTURE), "~/ours.safetensors"])
    files.save_tensors(tmp_path / "student.safetensors", {"x": torch.zeros(1)})
    (tmp_path / "notes.safetensors").write_text("mine")
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "ours.safetensors")
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    for name in ("student", "notes", "link"):
        line = refusal(pickles.main, [str(FIXTURE), str(tmp_path / f"{name}.safetensors")])
        assert f"{name}.safetensors is in the way: name another" in line
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


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
    found = read(file.getvalue())
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
    found = read(checkpoint(module))
    assert list(found) == ["weight", "kept"] and found["weight"].tolist() == [[1, 2], [3, 4]]


# ------------------------------------------------------- an assembler of pickles, and what attacks


TRIPWIRE = "open('TRIPWIRE_EXECUTED', 'w').write('x')"
STOP, MARK = b".", b"("


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
    meta = {"class_name": text("Any"), "module_src": text(TRIPWIRE), "state": state} | meta
    return call("torch_utils.persistence._reconstruct_persistent_obj", items(**meta))


def checkpoint(ema):
    return b"\x80\x04" + items(ema=ema) + STOP


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


def stored(payload):
    return parameter(tensor(storage(payload)))


def shaped(**how):
    return parameter(tensor(**how))


def network(**members):
    return checkpoint(assembled(**members))


def laughs(levels):
    """Modules that hold the one before twice: a file of levels, a network of 2**levels."""
    module = assembled(parameters=items(weight=tensor())) + b"q\x00"
    for level in range(levels):
        module = assembled(modules=items(a=module, b=b"h" + bytes([level])))
        module += b"q" + bytes([level + 1])
    return checkpoint(module)


class Code:
    def __reduce__(self):
        return exec, (TRIPWIRE,)


RUN = MARK + text(TRIPWIRE) + b"tR"  # calls what is on the stack
HUGE, DEEP = 2**62, b")" + b"\x85" * 150_000
DICT, MODULES = "collections.OrderedDict", "torch.nn.modules.container.ModuleDict"
TENSOR = "torch._utils._rebuild_tensor_v2"
NAMES = {full: (parameter(call(full, text(TRIPWIRE))), full) for full in (
    "builtins.exec", "builtins.getattr", "torch.load", "numpy.core.multiarray._reconstruct")}
HOSTILE = NAMES | {
    # calls, by every other road that leads to one
    "exec named by lines": (parameter(b"cbuiltins\nexec\n" + RUN), "builtins.exec"),
    "exec by INST": (parameter(MARK + text(TRIPWIRE) + b"ibuiltins\nexec\n"), "builtins.exec"),
    "exec by OBJ": (parameter(MARK + name("builtins.exec") + text(TRIPWIRE) + b"o"), "exec"),
    "exec by NEWOBJ": (parameter(name("builtins.exec") + MARK + text(TRIPWIRE) + b"t\x81"), "exec"),
    "exec in the loss": (b"\x80\x04" + items(
        ema=assembled(), loss_fn=name("builtins.exec") + RUN) + STOP, "builtins.exec"),
    "a name with dots": (parameter(text("torch") + text("storage._load_from_bytes.__globals__")
                                   + b"\x93"), "__globals__"),
    "a name that is split elsewhere": (parameter(text("torch.storage._load_from_bytes")
                                                 + text("__call__") + b"\x93"), "__call__"),
    "a number for a name": (parameter(b"\x82\x01"), "unregistered extension code"),
    "a persistent id": (parameter(text("x") + b"Q"), "persistent"),
    "a call of a result": (parameter(call(DICT) + RUN), "not callable"),
    "a call of a tensor": (parameter(tensor() + RUN), "not callable"),
    "another codec": (parameter(call("_codecs.encode", text("x"), text("zip"))), "no attribute"),
    # states that would change what is there
    "BUILD on a function": (parameter(name(TENSOR) + items(value=b"N") + b"b"), "sets the state"),
    "BUILD on a class": (parameter(name(MODULES) + items(__new__=b"N") + b"b"), "TypeError"),
    "BUILD on a module that has a state": (parameter(assembled() + b"}b"), "sets the state"),
    "BUILD on a tensor": (parameter(tensor() + items(grad=b"N") + b"b"), "sets the state"),
    # storages
    "exec in torch.save's new format": (stored(saved(
        Code(), _use_new_zipfile_serialization=True)), "more than tensors"),
    "a tensor for a storage": (stored(saved(torch.arange(6.0))), "something else"),
    "a dict for a storage": (shaped(of=b"}"), "no attribute"),
    "text for bytes": (shaped(of=call("torch.storage._load_from_bytes", text("x"))), "bytes-like"),
    "a storage that is cut off": (stored(STORAGE[:-1]), "unexpected EOF"),
    "a storage that is empty": (stored(b""), "EOF"),
    # tensors
    "an offset beyond the storage": (shaped(offset=1), "out of bounds"),
    "a negative offset": (shaped(offset=-1), "offset"),
    "a stride beyond the storage": (shaped(size=(2,), stride=(6,)), "out of bounds"),
    "a negative stride": (shaped(stride=(-1,), offset=5), "egative strides"),
    "a stride of 0 and a huge size": (shaped(size=(HUGE,), stride=(0,)), "larger"),
    "fewer strides than sizes": (shaped(size=(2, 3), stride=(1,)), "mismatch"),
    # networks
    "modules that double": (laughs(7), "occurs twice"),
    "a parameter that is none": (parameter(b"K\x01"), "no attribute"),
    "a parameter without numbers": (parameter(assembled()), "weight is not a tensor"),
    "a module with half a state": (network(state=items(_buffers=b"}")), "KeyError"),
    "no tensor at all": (network(), "no tensor"),
    "no ema": (b"\x80\x04}.", "ema"),
    "a list": (b"\x80\x04].", "TypeError"),
    "more after its end": (parameter(tensor()) + b"x", "after its end"),
    "a protocol to come": (b"\x80\x06}.", "protocol"),
    "text longer than the file": (parameter(b"X\xff\xff\xff\x00x"), "only 69 remain"),
    "bytes longer than any memory": (parameter(b"\x8e" + b"\xff" * 7 + b"\x7f"), "too large"),
    "tuples nested deep for a key": (parameter(b"}" + DEEP + b"Ns"), "too many tuples"),
    "a huge memo slot": (parameter(b"K\x01r\xff\xff\xff\x7f"), "a place in the memo"),
    "a mark that is missing": (parameter(b"ttttt"), "UnpicklingError"),
    "nothing": (b"", ""),
    "text, no pickle": (b"<!DOCTYPE html><html>404</html>", "unknown"),
    "a safetensors file": (b"\x08\0\0\0\0\0\0\0{}      ", "unknown"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_refused_for_its_own_reason_and_leaves_nothing(case, tmp_path):
    data, reason = HOSTILE[case]
    (tmp_path / "in.pkl").write_bytes(data)
    with at_most(2**28):
        line = refusal(pickles.convert, tmp_path / "in.pkl", tmp_path / "out.safetensors")
    assert reason in line and len(line) < 600
    assert os.listdir(tmp_path) == ["in.pkl"]


def test_a_real_unpickler_runs_such_a_call_and_writes_the_tripwire(tripwire):
    """Otherwise its absence above would prove nothing."""
    pickle.loads(b"\x80\x04" + name("builtins.exec") + RUN + STOP)
    assert tripwire.exists()
    tripwire.unlink()


# ------------------------------------------------------------------------------ damage by accident


def test_the_fixture_cut_off_anywhere_is_refused():
    data = FIXTURE.read_bytes()
    for end in range(0, len(data), 9973):
        Path("cut.pkl").write_bytes(data[:end])
        assert "download it again" in refusal(pickles.load, Path("cut.pkl"))


class Small(torch.nn.Module):
    """Of everything in a checkpoint one, so that most of its bytes are structure."""

    def __init__(self):
        super().__init__()
        self.enc = torch.nn.ModuleDict({"8x8": torch.nn.Linear(2, 1), "down": edm.Resample("up")})


@pytest.mark.filterwarnings("ignore")
def test_a_changed_byte_is_refused_or_read_and_nothing_else():
    """A name or a shape that it hits is refused by the strict loading that follows."""
    file = io.BytesIO()
    dump(Small(), file)
    rng, refused = random.Random(0), 0
    for _ in range(500):
        damaged = bytearray(file.getvalue())
        damaged[rng.randrange(len(damaged))] ^= rng.randrange(1, 256)
        Path("in.pkl").write_bytes(damaged)
        try:
            pickles.load(Path("in.pkl"))
        except (disback.Refusal, MemoryError):
            refused += 1
    assert 100 < refused < 490
