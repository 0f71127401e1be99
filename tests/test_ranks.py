"""However many ranks, shards or backward passes share a batch, the same is learnt."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import BACKTRACK, DEGRADE, read, refusal, save_of_few_tensors
from PIL import Image
from processes import Started, stages, two_ranks
from safetensors.torch import load_file

import backtrack
import degrade
import disback
from runtime import place, ranks


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


def assert_same_run(out, alone):
    about = [read(run / "path" / "path.json") for run in (out, alone)]
    assert about[0]["steps"] == about[1]["steps"]
    assert about[0]["positions"] == pytest.approx(about[1]["positions"], rel=1e-4)
    for node in ("00", "02", "04"):
        assert_alike(*(load_file(run / "path" / f"{node}.safetensors") for run in (out, alone)))
    assert_alike(weights(out), weights(alone))
    rows = [read(run / "log.jsonl") for run in (out, alone)]
    assert [row["step"] for row in rows[0]] == [5, 10, 15, 20]  # of one rank alone
    for row, expected in zip(*rows):
        for name in ("loss_fake", "mismatch", "swd"):
            assert row[name] == pytest.approx(expected[name], rel=1e-4)


def test_two_sharded_ranks_learn_what_one_does(completed, tmp_path):
    out = ["toy2d", "--out", tmp_path, "--shard"]
    said, codes = two_ranks(stages(["degrade", *out, *DEGRADE], ["backtrack", *out, *BACKTRACK]))
    assert codes == [0, 0], said
    assert_same_run(tmp_path, completed)


def test_ranks_that_torchrun_starts_and_that_accumulate_learn_what_one_does(
        recorded, tmp_path, no_figures):
    """They are forked here, as to import torch anew would take each of them seconds."""
    shutil.copytree(recorded / "path", tmp_path / "alone" / "path")
    more = [*BACKTRACK, "--accumulate", "4", "--fake-updates", "2"]
    backtrack.main(["toy2d", "--out", str(tmp_path / "alone"), *more])
    two = ["toy2d", "--out", str(tmp_path / "two")]
    argvs = [["--standalone", "--nproc-per-node", "2", *words] for words in (
        ["degrade.py", *two, *DEGRADE, "--accumulate", "4"], ["backtrack.py", *two, *more])]
    said, code = Started(stages(first=f"""
import runpy
from torch.distributed import run as torchrun
def script(option, name, *argv):
    sys.argv = [name, *argv]
    runpy.run_path(name, run_name="__main__")
def fork(config, entrypoint):
    config.start_method = "fork"
    return launch(config, script)
launch, torchrun.elastic_launch = torchrun.elastic_launch, fork
for argv in {argvs!r}:
    torchrun.main(argv)
"""), OMP_NUM_THREADS="1").ended()
    assert code == 0, said
    assert_same_run(tmp_path / "two", tmp_path / "alone")


def test_one_rank_that_accumulates_has_the_same_gradients_and_learns_the_same(
        completed, tmp_path, no_figures, before_updates):
    """Adam would not tell a gradient from its multiple."""
    norms = {1: [], 4: []}
    for parts, found in norms.items():
        out = ["toy2d", "--out", str(tmp_path / str(parts))]

        def look(optimizer, found=found):
            weights = [weight for group in optimizer.param_groups for weight in group["params"]]
            found.append(sum(weight.grad.square().sum().item() for weight in weights))

        hook = before_updates(look)
        degrade.main([*out, *DEGRADE, "--accumulate", str(parts)])
        backtrack.main([*out, *BACKTRACK, "--accumulate", str(parts)])
        hook.remove()
    assert len(norms[1]) == 20 + 2 * 20 and norms[4] == pytest.approx(norms[1], rel=1e-3)
    assert_same_run(tmp_path / "4", completed)


def test_a_signal_to_one_of_two_sharded_ranks_saves_a_checkpoint_that_one_rank_resumes(
        recorded, completed, tmp_path, no_figures):
    """Also where the first rank takes its time to write, and the signal is repeated."""
    shutil.copytree(recorded / "path", tmp_path / "path")
    argv = ["toy2d", "--out", tmp_path, *BACKTRACK]
    said, codes = two_ranks(stages(["backtrack", *argv, "--shard"], first=f"""
import signal, time, torch
stop_asked, save, leave, steps = run.asked_to_stop, torch.save, sys.exit, []
def asked(signals):
    steps.append(1)
    if len(steps) == 13 and ranks.rank() == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return stop_asked(signals)
def slow(*args):
    for _ in range(2 if len(steps) == 13 else 0):
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(1)
    save(*args)
def last(message):
    assert torch.load({str(tmp_path / "state.pt")!r}, weights_only=True)["step"] == 13
    leave(message)
run.asked_to_stop, torch.save, sys.exit = asked, slow, last
"""))
    assert codes == [1, 1] and said.count("stopped by SIGTERM after step 13") == 1, said
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["step"] == 13 and all(type(w) is torch.Tensor for w in state["fake"].values())
    backtrack.main([*map(str, argv), "--resume"])
    assert_same_run(tmp_path, completed)


def test_a_rank_that_dies_ends_the_other(recorded, tmp_path):
    """Where it did not, this test would end by its own limit of time."""
    said, codes = two_ranks(stages(
        ["backtrack", "toy2d", "--out", tmp_path, "--path", recorded / "path", *BACKTRACK],
        first="""
