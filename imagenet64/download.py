"""Fetching the files that preset full needs: what comes is checked before it gets a file's name."""

import contextlib
import fcntl
import http.client
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import disback
from runtime import files
from runtime.errors import NO_ROOM

NVIDIA = "https://nvlabs-fi-cdn.nvidia.com/"
TEACHER = NVIDIA + "edm/pretrained/edm-imagenet-64x64-cond-adm.pkl"
REFERENCE = NVIDIA + "edm/fid-refs/imagenet-64x64.npz"
INCEPTION = NVIDIA + "stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"
# As k-diffusion and others check it; no hash of the other two files was found published.
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"


def fetch(url: str, file: Path, check: Callable[[Path], object]) -> Path:
    """`file`, downloaded from `url` where it is not there yet. It gets its name once it is whole
    and `check` of it raised nothing. Refusal, which says what to do by hand, where that fails."""
    def download(beside: Path) -> None:
        print(f"downloading {url}", file=sys.stderr)
        socket.setdefaulttimeout(60)  # torch.hub would wait for a silent server for ever
        try:
            with alive(beside.parent):
                torch.hub.download_url_to_file(url, str(beside))
                check(beside)
        except (OSError, ValueError, http.client.HTTPException) as error:
            if getattr(error, "errno", None) in NO_ROOM:
                raise
            raise disback.Refusal(
                f"cannot download {url}, or what was sent is another file or not whole "
                f"({error.__cause__ or error}): try again, or put the file at {file} by hand"
            ) from error

    if not file.exists():
        bury(file)
        files.atomically(file, download)
    return file


@contextlib.contextmanager
def alive(folder: Path) -> Iterator[None]:
    """While this lasts, and its process lives, a file in the download's folder is locked."""
    with open(folder / "born", "w") as handle:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
            os.rename(folder / "born", folder / "alive")
        yield


def bury(file: Path) -> None:
    """Remove what killed downloads of `file` left, which may be gigabytes."""
    for folder in file.parent.glob(f".{file.name}.{'?' * 8}{files.UNFINISHED}"):
        with contextlib.suppress(OSError), open(folder / "alive", "r+") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails where it is alive
            shutil.rmtree(folder)


def check_inception(file: Path) -> None:
    """ValueError where the file is not that of INCEPTION."""
    if (found := files.sha256(file)) != INCEPTION_SHA256:
        raise ValueError(f"its SHA-256 is {found}, not {INCEPTION_SHA256}")
