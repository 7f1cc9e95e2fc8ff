"""Known traces give known tables; anything else that may come is an error in one sentence."""

from __future__ import annotations

import gc
import gzip
import json
import math

import fake_trace
import pytest
from fake_trace import FakeTrace

from profiling import kernel_figures
from profiling.categories import (
    ATTENTION,
    BMM,
    COPIES,
    ELEMENTWISE,
    GEMM,
    HOST,
    NORMALISATION,
    OTHER,
    category_of_kernel,
    category_of_op,
)
from profiling.trace import read_profile
from profiling.trace_diff import diff, sentence
from profiling.trace_file import TraceError, read_trace, write_tensorboard_run, write_trace
from profiling.trace_profile import TraceProfile


@pytest.fixture
def profile() -> TraceProfile:
    return read_profile(fake_trace.two_methods().document)


def nonzero(categories: dict[str, float]) -> dict[str, float]:
    return {name: pytest.approx(ms) for name, ms in categories.items() if ms}


def test_a_known_trace_gives_known_tables(profile):
    flora, bmm = profile.groups
    assert (profile.device, flora.method, flora.phase, bmm.method) == ("cpu", "flora", "decode", "bmm-lora")
    assert flora.step_ms == (0.1, 0.1) and bmm.step_ms == (0.08, 0.08)
    # aten::linear's own 10 µs, the range's 20 and the step's 20 are the host's.
    assert nonzero(flora.categories) == {GEMM: 0.04, ELEMENTWISE: 0.01, HOST: 0.05}
    assert nonzero(bmm.categories) == {GEMM: 0.02, BMM: 0.02, HOST: 0.04}
    assert (flora.launches, bmm.launches, flora.host_calls) == (2, 3, None)
    assert flora.busy == pytest.approx(0.5)
    mm = flora.kernels[0]
    assert (mm.name, mm.category, mm.shapes) == ("aten::mm", GEMM, "32×256 · 256×768")
    assert (mm.calls, mm.us, mm.where) == (1, 40, "attention")
    assert mm.product == (1, 32, 256, 768)
    assert [kernel.product for kernel in bmm.kernels if kernel.category == BMM] == [(8, 1, 256, 4), (8, 1, 4, 768)]
    assert [kernel.us for kernel in flora.kernels] == [40, 10, 10]


def test_the_tree_is_as_wide_as_the_step_and_layers_of_one_name_are_one(profile):
    tree = profile.groups[0].tree
    assert (tree.us, tree.calls) == (100, 1)
    layer, mul = tree.children
    assert (layer.name, layer.us, layer.calls) == ("attention | transformer.h.*.attn.c_attn", 70, 1)
    (linear,) = layer.children
    assert (linear.us, linear.children[0].name, linear.children[0].us) == (50, "aten::mm", 40)
    assert (mul.name, mul.us, mul.category) == ("aten::mul", 10, ELEMENTWISE)


def test_the_timeline_has_layers_operators_and_what_each_spends_itself(profile):
    lanes = {lane.name: lane.segments for lane in profile.groups[0].lanes}
    assert lanes["layers"] == ((10, 70, "", "attention | transformer.h.0.attn.c_attn"),)
    assert [segment[:2] for segment in lanes["operators"]] == [(20, 50), (85, 10)]
    linear, mm, linear_again, *_ = lanes["innermost"]
    assert (linear, mm) == ((20, 5, HOST, "aten::linear"), (25, 40, GEMM, "aten::mm"))
    assert linear_again == (65, 5, HOST, "aten::linear")


def test_memory_is_the_peak_beyond_the_steps_start_and_by_operator(profile):
    memory = profile.groups[0].memory
    assert (memory.peak_bytes, memory.allocated_bytes, memory.allocations) == (5096, 5096, 2)
    assert memory.by_op == (("aten::mm", 5096),)


