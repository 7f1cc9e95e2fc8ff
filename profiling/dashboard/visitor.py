"""A visitor's open page as the server sees it, without a browser: it asks for what is new as often as the page's timer does.

Run as a program, so that what it does is no work of the server's process:

    python -m profiling.dashboard.visitor ADDRESS SESSION EVENT SECONDS

ADDRESS: host:port of the page. EVENT: the number of the timer's event. SECONDS: how often it ticks. It is told on its standard
input what to do, a letter each: "l", look (as at first), "r", rest. It ends with its standard input and prints how many answers
came, in how many seconds of looking, and how large the last one was, in bytes as they travelled.
"""

from __future__ import annotations

import http.client
import json
import os
import select
import sys
import threading
import time
from collections.abc import Sequence

_HEADERS = {"Content-Type": "application/json", "Accept-Encoding": "gzip, deflate, br, zstd"}  # as Chromium sends them


def visit(address: str, session: str, event: int, every_s: float) -> tuple[int, float, int]:
    """Tick until standard input ends: answers, seconds of looking, bytes of the last one. RuntimeError where one is refused."""
    threading.Thread(target=_heartbeat, args=(address, session), daemon=True).start()
    connection = http.client.HTTPConnection(address, timeout=60)
    body = json.dumps({"fn_index": event, "session_hash": session, "data": [], "event_data": None, "trigger_id": None})
    num_answers, looked_s, size = 0, 0.0, 0
    looks, due_s, seen_s = True, time.monotonic(), time.monotonic()
    while True:
        told, _, _ = select.select([0], [], [], max(0.0, due_s - time.monotonic()) if looks else None)
        looked_s += looks * (time.monotonic() - seen_s)
        seen_s = time.monotonic()
        if told:
            letters = os.read(0, 64)
            if not letters:
                return num_answers, looked_s, size
            looks, due_s = letters.endswith(b"l"), seen_s
            continue
        connection.request("POST", "/gradio_api/run/predict", body, _HEADERS)
        answer = connection.getresponse()
        size = len(answer.read())
        if answer.status != 200:
            raise RuntimeError(f"the server answered {answer.status}")
        num_answers += 1
        due_s = max(due_s + every_s, time.monotonic())


def _heartbeat(address: str, session: str) -> None:
    """By which the server knows that the page is open."""
    connection = http.client.HTTPConnection(address)
    connection.request("GET", f"/gradio_api/heartbeat/{session}", headers=_HEADERS)
    answer = connection.getresponse()
    while answer.read1():
        pass


def main(arguments: Sequence[str]) -> None:
    address, session, event, every_s = arguments
    print(*visit(address, session, int(event), float(every_s)))


if __name__ == "__main__":
    main(sys.argv[1:])
