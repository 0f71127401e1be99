"""A problem that somebody adds: no more than what the README asks of it."""

import dataclasses
from typing import Literal

import pytest
from conftest import read

import backtrack
import degrade
from runtime import cli, interface

PROBLEM = '''
import dataclasses
import torch
from runtime.interface import Config, Problem, setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Config):
    share: float = setting(0.5, "of 100%")


PRESETS = {"small": Settings(degrade_steps=20, backtrack_steps=12, nodes=3, interval=4, batch=16)}


class Denoiser(torch.nn.Module):
    """Of N(mean, 1): x and the mean, weighted by their precisions."""

    def __init__(self, mean):
        super().__init__()
        self.mean = torch.nn.Parameter(torch.tensor([mean]))

    def forward(self, x, sigma, cond=None):
        return (x + sigma**2 * self.mean) / (1 + sigma**2)


class Student(torch.nn.Module):
    def __init__(self, mean):
        super().__init__()
        self.mean = torch.nn.Parameter(torch.tensor([mean]))

    def forward(self, z):
        return z + self.mean


def make(config, seed=0, device="cpu"):
    torch.manual_seed(seed)
    return Problem(
        config=config, about={"means": (0.0, 4.0)}, teacher=Denoiser(0.0), student=Student(4.0),
        generate=lambda student, z, cond: student(z),
        sample_inputs=lambda n: (torch.randn(n, 1), None),
        sample_sigma=lambda n: torch.randn(n, 1).exp(),
        sample_sigma_vsd=lambda n: torch.randn(n, 1).exp(), score_weight=lambda sigma: 1.0,
        evaluate=lambda student: {"error": student(torch.zeros(1, 1)).item()},
        draw=lambda out, path, compare: None, snapshot=lambda: (torch.zeros(4, 1), None))
'''


def test_it_runs_both_stages(tmp_path, monkeypatch, capsys):
    (tmp_path / "gauss1d").mkdir()
    (tmp_path / "gauss1d" / "problem.py").write_text(PROBLEM)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "runtime" / "cli.py"))
    out = tmp_path / "run"
    with pytest.raises(SystemExit):
        degrade.main(["gauss1d", "--help"])
    assert "of 100% (0.5)" in capsys.readouterr().out
    degrade.main(["gauss1d", "--out", str(out)])
    # What is said of it goes through a file, where a tuple is a list.
    backtrack.main(["gauss1d", "--out", str(out), "--lr-student", "0.1", "--lr-fake", "0.1"])
    metrics, said = read(out / "metrics.json"), capsys.readouterr().out
    assert metrics["problem"] == "gauss1d" and metrics["node"] == 0 and metrics["error"] < 4
    assert "student after 12 iterations: error" in said and "figures" not in said


@pytest.mark.parametrize("kind, value", [(bool, True), (Literal[1, 2], 1)])
def test_a_setting_that_no_flag_can_be_is_told_at_once(kind, value):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config(interface.Config):
        large: kind = interface.setting(value, "whether it is large")

    with pytest.raises(TypeError, match="--large is of .*: a setting is an int"):
        Config()
