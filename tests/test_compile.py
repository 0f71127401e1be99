"""--compile changes what is run, not what is learnt."""

import shutil

import pytest
import torch
from conftest import BACKTRACK, DEGRADE
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounter

import backtrack
import degrade
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
    # The student; the fake while it learns; and one for fake and target, asked side by side.
    assert graphs == [3, 3]
    found, expected = (load_file(out / "student.safetensors") for out in (tmp_path / "2", whole))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_compiled_networks_weights_keep_their_names(tmp_path, counter):
    degrade.main(["toy2d", "--out", str(tmp_path), *DEGRADE, "--compile"])
    assert counter.frame_count > 0
    names = load_file(tmp_path / "path" / "04.safetensors").keys()
    assert names == model.Denoiser(16, 1, 1.0).state_dict().keys()
