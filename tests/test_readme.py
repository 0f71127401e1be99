"""The README keeps its word: its example runs, its file map and its commands are true."""

import ast
import copy
import re
import subprocess
import sys

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


def room(file):
    """0 is the bottom of the README's map; who imports may only import what lies lower."""
    parts = file.relative_to(ROOT).parts
    if parts == ("disback.py",):
        return 0
    if parts[0] == "runtime":
        return 1
    if len(parts) == 1:
        return 3
    return 4 if file.stem in ("bench", "study") else 2


def imports(file):
    """The files of ours that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            found = ROOT / (name.replace(".", "/") + ".py")
            if found.exists():
                yield found


PRODUCT = [*ROOT.glob("*.py"), *(file for folder in ("runtime", "toy2d", "imagenet64", "sdxl")
                                 for file in (ROOT / folder).glob("*.py"))]


@pytest.mark.parametrize("file", PRODUCT, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_import_points_down_or_stays_in_its_room(file):
    for other in imports(file):
        same_folder = other.parent == file.parent and room(file) in (1, 2, 4)
        assert room(other) < room(file) or same_folder, other
        if room(file) in (2, 4) and room(other) in (2, 4):
            assert same_folder, f"{file} knows another problem"


def test_no_file_of_ours_imports_itself_by_a_circle():
    graph = {file: set(imports(file)) for file in PRODUCT}
    while graph:
        lowest = [file for file, others in graph.items() if not others & graph.keys()]
        assert lowest, sorted(map(str, graph))
        for file in lowest:
            del graph[file]


def test_the_method_loads_nothing_but_torch_and_safetensors():
    code = ("import sys, torch, safetensors.torch; before = set(sys.modules); import disback; "
            "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))")
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
    assert not set(said.stdout.split()) & {"argparse", "runtime", "toy2d", "tqdm", "matplotlib"}
    assert "disback" in said.stdout.split()
