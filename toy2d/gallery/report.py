"""table.md and gallery.png, from the lines alone."""

from pathlib import Path


def write(out: Path, lines: list[dict]) -> None:
    pass
