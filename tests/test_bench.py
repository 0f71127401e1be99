"""The benchmarks: what they count is right, and they need neither a file nor the network."""

import functools
import platform
import re
import time
import types

import pytest
import torch
from conftest import SMALL
from processes import Started

import disback
from imagenet64 import bench as imagenet64_bench
from imagenet64 import problem as imagenet64
from runtime import bench
from sdxl import bench as sdxl_bench
from sdxl import memory, tiny
from toy2d import bench as toy_bench

BENCHES = {"toy2d": toy_bench.BENCH, "imagenet64": imagenet64_bench.BENCH, "sdxl": sdxl_bench.BENCH}
TOY = ["--no-compile", *SMALL]
FULL = ["--preset", "full", "--batch", "1", "--no-compile"]
PARTS = {"student: forward and backward": 60, "fake: forward": 20,
         "target: forward, guided if so": 20, "fake: forwards and backwards": 50,
         "fresh samples: forwards": 10, "optimizers: clipping, AdamW": 15}  # milliseconds


@pytest.fixture(autouse=True)
def no_cache(monkeypatch, tmp_path):
    """A cache that is not there; and a round is enough, as no time is looked at."""
    monkeypatch.setenv("DISBACK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(bench, "ROUNDS", 1)
    yield
    assert not (tmp_path / "cache").exists()


@pytest.fixture
def small_full(monkeypatch):
    """The full presets, bf16 and all, on networks small enough for the tests."""
    small = imagenet64.NETWORKS["digits"] | dict(img_channels=3, label_dim=1000)
    monkeypatch.setitem(imagenet64.NETWORKS, "imagenet", small)
    monkeypatch.setattr(memory, "BASE", dict(tiny.unet().config))


def table(capsys, name, *argv):
    """The two lines that a benchmark prints first, and a table for each batch, by its rows."""
    bench.main(BENCHES[name], 1, argv)
    first, second, *rows = capsys.readouterr().out.replace(",", "").splitlines()
    tables = {}
    for row in rows:
        if row.startswith("batch "):
            tables[row] = now = {}
        else:
            now[row[:40].strip()] = row[40:].strip()
    return first, second, tables


@pytest.mark.parametrize("name, argv, evals", [
    ("toy2d", [*TOY, "--fake-updates", "1", "--batch", "3", "--fake-init", "degraded"], 8),
    ("toy2d", [*TOY, "--fake-updates", "5", "--batch", "3"], 24),
    ("sdxl", ["--no-compile", "--fake-updates", "2", "--batch", "2"], 13)])
def test_an_iteration_costs_the_bound(name, argv, evals):
    spent, least, _ = bench.evaluations(BENCHES[name].networks(argv))
    assert spent == least == evals


def test_a_forward_more_is_counted(monkeypatch):
    vsd_loss = disback.vsd_loss

    def wasteful(x0, sigma, fake, target, cond, *rest):
        target(x0.detach(), sigma, cond).mean().backward()
        return vsd_loss(x0, sigma, fake, target, cond, *rest)

    monkeypatch.setattr(disback, "vsd_loss", wasteful)
    spent, least, _ = bench.evaluations(toy_bench.BENCH.networks([*TOY, "--batch", "3"]))
    assert spent == 8 + 3 and least == 8


def test_the_flops_of_the_digits_network_are_those_of_its_layers_and_its_attention():
    expected = []

    def layer(layer, args, out):  # two for each weight of an output's row, at each output
        expected.append(2 * out[0].numel() * layer.weight[0].numel())

    def block(block, args, out):  # queries by keys, and those by values
        expected.append(4 * out[0].numel() * out[0, 0].numel() if block.heads else 0)

    net = imagenet64_bench.random_teacher(imagenet64.TINY)
    for module in net.modules():
        if hasattr(module, "heads"):
            module.register_forward_hook(block)
        elif getattr(module, "weight", None) is not None and module.weight.dim() > 1:
            module.register_forward_hook(layer)
    with torch.no_grad():
        net(torch.randn(1, 1, 8, 8), torch.ones(1), torch.zeros(1, 10))
    _, _, flops = bench.evaluations(
        imagenet64_bench.BENCH.networks(["--no-compile", "--batch", "2"]))
    assert flops == sum(expected)


def test_the_table_has_every_row_for_every_batch_size(capsys):
    argv = ["--no-compile", *SMALL, "--batch", "8", "16", "--fake-updates", "2"]
    first, second, tables = table(capsys, "toy2d", *argv)
    assert "toy2d" in first and "CPU" in first and "--no-compile" in first
    assert second.startswith("12 F an iteration 12 is the least")
    assert list(tables) == ["batch 8", "batch 16"]
    for rows in tables.values():
        assert rows.pop("/ the peak") == "-"
        assert rows.pop("the rest where below 0 noise ms")  # of either sign where times scatter
        assert rows.pop("the first iteration s")
        assert {f"{name} ms".replace(",", "") for name in PARTS} <= rows.keys()
        assert len(rows) == len(PARTS) + 2 + 5
        assert all(float(number) > 0 for number in rows.values())


def test_the_parts_are_taken_as_often_as_an_iteration_has_them(monkeypatch):
    nets = toy_bench.BENCH.networks([*TOY, "--batch", "6", "--fake-updates", "3",
                                     "--accumulate", "2"])
    seen = set()
    nets.target.register_forward_hook(lambda net, args, x0: seen.add(len(x0)))
    monkeypatch.setattr(bench, "milliseconds", lambda work, repeats: [work()] and 1)
    parts = bench.alone(nets, repeats=1)
    assert dict(zip(PARTS, (2, 2, 2, 6, 4, 4))) == parts and seen == {3}


def test_the_rates_follow_from_the_times(monkeypatch):
    monkeypatch.setattr(bench, "iterate", lambda nets: None)
    monkeypatch.setattr(bench, "milliseconds", lambda *_: 200)
    monkeypatch.setattr(bench, "alone", lambda *_: PARTS)
    monkeypatch.setattr(bench, "device", lambda: "NVIDIA H200")
    nets = imagenet64_bench.BENCH.networks(["--batch", "50", "--precision", "bf16",
                                            "--accumulate", "10"])
    row = bench.measure(nets, evals=16, flops=99e9, repeats=10)
    assert row["an iteration, ms"] == "200.000" and row["images a second"] == "250"
    assert row["all forwards and backwards, ms"] == "160.000"
    assert row["the rest, where below 0 noise, ms"] == "25.000"
    assert row["  / all forwards and backwards"] == "1.25"
    assert row["  / (F x the fake's forward)"] == "0.62"  # 200 / (16 x 20)
    assert (row["TFLOP/s"], row["  / the peak"]) == ("396", "40.0%")  # 50 x 16 x 0.099 / 0.2 of 990


def test_milliseconds_are_those_of_one_call():
    assert 20 <= bench.milliseconds(lambda: time.sleep(0.02), 2) < 200


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc alone")
def test_memory_that_an_iteration_frees_is_the_next_ones_without_new_pages():
    said, _ = Started("""
import resource, torch
from runtime import command
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        [torch.ones(2**21) for _ in range(4)]  # 32 MB, 8 thousand pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
command.run(lambda argv: faults() and print(faults()))
""").ended()
    assert int(said) < 4000


@pytest.mark.parametrize("name, argv", [
    ("imagenet64", []), ("sdxl", ["--size", "64", "--checkpointing", "yes"])])
def test_the_full_presets_need_no_file_and_write_none(capsys, small_full, monkeypatch,
                                                      tmp_path, name, argv):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "milliseconds", lambda work, _: (work(), 1.0)[1])
    _, second, tables = table(capsys, name, *FULL, *argv, "--fake-updates", "1")
    assert second.startswith(f"{8 + (name == 'sdxl')} F an iteration")
    assert len(tables["batch 1"]) == 16
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("argv, side", [([], 16), (FULL, 128)])
def test_the_latents_and_the_noise_levels_are_sdxls(small_full, argv, side):
    made = sdxl_bench.BENCH.networks([*argv, "--no-compile"]).problem
    assert made.sample_inputs(1)[0].shape == (1, 4, side, side)
    assert sdxl_bench.noise_levels()[399].item() == pytest.approx(1.16057, abs=1e-5)


