"""The Fréchet distance between images and the data: python -m imagenet64.fid SOURCE

SOURCE is a run's folder, a node's file, or an .npz with uint8 images arr_0 [n, h, w, c]. Preset
full is FID; preset tiny is in other units, those of a classifier of digits (see features.py). The
result is printed and kept beside SOURCE. An interrupted measurement goes on where it was.
"""

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

import disback
from imagenet64 import download, features

SAVE_EVERY = 5000  # images between savings of a measurement that is under way


class Statistics:
    """Number, mean and covariance of features [n, dim] that come in batches and are not kept.

    In float64, on the CPU. Batches are merged by their means and centred sums (Chan, Golub and
    LeVeque 1979), which loses no digits where the mean is large."""

    def __init__(self, dim: int):
        self.n, self.mean = 0, torch.zeros(dim, dtype=torch.float64)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64)  # sum of (f - mean)(f - mean)^T

    def add(self, features: Tensor) -> None:
        """Take in features [n, dim], n >= 0, of any device and precision."""
        if features.shape[1:] != self.mean.shape:
            raise disback.Refusal(f"features are {list(features.shape[1:])} numbers, those of the "
                                  f"reference {len(self.mean)}: the two must be of one network")
        if len(features) == 0:
            return
        features = features.cpu().double()
        mean, total = features.mean(dim=0), self.n + len(features)
        centred, shift = features - mean, mean - self.mean
        self.scatter += centred.T @ centred
        self.scatter += torch.outer(shift, shift) * (self.n * len(features) / total)
        self.mean += shift * (len(features) / total)
        self.n = total

    @property
    def cov(self) -> Tensor:
        """The covariance [dim, dim] with divisor n - 1; Refusal where there are fewer than 2."""
        if self.n < 2:
            raise disback.Refusal(f"a covariance needs at least 2 images, not {self.n}")
        return self.scatter / (self.n - 1)


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """|mean1 - mean2|^2 + tr(cov1 + cov2 - 2 sqrt(cov1 cov2)), the squared 2-Wasserstein distance
    of two Gaussians, in float64 (Heusel et al. 2017, Eq. 6).

    The product's root has as its trace the sum of the singular values of root(cov1) root(cov2).
    That needs no root of a matrix that is not symmetric, and holds for singular covariances."""
    mean1, cov1, mean2, cov2 = (t.double() for t in (mean1, cov1, mean2, cov2))
    overlap = torch.linalg.svdvals(root(cov1) @ root(cov2)).sum()
    return ((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * overlap).item()


def root(cov: Tensor) -> Tensor:
    """The symmetric root. Eigenvalues that rounding alone can make count as zero: their roots are
    eight digits larger than they, and a singular covariance has many."""
    values, vectors = torch.linalg.eigh(cov)
    noise = values.max() * len(cov) * torch.finfo(cov.dtype).eps
    return vectors * torch.where(values > noise, values, 0).sqrt() @ vectors.T


def measure(batches_of_block: Callable[[int, int], Iterable[Tensor]], extract: Callable,
            reference: tuple[Tensor, Tensor], images: int, blocks: int, resume_file: Path,
            about: dict) -> dict:
    """Fréchet distances of `blocks` separate sets of `images` each to the reference (mean, cov).

    batches_of_block(block, done) yields a block's uint8 images [n, c, h, w] but the first `done`.
    What is done is kept in `resume_file` and gone on with after an interrupt; the file is removed
    at the end. Refuses a block that has not `images` images, and a resume file of a measurement
    of which `images`, `blocks` or anything in `about` is another."""
    about = about | {"images": images, "blocks": blocks}
    statistics, distances = restore(resume_file, len(reference[0]), about)
    done = len(distances) * images + statistics.n
    with tqdm(total=blocks * images, initial=done, desc="features", unit="image") as bar:
        for block in range(len(distances), blocks):
            saved = statistics.n
            for batch in batches_of_block(block, statistics.n):
                statistics.add(extract(batch))
                bar.update(len(batch))
                if statistics.n - saved >= SAVE_EVERY:
                    saved = statistics.n
                    save(resume_file, statistics, distances, about)
            if statistics.n != images:
                raise disback.Refusal(f"block {block} has {statistics.n} images, not {images}")
            distances.append(frechet_distance(statistics.mean, statistics.cov, *reference))
            statistics = Statistics(len(reference[0]))
            save(resume_file, statistics, distances, about)
    resume_file.unlink()
    return about | {"distances": distances, "min": min(distances),
                    "mean": sum(distances) / blocks}


def save(file: Path, statistics: Statistics, distances: list[float], about: dict) -> None:
    """A measurement under way as tensors; `about` becomes the bytes of its JSON."""
    disback.save_tensors(file, {
        "n": torch.tensor(statistics.n), "mean": statistics.mean, "scatter": statistics.scatter,
        "distances": torch.tensor(distances, dtype=torch.float64),
        "about": torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)})