average, calls = ranks.average_gradients, []
def dying(optimizer):
    calls.append(1)
    if ranks.rank() == 1 and len(calls) == 7:
        os.kill(os.getpid(), 9)
    average(optimizer)
ranks.average_gradients = dying
"""))
    assert codes == [1, -9] and "gloo" in said.lower(), said


@pytest.mark.parametrize("flags, world, reason", [
    (["--accumulate", "3"], 1, "batch 64 must be divisible by 3"),
    (["--accumulate", "2"], 3, "batch 64 must be divisible by 6"),
    (["--accumulate", "0"], 1, "--accumulate must be at least 1"), (["--shard"], 1, "torchrun")])
def test_what_cannot_be_shared_is_refused(tmp_path, monkeypatch, flags, world, reason):
    monkeypatch.setattr(ranks, "world_size", lambda: world)
    argv = ["toy2d", "--out", str(tmp_path), *BACKTRACK, "--target", "teacher", *flags]
    assert reason in refusal(backtrack.main, argv)
    assert not (tmp_path / "log.jsonl").exists()


def test_two_ranks_answer_together_what_one_answers_alone():
    said, codes = two_ranks(stages(first="""
import torch
ranks.join_ranks()
seen = []
def function(x, factor, cond):
    seen.append(len(x))
    return factor * x + cond["shift"]
for n in (6, 5):
    x, cond = torch.arange(float(n))[:, None], {"shift": torch.arange(float(n))[:, None]}
    answer = results.SplitOverRanks(function)(x, torch.tensor(3.0), cond)
    assert torch.equal(answer, 4 * torch.arange(float(n))[:, None])
assert seen == [3, 5]  # five cannot be shared by two
"""))
    assert codes == [0, 0], said


def test_shares_are_disjoint_and_make_up_the_batch(monkeypatch):
    monkeypatch.setattr(ranks, "world_size", lambda: 3)
    x, cond, scalar = torch.arange(12.0)[:, None], {"text": torch.arange(12)}, torch.ones(())
    found = []
    for rank in range(3):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        found += ranks.share(12, 2, x, cond, scalar, None)
    assert torch.equal(torch.cat([part[0] for part in found]), x)
    assert torch.equal(torch.cat([part[1]["text"] for part in found]), cond["text"])
    assert len(found) == 6 and all(part[2] is scalar and part[3] is None for part in found)


def test_sharded_sdxl_records_and_learns_what_accumulation_does_on_one_rank(tmp_path, monkeypatch):
    """Nodes are differences to the teacher, of shards. Adam magnifies rounding where gradients
    vanish, so all weights are compared as one. A UNet of few tensors, as FSDP2 reasons on each."""
    monkeypatch.setattr("sdxl.figures.draw", lambda *args: None)
    save_of_few_tensors(tmp_path / "model")
    (tmp_path / "two.txt").write_text("a dog\na cat")
    flags = ["sdxl", "--model", str(tmp_path / "model"), "--prompts", str(tmp_path / "two.txt"),
             "--batch", "2", "--nodes", "2", "--steps"]
    walk = ["--interval", "1", "--fake-updates", "2"]
    two, one = tmp_path / "two", tmp_path / "one"
    said, codes = two_ranks(stages(
        ["degrade", *flags, 2, "--shard", "--out", two],
        ["backtrack", *flags, 1, *walk, "--shard", "--out", two],
        first="from sdxl import figures; figures.draw = lambda *args: None"))
    assert codes == [0, 0], said
    degrade.main([*flags, "2", "--accumulate", "2", "--out", str(one)])
    backtrack.main([*flags, "1", *walk, "--accumulate", "2", "--out", str(one)])
    for found, expected in ((load_file(two / "path" / "02.safetensors"),
                             load_file(one / "path" / "02.safetensors")),
                            (weights(two), weights(one))):
        assert found.keys() == expected.keys()
        found, expected = (torch.cat([weight.flatten().float() for weight in state.values()])
                           for state in (found, expected))
        assert (found - expected).norm() < 1e-3 * expected.norm()
    assert (two / "student" / "unet").is_dir()


def test_two_ranks_share_the_pictures_of_one_and_the_first_writes_them(tmp_path, capfd):
    from sdxl import generate, layout

    base = layout.find("", tmp_path)
    argv = ["a dog", "a cat", "q " * 80, "--batch", "3", "--base", str(base),
            "--student", str(base / "unet/diffusion_pytorch_model.safetensors"), "--out"]
    generate.main([*argv, str(tmp_path / "one")])
    alone = capfd.readouterr().err
    said, codes = two_ranks(stages(first=f"""
from sdxl import generate
pictures, asked = generate.generate, []
def counted(pipe, about, jobs):
    asked.append(len(jobs))
    return pictures(pipe, about, jobs)
