"""trajectory.html: a page of its own, offline, that plays a run step by step."""

import json
from pathlib import Path

from torch import Tensor

from runtime import files
from runtime.records import read_log
from toy2d.diagnosis import LEVELS

TEMPLATE = Path(__file__).with_name("trajectory.html")
SHOWN = 500  # points of each cloud


def write(file: Path, out: Path, snapshots: list, nodes: list[Tensor], points: Tensor,
          grid: Tensor, limits: tuple[float, float]) -> None:
    """Write the page: a frame for every snapshot that the log has a line for. A node's samples are
    stored once; arrows, at the points of the grid, are D(x) - x, which is sigma^2 times the score.
    """
    numbers = {line["step"]: line for line in read_log(out)}
    frames = [{"numbers": numbers[step], "node": int(kept["node"]),
               "student": rounded(kept["student"][:SHOWN]),
               "fake": rounded(kept["fake"] - grid), "target": rounded(kept["target"] - grid)}
              for step, kept in snapshots if step in numbers]
    data = {"frames": frames, "data": rounded(points[:SHOWN]), "grid": rounded(grid),
            "nodes": [rounded(x[:SHOWN]) for x in nodes], "levels": LEVELS,
            "limits": limits}
    page = TEMPLATE.read_text().replace('"THE RUN"', json.dumps(data, separators=(",", ":")))
    files.atomically(file, lambda beside: beside.write_text(page))


def rounded(x: Tensor) -> list:
    """Coordinates to 0.01: a pixel is more."""
    return (x * 100).round().int().tolist()
