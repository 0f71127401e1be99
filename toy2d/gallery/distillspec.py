"""DistillSpec (arXiv 2310.08461, Section 3), an analogue: tokens are addresses of points.

Claim: distil a draft q towards the target p on the draft's own prefixes, and speculative decoding
accepts more tokens, 1 - TV(p, q). Asked: -, p is exact everywhere. --backtrack is ours: p becomes
(1 - l) p + l q_start, l from 0.9 to 0. A token is a step down a quadtree of 32 x 32 bins: letter t
leads from node i, a prefix, to node 4 i + 1 + t, and 0 is the root. Lost: cost, the reason for the
draft's prefixes. The problem, not only its size, is ours."""

import copy

import torch
from torch import Tensor, nn

from toy2d import mixture
from toy2d.gallery.core import Result, Toy, loop, update

NAME, QUERIES, START, STEPS, BACKTRACK = "DistillSpec", "-", "200 sequences", 0, True
CLAIM = "acceptance: before → after, JSD on the draft's prefixes (check: on the target's)"
TOKENS, NODES = 5, 341  # prefixes of up to 4 tokens
DIVERGENCES = {  # of p from q [n, 4]
    "FKL": lambda p, q: (p * (p / q).log()).sum(1),
    "RKL": lambda p, q: (q * (q / p).log()).sum(1),
    "JSD": lambda p, q: sum((a * (2 * a / (p + q)).log()).sum(1) / 2 for a in (p, q)),
    "TVD": lambda p, q: (p - q).abs().sum(1) / 2}


def target(data: mixture.Mixture) -> tuple[Tensor, Tensor]:
    """p(letter | prefix) [341, 4], and the probability of each prefix [341]."""
    axis = (torch.arange(32) + 0.5) * 6 / 32 - 3
    tree = data.log_density(torch.cartesian_prod(axis, axis)).softmax(0).clamp(min=1e-12)
    tree = tree.view(10 * [2]).permute(0, 5, 1, 6, 2, 7, 3, 8, 4, 9).flatten()
    for depth in range(TOKENS - 1, -1, -1):  # the level above is the sum over letters
        tree = torch.cat([tree[:4 ** (depth + 1)].view(-1, 4).sum(1), tree])
    return tree[1:].view(NODES, 4) / tree[:NODES, None], tree[:NODES]


def features() -> Tensor:
    """The letters of each prefix, one-hot [341, 16]; 0 for those to come."""
    x = torch.zeros(NODES, 16)
    for i in range(1, NODES):
        x[i] = x[(i - 1) // 4]
        x[i, 4 * int(x[i].sum()) + (i - 1) % 4] = 1
    return x


def sequences(p: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The prefixes [5 n] of n sequences from p [341, 4], and the letter after each."""
    nodes, letters = [torch.zeros(n, dtype=torch.long)], []
    for _ in range(TOKENS):
        letters.append(torch.multinomial(p[nodes[-1]], 1)[:, 0])
        nodes.append(4 * nodes[-1] + 1 + letters[-1])
    return torch.cat(nodes[:-1]), torch.cat(letters)


def acceptance(p: Tensor, weight: Tensor, q: Tensor) -> float:  # one token drafted at a time
    return 1 - (weight * DIVERGENCES["TVD"](p, q)).sum().item() / TOKENS


def distil(toy: Toy, p: Tensor, draft: nn.Module, divergence: str, source: str) -> Tensor:
    """Minimise D(p, q) at prefixes from the "draft" or the "target"; returns q [341, 4]."""
    x, start = features(), draft(features()).softmax(1).detach()
    for i in loop(400, adam := toy.adam(draft, 2e-2, 0.9)):
        mixed = max(0.9 * (1 - i / 200), 0) if toy.backtrack else 0
        q, walking = draft(x).softmax(1), (1 - mixed) * p + mixed * start
        node, _ = sequences(p if source == "target" else q.detach(), 64)
        update(adam, DIVERGENCES[divergence](walking[node], q[node]).mean())
    return draft(x).softmax(1)


def train(toy: Toy) -> Result:
    (p, weight), x = target(mixture.uneven()), features()
    draft = nn.Sequential(nn.Linear(16, 8), nn.SiLU(), nn.Linear(8, 4))
    node, letter = sequences(p, 200)
    for _ in loop(400, adam := torch.optim.Adam(draft.parameters(), 2e-2)):
        update(adam, nn.functional.cross_entropy(draft(x[node]), letter))
    before = acceptance(p, weight, draft(x).softmax(1))
    after = {name: acceptance(p, weight, distil(toy, p, copy.deepcopy(draft), name, "draft"))
             for name in DIVERGENCES}
    check = acceptance(p, weight, distil(toy, p, draft, "JSD", "target"))
    return Result(numbers=after | {"without": before, "with": after["JSD"], "check": check})
