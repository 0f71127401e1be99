"""What code a line is of: numbers of other code are made again."""

import ast
import functools
import hashlib
from pathlib import Path

HERE = Path(__file__).parent
TEACHER = ("train", "trained_teacher", "karras_sigma", "lognormal_sigma", "score_weight")


@functools.cache
def version(method: str) -> str:
    """A hash of the code that a method's numbers depend on, without comments and docstrings."""
    todo, found = [HERE / f"{method}.py"], {}
    while todo:
        file = todo.pop()
        tree = found[file.name] = ast.parse(file.read_bytes())
        imported = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        names = {word for node in imported if str(node.module).startswith("toy2d.gallery")
                 for word in (node.module.split(".")[-1], *(alias.name for alias in node.names))}
        todo += [HERE / f"{name}.py" for name in sorted(names)
                 if f"{name}.py" not in found and (HERE / f"{name}.py").exists()]
    for name in ("model.py", "mixture.py"):
        found[name] = ast.parse((HERE.parent / name).read_bytes())
    problem = ast.parse((HERE.parent / "problem.py").read_bytes())
    found |= {node.name: node for node in problem.body if getattr(node, "name", "") in TEACHER}
    for node in (node for tree in found.values() for node in ast.walk(tree)):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        if documented and ast.get_docstring(node):
            del node.body[0]
    text = "".join(ast.dump(found[name]) for name in sorted(found))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def fresh(line: dict | None) -> bool:
    """Whether a line is there and of the present code."""
    return line is not None and line["version"] == version(line["method"])
