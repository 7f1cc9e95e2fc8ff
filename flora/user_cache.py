"""What a machine's user need not wait for twice: small JSON files where the platform keeps what can be made again."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path


def cache_folder() -> Path | None:
    """Where this platform keeps what can be made again; None where there is no such place."""
    try:
        if sys.platform == "darwin":
            root = Path.home() / "Library" / "Caches"
        elif sys.platform == "win32":
            root = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
        else:
            root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # a user without a home
        return None
    return root / "flora-live"


def read(file: Path) -> object | None:
    """What a file holds; None where there is none that can be read."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write(file: Path, row: dict) -> None:
    """As a whole or not at all; nothing where no file can be written: it is made again the next time."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=file.parent, suffix=".part")
        with os.fdopen(handle, "w", encoding="utf-8") as part:
            json.dump(row, part)
        os.replace(name, file)
    except OSError:
        return
