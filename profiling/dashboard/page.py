"""The whole page: head line and tabs, and how it is served."""

from __future__ import annotations

import argparse
import html
import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from starlette.middleware import Middleware

from flora.engine import Engine
from profiling import workload
from profiling.dashboard.accuracy import build_accuracy_tab
from profiling.dashboard.adapters import AdapterDesk
from profiling.dashboard.api import add_endpoints
from profiling.dashboard.compare import build_compare_tab
from profiling.dashboard.device import Device, StopSignals
from profiling.dashboard.engines import Engines
from profiling.dashboard.kernel_profiles import KernelProfiles
from profiling.dashboard.kernels import build_kernels_tab
from profiling.dashboard.live_load import LiveLoads, build_live_load_tab
from profiling.dashboard.live_plot import plotly_route
from profiling.dashboard.measuring import Measurements
from profiling.dashboard.menus import Follower, Following
from profiling.dashboard.models import ModelDesk
from profiling.dashboard.models_tab import build_models_tab
from profiling.dashboard.op_lab import build_op_lab_tab
from profiling.dashboard.policy import Policy
from profiling.dashboard.recorded_runs import COMPARISONS, LOADS, build_recorded_panel
from profiling.dashboard.sweep import build_sweep_tab
from profiling.dashboard.theme import CSS_FILE, theme
from profiling.dashboard.upload_quota import UploadQuota
from profiling.dashboard.uploads import MAX_UPLOAD_BYTES

TITLE = "fLoRA Live"
MAX_QUEUE = 20  # events that gradio keeps waiting, beyond the runs in line for the device
QUEUE_LOOKS_EVERY_S = 0.02  # gradio looks into an empty queue a thousand times a second, on a core that the engine needs
MAX_THREADS = 60  # every run in line holds one, the rest answers clicks
MAX_CLIP_BYTES = 10 * 1000**2


class Page(gr.Blocks):
    """The page with the device it runs on; closing it stops the run under way and the visitors' loads, and removes their adapters'
    files."""

    def __init__(
        self, device: Device, loads: LiveLoads, profiles: KernelProfiles, adapters: AdapterDesk, policy: Policy, **keywords: Any
    ):
        super().__init__(**keywords)
        self.device, self.loads, self.profiles, self.adapters, self.policy = device, loads, profiles, adapters, policy

    def close(self, verbose: bool = True) -> None:
        self.device.close()
        self.loads.close()
        self.profiles.close()
        self.adapters.close()
        super().close(verbose)