def test_a_diff_says_what_is_launched_instead_and_where_time_was_won(profile):
    difference = diff(*profile.groups)
    assert [(change.name, change.shapes) for change in difference.instead] == [
        ("aten::mm", "32×256 · 256×768"),
        ("aten::mul", "8×1×256 · 8×4×256"),
    ]
    assert [change.name for change in difference.no_longer] == ["aten::addmm", "aten::bmm", "aten::bmm"]
    assert difference.gained_ms == pytest.approx({GEMM: -0.02, BMM: 0.02, ELEMENTWISE: -0.01, HOST: -0.01})
    words = sentence(difference, "fLoRA", "bmm-LoRA")
    assert words.startswith("bmm-LoRA's decode step is 0.02 ms shorter (20 %); ")
    assert "fLoRA runs 1 GEMM of 32 rows where bmm-LoRA runs 1 GEMM of 8 rows and 2 bmm" in words
    assert "0.02 ms lost in GEMMs" in words and "0.02 ms won in bmm" in words


def test_a_difference_within_noise_is_called_that():
    trace = FakeTrace()
    for start, duration in ((0, 100), (1000, 120), (2000, 90)):
        trace.annotation("step | flora | decode", start, duration)
        trace.op("aten::mm", start + 1, 50)
        trace.annotation("step | bmm-lora | decode", start + 500, duration + 3)
        trace.op("aten::mm", start + 501, 50)
    assert "do not differ beyond noise" in sentence(diff(*read_profile(trace.document).groups), "a", "b")


def test_a_step_of_ours_that_was_held_up_is_left_out_and_counted():
    trace = FakeTrace()
    for start, duration in ((0, 100), (1000, 110), (2000, 400)):
        trace.annotation("step | flora | decode", start, duration)
        trace.op("aten::mm", start + 1, 50)
    (group,) = read_profile(trace.document).groups
    assert (group.step_ms, group.num_held_up) == ((0.1, 0.11), 1)


def gpu_trace() -> FakeTrace:
    """A step of 100 µs: a GEMM of 30 µs, a copy of 10 that overlaps it by 5 on another stream, and a kernel out of a graph."""
    trace = FakeTrace()
    trace.annotation("step | flora | decode", 0, 100)
    trace.op("MLP | h.0.mlp.c_fc", 1, 20)
    trace.op("aten::linear", 2, 15, [[8, 256], [768, 256], []])
    trace.op("aten::addmm", 3, 12, [[768], [8, 256], [256, 768], [], []])
    trace.launch(5, 3, 11)
    trace.kernel("ampere_sgemm_32x32_sliced1x4_tn", 20, 30, 11)
    trace.launch(30, 3, 12, "cudaMemcpyAsync")
    trace.kernel("Memcpy DtoH (Device -> Pinned)", 45, 10, 12, stream=8, category="gpu_memcpy")
    trace.launch(40, 3, 13, "cudaGraphLaunch")
    trace.kernel("_decode_kernel", 60, 20, 13)
    trace.kernel("void at::native::reduce_kernel<512>", 500, 20, 99)  # after the step: not its
    trace.memory(10, 100, 100, device=0)
    trace.memory(11, 256, 1256, device=1)
    return trace


def test_on_a_gpu_the_steps_time_is_its_kernels_and_the_gap():
    profile = read_profile(gpu_trace().document)
    (group,) = profile.groups
    assert profile.device == "gpu"
    assert nonzero(group.categories) == {GEMM: 0.05, COPIES: 0.005, HOST: 0.045}  # of the copy, 5 µs are hidden
    assert (group.launches, group.host_calls) == (3, 2)
    assert group.busy == pytest.approx(0.55)
    by_name = {kernel.name: kernel for kernel in group.kernels}
    gemm = by_name["ampere_sgemm_32x32_sliced1x4_tn"]
    assert (gemm.us, gemm.shapes, gemm.where, gemm.product) == (30, "768 · 8×256 · 256×768", "MLP", (1, 8, 256, 768))
    assert by_name["Memcpy DtoH (Device -> Pinned)"].us == 10
    assert by_name["_decode_kernel"].category == GEMM
    assert [lane.name for lane in group.lanes] == ["layers", "operators", "GPU stream 7", "GPU stream 8"]
    layer = group.tree.children[0]
    assert (layer.name, layer.us) == ("MLP | h.*.mlp.c_fc", 30) and group.tree.us == 100
    assert group.memory.peak_bytes == 256  # the device's own


