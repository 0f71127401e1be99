"""--compile changes what is run, not what is learnt."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import BACKTRACK, DEGRADE
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounter

import backtrack
import degrade
from imagenet64 import edm
from runtime import place
from toy2d import model


@pytest.fixture
def counter(monkeypatch):
    """Stands in for the compiler: counts the graphs that are made, and runs them as they are."""
    counter, compiled = CompileCounter(), torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile",
                        lambda net, **flags: compiled(net, backend=counter, **flags))
    yield counter
    torch._dynamo.reset()


def test_switches_of_the_target_compile_nothing_anew_and_change_no_bit(
        recorded, tmp_path, no_figures, counter):
    whole = tmp_path / "whole"
    shutil.copytree(recorded / "path", whole / "path")
    backtrack.main(["toy2d", "--out", str(whole), *BACKTRACK, "--no-compile"])
    assert counter.frame_count == 0
    graphs = []
    for interval in ("2", "7"):  # all nodes are visited, or two of them
        out = tmp_path / interval
        shutil.copytree(recorded / "path", out / "path")
        backtrack.main(["toy2d", "--out", str(out), *BACKTRACK, "--interval", interval,
                        "--compile"])
        graphs.append(counter.frame_count)
        torch._dynamo.reset()
        counter.clear()
    # The student; the fake while it learns; one for fake and target, asked side by side; and three
    # of the toy's diagnosis, which asks them at samples of its own.
    assert graphs == [6, 6]
    found, expected = (load_file(out / "student.safetensors") for out in (tmp_path / "2", whole))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_blocks_of_a_kind_share_a_graph_in_all_networks(counter):
    shape = dict(img_resolution=8, img_channels=1, label_dim=10, model_channels=32,
                 channel_mult=(1, 2), num_blocks=2, attn_resolutions=(4,))
    nets, kinds = [edm.Denoiser(**shape) for _ in range(3)], set()

    def note(block, args):
        kinds.add((args[0].shape, block.in_channels, len(block.conv1.weight), block.heads,
                   block.conv0.direction))

    for weight in nets[0].parameters():
        torch.nn.init.normal_(weight, std=0.1)  # those that start at zero would hide the others
    for block in nets[0].modules():
        if isinstance(block, edm.Block):
            block.register_forward_pre_hook(note)
    x, sigma, cond = torch.randn(2, 1, 8, 8), torch.ones(2), torch.zeros(2, 10)
    expected = nets[0](x, sigma, cond)
    for net in nets[1:]:
        net.load_state_dict(nets[0].state_dict())
        place.ready(net, SimpleNamespace(shard=False, compile=True), (edm.Block,))
        with torch.no_grad():
            assert torch.equal(net(x, sigma, cond), expected)
    assert counter.frame_count == len(kinds) > 5
    for net in nets[1:]:
        net(x, sigma, cond).mean().backward()
    assert counter.frame_count == 2 * len(kinds)  # those with gradients are others
    nets[1].load_state_dict({name: w / 2 if w.requires_grad else w for name, w
                             in nets[1].state_dict(keep_vars=True).items()})
    with torch.no_grad():
        assert not torch.equal(nets[1](x, sigma, cond), expected)
    assert counter.frame_count == 2 * len(kinds)


def test_a_compiled_networks_weights_keep_their_names(tmp_path, counter):
    degrade.main(["toy2d", "--out", str(tmp_path), *DEGRADE, "--compile"])
    assert counter.frame_count > 0
    names = load_file(tmp_path / "path" / "04.safetensors").keys()
    assert names == model.Denoiser(16, 1, 1.0).state_dict().keys()
