"""What this machine allows, measured: copy bandwidth, the rate of matrix products by dtype, the cost of a launch, memory.

    copy bandwidth   a tensor copied into another, bytes read and written; each is several times as large as the last cache
    matrix rate      a square product, 2 · n³ operations, n large enough that more of it is not faster; float32 as PyTorch has it by
                     default, without TF32; int8 into int32, on a GPU
    launch           calls that do next to nothing, one after another without waiting between: an empty kernel on a GPU, an addition
                     to one number on a CPU

The best of repeats, since what is kept should not remember a moment in which the machine did something else; of launches the
median. A few seconds in all. They are kept in the user's cache folder, for the same device, versions and threads.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import TypeVar

import psutil
import torch

from flora.models import choose_device
from flora.user_cache import cache_folder, read, write
from profiling import hardware, report
from profiling.document import text_table
from profiling.loading import set_threads
from profiling.timing import median, synchronise

Row = TypeVar("Row")

REPEATS = 7
MIN_CPU_BUFFER, MIN_GPU_BUFFER = 128 << 20, 1 << 30  # bytes
CACHE_MULTIPLE = 4  # so many times the last cache a copied tensor is, at least
UNKNOWN_CACHE = 64 << 20  # bytes, where the system does not tell
MEMORY_SHARE = 0.1  # of what is free, for each of the two tensors, at most
GPU_WIDTH, CPU_WIDTHS = 8192, (1024, 512, 256, 128)
LONGEST_PRODUCT_S = 0.1
NUM_LAUNCHES = 1000
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Peaks:
    """What was measured on a device, and how. Rates in a second; operations are multiplications and additions."""

    device: str
    device_name: str
    torch: str
    cuda: str | None
    threads: int | None  # None on a GPU
    copy_bytes_per_s: float
    copy_buffer_bytes: int  # of each of the two tensors
    cache_bytes: int | None  # the last cache: L2 of a GPU, L3 of a CPU
    matrix_flops_per_s: dict[str, float]  # by dtype
    matrix_width: dict[str, int]  # by dtype, n of the n × n product
    launch_s: float
    memory_bytes: int
    repeats: int

    def as_row(self) -> dict:
        """A flat record; `Peaks.of_row` reads it back."""
        return asdict(self)

    @classmethod
    def of_row(cls, row: dict) -> Peaks:
        """From `as_row`; ValueError for anything that no measurement gives."""
        if not isinstance(row, dict) or set(row) != {field.name for field in fields(cls)}:
            raise ValueError("these are no peaks")
        rates = row["matrix_flops_per_s"]
        if not (isinstance(rates, dict) and isinstance(row["matrix_width"], dict) and rates.keys() == row["matrix_width"].keys()):
            raise ValueError("these are no rates of matrix products")
        numbers = [row["copy_bytes_per_s"], row["launch_s"], row["memory_bytes"], row["copy_buffer_bytes"], *rates.values()]
        if not rates or not all(isinstance(number, int | float) and 0 < number < float("inf") for number in numbers):
            raise ValueError("a peak is a number above 0")
        return cls(**row)


# ------------------------------------------------------------------------------------------------------------- measure


def measure(device: torch.device, clock: Callable[[], float] = time.perf_counter, repeats: int = REPEATS) -> Peaks:
    """Measure everything anew. Takes a few seconds."""
    timer = _Timer(device, clock, repeats)
    on_gpu = device.type == "cuda"
    cache_bytes, memory_bytes, free_bytes = _memory(device)
    smallest = MIN_GPU_BUFFER if on_gpu else MIN_CPU_BUFFER
    wanted = max(smallest, CACHE_MULTIPLE * (cache_bytes or UNKNOWN_CACHE))
    size = int(min(wanted, MEMORY_SHARE * free_bytes)) // 4096 * 4096
    rates, widths = {}, {}
    with torch.inference_mode():
        launch_s = _launch_s(timer)
        copy_s = _copy_s(size, timer)
        for dtype in DTYPES:
            name = str(dtype).removeprefix("torch.")
            rates[name], widths[name] = _matrix_rate(dtype, timer)
        if on_gpu:
            rates["int8"], widths["int8"] = _int8_rate(timer)
    return Peaks(
        **identity_of(device),
        copy_bytes_per_s=2 * size / copy_s,
        copy_buffer_bytes=size,
        cache_bytes=cache_bytes,
        matrix_flops_per_s=rates,
        matrix_width=widths,
        launch_s=launch_s,
        memory_bytes=memory_bytes,
        repeats=repeats,
    )


def identity_of(device: torch.device) -> dict:
    """What a measurement holds for: the fields of `Peaks` that are known before."""
    on_gpu = device.type == "cuda"
    return {
        "device": device.type,
        "device_name": hardware.device_name(device),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda if on_gpu else None,
        "threads": None if on_gpu else torch.get_num_threads(),
    }


def _memory(device: torch.device) -> tuple[int | None, int, int]:
    """Bytes of the last cache (None: unknown), of memory, and of memory that is free."""
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        return facts.L2_cache_size, facts.total_memory, torch.cuda.mem_get_info(device)[0]
    memory = psutil.virtual_memory()
    return _last_cache(), memory.total, memory.available


def last_cache_bytes() -> int:
    """Of a CPU; a guess where the system does not tell."""
    return _last_cache() or UNKNOWN_CACHE


def _last_cache() -> int | None:
    """Bytes of a CPU's L3, where Linux tells."""
    file = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    try:
        text = file.read_text(encoding="ascii").strip()
        return int(text[:-1]) << {"K": 10, "M": 20}[text[-1]]
    except (OSError, ValueError, KeyError, IndexError):
        return None