def test_sdxls_shape_is_not_taken_for_another_models(refused):
    line = refused(functools.partial(bench.main, sdxl_bench.BENCH, 1), ["--model", "my/model"])
    assert "--model my/model is of no use" in line and "--preset full has SDXL's shape" in line


def test_no_weight_of_the_adm_starts_at_zero():
    net = imagenet64_bench.random_teacher(imagenet64.TINY)
    assert all(weight.any() for weight in net.parameters())


@pytest.mark.parametrize("argv, cause", [
    (["--batch", "0"], "batch"), (["--batch", "8", "many"], "many"),
    (["--iterations", "0"], "--iterations"), (["--bath", "8"], "--bath"),
    (["--batch", "3", "--accumulate=2"], "--accumulate"), (["--resume"], "are for a run"),
    (["--path", "p"], "--path p is of no use"), (["--overwrite"], "are for a run"),
    (["--compare", "r"], "are for a run")])
def test_a_mistake_ends_it_in_one_line(refused, argv, cause):
    assert cause in refused(functools.partial(bench.main, toy_bench.BENCH, 1), argv)


def test_the_stage_is_compiled_where_it_is_asked_for_and_never_while_it_is_counted(monkeypatch):
    seen = []
    monkeypatch.setattr(bench.Bench, "networks", lambda _, argv: seen.append(argv) or
                        types.SimpleNamespace(config=types.SimpleNamespace(batch=1)))
    monkeypatch.setattr(bench, "evaluations", lambda nets: (8, 8, 1))
    monkeypatch.setattr(bench, "measure", lambda *_: {})
    bench.main(toy_bench.BENCH, 1, ["--compile", "--batch", "7"])
    assert seen == [["--batch", "1", "--accumulate", "1", "--no-compile"],
                    ["--compile", "--batch", "7"]]


def test_the_profile_names_the_longest_operators_of_one_iteration(capsys):
    bench.main(imagenet64_bench.BENCH, 1, ["--no-compile", "--batch", "2", "--profile"])
    said = capsys.readouterr().out
    rows = [row.split() for row in said.splitlines() if row.count("%") == 2 and "Name" not in row]
    assert len(rows) == 15 and "Self CPU %" in said
    spent = [float(re.search(r"([\d.]+)%", " ".join(row)).group(1)) for row in rows]
    assert spent == sorted(spent, reverse=True) and spent[-1] > 0
    calls = {row[0]: int(row[-1]) for row in rows}
    net = imagenet64_bench.random_teacher(imagenet64.TINY)
    convolutions = sum(weight.dim() == 4 for weight in net.parameters())
    assert calls["aten::convolution_backward"] == 2 * convolutions  # the student's, the fake's
