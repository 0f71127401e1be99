import dataclasses
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # tiny networks: threads cost more than they give

import disback  # noqa: E402
from runtime import command, folder  # noqa: E402
from runtime.study import words  # noqa: E402

# A toy that both stages finish in a second; the flags of either stage.
TINY = dict(width=16, depth=1, teacher_steps=60, teacher_batch=64)
SMALL = words(TINY)
DEGRADE = [*SMALL, "--batch", "64", "--steps", "20", "--nodes", "4", "--log-every", "10"]
BACKTRACK = [*SMALL, "--batch", "64", "--steps", "20", "--interval", "2", "--log-every", "10",
             "--save-every", "8"]


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """One cache of teachers for all tests, and none of the user's; metrics of fewer samples."""
    from toy2d import metrics

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISBACK_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(metrics.Evaluation, "samples", 1000)
        yield


@pytest.fixture(autouse=True)
def locks():
    """A stage holds its folder until its process ends: here, until its test does."""
    yield
    folder.leave()


@pytest.fixture
def all_samples(monkeypatch):
    """Metrics of as many samples as the toy is measured by."""
    from toy2d import metrics

    monkeypatch.setattr(metrics.Evaluation, "samples", 10_000)


@pytest.fixture(scope="session")
def recorded(tmp_path_factory):
    """A finished stage 1 of the small toy; copy it before writing to it."""
    import degrade

    out = tmp_path_factory.mktemp("recorded")
    degrade.main(["toy2d", "--out", str(out), *DEGRADE])
    return out


@pytest.fixture
def stage1(recorded, tmp_path):
    """A copy of that stage's folder, and the command that made it."""
    out = shutil.copytree(recorded, tmp_path / "run",
                          ignore=shutil.ignore_patterns(".disback.lock"))
    return out, ["toy2d", "--out", str(out), *DEGRADE]


@pytest.fixture(scope="session")
def completed(recorded, tmp_path_factory):
    """A finished run of both stages, without figures; copy it before writing to it."""
    import backtrack
    from toy2d import figures

    out = tmp_path_factory.mktemp("completed") / "run"
    shutil.copytree(recorded, out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "draw", lambda *args: None)
        backtrack.main(["toy2d", "--out", str(out), *BACKTRACK])
    return out


@pytest.fixture
def finished(completed, tmp_path, no_figures):
    """A copy of that run's folder, and the command that made it."""
    out = shutil.copytree(completed, tmp_path / "run")
    return out, ["toy2d", "--out", str(out), *BACKTRACK]


@pytest.fixture(scope="session")
def pair(recorded, tmp_path_factory):
    """A run of VSD, and one of DisBack that is compared with it, with all its figures."""
    import backtrack
    from toy2d import figures

    out = tmp_path_factory.mktemp("pair")
    shutil.copytree(recorded / "path", out / "main" / "path")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "draw", lambda *args: None)
        backtrack.main(["toy2d", "--out", str(out / "vsd"), "--target", "teacher", *BACKTRACK])
    backtrack.main(["toy2d", "--out", str(out / "main"), *BACKTRACK, "--compare",
                    str(out / "vsd")])
    return out


@pytest.fixture(scope="module")
def small_digits():
    """A network for the digits, without attention, that answers in a fraction of the time."""
    from imagenet64 import problem

    small = dict(img_resolution=8, img_channels=1, label_dim=10, model_channels=16,
                 channel_mult=(1, 2), num_blocks=1, attn_resolutions=())
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(problem.NETWORKS, "digits", small)
        yield


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """The folder of SDXL's tiny pipeline, as anybody's local model."""
    from sdxl import layout

    return layout.find("", tmp_path_factory.getbasetemp())


@pytest.fixture
def mine(base, tmp_path):
    """A copy of the tiny pipeline to spoil."""
    return shutil.copytree(base, tmp_path / "mine")


def save_of_few_tensors(folder):
    """A pipeline whose UNet is smaller still, as FSDP2 reasons on each tensor."""
    from diffusers import UNet2DConditionModel

    from sdxl import tiny

    pipe = tiny.pipeline()
    pipe.unet = UNet2DConditionModel.from_config(dict(pipe.unet.config) | dict(
        block_out_channels=(16,), attention_head_dim=2, transformer_layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",), mid_block_type=None,
        up_block_types=("UpBlock2D",)))
    pipe.save_pretrained(folder)


