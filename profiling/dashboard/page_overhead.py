"""What an open page with its live charts costs the engine: tokens/s with the page beside tokens/s without, in turns.

The engine, the page's server and the load are one process, as they are for visitors. A visitor's browser is on a machine of its
own; here it would take the engine's cores to draw the charts. So the page is open as the server sees it: `visitor` asks for all
that the open page asks for while its charts move. What a browser costs that draws on the same machine is measured on request.

Eight requests at a time keep the engine busy throughout, and a visitor's own load goes on. In one half of a round an open *Live
load* tab shows it, whose charts move; in the other nobody looks. Which half is first changes every round, and halves are short,
since a machine drifts.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from flora.engine import Engine
from flora.errors import FloraError, RequestError, first_line
from profiling import workload
from profiling.dashboard import page
from profiling.dashboard.live_load import MAX_ADAPTERS, UPDATE_S, Wish
from profiling.load import Driver
from profiling.load_runs import sources_of
from profiling.timing import Ratio, paired_ratio
from profiling.traffic import EndlessTraffic

CONCURRENCY = 8  # requests that keep the engine busy
RATE = 0.5  # requests a second of the visitor's own load
FEWEST, SMALLEST = 0.5, 2000  # of the answers that are due, so many have to come; bytes of one that moves the charts
SETTLE_S = 0.3  # before a half counts
LOADED_S = 5.0  # what a browser goes on with after its page is there
_STARTED = "() => /^[1-9]/.test(document.querySelector('#load-readouts [data-cell=requests]')?.textContent)"


def measure(rounds: int, seconds: float, draws: bool = False) -> Ratio:
    """tokens/s with an open page over tokens/s without, paired by round, of halves of so many seconds.

    draws: a browser on this machine draws the page, on the engine's cores. Raises FloraError where the page does not answer or its
    charts do not move; with draws, RequestError where there is no playwright or no Chromium.
    """
    assets = workload.ASSETS
    engine = Engine.from_pretrained(assets / "models" / "code", workload.discover_adapters(assets / "adapters" / "code"))
    engines = {"code": engine}
    demo = page.build(engines)
    demo.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, **page.launch_options(demo))
    halves: dict[bool, list[float]] = {True: [], False: []}  # somebody looks → tokens/s of each round
    try:
        with _busy(engines, demo), (_drawn if draws else _served)(demo) as look:
            for place in range(rounds):
                for looks in (True, False) if place % 2 else (False, True):
                    look(looks)
                    time.sleep(SETTLE_S)
                    halves[looks].append(_tokens_per_s(engine, seconds))
    finally:
        demo.close()
        engine.close(timeout_s=0.0)
    return paired_ratio(halves[True], halves[False])


Look = Callable[[bool], object]
"""Has the page's charts move from now on, or not."""


# --------------------------------------------------------------------------------------------------- on another machine


@contextmanager
def _served(demo: page.Page) -> Iterator[Look]:
    """A visitor whose load runs, and whose page asks for charts that move."""
    session = secrets.token_hex(8)
    demo.loads.start(session, _wish())
    address, event = demo.local_url.removeprefix("http://").rstrip("/"), _event_that_moves_the_charts(demo)
    command = [sys.executable, "-m", "profiling.dashboard.visitor", address, session, str(event), str(UPDATE_S)]
    visitor = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)

    def look(looks: bool) -> None:
        with suppress(BrokenPipeError):  # it has ended: what it has said tells why
            visitor.stdin.write(b"l" if looks else b"r")

    try:
        yield look
        said, complaint = visitor.communicate(timeout=30)
        num_answers, looked_s, size = map(float, said.split()) if visitor.returncode == 0 else (0, 0, 0)
        due = looked_s / UPDATE_S
        if not num_answers or num_answers < FEWEST * due or size < SMALLEST:
            told = f"{num_answers:.0f} answers where {due:.0f} were due, the last of {size:.0f} bytes"
            raise FloraError(f"the page's charts did not move: {first_line(complaint.decode()) or told}")
    finally:
        visitor.kill()
        demo.loads.forget(session)


def _event_that_moves_the_charts(demo: page.Page) -> int:
    """The number of the *Live load* tab's tick."""
    return next(
        number
        for number, event in demo.fns.items()
        if any(name == "tick" for _, name in event.targets) and any(one.elem_id == "load-readouts" for one in event.outputs)
    )


# ---------------------------------------------------------------------------------------------------- on this machine


@contextmanager
def _drawn(demo: page.Page) -> Iterator[Look]:
    """A visitor whose load runs, and whose browser draws the page."""
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError as error:
        raise RequestError("to draw the page needs playwright: pip install -r requirements-dev.txt") from error
    try:
        with sync_playwright() as playwright, ExitStack() as opened:
            path = _chromium() or playwright.chromium.executable_path
            browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])

            def look(looks: bool) -> None:
                opened.close()
                opened.enter_context(_open_page(browser, demo.local_url) if looks else _without_page(demo))

            yield look
    except Error as error:
        raise FloraError(f"the browser could not show the page: {str(error).splitlines()[0]}") from error


def _chromium() -> str | None:
    """The browser to drive: CHROMIUM, one on the PATH, else the one that playwright installed."""
    names = (os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome")
    return next((path for name in names if name and (path := shutil.which(name))), None)


@contextmanager
def _open_page(browser: Any, url: str) -> Iterator[None]:
    """A visitor whose load runs and whose charts move."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    try:
        shown = context.new_page()
        shown.goto(url)
        shown.locator("#chart .main-svg").first.wait_for()
        shown.get_by_role("tab", name="Live load").click()
        rate = shown.locator("#load-rate input[type=number]")
        rate.fill(str(RATE))
        rate.press("Tab")
        shown.locator("#load-start").click()
        shown.wait_for_function(_STARTED)
        time.sleep(LOADED_S)
        yield
    finally:
        context.close()


# ------------------------------------------------------------------------------------------------------ in both halves


def _wish() -> Wish:
    return Wish(rate=RATE, num_adapters=MAX_ADAPTERS)


@contextmanager
def _busy(engines: Mapping[str, Engine], demo: page.Page) -> Iterator[None]:
    """As many requests at a time as keep the engine busy, until the context is left."""
    wish = _wish()
    traffic = EndlessTraffic(wish.traffic(list(engines)), sources_of(engines), demo.loads.adapters(wish))
    driver = Driver(engines, wish.method, traffic, concurrency=CONCURRENCY, session="everybody else", num_records=100)
    driver.start()
    try:
        yield
    finally:
        driver.stop()
        driver.join(10.0)


@contextmanager
def _without_page(demo: page.Page) -> Iterator[None]:
    """The same visitor's load without anybody who looks."""
    demo.loads.start("nobody looks", _wish())
    try:
        yield
    finally:
        demo.loads.forget("nobody looks")


def _tokens_per_s(engine: Engine, seconds: float) -> float:
    """New tokens of everybody's requests in the next seconds."""
    before, began_s = engine.snapshot().num_tokens, time.perf_counter()
    time.sleep(seconds)
    return (engine.snapshot().num_tokens - before) / (time.perf_counter() - began_s)