def restore(file: Path, dim: int, about: dict) -> tuple[Statistics, list[float]]:
    """What save() wrote, or nothing done yet where there is no file; Refusal where it is of
    another measurement."""
    statistics = Statistics(dim)
    if not file.exists():
        return statistics, []
    try:
        kept = load_file(file)
        then = json.loads(bytes(kept["about"].tolist()))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise disback.Refusal(f"{file} cannot be read, remove it: {error}") from error
    for name in about | then:
        if then.get(name) != about.get(name):
            raise disback.Refusal(f"{file} is of a measurement with {name} {then.get(name)}, not "
                                  f"{about.get(name)}: finish that one, or remove the file")
    statistics.n, statistics.mean = int(kept["n"]), kept["mean"]
    statistics.scatter = kept["scatter"]
    return statistics, kept["distances"].tolist()


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m imagenet64.fid", description=__doc__,
                                     allow_abbrev=False)
    parser.error = disback.refuse
    parser.add_argument("source", type=Path, metavar="SOURCE")
    parser.add_argument("--preset", choices=("tiny", "full"), default="tiny")
    parser.add_argument("--images", type=int, help="of a block (50000; of an .npz: all it holds)")
    parser.add_argument("--blocks", type=int, help="measured apart (3; of an .npz: 1)")
    parser.add_argument("--batch", type=int, default=100, help="images at a time (100)")
    parser.add_argument("--inception", type=Path, help="TorchScript file (downloaded)")
    parser.add_argument("--reference", type=Path, help=".npz with mu and sigma (downloaded)")
    args = parser.parse_args(argv)
    for name in ("images", "blocks", "batch"):
        if (value := getattr(args, name)) is not None and value < 1:
            disback.refuse(f"--{name} must be at least 1, not {value}")
    if args.preset == "tiny" and (args.inception or args.reference):
        disback.refuse("--inception and --reference are of --preset full")
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    stored = args.source.suffix == ".npz"
    batches, args.images, args.blocks, about = (of_npz if stored else of_weights)(args, device)
    extractor, reference = (features.of_digits(device) if args.preset == "tiny"
                            else features.of_inception(*files(args), device))
    base = args.source / "fid" if args.source.is_dir() else args.source.with_suffix(".fid")
    result = measure(batches, extractor, reference, args.images, args.blocks,
                     base.with_name(base.name + ".partial.safetensors"), about | extractor.about)
    disback.save_json(base.with_name(base.name + ".json"), {"preset": args.preset} | result)
    print(json.dumps(result, indent=1))


def files(args: argparse.Namespace) -> tuple[Path, Path]:
    """Inception and the reference: as named, or from the cache, or downloaded into it."""
    inception, reference = map(download.cached, ("inception-2015-12-05.pt", "imagenet-64x64.npz"))
    return (args.inception or download.fetch(download.INCEPTION, inception,
                                             download.INCEPTION_SHA256),
            args.reference or download.fetch(download.REFERENCE, reference))


def of_npz(args: argparse.Namespace, device: str) -> tuple[Callable, int, int, dict]:
    """(batches_of_block, images, blocks, about) of the images in an .npz, block after block."""
    (images,) = features.read_npz(args.source, "arr_0")
    if images.ndim != 4 or images.dtype != "uint8":
        raise disback.Refusal(f"{args.source}: arr_0 must be uint8 [n, h, w, c], not "
                              f"{images.dtype} {list(images.shape)}")
    blocks = args.blocks or 1
    size = args.images or len(images) // blocks
    if len(images) < size * blocks:
        raise disback.Refusal(f"{args.source} holds {len(images)} images, too few for --blocks "
                              f"{blocks} of --images {size}")

    def batches(block: int, done: int) -> Iterable[Tensor]:
        for start in range(block * size + done, (block + 1) * size, args.batch):
            part = images[start:min(start + args.batch, (block + 1) * size)]
            yield torch.from_numpy(part).permute(0, 3, 1, 2)

    return batches, size, blocks, {"source_sha256": disback.sha256(args.source)}


def of_weights(args: argparse.Namespace, device: str) -> tuple[Callable, int, int, dict]:
    """The same of a generator's images: a run's student or a node; image i comes from seed i."""
    weights = args.source / "student.safetensors" if args.source.is_dir() else args.source
    if not weights.is_file():
        raise disback.Refusal(f"{weights} is not there: name a run's folder, a node or an .npz")
    size, blocks = args.images or 50_000, args.blocks or 3

    def batches(block: int, done: int) -> Iterable[Tensor]:
        # GLUE, to be fitted to sample.py: uint8 batches [n, c, h, w] for a range of seeds.
        from imagenet64 import sample
        seeds = range(block * size + done, (block + 1) * size)
        return sample.images(weights, args.preset, seeds, args.batch, device)

    return batches, size, blocks, {"source_sha256": disback.sha256(weights)}


if __name__ == "__main__":
    disback.run(main)
