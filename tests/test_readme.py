"""The README keeps its word: its example runs, its file map and its commands are true."""

import ast
import copy
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file

import disback
from toy2d import model, problem

README = (ROOT / "README.md").read_text()


def test_the_example_adds_backtracking_to_somebody_elses_loop(tmp_path, monkeypatch):
    code, _ = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len([line for line in code.splitlines() if line and not line.startswith("#")]) <= 20
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    teacher = model.Denoiser(8, 1, 1.0)
    original, targets = copy.deepcopy(teacher), []

    def your_distillation_step(generator, fake, target):
        targets.append(target.net[0].weight.detach().clone())

    names = dict(teacher=teacher, fake=copy.deepcopy(teacher), generator=model.Untrained(8.0, 8, 1),
                 draw_z=lambda: torch.randn(16, 2),
                 draw_sigma=lambda: problem.lognormal_sigma(16, 1.0),
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


def test_the_example_adds_backtracking_to_a_loop_in_dmd2s_style(tmp_path, monkeypatch):
    _, code = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(code.splitlines()) <= 20
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    teacher = model.Denoiser(8, 1, 1.0)
    nodes = [model.Denoiser(8, 1, 1.0).state_dict() for _ in range(3)]  # 0 is the teacher
    nodes[0] = copy.deepcopy(teacher.state_dict())
    (tmp_path / "my_path").mkdir()
    for i, weights in enumerate(nodes):
        save_file(weights, tmp_path / "my_path" / f"step-{i}.safetensors")
    disback.DegradationPath.create(
        tmp_path / "my_path", [tmp_path / "my_path" / f"step-{i}.safetensors" for i in range(3)],
        steps=[0, 1, 2], positions=[0, 1, 2])
    guidance, seen, start = SimpleNamespace(
        real_unet=copy.deepcopy(teacher), fake_unet=copy.deepcopy(teacher)), [], []

    def distribution_matching_loss(x0):
        seen.append(("real", copy.deepcopy(guidance.real_unet.state_dict())))
        sigma = problem.lognormal_sigma(len(x0), 1.0)
        return disback.vsd_loss(x0, sigma, guidance.fake_unet, guidance.real_unet, None, "dmd")[0]

    def fake_loss(x0):
        start.append(copy.deepcopy(guidance.fake_unet.state_dict()))
        seen.append(("fake", None))
        return disback.score_matching_loss(guidance.fake_unet, x0,
                                           problem.lognormal_sigma(len(x0), 1.0))

    guidance.distribution_matching_loss, guidance.fake_loss = distribution_matching_loss, fake_loss
    generator = model.Untrained(8.0, 8, 1)
    before = copy.deepcopy(generator.state_dict())
    exec(code, dict(
        disback=disback, guidance=guidance, generator=generator, steps=5 * 25,
        draw_z=lambda: torch.randn(16, 2),
        generator_optimizer=torch.optim.Adam(generator.parameters()),
        fake_optimizer=torch.optim.Adam(guidance.fake_unet.parameters())))
    assert [kind for kind, _ in seen] == (["real"] + 5 * ["fake"]) * 25
    targets = [weights for kind, weights in seen if kind == "real"]
    for cycle, weights in enumerate(targets):  # node 1 for ten cycles, then the teacher
        expected = nodes[1 if cycle < 10 else 0]
        assert all(torch.equal(weights[name], expected[name]) for name in expected), cycle
    assert all(torch.equal(start[0][name], nodes[2][name]) for name in nodes[2])
    for net, old in ((guidance.fake_unet, nodes[2]), (generator, before)):
        assert not torch.equal(net.state_dict()["net.0.weight"], old["net.0.weight"])


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
    around = "gallery" in parts or file.stem.split("_")[0] in ("bench", "study")
    return 4 if around else 2


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
                                 for file in (ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("file", PRODUCT, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_import_points_down_or_stays_in_its_room(file):
    for other in imports(file):
        one, two = (place.relative_to(ROOT).parts[0] for place in (file, other))
        same_folder = one == two and room(file) in (1, 2, 4)
        assert room(other) < room(file) or same_folder and room(other) == room(file), other
        if room(file) in (2, 4) and room(other) in (2, 4):
            assert same_folder, f"{file} knows another problem"


def test_no_file_of_ours_imports_itself_by_a_circle():
    graph = {file: set(imports(file)) for file in PRODUCT}
    while graph:
        lowest = [file for file, others in graph.items() if not others & graph.keys()]
        assert lowest, sorted(map(str, graph))
        for file in lowest:
            del graph[file]


def test_the_method_imports_nothing_but_torch_and_safetensors():
    names = set()
    for node in ast.walk(ast.parse((ROOT / "disback.py").read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    assert {"torch", "safetensors"} == {name.split(".")[0] for name in names} - (
        sys.stdlib_module_names)
    assert not names & {"argparse", "torch.distributed"}
