"""However many ranks, shards or backward passes share a batch, the same is learnt."""

import json
import os
import shutil
import socket
import subprocess
import sys

import pytest
import torch
from conftest import BACKTRACK, DEGRADE, ROOT
from safetensors.torch import load_file

import backtrack
import disback

# What each of two ranks runs: stages, one after the other, and what is done to them first.
RANK = """
import json, os, sys
import backtrack, degrade, disback
from toy2d import figures
figures.draw = lambda *args: None
first, stages = json.loads(sys.argv[1])
exec(first)
for name, *argv in stages:
    {"degrade": degrade, "backtrack": backtrack}[name].main(argv)
"""


def two_ranks(*stages, first=""):
    """Run stages (name, *argv) on two ranks, as torchrun starts them but with less to import; what
    they said, and their exit statuses."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    argv = json.dumps([first, [[str(word) for word in stage] for stage in stages]])
    ranks = [subprocess.Popen(
        [sys.executable, "-c", RANK, argv], cwd=ROOT, text=True, stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank),
                          "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)})
        for rank in range(2)]
    said = [rank.communicate(timeout=300)[1] for rank in ranks]
    return "".join(said), [rank.returncode for rank in ranks]


def torchrun(*argv):
    """A run of two ranks as a user starts it; what it said, and its exit status."""
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                           "--nproc-per-node", "2", *map(str, argv)], cwd=ROOT, text=True,
                          capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
                          timeout=300)
    return done.stderr, done.returncode


def weights(out):
    """Of generator, fake and moving average at the last checkpoint."""
    state = torch.load(out / "state.pt", weights_only=True)
    return {f"{net} {name}": weight for net in ("student", "fake", "ema")
            for name, weight in state[net].items()}


def assert_alike(one, other, most=1e-5):
    assert one.keys() == other.keys()
    for name in one:
        error = (one[name] - other[name]).norm() / other[name].norm()
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


def assert_same_run(out, alone):
    for node in ("00", "02", "04"):
        assert_alike(*(load_file(run / "path" / f"{node}.safetensors") for run in (out, alone)))
    assert_alike(weights(out), weights(alone))
    rows = [[json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
            for run in (out, alone)]
    assert [row["step"] for row in rows[0]] == [8, 10, 16, 20]  # of one rank alone
    for row, expected in zip(*rows):
        for name in ("loss_fake", "mismatch", "spread", "swd"):
            tolerance = 0.05 if name == "spread" else 1e-4  # spread: the mean of two halves'
            assert row[name] == pytest.approx(expected[name], rel=tolerance)


@pytest.mark.parametrize("flags", [["--shard"], ["--accumulate", "4"], ["--fake-updates", "2"]])
def test_two_ranks_learn_what_one_does(recorded, alone, tmp_path, no_figures, flags):
    out = ["toy2d", "--out", tmp_path]
    said, codes = two_ranks(["degrade", *out, *DEGRADE, *flags],
                            ["backtrack", *out, *BACKTRACK, *flags])
    assert codes == [0, 0], said
    if "--fake-updates" in flags:
        alone = tmp_path / "alone"
        shutil.copytree(recorded / "path", alone / "path")
        backtrack.main(["toy2d", "--out", str(alone), *BACKTRACK, *flags])
    assert_same_run(tmp_path, alone)


def test_torchrun_takes_both_stages_and_the_figures_are_drawn(alone, tmp_path):
    for stage, argv in (("degrade.py", DEGRADE), ("backtrack.py", BACKTRACK)):
        said, code = torchrun(stage, "toy2d", "--out", tmp_path, *argv)
        assert code == 0, said
    assert_same_run(tmp_path, alone)
    assert len(list((tmp_path / "figures").iterdir())) == 4


def test_one_rank_that_accumulates_learns_the_same(recorded, alone, tmp_path, no_figures):
    shutil.copytree(recorded / "path", tmp_path / "path")
    backtrack.main(["toy2d", "--out", str(tmp_path), *BACKTRACK, "--accumulate", "4"])
    assert_same_run(tmp_path, alone)


def test_a_checkpoint_of_two_sharded_ranks_is_resumed_by_one(
        recorded, alone, tmp_path, no_figures):
    shutil.copytree(recorded / "path", tmp_path / "path")
    argv = ["toy2d", "--out", tmp_path, *BACKTRACK]
    cut = "disback.alarm = lambda log: 1 / 0 if '\"step\": 16' in log.read_text() else ''"
    said, codes = two_ranks(["backtrack", *argv, "--shard"], first=cut)
    assert "ZeroDivisionError" in said and codes != [0, 0]  # after the checkpoint of step 8
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["step"] == 8 and all(type(w) is torch.Tensor for w in state["fake"].values())
    backtrack.main([*map(str, argv), "--resume"])
    assert_same_run(tmp_path, alone)


def test_a_rank_that_dies_ends_the_others(recorded, tmp_path):
    """Where torchrun did not, this test would end by its own limit of time."""
    shutil.copytree(recorded / "path", tmp_path / "path")
    driver = tmp_path / "driver.py"
    driver.write_text(f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import backtrack, disback
update = disback.update
def dying(*args):
    if disback.rank() == 1 and args[1] < 5e-3:
        os.kill(os.getpid(), 9)
    update(*args)
disback.update = dying
disback.run(backtrack.main)
""")
    said, code = torchrun(driver, "toy2d", "--out", tmp_path, *BACKTRACK)
    assert code != 0 and "Signal 9" in said and "another rank has ended" in said
    assert "Traceback" not in said.split("torch/distributed")[0]


