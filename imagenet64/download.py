"""Fetching the files that preset full needs: resumed where a transfer broke, and checked."""

import http.client
import os
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

import disback
from runtime import files

NVIDIA = "https://nvlabs-fi-cdn.nvidia.com/"
TEACHER = NVIDIA + "edm/pretrained/edm-imagenet-64x64-cond-adm.pkl"
REFERENCE = NVIDIA + "edm/fid-refs/imagenet-64x64.npz"
INCEPTION = NVIDIA + "stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"
# As k-diffusion and others check it; no hash of the other two files was found published.
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"


def fetch(url: str, file: Path, sha256: str | None = None) -> Path:
    """Download `url` to `file` unless it is there, check its SHA-256 either way, return `file`.

    A transfer that breaks leaves `file`.part, and the next call goes on from there. Without a known
    hash, that of the first use is kept in `file`.sha256 and expected from then on. Raises
    disback.Refusal, which says what to download by hand or what to remove.
    """
    record, part = (file.with_name(file.name + end) for end in (".sha256", ".part"))
    sha256 = sha256 or (record.read_text().strip() if record.exists() else None)
    if not (there := file.exists()):
        try:
            part.parent.mkdir(parents=True, exist_ok=True)
            transfer(url, part)
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise disback.Refusal(f"cannot download {url} ({error}): try again to go on from where "
                                  f"it broke, or put the file at {file} by hand") from error
    found = files.sha256(file if there else part)
    if sha256 and found != sha256:
        raise disback.Refusal(f"{file if there else part} has SHA-256 {found}, not {sha256} as "
                              f"{url} should: remove it and try again")
    if not there:
        os.replace(part, file)
    if not sha256:
        files.atomically(record, lambda f: f.write_text(found + "\n"))
    return file


def transfer(url: str, part: Path) -> None:
    """Append to `part` what it lacks; OSError where the connection fails or ends too early."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        if error.headers["Content-Range"] != f"bytes */{have}":
            raise OSError(f"{part} is not a part of it, remove it") from error
        return  # nothing is left to send: an earlier call was ended just before its last step
    with response, open(part, "ab" if response.status == 206 else "wb") as out:
        start = out.tell()  # 0 where the server knows no ranges and sends all of it again
        total = start + int(response.headers["Content-Length"] or 0)
        with tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=part.stem) as bar:
            while chunk := response.read(1 << 20):
                bar.update(out.write(chunk))
        if out.tell() < total:
            raise OSError(f"{out.tell()} of {total} bytes arrived")
