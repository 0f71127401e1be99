"""When does backtracking pay, and why? python -m toy2d.study

The runs of a job, a seed of an arm in a cell at several learning rates, are advanced together by
study_runs.py. README.md reads the figures.
"""

import tempfile
from pathlib import Path

from runtime import command
from runtime.study import Lines, Rates, Study
from toy2d import study_figures, study_runs

FOLDER = Path(__file__).parent / "study"
# Flags of both stages, and of stage 2 alone. "budget" is in iterations of plain VSD, stage 1
# included. "default" keeps its preset's batch, iterations and average. The others have half the
# batch, a quarter of the iterations and a shorter average, so that a run takes seconds.


def short(weighting: str = "half", **flags: object) -> dict:
    return {"both": {"batch": 128} | flags, "stage2": {"weighting": weighting, "ema": 0.95},
            "budget": 1000}


CELLS = {
    "default": {"both": {"data": "ring"}, "budget": 4000},
    **{f"2D d{distance}": short(distance=distance) for distance in (4, 8, 12, 16)},
    **{f"4D d{distance}": short(data="ring4", distance=distance) for distance in (4, 8, 16)},
    **{f"16D d{distance}": short(preset="ring16", distance=distance or 1e-3)
       for distance in (0, 4, 8, 16)},
    "2D d8 eps": short("eps"), "poor teacher": short(teacher_steps=300),
    "Karras noise": short(noise="karras")}
STAGE1 = {"steps": 100}
PATH = {"stage1": STAGE1}
ARMS = {
    "vsd": {"stage2": {"target": "teacher"}},
    "disback": PATH,
    "degraded fake": PATH | {"stage2": {"target": "teacher", "fake_init": "degraded"}},
    "vsd k2": {"stage2": {"target": "teacher", "fake_updates": 2}},
    "disback k2": PATH | {"stage2": {"fake_updates": 2}},
    "teacher's fake": PATH | {"stage2": {"fake_init": "teacher"}},
    "forward": PATH | {"control": "forward"},
    "interpolated": PATH | {"control": "interpolated"},
    "wait": PATH | {"control": "wait"},
    **{f"{n} nodes": {"stage1": STAGE1 | {"nodes": n}} for n in (1, 3, 30)},
    **{f"interval {i}": PATH | {"stage2": {"interval": i}} for i in (3, 30)},
    **{spacing: {"stage1": STAGE1 | {"spacing": spacing}} for spacing in ("linear", "log")},
    "adaptive": PATH | {"stage2": {"switch": "adaptive"}}}
MAIN, ABLATION = list(ARMS)[:5], list(ARMS)[5:]
RULES = ("linear", "adaptive", "log", "30 nodes", "interval 30")
CONFIRMED = ("vsd", "disback", "vsd k2")  # on seeds that no sentence was written from
WATCHED = ("default", "4D d8", "2D d8 eps")  # cells whose curves are drawn
# Learning rates of student and fake: alike, and a faster fake.
ALIKE = tuple((rate, rate) for rate in (1e-3, 2e-3, 4e-3, 8e-3, 16e-3))
FASTER = ((4e-3, 8e-3), (8e-3, 16e-3))
FASTEST = ((16e-3, 32e-3),)
SLOW_STUDENT = ((2e-3, 4e-3), (2e-3, 8e-3))  # whose rate alone is limited
SEEDS, FRESH, ELSEWHERE = (tuple(range(first, first + 10)) for first in (0, 200, 300))
# Seeds that came after the text of a point was written; no figure shows them.
LATER = {"fresh seeds": FRESH, "another processor": ELSEWHERE}
# What is run in this order, what tells most first: cells, arms, rates, seeds.
CHEAP = tuple(cell for cell in CELLS if cell != "default")
PLAN = [
    (("16D d8", "4D d8"), (*MAIN, "linear"), ALIKE + FASTER, SEEDS),
    (("16D d8", "2D d8", "4D d8", "2D d8 eps"), RULES, ALIKE[1:3], SEEDS),
    (("16D d8", "4D d8"), ("vsd", "disback", "linear"), SLOW_STUDENT, SEEDS),
    (("16D d8", "4D d8"), (*CONFIRMED, *RULES[:2]), ALIKE[1:3], FRESH),
    (("4D d8", "16D d8", "2D d8 eps"), ("wait",), ALIKE[1:3], SEEDS),
    (("4D d8", "16D d8"), ("wait",), ALIKE[1:3], FRESH),
    (("16D d4", "16D d16"), (*MAIN[:2], "linear"), ALIKE[1:4], SEEDS),
    (("16D d0",), MAIN[:2], ALIKE[1:4], SEEDS),
    (("16D d8", "4D d8", "2D d8 eps"), ABLATION, ALIKE[1:3], SEEDS),
    (("4D d16", "2D d16", "16D d16"), RULES[:2], ALIKE[1:4], SEEDS),
    (("default",), (*MAIN[:2], *RULES[:2]), ALIKE[1:2], SEEDS),
    (CHEAP, MAIN, ALIKE + FASTER, SEEDS),
    (("4D d16",), (*CONFIRMED, "disback k2"), ALIKE + FASTER, FRESH),
    (("4D d16",), (*CONFIRMED, "disback k2"), FASTEST, SEEDS + FRESH),
    (("default",), MAIN, ALIKE + FASTER, SEEDS),
    (("default",), MAIN[:3], (ALIKE[0], ALIKE[2], *FASTER), FRESH),  # the best of each arm
    (("2D d8",), ABLATION, ALIKE[1:3], SEEDS),
    (("2D d16",), CONFIRMED, ALIKE + FASTER, FRESH),
    (("2D d16",), CONFIRMED, FASTEST, SEEDS + FRESH),
    (("default",), MAIN[:4], ALIKE[1:2], FRESH),
    (("default",), MAIN[:2], ALIKE[1:3], ELSEWHERE)]
QUICK = [(("4D d8",), MAIN[:2], ALIKE[1::2], SEEDS[:3])]


def advance(cell: str, arm: str, seed: int, rates: tuple[Rates, ...]) -> dict:
    """What is measured of a job's runs; the curves where a figure shows them."""
    drawn = study_figures.DRAWN if cell in WATCHED and arm in study_figures.NAMES else None
    with tempfile.TemporaryDirectory() as out:
        return study_runs.advance(Path(out), CELLS[cell], ARMS[arm], seed, rates,
                                  CELLS[cell]["budget"], drawn)


def draw(out: Path, lines: Lines) -> None:
    study_figures.draw(out, lines, LATER)


# The mismatch that an adaptive target waits for is one run's.
STUDY = Study(__doc__, FOLDER, CELLS, ARMS, PLAN, QUICK, ("swd", "mode_tv", "off_mode", "reach"),
              advance, draw, alone=("adaptive",))

if __name__ == "__main__":
    command.run(STUDY.main)
