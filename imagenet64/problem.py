"""EDM's ImageNet-64 model as the stages see it; preset tiny is the same on 8 x 8 digits."""

import copy
import hashlib
import inspect
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import one_hot
from tqdm import trange

import disback
from imagenet64 import digits, download, edm, features, frechet, pickles
from runtime import files, interface
from runtime.interface import setting


@dataclass(frozen=True, kw_only=True)
class Config(interface.Config):
    """The settings that images have beside those of every problem."""

    images: Literal["digits", "imagenet"] = setting("digits", "the preset's data", stage="none")
    start: Literal["teacher", "untrained"] = setting("teacher", "the student's first weights")
    start_sigma: float = setting(80.0, "the noise level at which the student generates")
    sigma_vsd: Literal["lognormal", "karras"] = setting(
        "lognormal", "levels of the student's update")
    sigma_fake: Literal["lognormal", "karras"] = setting("lognormal", "levels of score matching")
    teacher: str = setting(
        "", "the teacher's file, .pkl or .safetensors; default: trained or downloaded")
    teacher_steps: int = setting(1000, "training steps of the digits' teacher")
    teacher_lr: float = setting(1e-3, "its learning rate")


# Found by trying, see README.md; Adam's beta1 is that of Diff-Instruct and SiD.
TINY = Config(degrade_steps=60, backtrack_steps=300, batch=128, nodes=5, weighting="x0",
              lr_student=3e-4, lr_fake=3e-4, lr_degrade=3e-4, beta2=0.99)
# DMD2's setting on ImageNet-64, which the official DisBack ships for EDM as well. Its GAN loss and
# its warm-up of 500 steps are left out. Path and interval are ours: no recipe was released.
FULL = replace(TINY, images="imagenet", degrade_steps=1000, backtrack_steps=100_000, batch=280,
               nodes=10, interval=500, weighting="dmd", lr_student=2e-6, lr_fake=2e-6,
               lr_degrade=2e-6, fake_updates=5, beta1=0.9, beta2=0.999, weight_decay=0.01,
               decay="constant", ema=0.0, save_every=1000, log_every=100, precision="bf16",
               start_sigma=80.0, sigma_vsd="karras", sigma_fake="karras")
# Diff-Instruct's setting, published for CIFAR-10: the student starts where EDM denoises best.
DIFF_INSTRUCT = replace(FULL, batch=128, weighting="x0", lr_student=1e-5, lr_fake=1e-5,
                        lr_degrade=1e-5, fake_updates=1, beta1=0.0, weight_decay=0.0, ema=0.9998,
                        start_sigma=1.0, sigma_vsd="lognormal", sigma_fake="lognormal")
PRESETS = {"tiny": TINY, "full": FULL, "diff-instruct": DIFF_INSTRUCT}
NETWORKS = {"digits": dict(img_resolution=8, img_channels=1, label_dim=10, model_channels=32,
                           channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,)),
            "imagenet": dict(img_resolution=64, img_channels=3, label_dim=1000)}
WRITES = ("figures/path.png", "figures/convergence.png")
OF_TEACHER = ("images", "teacher", "teacher_steps", "teacher_lr")
OF_PATH = (*OF_TEACHER, "start", "start_sigma")


def make(config: Config, seed: int = 0,
         device: torch.device | str = "cpu") -> interface.Problem:
    """ImageNet-64, or the digits, as the stages see them.

    The first call trains or downloads the teacher and keeps it; no seed of the student's changes
    it. Labels are uniformly random: no stage sees an image of the data."""
    teacher, teacher_sha256 = load_teacher(config)
    evaluate = Evaluation(config, device) if config.images == "digits" else None
    return assemble(config, seed, device, teacher, teacher_sha256, evaluate)


