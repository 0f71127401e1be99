"""The README keeps its word: its example runs, its file map and its commands are true."""

import copy
import re

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

import disback
from toy2d import model, problem

README = (ROOT / "README.md").read_text()


def test_the_example_adds_backtracking_to_somebody_elses_loop(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len([line for line in code.splitlines() if line and not line.startswith("#")]) <= 20
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = problem.Config(width=8, depth=1)
    teacher = model.Denoiser(8, 1, 1.0)
    original, targets = copy.deepcopy(teacher), []

    def your_distillation_step(generator, fake, target):
        targets.append(target.net[0].weight.detach().clone())

    names = dict(teacher=teacher, fake=copy.deepcopy(teacher), generator=problem.Untrained(config),
                 draw_z=lambda: torch.randn(16, 2),
                 draw_sigma=lambda: problem.karras_sigma(16, config),
                 your_distillation_step=your_distillation_step)
    exec(code, names)
    for iteration, weight in enumerate(targets):
        node = max(9 - iteration // 10, 0)
        file = tmp_path / "my_path" / f"{node:02d}.safetensors"
        if iteration % 10 in (0, 9):
            assert torch.equal(weight, load_file(file)["net.0.weight"])
    assert torch.equal(targets[-1], original.net[0].weight)
    last = load_file(tmp_path / "my_path" / "10.safetensors")
    assert torch.equal(names["fake"].net[0].weight, last["net.0.weight"])


def test_the_file_map_tells_each_files_length():
    rows = re.findall(r"^\| `([\w/.]+\.py)` \| (\d+) \|", README, re.M)
    assert {name for name, _ in rows} >= {"disback.py", "degrade.py", "backtrack.py"}
    for name, lines in rows:
        assert int(lines) == len((ROOT / name).read_text().splitlines()), name


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`disback\.([A-Za-z]\w{2,})`", README))))
def test_names_in_the_readme_exist(name):
    assert hasattr(disback, name)
