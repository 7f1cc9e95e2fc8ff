"""What rows, commands and messages call a model, an adapter or a file: enough to find it, and no folder of this machine."""

from __future__ import annotations

from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]


def public_name(name: str | Path) -> str:
    """A hub id or relative path as it is; an absolute one seen from here or from the project, else its last two parts."""
    path = Path(name)
    for root in (Path.cwd(), PROJECT):
        if path.is_absolute() and path.is_relative_to(root):
            return path.relative_to(root).as_posix()
    elsewhere = path.is_absolute() or ".." in path.parts or str(name).startswith("~")
    return "/".join(path.parts[-2:]) if elsewhere else str(name)


def last_part(name: str) -> str:
    """The last part of a path that is here; a hub id as it is."""
    return Path(name).name if Path(name).exists() else name
