"""--compile changes what is run, not what is learnt."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import BACKTRACK, DEGRADE, same
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounter

import backtrack
import degrade
from imagenet64 import edm
from runtime import place
from toy2d import model


@pytest.fixture
def counter(monkeypatch):
    """Stands in for the compiler: counts the graphs that are made, and runs them as they are. What
    would break a graph in two raises, also where it leaves nothing before it."""
    counter, compiled = CompileCounter(), torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile",
                        lambda net, **flags: compiled(net, backend=counter, fullgraph=True,
                                                      **flags))
    yield counter
    torch._dynamo.reset()


def test_switches_of_the_target_compile_nothing_anew_and_change_no_bit(
        completed, tmp_path, no_figures, counter):
    shutil.copytree(completed / "path", tmp_path / "path")
    backtrack.main(["toy2d", "--out", str(tmp_path), *BACKTRACK, "--compile"])
    # The student; the fake while it learns; one for fake and target, asked side by side; and three
    # of the toy's diagnosis, which asks them at samples of its own.
    assert counter.frame_count == 6
    assert same(tmp_path, completed)


def test_blocks_of_a_kind_share_a_graph_in_all_networks_and_answer_and_learn_the_same(counter):
    shape = dict(img_resolution=8, img_channels=1, label_dim=10, model_channels=64,
                 channel_mult=(1, 1), num_blocks=1, attn_resolutions=(4,))
    nets, blocks = [edm.Denoiser(**shape) for _ in range(3)], []

    def note(block, args):
        blocks.append((args[0].shape, block.in_channels, len(block.conv1.weight), block.heads,
                       block.conv0.direction))

    def gradients(net):
        return torch.autograd.grad(net(x, sigma, cond).mean(), [*net.parameters()])

    for weight in nets[0].parameters():
        torch.nn.init.normal_(weight, std=0.1)  # those that start at zero would hide the others
    for block in nets[0].modules():
        if isinstance(block, edm.Block):
            block.register_forward_pre_hook(note)
    x, sigma, cond = torch.randn(2, 1, 8, 8), torch.ones(2), torch.zeros(2, 10)
    expected = nets[0](x, sigma, cond)
    kinds = len(set(blocks))
    assert 5 < kinds < len(blocks)
    for net in nets[1:]:
        net.load_state_dict(nets[0].state_dict())
        place.ready(net, SimpleNamespace(shard=False, compile=True), (edm.Block,))
        assert torch.equal(net(x, sigma, cond), expected)
    for found, gradient in zip(gradients(nets[2]), gradients(nets[0])):
        torch.testing.assert_close(found, gradient)
    nets[1].load_state_dict({name: w / 2 if w.requires_grad else w for name, w
                             in nets[1].state_dict(keep_vars=True).items()})
    assert not torch.equal(nets[1](x, sigma, cond), expected)
    assert counter.frame_count == kinds


def test_a_compiled_networks_weights_keep_their_names(tmp_path, counter):
    degrade.main(["toy2d", "--out", str(tmp_path), *DEGRADE, "--compile"])
    assert counter.frame_count > 0
    names = load_file(tmp_path / "path" / "04.safetensors").keys()
    assert names == model.Denoiser(16, 1, 1.0).state_dict().keys()
