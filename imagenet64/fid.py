"""The Fréchet distance between images and the data: python -m imagenet64.fid RUN

RUN is a run's folder, the word teacher for the teacher of --preset, or an .npz with uint8 images
arr_0 [n, h, w, c]. For ImageNet it is FID; for the digits it is in other units, those of a
classifier of theirs (see features.py). The result is printed and kept beside the images or the
weights.
"""

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import disback
from imagenet64 import download, features, problem, sample
from imagenet64.frechet import frechet_distance, statistics
from runtime import command, files, ranks, results


def measure(batches_of_block: Callable[[int], Iterable[Tensor]], extract: Callable,
            reference: tuple[Tensor, Tensor], blocks: int) -> dict:
    """Fréchet distances of `blocks` separate sets of images to the reference (mean, cov);
    batches_of_block(block) yields the uint8 images [n, c, h, w] of one."""
    distances = []
    for block in range(blocks):
        batches = tqdm(batches_of_block(block), f"features of block {block}", unit="batch",
                       disable=ranks.rank() > 0)
        made = torch.cat([extract(batch).cpu() for batch in batches])
        distances.append(frechet_distance(*statistics(made), *reference))
    return {"distances": distances, "min": min(distances), "mean": sum(distances) / blocks}


def parse(argv: list[str]) -> argparse.Namespace:
    parser = command.parser("python -m imagenet64.fid", __doc__)
    sample.add_source(parser)
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
    if args.source.endswith(".npz") and (args.node is not None or args.steps is not None):
        command.refuse("--node and --steps are for weights, not for images in an .npz")
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
    ranks.join_ranks()
    device = ranks.device()
    if args.source.endswith(".npz"):
        base, config = Path(args.source).with_suffix(".fid"), problem.PRESETS[args.preset or "tiny"]
        batches, size, blocks, about = of_npz(args)
    else:
        base = sample.default_name(args, "fid")
        with ranks.first_rank_first():
            made, config, about = sample.source(args)
        size, blocks = args.images or 50_000, args.blocks or 3

        def batches(block: int) -> Iterable[Tensor]:
            return (x for x, _ in made(range(block * size, (block + 1) * size)))

    if config.images == "digits" and (args.inception or args.reference):
        command.refuse("--inception and --reference are for ImageNet, not for the digits")
    with ranks.first_rank_first():
        extractor, reference = (features.of_digits(device) if config.images == "digits"
                                else features.of_inception(*inception_files(args), device))
    files.must_take_files(base.parent, "folder, for the result,")
    about |= {"images": size, "blocks": blocks}
    result = about | measure(batches, results.SplitOverRanks(extractor), reference, blocks)
    files.save_json(base.with_name(f"{base.name}-{size}x{blocks}.json"), result)
    if ranks.rank() == 0:
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
    if images.ndim != 4 or images.dtype != "uint8":
        raise disback.Refusal(f"{source}: arr_0 must be uint8 [n, h, w, c], not "
                              f"{images.dtype} {list(images.shape)}")
    blocks = args.blocks or 1
    size = args.images or max(2, len(images) // blocks)
    if len(images) < size * blocks:
        raise disback.Refusal(f"{source} holds {len(images)} images, too few for --blocks "
                              f"{blocks} of {size} images: name fewer")

    def batches(block: int) -> Iterable[Tensor]:
        for start in range(block * size, (block + 1) * size, args.batch):
            part = images[start:min(start + args.batch, (block + 1) * size)]
            yield torch.from_numpy(part).permute(0, 3, 1, 2)

    return batches, size, blocks, {"images_sha256": files.sha256(source)}


if __name__ == "__main__":
    command.run(main, "lower --batch")