@pytest.mark.parametrize("flags, reason", [
    (["--accumulate", "3"], "batch 64 must be divisible by 3"),
    (["--accumulate", "0"], "--accumulate must be at least 1"),
    (["--shard"], "torchrun")])
def test_what_cannot_be_shared_is_refused(recorded, tmp_path, flags, reason):
    shutil.copytree(recorded / "path", tmp_path / "path")
    with pytest.raises(disback.Refusal, match=reason):
        backtrack.main(["toy2d", "--out", str(tmp_path), *BACKTRACK, *flags])
    assert not (tmp_path / "log.jsonl").exists()


def test_more_ranks_than_the_batch_divides_into_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(disback, "ranks", lambda: 3)
    with pytest.raises(disback.Refusal, match="batch 64 must be divisible by 6"):
        backtrack.main(["toy2d", "--out", str(tmp_path), *BACKTRACK, "--target", "teacher",
                        "--accumulate", "2"])


def test_shares_are_disjoint_and_make_up_the_batch(monkeypatch):
    monkeypatch.setattr(disback, "ranks", lambda: 3)
    x, cond, scalar = torch.arange(12.0)[:, None], {"text": torch.arange(12)}, torch.ones(())
    found = []
    for rank in range(3):
        monkeypatch.setattr(disback, "rank", lambda rank=rank: rank)
        found += disback.share(12, 2, x, cond, scalar, None)
    assert torch.equal(torch.cat([part[0] for part in found]), x)
    assert torch.equal(torch.cat([part[1]["text"] for part in found]), cond["text"])
    assert len(found) == 6 and all(part[2] is scalar and part[3] is None for part in found)


def test_sharded_sdxl_records_and_learns_what_accumulation_does_on_one_rank(tmp_path, monkeypatch):
    """Nodes are differences to the teacher, of shards. Adam magnifies rounding where gradients
    vanish, so all weights are compared as one."""
    import degrade
    from sdxl import problem

    monkeypatch.setattr(problem.figures, "draw", lambda *args: None)
    flags = ["sdxl", "--batch", "2", "--nodes", "2", "--steps"]
    two, one = tmp_path / "two", tmp_path / "one"
    said, codes = two_ranks(["degrade", *flags, 4, "--shard", "--out", two],
                            ["backtrack", *flags, 2, "--interval", 1, "--shard", "--out", two],
                            first="from sdxl import problem\n"
                                  "problem.figures.draw = lambda *args: None")
    assert codes == [0, 0], said
    degrade.main([*flags, "4", "--accumulate", "2", "--out", str(one)])
    backtrack.main([*flags, "2", "--interval", "1", "--accumulate", "2", "--out", str(one)])
    for found, expected in ((load_file(two / "path" / "02.safetensors"),
                             load_file(one / "path" / "02.safetensors")),
                            (weights(two), weights(one))):
        assert found.keys() == expected.keys()
        found, expected = (torch.cat([weight.flatten().float() for weight in state.values()])
                           for state in (found, expected))
        assert (found - expected).norm() < 1e-3 * expected.norm()
    assert (two / "student" / "unet").is_dir()
