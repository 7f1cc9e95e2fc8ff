"""The real app as a process of its own, and a real Chromium that watches for errors and for requests to other hosts.

FLORA_REQUIRE_BROWSER=1     a missing Chromium fails the tests instead of skipping them
FLORA_APP_ARGUMENTS="…"     more arguments for app.py, such as another model
FLORA_README_PICTURE=1      also write assets/figures/page.png
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCREENSHOTS = ROOT / "build" / "screenshots"
START_S = 300
RUN_MS = 240_000


def find_chromium() -> str | None:
    """The browser to drive: CHROMIUM, one on the PATH, else the one that playwright installed."""
    for name in (os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome"):
        if name and shutil.which(name):
            return shutil.which(name)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return None
    with sync_playwright() as playwright:
        path = playwright.chromium.executable_path
    return path if Path(path).is_file() else None


def pytest_collection_modifyitems(items) -> None:
    for item in items:
        if Path(__file__).parent in Path(item.fspath).parents:
            item.add_marker(pytest.mark.browser)


@pytest.fixture(scope="session")
def chromium_path() -> str:
    path = find_chromium()
    if path is None:
        reason = "NO BROWSER: Chromium or playwright is missing, so the page was NOT tested (playwright install chromium)"
        if os.environ.get("FLORA_REQUIRE_BROWSER") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return path


@pytest.fixture(scope="session")
def app_url(chromium_path, tmp_path_factory) -> Iterator[str]:
    """The address of `python app.py`; the process must end cleanly on Ctrl-C and must have logged no fault of ours."""
    folder = tmp_path_factory.mktemp("app")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "GRADIO_TEMP_DIR": str(folder / "uploads"), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, str(ROOT / "app.py"), "--host", "127.0.0.1", "--port", str(port)]
    if int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) > 1:  # another one has a server and a browser on the same processors
        command += ["--threads", "1"]
    command += shlex.split(os.environ.get("FLORA_APP_ARGUMENTS", ""))
    log = folder / "log.txt"
    with log.open("w") as output:
        # Another folder than the project's: the page must not depend on where it was started.
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=folder)
    url = f"http://127.0.0.1:{port}/"
    try:
        _wait_until_served(process, url, log)
        yield url
    finally:
        process.send_signal(signal.SIGINT)
        try:
            code = process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    written = log.read_text()
    assert code == 0, f"the app ended with {code}:\n{written}"
    # gradio logs a traceback of its own when it refuses a forged file; none may pass through our code.
    for place in ("app.py", "flora", "profiling"):
        assert str(ROOT / place) not in written, written


def _wait_until_served(process: subprocess.Popen, url: str, log: Path) -> None:
    until = time.monotonic() + START_S
    while time.monotonic() < until:
        assert process.poll() is None, f"the app ended before it served:\n{log.read_text()}"
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"no page within {START_S} s:\n{log.read_text()}")


@pytest.fixture(scope="session")
def browser(chromium_path):
    from playwright.sync_api import sync_playwright

    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_path, args=arguments)
        yield browser
        browser.close()


@contextmanager
def visits(browser, app_url: str) -> Iterator:
    """visit(theme, width, height) -> a page on the app; at the end: no console error, no request to another host."""
    complaints: list[str] = []
    contexts = []

    def open_one(theme: str = "light", width: int = 1280, height: int = 900, expected_error: str | None = None):
        def listen(message) -> None:
            if message.type == "error" and not (expected_error and expected_error in message.text):
                complaints.append(message.text)

        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=theme, accept_downloads=True)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("console", listen)
        page.on("pageerror", lambda error: complaints.append(f"uncaught: {error}"))
        page.on("request", lambda request: _foreign(request.url, app_url, complaints))
        page.on("dialog", lambda dialog: (complaints.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.goto(f"{app_url}?__theme={theme}")
        page.locator("#run").wait_for()
        page.locator("#chart .main-svg").first.wait_for()
        return page

    yield open_one
    for context in contexts:
        context.close()
    assert not complaints, complaints


@pytest.fixture
def open_page(browser, app_url):
    """open_page(theme, width, height) -> a page of the test's own."""
    with visits(browser, app_url) as visit:
        yield visit


@pytest.fixture(scope="module")
def shared_page(browser, app_url):
    """One page for those tests of a file that find on it what they need wherever the others left it: opening one takes seconds."""
    with visits(browser, app_url) as visit:
        yield visit()


def _foreign(url: str, app_url: str, complaints: list[str]) -> None:
    parts = urlsplit(url)
    if parts.scheme not in ("data", "blob") and parts.netloc != urlsplit(app_url).netloc:
        complaints.append(f"a request to another host: {url}")


@pytest.fixture(scope="session")
def screenshot():
    """screenshot(page, name): the whole page as build/screenshots/<name>.png."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)

    def take(page, name: str) -> Path:
        path = SCREENSHOTS / f"{name}.png"
        page.screenshot(path=path, full_page=True)
        return path

    return take
