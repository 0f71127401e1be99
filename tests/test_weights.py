"""Weights from outside are taken exactly, or refused in the name of their file."""

import pytest
import torch
from safetensors.torch import save_file

import disback
from runtime import files

GOOD = {"weight": torch.ones(2, 3), "bias": torch.ones(2)}


def changed(name, tensor):
    return GOOD | {name: tensor}


@pytest.mark.parametrize("weights, cause", [
    (changed("bias", torch.tensor([1.0, float("nan")])), "not finite: bias"),
    (changed("weight", torch.full((2, 3), -torch.inf)), "not finite: weight"),
    (changed("bias", torch.full((2,), torch.nan).bfloat16()), "not finite: bias"),
    (changed("bias", torch.full((2,), 1e300, dtype=torch.float64)), "not finite: bias"),
    (changed("bias", torch.ones(2, dtype=torch.int8)), r"has \['bias \[2\] torch.int8'\]"),
    (changed("bias", torch.ones(2, dtype=torch.bool)), "torch.bool"),
    (changed("weight", torch.ones(2, 3, dtype=torch.complex64)), "torch.complex64"),
    (changed("bias", torch.ones(1)), r"lacks \['bias \[2\]'\] \(1\) and has \['bias \[1\]'\]"),
    ({"weight": GOOD["weight"]}, r"lacks \['bias \[2\]'\] \(1\) and has \[\] \(0\)"),
    (changed("more", torch.ones(1)), r"has \['more \[1\]'\]"),
    ({"_orig_mod." + name: tensor for name, tensor in GOOD.items()}, r"has \['_orig_mod.bias"),
    ({}, "lacks"),
])
@pytest.mark.parametrize("load", [
    lambda file, net: files.load_net(file, net), lambda file, net: path_of(file).load(0, net)])
def test_weights_that_do_not_fit_are_refused_and_none_is_copied(tmp_path, load, weights, cause):
    file, net = tmp_path / "00.safetensors", torch.nn.Linear(3, 2)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    save_file(weights, file)
    with pytest.raises(disback.Refusal, match=f"{file}.*{cause}"):
        load(file, net)
    assert all(torch.equal(net.state_dict()[name], tensor) for name, tensor in before.items())


def test_a_network_of_eight_bits_is_loaded():
    """torch has no isfinite for it."""
    net = torch.nn.Linear(2, 2, bias=False).to(torch.float8_e4m3fn)
    weight = torch.tensor([[1.0, -2.0], [0.5, 448.0]])
    disback.load_strictly(net, {"weight": weight})
    assert torch.equal(net.weight.float(), weight)


@pytest.mark.parametrize("held, dtype", [(7e4, torch.float16), (1e300, torch.float32)])
def test_what_is_finite_in_the_file_alone_is_refused(held, dtype):
    net = torch.nn.Linear(1, 1, bias=False).to(dtype)
    before = net.weight.clone()
    with pytest.raises(ValueError, match="not finite: weight"):
        disback.load_strictly(net, {"weight": torch.full((1, 1), held, dtype=torch.float64)})
    assert torch.equal(net.weight, before)


def path_of(file):
    save_file(GOOD, file.with_name("01.safetensors"))
    (file.parent / "path.json").write_text('{"steps": [0, 1], "positions": [0, 1]}')
    return disback.DegradationPath(file.parent)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_floats_of_any_size_are_taken(tmp_path, dtype):
    save_file({name: tensor.to(dtype) for name, tensor in GOOD.items()}, tmp_path / "w.safetensors")
    net = torch.nn.Linear(3, 2)
    files.load_net(tmp_path / "w.safetensors", net)
    assert net.weight.dtype == torch.float32 and torch.equal(net.weight, GOOD["weight"])


def test_integers_are_taken_where_the_network_has_them(tmp_path):
    net, other = torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2)
    net.num_batches_tracked += 7
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    files.load_net(tmp_path / "w.safetensors", other)
    assert other.num_batches_tracked == 7
