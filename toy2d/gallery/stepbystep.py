"""Distilling Step-by-Step (arXiv 2305.02301), an analogue on running sums.

Claim: a small model that must also give a large model's reasons learns from fewer examples.
L = CE(label) / 2 + CE(rationale) / 2, one model for both; at test only the label is asked.
Asked: -, there is no diffusion. Here: six digits mod 5, the label is their sum mod 5, the rationale
is the running sums, and two heads stand for the prefixes "predict:" and "explain:".
Lost: language. Our rationale is perfect and aligned in time, which flatters the method; the
problem, not only its size, is ours.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from toy2d.gallery.core import Result, Toy, update

NAME, QUERIES, START, STEPS, BACKTRACK = "Distilling Step-by-Step", "-", "untrained", 0, False
CLAIM = "accuracy after 400 examples: label only → with rationale (check: rationales permuted)"
DIGITS, BASE = 6, 5
EXAMPLES = (100, 400, 1600)


class Student(nn.Module):
    """Digits [n, 6] -> logits of the label [n, 5] and of every running sum [n, 6, 5]."""

    def __init__(self, width: int = 48):
        super().__init__()
        self.digit = nn.Embedding(BASE, width)
        self.trunk = nn.GRU(width, width, batch_first=True)
        self.label, self.rationale = nn.Linear(width, BASE), nn.Linear(width, BASE)

    def forward(self, digits: Tensor) -> tuple[Tensor, Tensor]:
        states, _ = self.trunk(self.digit(digits))
        return self.label(states[:, -1]), self.rationale(states)


def running_sums(digits: Tensor) -> Tensor:
    """The rationale [n, 6]; its last entry is the label."""
    return digits.cumsum(dim=1) % BASE


def loss(student: Student, digits: Tensor, rationale: Tensor, alpha: float) -> Tensor:
    """alpha * CE(label) + (1 - alpha) * CE(rationale)."""
    label, sums = student(digits)
    explained = cross_entropy(sums.flatten(0, 1), rationale.flatten())
    return alpha * cross_entropy(label, running_sums(digits)[:, -1]) + (1 - alpha) * explained


def accuracy(toy: Toy, examples: int, alpha: float, permuted: bool = False,
             steps: int = 1000) -> float:
    """Of labels that the student was not trained on, 0.2 by chance."""
    everything = torch.cartesian_prod(*DIGITS * [torch.arange(BASE)])
    digits, unseen = everything[torch.randperm(len(everything))].split(
        [examples, len(everything) - examples])
    rationale = running_sums(digits)
    if permuted:
        rationale = rationale[torch.randperm(examples)]
    student = Student()
    adam = toy.adam(student, 3e-3, 0.9)
    for _ in range(steps):  # at a constant rate: with a decay 400 examples do not suffice
        i = torch.randint(examples, (64,))
        update(adam, loss(student, digits[i], rationale[i], alpha))
    with torch.no_grad():
        answer = student(unseen)[0].argmax(dim=1)
    return (answer == running_sums(unseen)[:, -1]).float().mean().item()


def train(toy: Toy) -> Result:
    numbers = {}
    for n in EXAMPLES:
        numbers[f"label, {n}"] = accuracy(toy, n, alpha=1.0)
        numbers[f"rationale, {n}"] = accuracy(toy, n, alpha=0.5)
    numbers |= {"without": numbers["label, 400"], "with": numbers["rationale, 400"],
                "check": accuracy(toy, 400, alpha=0.5, permuted=True)}
    return Result(numbers=numbers)