def test_traces_of_others_have_the_profilers_steps_or_are_one_whole():
    trace = FakeTrace()
    trace.op("aten::mm", 10, 20)
    trace.op("aten::relu", 35, 10, thread=2)
    trace.op("aten::mm", 50, 20)
    (whole,) = read_profile(trace.document).groups
    assert (whole.method, whole.phase, whole.step_ms) == (None, "whole trace", (0.06,))
    assert sum(whole.categories.values()) == pytest.approx(0.06)
    trace.annotation("ProfilerStep#0", 0, 40)
    trace.annotation("ProfilerStep#1", 40, 40)
    (steps,) = read_profile(trace.document).groups
    assert (steps.phase, steps.step_ms) == ("step", (0.04, 0.04))
    assert nonzero(steps.categories) == {GEMM: 0.02, HOST: 0.02}  # another thread's operator takes nothing of the step
    assert "aten::relu" in {kernel.name for kernel in steps.kernels}


@pytest.mark.parametrize(
    ("name", "category"),
    [
        ("aten::addmm", GEMM), ("aten::_int_mm", GEMM), ("flora::decode", GEMM), ("bitsandbytes::int8_linear_matmul", GEMM),
        ("aten::baddbmm", BMM), ("flora::sgmv_add_", BMM), ("aten::add_", ELEMENTWISE), ("aten::gelu", ELEMENTWISE),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", ATTENTION), ("aten::native_layer_norm", NORMALISATION),
        ("aten::copy_", COPIES), ("aten::view", HOST), ("aten::linear", HOST), ("AddmmBackward0", HOST), ("mylib::thing", OTHER),
    ],
)  # fmt: skip
def test_operators_have_categories(name, category):
    assert category_of_op(name) == category


@pytest.mark.parametrize(
    ("name", "launcher", "category"),
    [
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop>", None, GEMM), ("nvjet_tst_64x8_64x16_1x4_h_bz_TNT", None, GEMM),
        ("ampere_sgemm_32x32_sliced1x4_tn", BMM, BMM), ("_shrink_kernel", None, BMM), ("Memset (Device)", GEMM, COPIES),
        ("void pytorch_flash::flash_fwd_kernel<…>", None, ATTENTION), ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80", HOST, ATTENTION),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl>", None, ELEMENTWISE),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy", None, COPIES), ("something_else", None, OTHER),
    ],
)  # fmt: skip
def test_kernels_have_categories(name, launcher, category):
    assert category_of_kernel(name, launcher) == category


