"""A run of the gallery, and the line that it leaves."""

import importlib
import json
import time
from pathlib import Path

import torch

from disback import Refusal
from runtime import files
from toy2d.gallery.core import Toy
from toy2d.gallery.counter import Count
from toy2d.gallery.versions import version

METHODS = ("vsd", "swiftbrush", "snoopi", "fdistill", "msd", "phased", "flash", "sprint", "tbcm",
           "rcm", "mdt", "hypersd", "twinflow", "boot", "instaflow", "hipa", "distillspec", "pvd",
           "stepbystep")
KEY = ("method", "variant", "backtrack", "rate", "seed")
START = b'{"method":'  # of every line


def arms(method: str) -> list[tuple]:
    """(variant, backtrack, rate) of all rows of a method, variants last."""
    module = importlib.import_module(f"toy2d.gallery.{method}")
    walking = [("", True, 1), ("", False, 2)] if module.BACKTRACK else []
    variants = [(name, False, 1) for name in getattr(module, "VARIANTS", ())]
    return [("", False, 1), *walking, *variants]


def execute(out: Path, key: tuple) -> dict:
    """A run's line; of seed 0 its points are written as well."""
    method, variant, backtrack, rate, seed = key
    module = importlib.import_module(f"toy2d.gallery.{method}")
    settings = dict(module.VARIANTS[variant]) if variant else {}
    toy = Toy(seed, backtrack, rate, settings.pop("data", "ring"))
    if hasattr(module, "teacher"):
        module.teacher(toy)  # into the cache, so that it is no part of the run
    began, code = time.perf_counter(), version(method)
    with Count() as count:
        result = module.train(toy, **settings)
    line = {**dict(zip(KEY, key)), "version": code, "torch": torch.__version__,
            "evals": count.evals, "seconds": round(time.perf_counter() - began, 1)}
    tensors = result.tensors
    if result.sample:
        line |= toy.measure(result.sample)
        with torch.no_grad():
            z, generator = toy.evaluate.z[:2000], torch.Generator().manual_seed(2)
            tensors = tensors | {"x": result.sample(z, generator)}
    others = {name: toy.measure(sample)["swd"] for name, sample in result.others.items()}
    if seed == 0 and not variant and rate == 1 and tensors:
        name = method + backtrack * "-backtrack"
        files.save_tensors(out / "clouds" / f"{name}.safetensors", tensors)
    return line | {"numbers": result.numbers | others}


def read(file: Path) -> dict[tuple, dict]:
    """The lines by their key, the last one of each; one that a kill tore is none."""
    lines = {}
    for text in file.read_bytes().splitlines() if file.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:
            if START.startswith(text[:len(START)]):
                continue  # a torn one, or the feed after it
            line = None
        ours = isinstance(line, dict) and "version" in line
        if not (ours and [type(line.get(name)) for name in KEY] == [str, str, bool, int, int]
                and line["method"] in METHODS):
            raise Refusal(f"{file} has lines of another kind: name another --out")
        lines[tuple(line[name] for name in KEY)] = line
    return lines
