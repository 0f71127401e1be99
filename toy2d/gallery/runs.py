"""A run of the gallery: what it costs, what it depends on, and the line that it leaves."""

import ast
import functools
import hashlib
import importlib
import json
import time
from pathlib import Path

import torch
from torch.nn.modules.module import register_module_forward_hook

from disback import Refusal
from runtime import files
from toy2d import model
from toy2d.gallery.core import Toy

METHODS = ("vsd", "swiftbrush", "snoopi", "fdistill", "msd", "phased", "flash", "sprint", "tbcm",
           "rcm", "mdt", "hypersd", "twinflow", "boot", "instaflow", "hipa", "distillspec", "pvd",
           "stepbystep")
HERE = Path(__file__).parent
TEACHER = ("train", "trained_teacher", "karras_sigma", "lognormal_sigma", "score_weight")
KEY = ("method", "variant", "backtrack", "rate", "seed")


class Count:
    """While it is open, `evals` grows by the rows of every answer of a Perceptron, three times
    where a backward is to follow or where a directional derivative is taken."""

    def __enter__(self) -> "Count":
        self.evals, self.handle = 0, register_module_forward_hook(self.add)
        return self

    def __exit__(self, *_: object) -> None:
        self.handle.remove()

    def add(self, module: torch.nn.Module, _: tuple, answer: torch.Tensor) -> None:
        if isinstance(module, model.Perceptron):
            tangent = torch.autograd.forward_ad.unpack_dual(answer).tangent
            self.evals += len(answer) * (3 if answer.requires_grad or tangent is not None else 1)


@functools.cache
def version(method: str) -> str:
    """A hash of the code that a method's numbers depend on, without comments and docstrings."""
    todo, found = [HERE / f"{method}.py"], {}
    while todo:
        file = todo.pop()
        tree = found[file.name] = ast.parse(file.read_text())
        imported = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        names = {word for node in imported if str(node.module).startswith("toy2d.gallery")
                 for word in (node.module.split(".")[-1], *(alias.name for alias in node.names))}
        todo += [HERE / f"{name}.py" for name in sorted(names)
                 if f"{name}.py" not in found and (HERE / f"{name}.py").exists()]
    for name in ("model.py", "mixture.py"):
        found[name] = ast.parse((HERE.parent / name).read_text())
    problem = ast.parse((HERE.parent / "problem.py").read_text())
    found |= {node.name: node for node in problem.body if getattr(node, "name", "") in TEACHER}
    for node in (node for tree in found.values() for node in ast.walk(tree)):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        if documented and ast.get_docstring(node):
            del node.body[0]
    text = "".join(ast.dump(found[name]) for name in sorted(found))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


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
            continue
        ours = isinstance(line, dict) and line.keys() >= {*KEY, "version"}
        if not (ours and line["method"] in METHODS):
            raise Refusal(f"{file} has lines of another kind: name another --out")
        lines[tuple(line[name] for name in KEY)] = line
    return lines


def fresh(line: dict | None) -> bool:
    """Whether a line is there and of the present code."""
    return line is not None and line["version"] == version(line["method"])