def test_nonsense_in_a_trace_is_left_out():
    trace = fake_trace.two_methods()
    want = read_profile(trace.document).as_dict()
    trace.events += [
        None,
        7,
        {},
        {"ph": "X"},
        {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": "soon", "dur": 1},
        {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": math.inf, "dur": 1},
        {"ph": "X", "cat": "cpu_op", "name": 5, "ts": 1, "dur": 1},
        {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 5, "dur": -1},
        {"ph": "X", "cat": None, "name": "x", "ts": 5, "dur": 1},
        {"ph": "i", "name": "[memory]", "ts": 1, "args": {"Bytes": "many"}},
        {"ph": "X", "cat": "cpu_op", "name": "x::y", "ts": 9e9, "dur": 1, "args": 5},
        {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 8e9, "dur": 1, "args": {"Input Dims": [[[]], "x", [None], {}]}},
    ]
    got = read_profile(trace.document).as_dict()
    assert got["groups"] == want["groups"]


@pytest.mark.parametrize(
    "event",
    [
        {"cat": "cpu_op", "name": "aten::mm", "ts": 10**400, "dur": 1},
        {"cat": "cpu_op", "name": "aten::mm", "ts": -1e308, "dur": 1.7e308},
        {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 1, "dur": 1, "args": {"correlation": [1]}},
        {"cat": "kernel", "name": "sgemm", "ts": 1, "dur": 1, "args": {"correlation": {"a": 1}, "stream": "\ud800"}},
        {"cat": "cpu_op", "name": "aten::\ud800\udfff \udc80", "ts": 0, "dur": 5},
    ],
)
def test_a_trace_made_to_break_it_is_read_and_can_be_sent_to_a_browser(event):
    document = {"traceEvents": [{"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 10}, {"ph": "X", **event}]}
    profile = read_profile(document)
    assert math.isfinite(profile.groups[0].mean_ms)
    json.dumps(profile.as_dict(), ensure_ascii=False, allow_nan=False).encode()


def test_more_kinds_of_steps_than_can_be_shown_are_refused():
    trace = FakeTrace()
    for number in range(41):
        trace.annotation(f"step | flora | phase {number}", 10 * number, 9)
        trace.op("aten::mm", 10 * number + 1, 5)
    with pytest.raises(TraceError, match="41 methods and phases, more than 40"):
        read_profile(trace.document)


def test_operators_nested_without_end_count_as_their_callers():
    trace = FakeTrace()
    for depth in range(3000):
        trace.op(f"aten::op{depth}", depth, 10_000 - 2 * depth)
    profile = read_profile(trace.document)
    assert sum(profile.groups[0].categories.values()) == pytest.approx(10.0)
    assert TraceProfile.from_dict(json.loads(json.dumps(profile.as_dict()))) == profile


def test_a_profile_survives_json(profile):
    assert TraceProfile.from_dict(json.loads(json.dumps(profile.as_dict()))) == profile


# --------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is not JSON"), (b"PK\x03\x04", "is not JSON"), (b"[" * 100_000, "is not JSON"),
        (b'{"a": 1}', "no list of traceEvents"), (b'"text"', "no list of traceEvents"),
        (b"\x1f\x8bgarbage", "gzip is broken"), (gzip.compress(b"{}" * 999, mtime=0)[:-9], "gzip is broken"),
        (b'{"traceEvents": []}', "no operator and no kernel"), (b'{"traceEvents": [{"ph": "M"}]}', "no operator and no kernel"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_trace_is_named_in_one_sentence(tmp_path, content, words):
    path = tmp_path / "given.json"
    path.write_bytes(content)
    with pytest.raises(TraceError, match=words) as error:
        read_profile(read_trace(path))
    assert str(tmp_path) not in str(error.value) and "\n" not in str(error.value)


def test_a_bomb_is_not_unpacked(tmp_path):
    path = tmp_path / "bomb.json.gz"
    path.write_bytes(gzip.compress(b"0" * 3_000_000))
    with pytest.raises(TraceError, match="larger than 1 MB"):
        read_trace(path, max_bytes=1_000_000)
    plain = tmp_path / "large.json"
    plain.write_bytes(b"0" * 1_000_001)
    with pytest.raises(TraceError, match="larger than 1 MB"):
        read_trace(plain, max_bytes=1_000_000)


def test_a_written_trace_names_no_machine(tmp_path):
    document = fake_trace.two_methods().document
    write_trace(tmp_path / "t.json.gz", document)
    text = gzip.decompress((tmp_path / "t.json.gz").read_bytes()).decode()
    assert "a-machine" not in text and "somewhere" not in text
    assert read_trace(tmp_path / "t.json.gz")["traceEvents"] == document["traceEvents"]
    run = write_tensorboard_run(tmp_path / "logs", document)
    assert run.parent.parent == tmp_path / "logs" and run.name.startswith("flora-live.") and run.name.endswith(".pt.trace.json.gz")
    with pytest.raises(TraceError, match="cannot write"):
        write_trace(tmp_path / "none" / "t.json", document)


def test_200_000_events_become_less_than_2_mb():
    gc.disable()  # as in the process that opens a trace
    try:
        profile = read_profile(fake_trace.large())
    finally:
        gc.enable()
    (group,) = profile.groups
    assert profile.num_events >= 199_990
    assert sum(group.categories.values()) == pytest.approx(group.mean_ms, rel=1e-6)
    figures = [kernel_figures.timeline(profile.groups), kernel_figures.icicle(group), kernel_figures.breakdown(profile.groups)]
    size = len(json.dumps([figure.figure for figure in figures])) + len(json.dumps(profile.as_dict()))
    assert size < 1_000_000, size
    assert group.num_kernels_left_out > 1000