generate.generate = counted
generate.main({[*argv, str(tmp_path / "two")]!r})
assert asked == [2]  # of three pictures, and the last once more
"""))
    assert codes == [0, 0], said
    assert said.count("over 77 tokens") == alone.count("over 77 tokens") == 1
    assert said.count("3 pictures and grid.png") == 1
    for file in ("00-0.png", "01-0.png", "02-0.png", "grid.png"):
        one, two = (np.asarray(Image.open(tmp_path / out / file)).astype(int)
                    for out in ("one", "two"))
        assert np.abs(one - two).max() <= 1, file


def test_what_the_first_rank_trains_or_fetches_the_others_find(tmp_path):
    said, codes = two_ranks(stages(first=f"""
import pathlib, time
from imagenet64 import fid, sample
from sdxl import generate
class Found(Exception): pass
def source(*_):
    if ranks.rank() == 0:
        time.sleep(0.5)
        file.touch()
    assert file.exists()
    raise Found
def found(main, *argv):
    global file
    file = pathlib.Path({str(tmp_path)!r}, main.__module__)
    try:
        main(list(argv))
    except Found:
        if ranks.rank() == 0:  # who failed would end here, the others wait
            ranks.barrier()
ranks.join_ranks()
with ranks.first_rank_first():
    if ranks.rank() == 0:
        time.sleep(0.5)
        pathlib.Path({str(tmp_path / "made")!r}).touch()
    assert pathlib.Path({str(tmp_path / "made")!r}).exists()
sample.source = fid.sample.source = fid.features.of_digits = generate.load = source
found(sample.main, "teacher")
found(fid.main, "teacher")
fid.of_npz = lambda args: (None, 1, 1, {{}})
fid.main.__module__ += ".npz"
found(fid.main, "images.npz")
found(generate.main, "a dog", "--out", {str(tmp_path)!r})
"""))
    assert codes == [0, 0], said


SHARD = SimpleNamespace(shard=True, compile=False)


@pytest.fixture
def one_rank():
    """A process group of this process alone, in which FSDP2 works."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_weights_are_loaded_into_shards_strictly(one_rank):
    net, weights = torch.nn.Linear(3, 2), {"weight": torch.ones(2, 3), "bias": torch.ones(2)}
    place.ready(net, SHARD, ())
    disback.load_strictly(net, weights)
    assert torch.equal(place.gathered(net.state_dict()["weight"]), weights["weight"])
    for wrong in ({"weight": torch.zeros(2, 3)}, weights | {"more": torch.ones(2)},
                  {"weight": torch.zeros(2, 3), "bias": torch.zeros(3)}):
        with pytest.raises(ValueError, match="it lacks .* and has "):
            disback.load_strictly(net, wrong)
        assert torch.equal(place.gathered(net.state_dict()["weight"]), weights["weight"])


def test_what_is_frozen_and_in_no_file_stays_as_it_is_in_shards(one_rank):
    """As LoRA's base."""
    from sdxl import model, tiny

    net = model.Denoiser(tiny.unet(), torch.linspace(0.03, 14.6, 1000), 32)
    net.unet.conv_in.requires_grad_(False)
    frozen = net.unet.conv_in.weight.clone()
    state = {name: 2 * weight for name, weight in net.state_dict().items()}
    assert "unet.conv_in.weight" not in state
    place.ready(net, SHARD, ())
    disback.load_strictly(net, state)
    assert torch.equal(place.gathered(net.unet.conv_in.weight), frozen)
    for name, weight in net.state_dict().items():
        assert torch.equal(place.gathered(weight), state[name])
    with pytest.raises(ValueError, match="it lacks .* and has .*more"):
        disback.load_strictly(net, state | {"more": frozen})


def test_an_answer_in_shards_is_of_the_weights_as_they_are_now(one_rank):
    """FSDP2 would keep the whole weights of the last answer of a network that does not learn."""
    net, x = torch.nn.Linear(3, 2), torch.ones(1, 3)
    place.ready(net, SHARD, ())
    parameters = list(net.parameters())
    with torch.no_grad():
        net(x)
        for parameter in parameters:
            parameter.fill_(1.0)
        assert torch.equal(net(x), torch.full((1, 2), 4.0))


def test_edms_network_can_be_put_in_shards(one_rank):
    from imagenet64 import edm, problem

    net = edm.Denoiser(**problem.NETWORKS["digits"]).to(memory_format=torch.channels_last)
    x, sigma, label = torch.randn(2, 1, 8, 8), torch.ones(2, 1, 1, 1), torch.eye(10)[:2]
    with torch.no_grad():
        expected = net(x, sigma, label)
        place.ready(net, SHARD, (edm.Block,))
        torch.testing.assert_close(net(x, sigma, label), expected)


@pytest.mark.parametrize("gpu, backend", [(True, "cpu:gloo,cuda:nccl"), (False, "gloo")])
def test_ranks_on_gpus_can_also_talk_on_the_cpu(monkeypatch, gpu, backend):
    asked = []
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **_: asked.append(backend))
    ranks.join_ranks()
    assert asked == [backend]
    monkeypatch.setenv("LOCAL_RANK", "1")
    if gpu:
        assert "there are 1 GPUs" in refusal(ranks.join_ranks)
