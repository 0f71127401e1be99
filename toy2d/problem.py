"""The toy: a Gaussian mixture, an MLP as the teacher, a student that starts off the data."""

import copy
import hashlib
import inspect
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from tqdm import trange

import disback
from runtime import files, interface
from runtime.interface import setting
from toy2d import metrics, mixture, model
from toy2d.diagnosis import EARLY, Diagnosis


@dataclass(frozen=True, kw_only=True)
class Config(interface.Config):
    """The toy's own settings. Values without a source were tuned on the ring, see README.md."""

    data: Literal["ring", "grid", "uneven", "ring4", "ring16"] = setting(
        "ring", "the mixture, see mixture.py; --preset sets what else goes with it")
    start: Literal["off", "teacher"] = setting(
        "off", "untrained and off the data, or the teacher's copy")
    distance: float = setting(
        8.0, "from the origin to an untrained student; the data reach to 2.5", below=1e4)
    start_sigma: float = setting(5.0, "the noise level at which a copy of the teacher generates")
    width: int = setting(128, "hidden units; 64 made a bad teacher")
    depth: int = setting(3, "hidden layers", below=1000)
    sigma_data: float = setting(1.42, "of EDM's preconditioning: the ring's standard deviation")
    noise: Literal["lognormal", "karras"] = setting(
        "lognormal", "levels of student and fake: as EDM trains, or from sigma_min to sigma_max")
    sigma_min: float = setting(0.02, "the least noise, well below a mode's width")
    sigma_max: float = setting(20.0, "the most noise, well above the data's extent")
    teacher_steps: int = setting(4000, "training steps of the teacher")
    teacher_batch: int = setting(512, "its batch")
    teacher_lr: float = setting(2e-3, "its learning rate")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sigma_min >= self.sigma_max:
            raise disback.Refusal(f"--sigma-min {self.sigma_min} must be below --sigma-max")


# Adam without momentum and one update of the fake, the defaults, are Diff-Instruct's.
RING = Config(degrade_steps=100, backtrack_steps=4000, batch=256, weighting="half",
              lr_student=2e-3, lr_fake=2e-3, beta2=0.99, ema=0.99, log_every=100)
PRESETS = {name: replace(RING, data=name) for name in ("ring", "grid", "uneven")}
# Over all 16 coordinates the standard deviation is 0.5; with 1.42 the teacher ends far off.
PRESETS["ring16"] = replace(RING, data="ring16", sigma_data=0.5, lr_student=4e-3, lr_fake=4e-3)
WRITES = tuple(f"figures/{name}" for name in (
    "mismatch.png", "path.png", "convergence.png", "mechanism.png", "backtracking.gif",
    "trajectory.html"))
OF_TEACHER = ("data", "width", "depth", "sigma_data", "teacher_steps", "teacher_batch",
              "teacher_lr")
OF_PATH = (*OF_TEACHER, "start", "distance", "start_sigma")  # the student's start as well


def make(config: Config, seed: int = 0,
         device: torch.device | str = "cpu") -> interface.Problem:
    """The toy as the stages see it.

    The first call trains the teacher and caches it; the seed is the student's, not the teacher's.
    """
    # One thread is faster at this size, and the bits do not depend on the machine's cores.
    torch.set_num_threads(1)
    data = getattr(mixture, config.data)()
    return assemble(config, seed, device, data, *trained_teacher(config, data))


def assemble(config: Config, seed: int, device: torch.device | str, data: mixture.Mixture,
             teacher: model.Denoiser, teacher_sha256: str) -> interface.Problem:
    """The problem of a teacher."""
    from toy2d import figures  # loads matplotlib, which --help does without

    torch.manual_seed(seed)
    student = (model.Untrained(config.distance, config.width, config.depth, data.dims)
               if config.start == "off"
               else model.TeacherCopy(copy.deepcopy(teacher), config.start_sigma))

    for layer in (*teacher.modules(), *student.modules()):
        if isinstance(layer, model.Perceptron):
            layer.bf16 = config.precision == "bf16"

    diagnosis = Diagnosis(data, teacher, student)

    def sample_inputs(n: int) -> tuple[Tensor, None]:
        return torch.randn(n, data.dims, device=device), None

    def sample_sigma(n: int) -> Tensor:
        return (karras_sigma(n, config, device) if config.noise == "karras"
                else lognormal_sigma(n, config.sigma_data, device))

    about = {name: getattr(config, name) for name in OF_PATH} | {"teacher_sha256": teacher_sha256}
    return interface.Problem(
        config=config, about=about,
        teacher=teacher.to(device), student=student.to(device),
        generate=lambda student, z, cond: student(z),
        sample_inputs=sample_inputs,
        sample_sigma=sample_sigma, sample_sigma_vsd=sample_sigma,
        score_weight=lambda sigma: score_weight(sigma, config.sigma_data),
        evaluate=metrics.Evaluation(data), snapshot=lambda: sample_inputs(2000),
        looks_at=lambda step: step <= EARLY and step % 5 == 0,
        diagnose=diagnosis, look=diagnosis.look,
        draw=lambda out, path, compare: figures.draw(
            out, path, compare, teacher, lambda net, n: sample(net, n, config, data.dims),
            data, diagnosis))