def assemble(config: Config, seed: int, device: torch.device | str, teacher: edm.Denoiser,
             teacher_sha256: str, evaluate: "Evaluation | None") -> interface.Problem:
    """The problem of a teacher."""
    from imagenet64 import figures  # loads matplotlib, which --help does without

    network = NETWORKS[config.images]
    torch.manual_seed(seed)
    student = copy.deepcopy(teacher) if config.start == "teacher" else edm.Denoiser(**network)
    teacher.bf16 = student.bf16 = config.precision == "bf16"
    teacher, student = (net.to(device, memory_format=torch.channels_last)
                        for net in (teacher, student))

    def sample_inputs(n: int) -> tuple[Tensor, Tensor]:
        z = latents(n, config, device=device)
        return z, labels(torch.randint(network["label_dim"], (n,), device=device), config)

    with torch.random.fork_rng(devices=[]):  # four images of each of ten classes, for the figures
        torch.default_generator.manual_seed(2)
        kept_z = latents(40, config).to(device)
    classes = torch.arange(10).repeat(4) * (network["label_dim"] // 10)
    kept_cond = labels(classes, config).to(device)

    about = {name: getattr(config, name) for name in OF_PATH} | {"teacher_sha256": teacher_sha256}
    return interface.Problem(
        config=config, about=about, teacher=teacher, student=student,
        generate=lambda student, z, cond: generate(student, z, cond, config.start_sigma),
        sample_inputs=sample_inputs,
        sample_sigma=lambda n: sample_sigma(config.sigma_fake, n, device=device),
        # DMD2 spares the student the ends of its grid of 1,000 levels, which teach it little.
        sample_sigma_vsd=lambda n: sample_sigma(config.sigma_vsd, n, 0.02, 0.98, device),
        score_weight=edm.score_weight,
        evaluate=evaluate or (lambda student: {}), snapshot=lambda: (kept_z, kept_cond),
        draw=lambda out, path, compare: figures.draw(
            out, path, compare, teacher, lambda net: edm.heun(net, kept_z, kept_cond),
            evaluate and evaluate.of_halves()), blocks=(edm.Block,))


def generate(student: edm.Denoiser, z: Tensor, cond: Tensor, sigma: float) -> Tensor:
    """x0 [n, c, h, w] = D(sigma z, sigma, cond): the student's one step from z ~ N(0, 1)."""
    return student(sigma * z, z.new_full((), sigma), cond)


def latents(n: int, config: Config, generator: torch.Generator | None = None,
            device: torch.device | str = "cpu") -> Tensor:
    """z ~ N(0, 1) [n, c, h, w]."""
    network = NETWORKS[config.images]
    size = network["img_resolution"]
    return torch.randn(n, network["img_channels"], size, size, generator=generator,
                       device=device)


def labels(classes: Tensor, config: Config) -> Tensor:
    """Classes [n] as the networks take them, one-hot [n, label_dim]."""
    return one_hot(classes, NETWORKS[config.images]["label_dim"]).float()


def sample_sigma(kind: str, n: int, low: float = 0.0, high: float = 1.0,
                 device: torch.device | str = "cpu") -> Tensor:
    """n noise levels [n, 1, 1, 1]: EDM's lognormal, or a Karras grid's made continuous, uniform in
    sigma**(1 / 7) from its `low` to its `high` part of [0.002, 80]."""
    if kind == "lognormal":
        return edm.lognormal_sigma(n, device=device)
    least, most = 0.002 ** (1 / 7), 80.0 ** (1 / 7)
    part = low + (high - low) * torch.rand(n, 1, 1, 1, device=device)
    return (least + part * (most - least)) ** 7


class Evaluation:
    """A student's Fréchet distance to all digits, in the units of the digits' classifier, and the
    share of images that it gives their label; from as many images as there are digits, the noise
    and the labels always the same."""

    def __init__(self, config: Config, device: torch.device | str):
        self.config, self.device = config, device
        self.extract, self.reference = features.of_digits(device)
        self.classifier = digits.classifier().to(device)
        self.classes = digits.load()[1]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(1)
            self.z = latents(len(self.classes), config)

    @torch.no_grad()
    def __call__(self, student: edm.Denoiser) -> dict[str, float]:
        statistics, right = frechet.Statistics(digits.Classifier.dim), 0
        for z, classes in zip(self.z.split(256), self.classes.split(256)):
            x0 = generate(student, z.to(self.device), labels(classes, self.config).to(self.device),
                          self.config.start_sigma)
            if not x0.isfinite().all():  # whoever asked knows which step it was
                return {"frechet": math.nan, "accuracy": math.nan}
            images = edm.to_uint8(x0)
            statistics.add(self.extract(images))
            found = self.classifier.classes(images / 127.5 - 1).cpu()
            right += (found == classes).sum().item()
        distance = frechet.frechet_distance(statistics.mean, statistics.cov, *self.reference)
        return {"frechet": distance, "accuracy": right / len(self.classes)}

    def of_halves(self, splits: int = 20) -> float:
        """The mean distance between random halves of the digits: what chance alone makes of it."""
        images, generator = edm.to_uint8(digits.load()[0]), torch.Generator().manual_seed(0)
        distances = []
        for _ in range(splits):
            halves = images[torch.randperm(len(images), generator=generator)].tensor_split(2)
            both = [frechet.Statistics(digits.Classifier.dim) for _ in halves]
            for statistics, half in zip(both, halves):
                statistics.add(self.extract(half))
            distances.append(frechet.frechet_distance(both[0].mean, both[0].cov,
                                                  both[1].mean, both[1].cov))
        return sum(distances) / splits


def load_teacher(config: Config) -> tuple[edm.Denoiser, str]:
    """The teacher and the SHA-256 of its file; the digits' takes the process to one thread. Refusal
    where it is not to be had, or is another network."""
    if config.images == "digits":
        # Two threads are 1.7 times faster on an idle machine, and 10 times slower on a busy one,
        # where they wait for each other; and the bits shall not depend on the machine's cores.
        torch.set_num_threads(1)
    file = Path(config.teacher).expanduser()
    if not config.teacher:
        file = digits_teacher(config) if config.images == "digits" else download.fetch(
            download.TEACHER, files.cached(download.TEACHER.split("/")[-1]), pickles.load)
    net = edm.Denoiser(**NETWORKS[config.images])
    other = "name another --teacher, .pkl or .safetensors, or another --preset"
    remedy = other if config.teacher else files.remedy(file, other)
    if file.suffix != ".pkl":
        files.load_net(file, net, remedy)
        return net, files.sha256(file)
    tensors, digest = pickles.load(file)
    with files.blame(f"{file} does not hold this network: {remedy}"):
        disback.load_strictly(net, tensors)
    return net, digest


def digits_teacher(config: Config) -> Path:
    """The file of the digits' teacher: in the cache, or trained into it, under the hash of all that
    it depends on; no seed of the student's changes it."""
    source = "".join(map(inspect.getsource, (edm, digits.load, train)))
    of_config = [NETWORKS["digits"], *(getattr(config, name) for name in OF_TEACHER)]
    name = hashlib.sha256((repr(of_config) + source + torch.__version__).encode()).hexdigest()[:16]
    file = files.cached(f"digits-teacher-{name}.safetensors")
    if not file.exists():
        torch.manual_seed(0)
        net = edm.Denoiser(**NETWORKS["digits"])
        with files.lost("the teacher in training: the next run begins it again"):
            train(net, config)
        files.save_tensors(file, net.state_dict())
    return file


def train(net: edm.Denoiser, config: Config, batch: int = 128) -> None:
    """EDM's training on the digits: denoising score matching with labels, cosine decay."""
    images, classes = digits.load()
    optimizer = torch.optim.Adam(net.parameters(), lr=config.teacher_lr, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.teacher_steps)
    for _ in (progress := trange(config.teacher_steps, desc="teacher (first use)")):
        chosen, sigma = torch.randint(len(images), (batch,)), edm.lognormal_sigma(batch)
        loss = disback.score_matching_loss(net, images[chosen], sigma,
                                           labels(classes[chosen], config), edm.score_weight(sigma))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3g}", refresh=False)
    if not all(weight.isfinite().all() for weight in net.parameters()):
        raise disback.Refusal("the teacher's training diverged: try a lower --teacher-lr")
