"""What an open page with its live charts costs the engine: tokens/s with the page beside tokens/s without, in turns.

The engine, the page's server and the load are one process, as they are for visitors. The browser is a real one, and asks the server
for all that a visitor's asks for. But a visitor's draws on a machine of its own, and this one would draw on the engine's cores: so
it counts the charts that it is given instead of drawing them, unless it is told to, and runs at the lowest priority (`nice`).

Eight requests at a time keep the engine busy throughout. In one half of a round a visitor's own load comes from an open *Live load*
tab, whose charts move meanwhile; in the other the same load comes without a page. Which half is first changes every round.
"""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flora.engine import Engine
from flora.errors import FloraError, RequestError
from profiling import workload
from profiling.dashboard import page
from profiling.dashboard.live_load import MAX_ADAPTERS, UPDATE_S, Wish
from profiling.load import Driver
from profiling.load_runs import sources_of
from profiling.timing import Ratio, paired_ratio
from profiling.traffic import EndlessTraffic

CONCURRENCY = 8  # requests that keep the engine busy
RATE = 0.5  # requests a second of the visitor's own load
_SLOWEST = 0.5  # of the moments at which charts should move, so many must have come
SETTLE_S = 2.0  # before a half counts: charts that move, a batch that is full
_STARTED = "() => /^[1-9]/.test(document.querySelector('#load-readouts [data-cell=requests]')?.textContent)"


_COUNTS_CHARTS = """
window.chartsGiven = 0;
window.floraPlotly = Promise.resolve({
  Icons: { home: {} },
  react: async (host) => { host.on = () => {}; window.chartsGiven += 1; },
});
"""
"""In the place of plotly.js, where `live_plot.js` looks for it."""


def measure(rounds: int, seconds: float, draws: bool = False) -> Ratio:
    """tokens/s with an open page over tokens/s without, paired by round, of halves of so many seconds.

    draws: the browser draws the charts, on the engine's cores. Raises RequestError where there is no playwright or no Chromium,
    FloraError where the page's charts do not move.
    """
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError as error:
        raise RequestError(
            "an open page needs playwright: pip install -r requirements-dev.txt, or leave the part page out"
        ) from error
    assets = workload.ASSETS
    engine = Engine.from_pretrained(assets / "models" / "code", workload.discover_adapters(assets / "adapters" / "code"))
    engines = {"code": engine}
    demo = page.build(engines)
    demo.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, **page.launch_options(demo))
    try:
        with _busy(engines, demo), sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
            polite = _polite(_chromium() or playwright.chromium.executable_path, Path(folder))
            browser = playwright.chromium.launch(executable_path=polite, args=["--no-sandbox", "--disable-gpu"])
            halves: dict[bool, list[float]] = {True: [], False: []}  # with a page → tokens/s of each round
            for place in range(rounds):
                for with_page in (True, False) if place % 2 else (False, True):
                    with _open_page(browser, demo.local_url, draws) if with_page else _without_page(demo):
                        time.sleep(SETTLE_S)
                        halves[with_page].append(_tokens_per_s(engine, seconds))
            browser.close()
    except Error as error:
        raise FloraError(f"the browser could not show the page: {str(error).splitlines()[0]}") from error
    finally:
        demo.close()
        engine.close(timeout_s=0.0)
    return paired_ratio(halves[True], halves[False])


def _chromium() -> str | None:
    """The browser to drive: CHROMIUM, one on the PATH, else the one that playwright installed."""
    names = (os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome")
    return next((path for name in names if name and (path := shutil.which(name))), None)


def _polite(chromium: str, folder: Path) -> Path:
    """A program that starts the browser at the lowest priority."""
    program = folder / "chromium"
    program.write_text(f'#!/bin/sh\nexec nice -n 19 {shlex.quote(chromium)} "$@"\n', encoding="utf-8")
    program.chmod(0o700)
    return program


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
def _open_page(browser: Any, url: str, draws: bool) -> Iterator[None]:
    """A visitor whose load runs and whose charts move."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    try:
        shown = context.new_page()
        if not draws:
            shown.add_init_script(_COUNTS_CHARTS)
        shown.goto(url)
        shown.get_by_role("tab", name="Live load").click()
        rate = shown.locator("#load-rate input[type=number]")
        rate.fill(str(RATE))
        rate.press("Tab")
        shown.locator("#load-start").click()
        shown.wait_for_function(_STARTED)
        before, began_s = 0 if draws else shown.evaluate("chartsGiven"), time.perf_counter()
        yield
        if not draws:
            given, expected = shown.evaluate("chartsGiven") - before, (time.perf_counter() - began_s) / UPDATE_S
            if given < _SLOWEST * expected:
                raise FloraError(f"the page's charts moved {given} times where {expected:.0f} were due: use a quieter machine")
    finally:
        context.close()


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