@dataclass(frozen=True)
class _Timer:
    device: torch.device
    clock: Callable[[], float]
    repeats: int

    def seconds(self, call: Callable[[], object], calls: int = 1) -> list[float]:
        """Of one call, `calls` in a row, repeated; one round before them is not counted."""
        taken = []
        for repeat in range(-1, self.repeats):
            synchronise(self.device)
            started = self.clock()
            for _ in range(calls):
                call()
            synchronise(self.device)
            if repeat >= 0:
                taken.append((self.clock() - started) / calls)
        return taken


def _launch_s(timer: _Timer) -> float:
    if timer.device.type == "cuda":
        return median(timer.seconds(partial(torch.cuda._sleep, 0), NUM_LAUNCHES))  # a kernel that waits for no cycles
    number = torch.zeros(1, device=timer.device)
    return median(timer.seconds(partial(number.add_, 1.0), NUM_LAUNCHES))


def _copy_s(size: int, timer: _Timer) -> float:
    source, target = (torch.zeros(size, dtype=torch.uint8, device=timer.device).view(torch.float32) for _ in range(2))
    return min(timer.seconds(partial(target.copy_, source)))


def _matrix_rate(dtype: torch.dtype, timer: _Timer) -> tuple[float, int]:
    """Operations a second, and the width n of the products, the widest that takes no longer than LONGEST_PRODUCT_S on a CPU."""
    if timer.device.type == "cuda":
        width = GPU_WIDTH
    else:
        # Some dtypes have no fast product on some CPUs: a small one says what a large one would take.
        small_s = min(timer.seconds(_product(CPU_WIDTHS[-1], dtype, timer.device)))
        width = next((n for n in CPU_WIDTHS if small_s * (n / CPU_WIDTHS[-1]) ** 3 <= LONGEST_PRODUCT_S), CPU_WIDTHS[-1])
    return 2 * width**3 / min(timer.seconds(_product(width, dtype, timer.device))), width


def _product(width: int, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    a, b = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
    return partial(torch.mm, a, b.T, out=torch.empty_like(a))  # as a linear layer has its weight: some dtypes are fast only so


def _int8_rate(timer: _Timer) -> tuple[float, int]:
    a, b = (torch.randint(-127, 128, (GPU_WIDTH, GPU_WIDTH), device=timer.device, dtype=torch.int8) for _ in range(2))
    return 2 * GPU_WIDTH**3 / min(timer.seconds(partial(torch._int_mm, a, b.T))), GPU_WIDTH


# ---------------------------------------------------------------------------------------------------------------- keep


def peaks(device: torch.device, fresh: bool = False, clock: Callable[[], float] = time.perf_counter) -> Peaks:
    """What was measured on this machine before, or what is measured now. fresh: measure in any case."""
    identity = identity_of(device)
    found = None if fresh else find("peaks", identity, Peaks)
    if found is None:
        found = measure(device, clock)
        keep("peaks", identity, found.as_row())
    return found


def find(name: str, identity: dict, made_of: type[Row]) -> Row | None:
    """What was kept under a name for the same identity, which is a part of its row; None where nothing that can be used was.

    made_of: has `as_row`, and `of_row`, which raises ValueError for what is no such row.
    """
    file = _file(name, identity)
    if file is None:
        return None
    try:
        found = made_of.of_row(read(file))
    except ValueError:
        return None
    return found if identity.items() <= found.as_row().items() else None


def _file(name: str, identity: dict) -> Path | None:
    digest, folder = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16], cache_folder()
    return None if folder is None else folder / f"{name}-{digest}.json"


def keep(name: str, identity: dict, row: dict) -> None:
    """As a whole or not at all; without a folder that can be written to, it is measured again the next time."""
    file = _file(name, identity)
    if file is not None:
        write(file, row)


# ------------------------------------------------------------------------------------------------------------- command


def table(found: Peaks) -> str:
    """What this machine allows, for a terminal."""
    buffer = f"{found.copy_buffer_bytes / 2**20:,.0f} MiB, the last cache has "
    buffer += "unknown size" if found.cache_bytes is None else f"{found.cache_bytes / 2**20:,.0f} MiB"
    lines = [["copy bandwidth", f"{found.copy_bytes_per_s / 1e9:,.1f} GB/s", f"read and written; tensors of {buffer}"]]
    for dtype, rate in found.matrix_flops_per_s.items():
        width = found.matrix_width[dtype]
        lines.append([f"matrix rate, {dtype}", f"{rate / 1e12:,.3g} T/s", f"operations; {width} × {width}"])
    what = "an empty kernel" if found.device == "cuda" else "an addition to one number"
    lines.append(["launch", f"{1e6 * found.launch_s:,.2f} µs", what])
    lines.append(["memory", f"{found.memory_bytes / 2**30:,.1f} GiB", ""])
    return text_table(("limit", "measured", "how"), lines, num_names=3)


def run(options: argparse.Namespace) -> int:
    """What `python -m profiling hardware` does. Raises a FloraError for bad input."""
    set_threads(options.threads)
    device = choose_device(options.device)
    found = peaks(device, options.fresh)
    facts = hardware.environment() | {"device": device.type, "device_name": hardware.device_name(device)}
    print(hardware.summary(facts), end="\n\n")
    print(table(found))
    if options.json:
        row = {"measures": "peaks", **found.as_row(), "hardware": facts, "command": report.own_command()}
        report.write_text(options.json, json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
    return 0
