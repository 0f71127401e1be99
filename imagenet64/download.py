"""Fetching the files that preset full needs: what comes is checked before it gets a file's name."""

import contextlib
import http.client
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from filelock import FileLock

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
            torch.hub.download_url_to_file(url, str(beside))
            check(beside)
        except (OSError, ValueError, http.client.HTTPException) as error:
            if getattr(error, "errno", None) in NO_ROOM:
                raise
            raise disback.Refusal(
                f"cannot download {url}, or what was sent is another file or not whole "
                f"({error.__cause__ or error}): try again, or put the file at {file} by hand"
            ) from error

    if file.exists():
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        with contextlib.suppress(PermissionError):  # the lock is another user's: do without
            held.enter_context(FileLock(file.with_name(f".{file.name}.lock")))
            files.sweep(file.parent, file.name)  # killed downloads, which may be gigabytes
        if not file.exists():  # another process may have fetched it meanwhile
            files.atomically(file, download)
    return file


def check_inception(file: Path) -> None:
    """ValueError where the file is not that of INCEPTION."""
    if (found := files.sha256(file)) != INCEPTION_SHA256:
        raise ValueError(f"its SHA-256 is {found}, not {INCEPTION_SHA256}")
