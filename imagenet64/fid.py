"""The Fréchet distance between images and the data: python -m imagenet64.fid RUN

RUN is a run's folder, the word teacher for the teacher of --preset, or an .npz with uint8 images
arr_0 [n, h, w, c]. For ImageNet it is FID; for the digits it is in other units, those of a
classifier of theirs (see features.py). The result is printed and kept beside the images or the
weights. An interrupted measurement goes on where it was.
"""

import argparse
import glob
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

import disback
from imagenet64 import download, features, problem, sample
from imagenet64.frechet import Statistics, frechet_distance
from runtime import command, files, ranks, results
from runtime.errors import must

SAVE_EVERY = 5000  # images between savings of a measurement that is under way
ELSEWHERE = "folder: copy what is measured to one that takes the result"


def measure(batches_of_block: Callable[[int, int], Iterable[Tensor]], extract: Callable,
            reference: tuple[Tensor, Tensor], images: int, blocks: int, resume_file: Path,
            about: dict) -> dict:
    """Fréchet distances of `blocks` separate sets of `images` each to the reference (mean, cov).

    batches_of_block(block, done) yields a block's uint8 images [n, c, h, w] but the first `done`.
    What is done is kept in `resume_file`, every 5,000 images and after every block, and gone on
    with after an interrupt; who has saved the result removes it. Refuses a block that has not
    `images` images, and a resume file of a measurement of which `images`, `blocks` or anything in
    `about` is another."""
    about = about | {"images": images, "blocks": blocks}
    statistics, distances = restore(resume_file, len(reference[0]), about)
    done = len(distances) * images + statistics.n
    with tqdm(total=blocks * images, initial=done, desc="features", unit="image",
              disable=ranks.rank() > 0) as bar:
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
    return about | {"distances": distances, "min": min(distances),
                    "mean": sum(distances) / blocks}


def save(file: Path, statistics: Statistics, distances: list[float], about: dict) -> None:
    """A measurement under way as tensors; `about` becomes the bytes of its JSON."""
    files.save_tensors(file, {
        "n": torch.tensor(statistics.n), "mean": statistics.mean, "scatter": statistics.scatter,
        "distances": torch.tensor(distances, dtype=torch.float64),
        "about": torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)})


def restore(file: Path, dim: int, about: dict) -> tuple[Statistics, list[float]]:
    """What save() wrote, or nothing done yet where there is no file; Refusal where it is of
    another measurement."""
    statistics = Statistics(dim)
    if not file.exists():
        return statistics, []
    with files.blame(f"{file} cannot be read: remove it to measure from the start"):
        kept = load_file(file)
        then = json.loads(bytes(kept["about"].tolist()))
        for name in about | then:
            if then.get(name) == about.get(name):
                continue
            what = (f"other {name.removesuffix('_sha256')}" if name.endswith("_sha256")
                    else f"{name} {then.get(name)}, not {about.get(name)}")
            raise disback.Refusal(f"{file} is of a measurement with {what}: remove it to measure "
                                  "from the start, or finish that one")
        statistics.n = int(kept["n"])
        statistics.mean += kept["mean"]  # these two raise where the shapes differ
        statistics.scatter += kept["scatter"]
        distances = kept["distances"].tolist()
        if not 0 <= statistics.n <= about.get("images", statistics.n) or len(distances) > about.get(
                "blocks", len(distances)) or not all(t.isfinite().all() for t in kept.values()):
            raise ValueError("numbers that no measurement has")
    return statistics, distances


