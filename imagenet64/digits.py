"""The tiny preset's data, 1,797 handwritten digits of 8 x 8 pixels, and a classifier of them.

digits.npz holds the test set of "Optical Recognition of Handwritten Digits" by E. Alpaydin and
C. Kaynak (1998), UCI Machine Learning Repository, https://doi.org/10.24432/C50P49, licence CC BY
4.0 (https://creativecommons.org/licenses/by/4.0/); scikit-learn ships it as load_digits. Changed:
stored as unsigned bytes. A pixel counts the inked cells among the 4 x 4 of a 32 x 32 scan, 0 to 16.
"""

import hashlib
import inspect
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import trange

from runtime import files

FILE = Path(__file__).parent / "digits.npz"
HELD_OUT = 360  # images that the classifier is not trained on, a fifth
STEPS, BATCH, LR, NOISE = 600, 128, 1e-3, 0.3  # of the classifier's training


def load() -> tuple[Tensor, Tensor]:
    """All digits: images float32 [1797, 1, 8, 8] in [-1, 1], ink is 1, and labels int64 [1797]."""
    with np.load(FILE, allow_pickle=False) as data:
        images, labels = torch.from_numpy(data["images"]), torch.from_numpy(data["labels"])
    return images[:, None].float() / 8 - 1, labels.long()


def split() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(images, labels) to train a classifier on, and the 360 held out: a fixed random choice."""
    images, labels = load()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held_out, train = order[:HELD_OUT], order[HELD_OUT:]
    return (images[train], labels[train]), (images[held_out], labels[held_out])


class Classifier(nn.Module):
    """Logits [n, 10] of images [n, 1, 8, 8] in [-1, 1], by way of 64 features."""

    dim = 64

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.SiLU(),
            nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.SiLU(),  # 4 x 4
            nn.Flatten(), nn.Dropout(0.2), nn.Linear(64 * 16, self.dim), nn.ReLU())
        self.head = nn.Linear(self.dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    def features(self, x: Tensor) -> Tensor:
        """The penultimate layer [n, 64], in whose units the tiny preset's Fréchet distance is."""
        return self.body(x)

    @torch.no_grad()
    def classes(self, x: Tensor) -> Tensor:
        """The likeliest digit of each image, int64 [n]."""
        return self(x).argmax(dim=1)


def classifier() -> Classifier:
    """The classifier on the CPU, in evaluation mode, without gradients: from the cache, or trained
    into it in seconds on the first call. No seed of the user's changes it, and torch's random
    state is left as it was. Raises disback.Refusal where the cache cannot be written or read."""
    source = "".join(map(inspect.getsource, (load, split, Classifier, trained)))
    depends_on = repr((HELD_OUT, STEPS, BATCH, LR, NOISE, torch.__version__)) + files.sha256(FILE)
    name = hashlib.sha256((source + depends_on).encode()).hexdigest()[:16]
    file = files.cached(f"digits-classifier-{name}.safetensors")
    if not file.exists():
        files.save_tensors(file, trained().state_dict())
    with torch.random.fork_rng(devices=[]):  # the layers draw initial weights, here for nothing
        net = Classifier()
    files.load_net(file, net, "remove it, and the next run trains it again")
    return net.eval().requires_grad_(False)


def trained() -> Classifier:
    """Cross entropy on the noised training part; random numbers and one thread of its own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as it is small; and the bits do not depend on the machine's cores
    (images, labels), _ = split()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would seed a GPU as well
        net = Classifier()
        optimizer = torch.optim.AdamW(net.parameters(), lr=LR, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        for _ in trange(STEPS, desc="digits classifier (first use)"):
            chosen = torch.randint(len(labels), (BATCH,))
            x = images[chosen] + NOISE * torch.randn(BATCH, 1, 8, 8)
            loss = nn.functional.cross_entropy(net(x), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    torch.set_num_threads(threads)
    return net
