"""The whole page: head line and tabs, and how it is served."""

from __future__ import annotations

import html
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gradio as gr
import torch

from flora.engine import Engine
from profiling import workload
from profiling.dashboard.accuracy import build_accuracy_tab
from profiling.dashboard.api import add_endpoints
from profiling.dashboard.compare import build_compare_tab
from profiling.dashboard.device import Device, StopSignals
from profiling.dashboard.live_load import LiveLoads, build_live_load_tab
from profiling.dashboard.live_plot import plotly_route
from profiling.dashboard.theme import CSS_FILE, theme

TITLE = "fLoRA Live"
MAX_QUEUE = 20  # events that gradio keeps waiting, beyond the runs in line for the device
MAX_THREADS = 60  # every run in line holds one, the rest answers clicks
MAX_FILE_SIZE = "10mb"


class Page(gr.Blocks):
    """The page with the device it runs on; closing it stops the run under way, and the visitors' loads."""

    def __init__(self, device: Device, loads: LiveLoads, **keywords: Any):
        super().__init__(**keywords)
        self.device, self.loads = device, loads

    def close(self, verbose: bool = True) -> None:
        self.device.close()
        self.loads.close()
        super().close(verbose)


def build(engines: Mapping[str, Engine], results_folder: str | os.PathLike | None = None) -> Page:
    """The page for these engines, kind ("code", "speech") -> engine; serve it with `demo.launch(**launch_options())`.

    results_folder: the recorded evaluations that the Accuracy tab shows; it may be empty, or not there. None: those that ship.
    """
    device, stops, loads = Device(), StopSignals(), LiveLoads(engines)
    with Page(device, loads, title=TITLE, analytics_enabled=False, delete_cache=(3600, 24 * 3600), fill_width=True) as demo:
        with gr.Column(elem_id="flora-page"):
            gr.HTML(_head(engines), apply_default_css=False, elem_id="head")
            with gr.Tabs(elem_classes="tabs"):
                with gr.Tab("Compare", id="compare"):
                    build_compare_tab(engines, device, stops)
                if engines:
                    with gr.Tab("Live load", id="live-load"):
                        build_live_load_tab(loads, device_line(engines))
                with gr.Tab("Accuracy", id="accuracy") as accuracy_tab:
                    build_accuracy_tab(accuracy_tab, Path(results_folder or workload.ASSETS / "results"))
        add_endpoints(engines, device)

        def forget(request: gr.Request) -> None:
            stops.forget(request.session_hash)
            loads.forget(request.session_hash)

        demo.unload(forget)
    demo.queue(max_size=MAX_QUEUE, default_concurrency_limit=None)
    return demo


def launch_options() -> dict[str, Any]:
    """What `launch` needs besides an address: the look, plotly.js, and limits on what visitors may send and see."""
    return {
        "theme": theme(),
        "css_paths": CSS_FILE,
        "app_kwargs": {"routes": [plotly_route()]},
        "allowed_paths": [str(workload.ASSETS / "clips")],
        "max_file_size": MAX_FILE_SIZE,
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


def _head(engines: Mapping[str, Engine]) -> str:
    return f'<header class="head"><h1>{TITLE}</h1><div class="device">{html.escape(device_line(engines))}</div></header>'