def refusal(function, *args, **keywords):
    """What the Refusal says, in one line, that a call must end with."""
    with pytest.raises(disback.Refusal) as error:
        function(*args, **keywords)
    return " ".join(str(error.value).split())


@pytest.fixture
def refused(capsys, monkeypatch):
    """refused(main, argv): the one line on standard error of a run that must end with `status`."""

    def run(main, argv, status=2):
        monkeypatch.setattr(sys, "argv", ["stage.py", *map(str, argv)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            command.run(main, "lower --batch")
        said = capsys.readouterr().err
        line = said.strip().splitlines()[-1]
        assert ended.value.code == status and line.startswith("error: ") and "Traceback" not in said
        return line

    return run


def same(*weights):
    """Whether two dicts or files of weights, or the students of two runs, have the same bits."""
    files = [held / "student.safetensors" if isinstance(held, Path) and held.is_dir() else held
             for held in weights]
    one, other = (held if isinstance(held, dict) else load_file(held) for held in files)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def read(file):
    """What a JSON file holds, or each of the lines of a log."""
    if file.suffix == ".jsonl":
        return [json.loads(line) for line in file.read_text().splitlines()]
    return json.loads(file.read_text())


def edit(file, **changes):
    """Change entries of a JSON file, and drop those that become `...`."""
    held = read(file) | changes
    file.write_text(json.dumps({name: value for name, value in held.items() if value is not ...}))


@pytest.fixture
def no_training(monkeypatch):
    """The refusal that is tested must come before a teacher of the toy is trained."""
    monkeypatch.setattr("toy2d.problem.trained_teacher", lambda *_: pytest.fail("trained"))


def make(problem, preset=None, seed=0, device="cpu", **changes):
    """A problem as its module makes it, of a preset, the first one by default, and changes."""
    config = problem.PRESETS[preset] if preset else next(iter(problem.PRESETS.values()))
    return problem.make(dataclasses.replace(config, **changes), seed, device)


@pytest.fixture
def before_updates():
    """before_updates(f) lets f(optimizer) come before every step of any optimizer."""
    handles = []

    def register(function):
        handles.append(register_optimizer_step_pre_hook(lambda adam, *_: function(adam)))
        return handles[-1]

    yield register
    for handle in handles:
        handle.remove()


def forwards(kinds, batch, main, argv):
    """The forwards of one sample that a stage makes of networks of these kinds at its own batch; a
    backward through the weights counts 2."""
    total = 0

    def count(net, inputs, output):
        nonlocal total
        made = output if isinstance(output, torch.Tensor) else output[0]
        if isinstance(net, kinds) and len(made) in batch:
            total += len(made) * (3 if made.requires_grad else 1)

    hook = torch.nn.modules.module.register_module_forward_hook(count)
    try:
        main([str(word) for word in argv])
    finally:
        hook.remove()
    return total


@pytest.fixture
def cut_off(before_updates):
    """cut_off(n, main, argv): run a stage, and interrupt it in the place of its n-th update."""

    def run(n, main, argv):
        left = n

        def cut(_):
            nonlocal left
            left -= 1
            if left == 0:
                raise KeyboardInterrupt

        handle = before_updates(cut)
        with pytest.raises(KeyboardInterrupt):
            main([str(word) for word in argv])
        handle.remove()

    return run


@pytest.fixture
def no_figures(monkeypatch):
    from toy2d import figures

    monkeypatch.setattr(figures, "draw", lambda *args: None)


class Gaussian(torch.nn.Module):
    """The exact denoiser of N(mean, std^2), per coordinate; its parameters take gradients."""

    def __init__(self, mean: float, std: float):
        super().__init__()
        self.mean = torch.nn.Parameter(torch.tensor(mean, dtype=torch.float64))
        self.std = torch.nn.Parameter(torch.tensor(std, dtype=torch.float64))

    def forward(self, x, sigma, cond=None):
        variance = self.std**2
        return (variance * x + sigma**2 * self.mean) / (variance + sigma**2)


@pytest.fixture
def gaussian():
    return Gaussian