def build(
    engines: Mapping[str, Engine],
    results_folder: str | os.PathLike | None = None,
    policy: Policy | None = None,
    options: argparse.Namespace | None = None,
) -> Page:
    """The page for these engines, kind ("code", "speech") -> engine; serve it with `demo.launch(**launch_options(demo))`.

    results_folder: what was recorded, for the tabs that show it; it may be empty, or not there. None: those that ship.
    policy: what visitors may change; None: as on a page that others can reach. options: of the command line that loaded the
    engines, by which others are loaded; None: none can be.
    """
    engines, policy = Engines(engines), policy or Policy()
    device, stops, loads, adapters = Device(), StopSignals(), LiveLoads(engines), AdapterDesk(engines)
    results = Path(results_folder or workload.ASSETS / "results")
    measurements, profiles = Measurements(device), KernelProfiles(engines, results)
    engines.when_replaced(loads.replaced)
    models = None if options is None else ModelDesk(engines, device, options)

    @lru_cache(maxsize=1)
    def device_line_at(number: int) -> str:
        return device_line(engines)

    def computing() -> torch.device:
        return next((engine.device for engine in engines.values()), torch.device("cpu"))

    def line() -> str:
        return device_line_at(engines.number)

    with Page(
        device,
        loads,
        profiles,
        adapters,
        policy,
        title=TITLE,
        analytics_enabled=False,
        delete_cache=(3600, 24 * 3600),
        fill_width=True,
    ) as demo:
        with gr.Column(elem_id="flora-page"):
            head = gr.HTML(_head(line()), apply_default_css=False, elem_id="head")
            with gr.Tabs(elem_classes="tabs"):
                with gr.Tab("Compare", id="compare") as compare_tab:
                    followers = [build_compare_tab(engines, device, stops)]
                    build_recorded_panel(results, "compare", COMPARISONS)
                selected, changes = [compare_tab.select], []
                if engines:
                    with gr.Tab("Live load", id="live-load") as load_tab:
                        followers += build_live_load_tab(loads, line)
                        build_recorded_panel(results, "load", LOADS)
                    with gr.Tab("Kernels", id="kernels") as kernels_tab:
                        build_kernels_tab(kernels_tab, profiles, measurements)
                    with gr.Tab("Sweep", id="sweep") as sweep_tab:
                        build_sweep_tab(sweep_tab, engines, measurements, results, line)
                    selected.append(load_tab.select)
                with gr.Tab("Op lab", id="op-lab") as op_lab_tab:
                    build_op_lab_tab(op_lab_tab, measurements, computing, results)
                with gr.Tab("Accuracy", id="accuracy") as accuracy_tab:
                    build_accuracy_tab(accuracy_tab, results)
                if engines:
                    with gr.Tab("Models", id="models") as models_tab:
                        follower, changes = build_models_tab(models_tab, demo.load, adapters, models, policy)
                    followers.append(follower)
        followers.append(Follower([head], lambda values, opened: [_head(line())]))
        Following(engines, followers).connect(selected, changes, demo.load)
        add_endpoints(engines, device, adapters, policy)

        def forget(request: gr.Request) -> None:
            stops.forget(request.session_hash)
            loads.forget(request.session_hash)
            measurements.forget(request.session_hash)
            profiles.forget(request.session_hash)
            adapters.leave(request.session_hash)

        demo.unload(forget)
    demo.queue(max_size=MAX_QUEUE, default_concurrency_limit=None)
    demo._queue.sleep_when_free = QUEUE_LOOKS_EVERY_S
    return demo


def launch_options(demo: Page) -> dict[str, Any]:
    """What `launch` needs besides an address: the look, plotly.js, and limits on what visitors may send and see."""
    largest = MAX_UPLOAD_BYTES if "upload" in demo.policy.widest else MAX_CLIP_BYTES
    return {
        "theme": theme(),
        "css_paths": CSS_FILE,
        "app_kwargs": {
            "routes": [plotly_route(), demo.profiles.traces.route()],
            "middleware": [Middleware(UploadQuota, most_bytes=largest + 64_000)],
        },
        "allowed_paths": [str(workload.ASSETS / "clips")],
        "max_file_size": largest,
        "show_error": False,
        "footer_links": ["api", "settings"],
        "run_history": False,
        "enable_monitoring": False,
        "max_threads": MAX_THREADS,
        "share": False,
        "pwa": False,
    }


def device_line(engines: Mapping[str, Engine]) -> str:
    """Device, threads, dtype and models in one line."""
    devices = dict.fromkeys(engine.device.type for engine in engines.values())
    names = " + ".join(
        "CPU" if device == "cpu" else torch.cuda.get_device_name() if device == "cuda" else device for device in devices
    )
    dtypes = " + ".join(dict.fromkeys(str(engine.dtype).removeprefix("torch.") for engine in engines.values()))
    threads = torch.get_num_threads()
    parts = [names, f"{threads} thread{'s' if threads != 1 else ''}" if "cpu" in devices else "", dtypes]
    for kind, engine in engines.items():
        parameters = sum(parameter.numel() for parameter in engine.model.parameters())
        parts.append(f"{kind} model {parameters / 1e6:.1f} M parameters, {len(engine.adapters)} adapters")
    return " · ".join(part for part in parts if part)


def _head(line: str) -> str:
    return f'<header class="head"><h1>{TITLE}</h1><div class="device">{html.escape(line)}</div></header>'
