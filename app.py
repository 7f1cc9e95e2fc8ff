"""The door: command line -> engines -> page -> server.

python app.py                      # the embedded models on http://127.0.0.1:7860
python app.py --code-model starcoderbase-1b --adapters lua=path/to/flora lua=path/to/lora
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from profiling.options import add_base_model_check, add_rights, add_weights

if TYPE_CHECKING:
    from flora import Engine
    from profiling.dashboard.page import Page

KINDS = ("code", "speech")
DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 7860


class _Parser(argparse.ArgumentParser):
    """Bad input: one line, exit 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _environment(*names: str) -> str | None:
    """The first of these environment variables that says something."""
    return next((os.environ[name] for name in names if os.environ.get(name)), None)


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"a port is a number from 1 to 65535, not {text!r}")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) <= 1024:
        raise argparse.ArgumentTypeError(f"a number of threads is a whole number of at least 1, not {text!r}")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """The command line of the app."""
    parser = _Parser(
        prog="app.py", description="fLoRA Live: one model, many adapters, one batch; fLoRA beside bmm-LoRA in the browser."
    )
    parser.add_argument(
        "--host", default=_environment("HOST", "GRADIO_SERVER_NAME") or DEFAULT_HOST, help="default: HOST, or 127.0.0.1"
    )
    parser.add_argument(
        "--port", type=_port, default=_environment("PORT", "GRADIO_SERVER_PORT") or str(DEFAULT_PORT), help="default: PORT, or 7860"
    )
    for kind in KINDS:
        parser.add_argument(
            f"--{kind}-model", metavar="MODEL", help=f"folder, hub id or short name; default: the embedded {kind} one"
        )
        parser.add_argument(
            f"--{kind}-adapters",
            nargs="+",
            metavar="TAG=SOURCE",
            help=f"the {kind} model's adapters, each a folder or hub id; default: those that ship, for the embedded model",
        )
    parser.add_argument(
        "--adapters",
        nargs="+",
        default=[],
        metavar="TAG=SOURCE",
        help="more adapters, each for the model that it fits; a tag may be given twice, once per family",
    )
    add_base_model_check(parser)
    add_rights(parser)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps; default: auto")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, float16; default: auto")
    add_weights(parser)
    parser.add_argument("--results", metavar="FOLDER", help="recorded evaluations that the page shows; default: those that ship")
    parser.add_argument("--threads", type=_count, metavar="N", help="torch's CPU threads; default: torch's own choice")
    return parser


def load_engines(options: argparse.Namespace) -> dict[str, Engine]:
    """kind -> engine, as the command line asks. Raises the FloraError that says what is wrong with a model or an adapter."""
    from profiling.loading import add_where_it_fits, load_engine, set_threads

    set_threads(options.threads)
    engines = {kind: load_engine(kind, options) for kind in KINDS}
    add_where_it_fits(engines, options.adapters, options.any_base_model)
    return engines


def build_demo(options: argparse.Namespace) -> Page:
    """The page, not yet served."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported: nothing is sent anywhere
    from profiling.dashboard import page
    from profiling.dashboard.policy import Policy

    policy = Policy.of_command_line(options.allow, options.host)  # before anything is loaded: it may be mistyped
    return page.build(load_engines(options), options.results, policy, options)


def serve(demo: Page, host: str, port: int) -> None:
    """Serve the page until Ctrl-C or SIGTERM. Raises OSError where the port is taken."""
    from profiling.dashboard import page

    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    demo.launch(server_name=host, server_port=port, prevent_thread_lock=True, quiet=True, **page.launch_options(demo))
    print(f"fLoRA Live is at {demo.local_url} (Ctrl-C stops it)", flush=True)
    stop.wait()
    print("stopping", flush=True)
    demo.close(verbose=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve; 0 when stopped, 2 with one line on stderr for bad input."""
    command_line = parser()
    options = command_line.parse_args(arguments)
    # Heavy imports wait until the command line is known to be good: --help and a mistyped option answer at once.
    from flora.errors import FloraError

    try:
        demo = build_demo(options)
        serve(demo, options.host, options.port)
    except FloraError as error:
        command_line.error(" ".join(str(error).split()))
    except OSError as error:
        command_line.error(f"cannot serve on {options.host}:{options.port}: {' '.join(str(error).split())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