def parse(argv: list[str]) -> argparse.Namespace:
    parser = command.parser("python -m imagenet64.fid", __doc__)
    sample.add_source(parser, ", or an .npz")
    parser.add_argument("--images", type=command.count,
                        help="of a block (50000; of an .npz: all it holds)")
    parser.add_argument("--blocks", type=command.count,
                        help="measured apart (3; of an .npz: 1)")
    parser.add_argument("--inception", type=command.path, help="TorchScript file (downloaded)")
    parser.add_argument("--reference", type=command.path,
                        help=".npz with mu and sigma (downloaded)")
    args = parser.parse_args(argv)
    if args.images == 1:
        command.refuse("--images must be at least 2, which a covariance needs")
    for flag, file in (("--inception", args.inception), ("--reference", args.reference)):
        if file and not file.is_file():
            command.refuse(f"{flag} {file} is no file")
    if args.source.endswith(".npz") and (args.node is not None or args.steps is not None):
        command.refuse("--node and --steps are for weights, not for images in an .npz")
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
    ranks.join_ranks()
    device = ranks.device()
    npz = args.source.endswith(".npz")
    base = Path(args.source).with_suffix(".fid") if npz else sample.default_name(args, "fid")
    files.must_take_files(base.parent, ELSEWHERE)
    config = problem.PRESETS[args.preset or "tiny"] if npz else sample.config_of(args)
    if config.images == "digits" and (args.inception or args.reference):
        command.refuse("--inception and --reference are for ImageNet, not for the digits")
    if npz:
        batches, size, blocks, about = of_npz(args)
    else:
        with ranks.first_rank_first():
            made, about = sample.source(args)
        size, blocks = args.images or 50_000, args.blocks or 3

        def batches(block: int, done: int) -> Iterable[Tensor]:
            return (x for x, _ in made(range(block * size + done, (block + 1) * size)))

    with ranks.first_rank_first():
        extractor, reference = (features.of_digits(device) if config.images == "digits"
                                else features.of_inception(*inception_files(args), device))
    name = f"{base.name}-{size}x{blocks}"
    under_way, kept = (base.with_name(name + end) for end in (".partial.safetensors", ".json"))
    # The covariance is saved beside what was saved before.
    saving = 8 * len(reference[0])**2
    files.must_take_files(base.parent, ELSEWHERE, saving * (2 - under_way.exists()))
    if kept.exists():
        with files.blame(f"{kept} is in the way of the result: move it"):
            must("distances" in files.load_json(kept, "move it"), "it is no measurement's")
    result = measure(batches, results.SplitOverRanks(extractor), reference, size, blocks, under_way,
                     about | extractor.about)
    files.save_json(kept, result)
    if ranks.rank() == 0:
        # Only now, so that a full disk costs no measurement; another process may have been first.
        under_way.unlink(missing_ok=True)
        for file in (under_way, kept):
            files.sweep(base.parent, glob.escape(file.name))
        print(json.dumps(result, indent=1))


def inception_files(args: argparse.Namespace) -> tuple[Path, Path]:
    """Inception and the reference: as named, or from the cache, or downloaded into it."""
    inception, reference = args.inception, args.reference
    if not inception:
        inception = files.cached("inception-2015-12-05.pt")
        download.fetch(download.INCEPTION, inception, download.check_inception)
        with files.blame(f"{inception} is broken: remove it, and it is fetched again"):
            download.check_inception(inception)
    return inception, reference or download.fetch(
        download.REFERENCE, files.cached("imagenet-64x64.npz"), features.read_reference)


def of_npz(args: argparse.Namespace) -> tuple[Callable, int, int, dict]:
    """(batches_of_block, images, blocks, about) of the images in an .npz, block after block."""
    source = Path(args.source)
    (images,) = features.read_npz(source, "arr_0")
    if images.ndim != 4 or images.dtype != "uint8" or images.shape[3] not in (1, 3):
        raise disback.Refusal(f"{source}: arr_0 must be uint8 [n, h, w, c] of 1 or 3 channels, not "
                              f"{images.dtype} {list(images.shape)}")
    blocks = args.blocks or 1
    size = args.images or max(2, len(images) // blocks)
    if len(images) < size * blocks:
        raise disback.Refusal(f"{source} holds {len(images)} images, too few for --blocks "
                              f"{blocks} of {size} images: name fewer, or an .npz of more")

    def batches(block: int, done: int) -> Iterable[Tensor]:
        for start in range(block * size + done, (block + 1) * size, args.batch):
            part = images[start:min(start + args.batch, (block + 1) * size)]
            yield torch.from_numpy(part).permute(0, 3, 1, 2)

    return batches, size, blocks, {"images_sha256": files.sha256(source)}


if __name__ == "__main__":
    command.run(main, "lower --batch")
