"""What the Fréchet distance is taken of: features of images by a fixed network, and those of data.

Preset full: the 2048 features of Inception and NVIDIA's statistics of ImageNet-64, which make it
FID. Preset tiny: the 64 features of a classifier of digits, and the digits themselves.
"""

import hashlib
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import disback
from imagenet64 import digits, download
from imagenet64.edm import to_uint8
from imagenet64.frechet import root
from runtime import files
from runtime.errors import must


@dataclass(frozen=True)
class Extractor:
    """Features of uint8 images [n, *shape] by `net`; `about` says which network that is, and which
    reference goes with it. Refuses images of another size or type."""

    shape: tuple[int, int, int]  # channels, height, width
    net: Callable[[Tensor], Tensor]
    about: dict[str, str]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != self.shape:
            raise disback.Refusal(f"images must be uint8 {list(self.shape)}, not {images.dtype} "
                                  f"{list(images.shape[1:])}: is it the right --preset?")
        return self.net(images)


def of_digits(device: str) -> tuple[Extractor, tuple[Tensor, Tensor]]:
    """Preset tiny: the digits' classifier, mean and covariance of its features of all digits."""
    net = digits.classifier().to(device)
    weights = b"".join(t.cpu().numpy().tobytes() for t in net.state_dict().values())
    extractor = Extractor((1, 8, 8), lambda x: net.features(x.to(device) / 127.5 - 1),
                          {"features_sha256": hashlib.sha256(weights).hexdigest(),
                           "reference_sha256": files.sha256(digits.FILE)})
    features = extractor(to_uint8(digits.load()[0])).cpu().double()
    return extractor, (features.mean(dim=0), features.T.cov())


def of_inception(inception: Path, reference: Path,
                 device: str) -> tuple[Extractor, tuple[Tensor, Tensor]]:
    """Preset full: Inception from a TorchScript file, mu and sigma of the data from an .npz.
    Refuses files that are not that."""
    with files.blame(f"{inception} is not the TorchScript Inception of {download.INCEPTION}: "
                     + files.remedy(inception, "name that by --inception")):
        digest = files.sha256(inception)
        net = torch.jit.load(inception, map_location=device).eval()
        zeros = torch.zeros(1, 3, 64, 64, dtype=torch.uint8, device=device)
        if not net(zeros, return_features=True).isfinite().all():
            raise ValueError("its features are not finite")
    mean, cov = read_reference(reference)
    extractor = Extractor((3, 64, 64), lambda x: net(x.to(device), return_features=True),
                          {"features_sha256": digest,
                           "reference_sha256": files.sha256(reference)})
    return extractor, (mean, cov)


def read_reference(file: Path) -> tuple[Tensor, Tensor]:
    """Mean [dim] and covariance [dim, dim] in an .npz with mu and sigma, in float64, or Refusal."""
    mean, cov = (torch.from_numpy(a.astype("f8")) for a in read_npz(file, "mu", "sigma"))
    with files.blame(f"{file} holds no mean and covariance as the file of {download.REFERENCE} "
                     "does: " + files.remedy(file, "name that by --reference")):
        must(mean.dim() == 1 and len(mean) and cov.shape == 2 * mean.shape,
             f"their shapes are {list(mean.shape)} and {list(cov.shape)}")
        must(mean.square().sum().isfinite() and cov.square().sum().isfinite()
             and cov.allclose(cov.T), "they are not finite, or not symmetric")
        root(cov)
    return mean, cov


def read_npz(file: Path, *names: str) -> list[np.ndarray]:
    """The arrays of these names, none of them unpickled; Refusal where the file lacks one."""
    with files.blame(f"{file} is no .npz file with {' and '.join(names)}: "
                     + files.remedy(file, "name another")):
        with open(file, "rb") as handle:
            if not zipfile.is_zipfile(handle):  # numpy's advice would be to trust it
                raise ValueError("it is no archive of arrays")
        with np.load(file, allow_pickle=False) as data:
            arrays = [data[name] for name in names]
        if not all(isinstance(a, np.ndarray) and a.dtype.kind in "uif" for a in arrays):
            raise ValueError("not arrays of numbers")
        return arrays
