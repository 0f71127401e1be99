"""However many ranks, shards or backward passes share a batch, the same is learnt."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import BACKTRACK, DEGRADE, ROOT
from safetensors.torch import load_file

import backtrack
import degrade
import disback

RANKS = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def torchrun(*argv, ranks=RANKS, **keywords):
    """A run of two processes on the CPU; its exit status and what it said."""
    done = subprocess.run([sys.executable, *ranks, *map(str, argv)], cwd=ROOT, text=True,
                          capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
                          timeout=300, **keywords)
    return done.returncode, done.stderr


def weights(out):
    """Of generator, fake and moving average after the last step."""
    state = torch.load(out / "state.pt", weights_only=True)
    return {f"{net} {name}": weight for net in ("student", "fake", "ema")
            for name, weight in state[net].items()}


def assert_alike(one, other, most=1e-5):
    assert one.keys() == other.keys()
    for name in one:
        error = (one[name] - other[name]).norm() / other[name].norm().clamp(min=1e-12)
        assert error <= most, (name, error.item())


@pytest.fixture(scope="module")
def alone(recorded, tmp_path_factory):
    """A run of one rank."""
    out = tmp_path_factory.mktemp("alone")
    shutil.copytree(recorded / "path", out / "path")
    with pytest.MonkeyPatch.context() as patch:
        from toy2d import figures

        patch.setattr(figures, "draw", lambda *args: None)
        backtrack.main(["toy2d", "--out", str(out), *BACKTRACK])
    return out


@pytest.mark.parametrize("flags", [[], ["--shard"], ["--accumulate", "4"]])
def test_two_ranks_learn_what_one_does(alone, tmp_path, flags):
    """Both stages; replicated (DDP), sharded (FSDP2), and in several backward passes."""
    code, said = torchrun("degrade.py", "toy2d", "--out", tmp_path, *DEGRADE, *flags)
    assert code == 0, said
    code, said = torchrun("backtrack.py", "toy2d", "--out", tmp_path, *BACKTRACK, *flags)
    assert code == 0, said
    for node in ("00", "02", "04"):
        assert_alike(*(load_file(out / "path" / f"{node}.safetensors")
                       for out in (tmp_path, alone)))
    assert_alike(weights(tmp_path), weights(alone))
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 4  # of one rank alone
    assert len(list((tmp_path / "figures").iterdir())) == 4
