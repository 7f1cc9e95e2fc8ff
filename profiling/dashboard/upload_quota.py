"""A limit to what all uploads together take on disk: gradio limits each file, and no more than that."""

from __future__ import annotations

import os
from pathlib import Path

from gradio.utils import get_upload_folder
from starlette.concurrency import run_in_threadpool
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

MAX_HELD_BYTES = 2 * 1000**3


class UploadQuota:
    """Refuses an upload that says no length, says too great a one, or finds the folder of uploads full.

    most_bytes: of one upload. gradio itself removes what is a day old.
    """

    def __init__(self, app: ASGIApp, most_bytes: int, most_held_bytes: int = MAX_HELD_BYTES) -> None:
        self._app, self._most_bytes, self._most_held_bytes = app, most_bytes, most_held_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = None
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"].rstrip("/").endswith("/upload"):
            refusal = await self._refusal(scope)
        await (self._app if refusal is None else refusal)(scope, receive, send)

    async def _refusal(self, scope: Scope) -> PlainTextResponse | None:
        length = dict(scope["headers"]).get(b"content-length", b"").decode("latin-1")
        if not length.isdecimal():
            return PlainTextResponse("an upload has to say how long it is", 411)
        if int(length) > self._most_bytes:
            return PlainTextResponse(f"uploads are limited to {self._most_bytes // 1000**2} MB", 413)
        held = await run_in_threadpool(folder_bytes, Path(get_upload_folder()))
        if held + int(length) > self._most_held_bytes:
            return PlainTextResponse("the server holds as many uploads as it takes: try again tomorrow", 507)
        return None


def folder_bytes(folder: Path) -> int:
    """What the files below a folder take; those that go meanwhile do not count."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(place, name), follow_symlinks=False).st_size
            except FileNotFoundError:
                continue
    return total