def lognormal_sigma(n: int, sigma_data: float, device: torch.device | str = "cpu") -> Tensor:
    """n noise levels [n, 1] as EDM trains on images, whose standard deviation is 0.5 (Karras et
    al. 2022, Table 1), scaled to data of another one."""
    return sigma_data / 0.5 * (1.2 * torch.randn(n, 1, device=device) - 1.2).exp()


def karras_sigma(n: int, config: Config, device: torch.device | str = "cpu",
                 rho: float = 7.0) -> Tensor:
    """n noise levels [n, 1], uniform in sigma**(1 / rho) (Karras et al. 2022, Eq. 5)."""
    low, high = config.sigma_min ** (1 / rho), config.sigma_max ** (1 / rho)
    return (high + torch.rand(n, 1, device=device) * (low - high)) ** rho


def score_weight(sigma: Tensor, sigma_data: float) -> Tensor:
    """EDM's lambda(sigma), which makes the loss of every noise level alike at initialisation."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def trained_teacher(config: Config, data: mixture.Mixture) -> tuple[model.Denoiser, str]:
    """The teacher from the cache, or trained into it, and its file's hash; the file is named by all
    that the teacher depends on."""
    torch.manual_seed(0)
    net = model.Denoiser(config.width, config.depth, config.sigma_data, data.dims)
    source = "".join(map(inspect.getsource, (model, mixture, train, lognormal_sigma, score_weight)))
    depends_on = repr([getattr(config, name) for name in OF_TEACHER]) + source + torch.__version__
    name = hashlib.sha256(depends_on.encode()).hexdigest()[:16]
    file = files.cached(f"toy2d-{config.data}-{name}.safetensors")
    if not file.exists():
        with files.lost("the teacher in training: the next run begins it again"):
            train(net, config, data)
        if not all(weight.isfinite().all() for weight in net.parameters()):
            raise disback.Refusal("the teacher's training diverged: try a lower --teacher-lr")
        files.save_tensors(file, net.state_dict())
    files.load_net(file, net, "remove it, and the next run trains the teacher again")
    return net, files.sha256(file)


def train(net: model.Denoiser, config: Config, data: mixture.Mixture) -> None:
    """Denoising score matching on the data (Eq. 5 with data for samples), cosine decay."""
    optimizer = torch.optim.Adam(net.parameters(), lr=config.teacher_lr, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.teacher_steps)
    for _ in trange(config.teacher_steps, desc="teacher (first use)"):
        sigma = lognormal_sigma(config.teacher_batch, config.sigma_data)
        loss = disback.score_matching_loss(net, data.sample(config.teacher_batch), sigma,
                                           weight=score_weight(sigma, config.sigma_data))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def sample(net: nn.Module, n: int, config: Config, dims: int = 2, steps: int = 40) -> Tensor:
    """n samples [n, dims] of a denoiser by Heun's method on the probability-flow ODE, from
    sigma_max to 0 (Karras et al. 2022, Algorithm 1)."""
    rho = 7.0
    low, high = config.sigma_min ** (1 / rho), config.sigma_max ** (1 / rho)
    sigmas = [*torch.linspace(high, low, steps).pow(rho).tolist(), 0.0]
    x = config.sigma_max * torch.randn(n, dims)

    def slope(x: Tensor, sigma: float) -> Tensor:
        return (x - net(x, x.new_full((n, 1), sigma))) / sigma

    for sigma, lower in zip(sigmas, sigmas[1:]):
        first = slope(x, sigma)
        euler = x + (lower - sigma) * first
        x = euler if lower == 0 else x + (lower - sigma) * (first + slope(euler, lower)) / 2
    return x
