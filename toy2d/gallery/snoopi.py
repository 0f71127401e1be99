"""SNOOPI (arXiv 2412.02687), its half PG-SB: SwiftBrush with a random guidance scale.

Claim: the scale kappa ~ U(kappa_min, kappa_max) of every sample, the same for teacher and fake,
makes training steadier. Asked: S. The guided D is linear in kappa, so that where the weight does
not depend on it the expected gradient is SwiftBrush's at the mean scale: here nothing can change
but the spread over seeds. Lost in 2D: NASA, which subtracts a negative prompt's cross-attention at
inference; there is none. Known from three summaries of the paper; no training code was found.
"""

from toy2d.gallery import swiftbrush
from toy2d.gallery.conditional import teacher  # noqa: F401  (it must be ready before the run)
from toy2d.gallery.core import Result, Toy

NAME, QUERIES, START, STEPS, BACKTRACK = "SNOOPI (PG-SB)", "S", "off", 1, True


def train(toy: Toy) -> Result:
    return swiftbrush.train(toy, kappa=(1, 5))  # of the same mean, 3
