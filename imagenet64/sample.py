"""Images from a student in one step, or from its teacher or a node: python -m imagenet64.sample RUN

RUN is a run's folder; the word teacher stands for the teacher of --preset, which needs no run. The
image of a seed is the same, but for rounding, whatever the batch. Writes a grid (.png), or (.npz)
uint8 arr_0 [n, h, w, c] and the classes arr_1 [n], the layout that FID tools read.
"""

import argparse
import dataclasses
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import disback
from imagenet64 import edm, figures, problem
from runtime import command, files, folder, pictures, ranks, records, results

Images = Callable[[range], Iterable[tuple[Tensor, Tensor]]]  # seeds -> uint8 [n, c, h, w], classes
STEPS = 18  # of Heun's method, with two evaluations each but for the last


def main(argv: list[str]) -> None:
    parser = command.parser("python -m imagenet64.sample", __doc__)
    add_source(parser)
    parser.add_argument("--images", type=command.count, default=40, help="how many (40)")
    parser.add_argument("--seed", type=int, default=0, help="of the first image (0)")
    parser.add_argument("--classes", type=int, nargs="+", metavar="C",
                        help="in turn, after RUN (random, each from its image's seed)")
    parser.add_argument("--to", type=command.path, help=".png or .npz file (RUN/samples.png)")
    args = parser.parse_args(argv)
    file = args.to or default_name(args).with_suffix(".png")
    if file.suffix not in (".png", ".npz"):
        command.refuse(f"--to must be a .png or an .npz file, not {file}")
    files.must_take_files(file.parent, "--to")
    pictures.must_be_ours(file, "--to")
    if not 0 <= args.seed < 2**63 - args.images:
        command.refuse("--seed must be at least 0, and --seed + --images below 2**63")
    network = problem.NETWORKS[config_of(args).images]
    pixels = network["img_channels"] * network["img_resolution"]**2
    files.must_take_files(file.parent, "--to", args.images * pixels)  # a byte for each
    ranks.join_ranks()
    with ranks.first_rank_first():
        sample, _ = source(args, args.classes)
    batches = sample(range(args.seed, args.seed + args.images))
    made = list(tqdm(batches, total=-(-args.images // args.batch), unit="batch",
                     disable=ranks.rank() > 0))
    images, classes = (torch.cat(part) for part in zip(*made))
    if file.suffix == ".png":
        write_png(file, images)
    else:
        pictures.save_arrays(file, images.permute(0, 2, 3, 1).numpy(), classes.numpy())
    if ranks.rank() == 0:
        print(file)


def add_source(parser: argparse.ArgumentParser, also: str = "") -> None:
    """The flags that name what to draw from; RUN may be something `also`."""
    parser.add_argument("source", metavar="RUN", type=run_or_images,
                        help=f"a run's folder, or: teacher{also}")
    parser.add_argument("--node", type=int, help="a node of the run's path; 0 is the teacher")
    parser.add_argument("--preset", choices=problem.PRESETS, help="the run's, or the teacher's")
    parser.add_argument("--steps", type=command.count,
                        help=f"of Heun's method, for a node ({STEPS})")
    parser.add_argument("--batch", type=command.count, default=64,
                        help="images in memory at a time (64)")


def run_or_images(text: str) -> str:
    """The type of RUN, which for fid.py may be an .npz."""
    word = command.home(text)
    text = str(Path(word))
    if word == "teacher":
        return word
    if Path(text).is_file() and not text.endswith(".npz"):
        raise argparse.ArgumentTypeError(f"{text} is a file: name the folder of its run")
    return os.path.abspath(text) if text == "teacher" else text  # a folder, named as teacher/


def default_name(args: argparse.Namespace, name: str = "samples") -> Path:
    """Where the results of a source belong, but for the suffix."""
    end = f"-{args.steps}-steps" if args.steps not in (None, STEPS) else ""
    if args.source == "teacher":
        return Path("runs", f"{name}-teacher-{args.preset or 'tiny'}{end}")
    return Path(args.source) / (name if args.node is None else f"{name}-node-{args.node:02d}{end}")


def source(args: argparse.Namespace, classes: list[int] | None = None) -> tuple[Images, dict]:
    """(images of seeds, what identifies them) of the source that the flags name.

    Refuses a run of another problem or preset, a node that is not on its path, weights of another
    network, and classes that there are not.
    """
    one_step = args.source != "teacher" and args.node is None
    if one_step and args.steps is not None:
        command.refuse("--steps is for a --node or the teacher; a student makes one")
    if args.source == "teacher" and args.node is not None:
        command.refuse("--node is for a run's path; the teacher needs none")
    steps = 1 if one_step else args.steps or STEPS
    device, config = ranks.device(), config_of(args)
    count = problem.NETWORKS[config.images]["label_dim"]
    for wrong in (c for c in classes or () if not 0 <= c < count):
        command.refuse(f"--classes must be from 0 to {count - 1}, not {wrong}")
    if args.source == "teacher":
        net, sha256 = problem.load_teacher(config)
    else:
        net = edm.Denoiser(**problem.NETWORKS[config.images])
        file = Path(args.source) / "student.safetensors"
        if one_step:
            if not file.is_file():
                raise disback.Refusal(f"{file} is not there yet: finish the run by backtrack.py "
                                      "--resume")
            records.note_older(Path(args.source))
        else:
            path = folder.read_path(Path(args.source) / "path", {})
            if not 0 <= args.node < len(path):
                command.refuse(f"--node must be from 0 to {len(path) - 1}, not {args.node}")
            file = path.files[args.node]
        files.load_net(file, net, "name the run that made it")
        sha256 = files.sha256(file)
    net = results.SplitOverRanks(net.to(device, memory_format=torch.channels_last))

    @torch.no_grad()
    def images(seeds: range) -> Iterable[tuple[Tensor, Tensor]]:
        for start in range(0, len(seeds), args.batch):
            now = seeds[start:start + args.batch]
            z, of = inputs(now, classes and [classes[(seed - seeds[0]) % len(classes)]
                                             for seed in now], config)
            z, cond = z.to(device), problem.labels(of, config).to(device)
            x0 = (problem.generate(net, z, cond, config.start_sigma) if one_step
                  else edm.heun(net, z, cond, steps))
            yield edm.to_uint8(x0).cpu(), of

    return images, {"weights_sha256": sha256, "steps": steps}


def config_of(args: argparse.Namespace) -> problem.Config:
    """The teacher's config, or that which a run was made with, from its config.json."""
    if args.source == "teacher":
        return problem.PRESETS[args.preset or "tiny"]
    run, preset = Path(args.source), args.preset
    stage = "backtrack" if args.node is None else "degrade"
    file = run / "config.json"
    stages = files.load_json(file, "name a run's folder")
    remedy = ("run backtrack.py, or name a node by --node" if args.node is None
              else "name the run that has recorded the path")
    with files.blame(f"{run} holds no stage {stage} of imagenet64: {remedy}"):
        settings = stages[stage]
        records.must_agree(run, settings, {"problem": "imagenet64"})
        records.must_agree(run, settings, {"preset": preset or settings["preset"]})
        found = {field.name: settings[field.name] for field in dataclasses.fields(problem.Config)}
    try:
        return problem.Config(**found)
    except disback.Refusal as refusal:  # which knows the name of a flag alone
        raise disback.Refusal(f"{file} was changed: {refusal}") from None


def inputs(seeds: range, classes: list[int] | None, config: problem.Config) -> tuple[
        Tensor, Tensor]:
    """z [n, c, h, w] and classes [n], given, or random; an image's from its own seed alone."""
    count, z, of = problem.NETWORKS[config.images]["label_dim"], [], []
    for i, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(seed)
        z.append(problem.latents(1, config, generator))
        random = torch.randint(count, (), generator=generator)
        of.append(torch.tensor(classes[i]) if classes else random)
    return torch.cat(z), torch.stack(of)


def write_png(file: Path, images: Tensor) -> None:
    """A grid of uint8 images [n, c, h, w] in rows of 10, small ones enlarged."""
    grid = figures.grid(images).numpy()
    enlarge = max(1, 64 // images.shape[-1])
    grid = grid.repeat(enlarge, axis=0).repeat(enlarge, axis=1)
    pictures.save(file, Image.fromarray(np.broadcast_to(grid, (*grid.shape[:2], 3))))


if __name__ == "__main__":
    command.run(main, "lower --batch")
