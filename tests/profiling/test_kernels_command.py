"""`python -m profiling kernels`: real profiles of the embedded model, what is written of them, and bad input."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import textwrap

import fake_trace
import pytest

from flora.engine import Request
from flora.errors import FloraError, ModelError, RequestError
from profiling.__main__ import main
from profiling.categories import GEMM, HOST, OTHER
from profiling.loading import load_engine
from profiling.profile_run import batch_of, layer_kinds, layer_ranges, record, require_kernels
from profiling.trace import read_profile
from profiling.trace_file import TraceError, read_trace, write_trace
from profiling.trace_profile import profile_of_rows

METHODS = ("flora", "bmm-lora")
MODEL_OPTIONS = dict.fromkeys(("code_model", "code_adapters", "speech_model", "speech_adapters", "quantize", "llm_int8_threshold"))


def embedded(kind: str):
    options = argparse.Namespace(**MODEL_OPTIONS, device="cpu", dtype="auto", weights="pretrained", any_base_model=False)
    return load_engine(kind, options, capture_steps=False)


@pytest.fixture(scope="module")
def engine():
    return embedded("code")


@pytest.fixture(scope="module")
def document(engine):
    """Both methods on the embedded code model."""
    told = []
    requests = batch_of(engine, METHODS, num_rows=8)
    document = record(engine, requests, METHODS, prefills=2, steps=4, warmup=2, on_progress=lambda *news: told.append(news))
    assert [done for _, done, _ in told] == list(range(1, len(told) + 1)) and told[-1][1] == told[-1][2]
    return document


def test_self_times_add_up_to_the_step_and_categories_cover_it(document):
    profile = read_profile(document)
    assert [(group.method, group.phase) for group in profile.groups] == [
        (method, phase) for phase in ("prefill", "decode") for method in METHODS
    ]
    steps = [event for event in document["traceEvents"] if str(event["name"]).startswith("step | ")]
    assert len(steps) == 2 * (2 + 4)
    for group in profile.groups:
        assert len(group.step_ms) + group.num_held_up == (2 if group.phase == "prefill" else 4)
        assert sum(group.categories.values()) == pytest.approx(group.mean_ms, rel=0.02)
        # The table's self-times, and what no operator takes, are the step too.
        operators_ms = sum(kernel.us for kernel in group.kernels) / 1000
        computing_ms = sum(kernel.us for kernel in group.kernels if kernel.category != HOST) / 1000
        assert operators_ms <= 1.02 * group.mean_ms
        assert computing_ms + group.categories[HOST] == pytest.approx(group.mean_ms, rel=0.02)
        assert group.categories[OTHER] <= 0.05 * group.mean_ms
        assert group.categories[GEMM] > 0 and group.launches > 50
        assert group.memory.peak_bytes > 1000 and group.memory.by_op
        assert {"layers", "in layers", "operators", "innermost"} == {lane.name for lane in group.lanes}


def test_a_decode_step_has_the_products_that_the_methods_are_made_of(document):
    """Rank 4, 8 rows: fLoRA sends 32 rows through each of the 20 adapted layers, bmm-LoRA 8, and runs two bmm beside it."""
    flora, bmm = read_profile(document).of("decode")
    rows = {kernel.product[1]: 0.0 for kernel in flora.kernels if kernel.product}
    for kernel in flora.kernels:
        if kernel.product:
            rows[kernel.product[1]] += kernel.calls
    assert rows == {32: 20, 8: 1}  # the output head is not adapted
    assert sum(kernel.calls for kernel in bmm.kernels if kernel.category == "bmm") == 40
    assert {place for kernel in flora.kernels for place in kernel.where.split(", ")} >= {"attention", "MLP", "output head", "norm"}


def test_beside_the_trace_stands_what_it_was_measured_on(document):
    facts = document["floraLive"]
    assert (facts["batch"], facts["popularity"], facts["warmup"]) == (8, "distinct", 2)
    assert facts["ranks"] == {"flora": [4], "bmm-lora": [4]}
    assert set(facts["plain_ms"]) == {f"{method} {phase}" for method in METHODS for phase in ("prefill", "decode")}
    assert facts["hardware"]["models"]["code"]["dtype"] == "float32"


def test_ranges_exist_only_while_the_profiler_is_on(engine):
    kinds = layer_kinds(engine.model)
    assert kinds["transformer.h.0.attn.c_attn"] == "attention" and kinds["transformer.h.0.mlp.c_fc"] == "MLP"
    module = engine.model.get_submodule("transformer.h.0.attn.c_attn")
    with pytest.raises(ZeroDivisionError), layer_ranges(engine.model):
        assert module._forward_pre_hooks and module._forward_hooks
        _ = 1 / 0
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in engine.model.modules())


def test_a_speech_model_and_three_methods_are_profiled_too():
    engine, methods = embedded("speech"), ("flora", "sgmv-lora", "merged")
    requests = batch_of(engine, methods, 2, rank=2)
    assert [request.adapter for request in requests] == ["random-r2-0000", "random-r2-0001"]
    profile = read_profile(record(engine, requests, methods, prefills=1, steps=1, warmup=1))
    assert [group.method for group in profile.of("decode")] == list(methods)
    places = {place for group in profile.of("prefill") for kernel in group.kernels for place in kernel.where.split(", ")}
    assert places >= {"attention", "MLP", "convolution", "output head"}


def test_a_trace_of_a_gpu_without_kernels_is_an_error():
    document = fake_trace.two_methods().document
    require_kernels(document, "cpu")
    with pytest.raises(ModelError, match="saw no kernel of the GPU"):
        require_kernels(document, "cuda")


def test_what_cannot_be_profiled_is_named(engine, tiny_engines):
    requests = batch_of(engine, METHODS, 2)
    with pytest.raises(RequestError, match="from 1 to 64"):
        record(engine, requests, METHODS, steps=0)
    with pytest.raises(RequestError, match="ask for fewer steps"):
        record(tiny_engines["code"], [Request(prompt="x" * 80, adapter="aa")], METHODS, prefills=1, steps=8, warmup=1)
    with pytest.raises(FloraError):
        record(engine, requests, ("flora", "nonsense"), prefills=1, steps=1, warmup=1)


# --------------------------------------------------------------------------------------------------------- the command


def test_the_command_records_prints_and_says_how_to_do_it_again(tmp_path, capsys):
    counts = ["--rows", "2", "--prefills", "1", "--steps", "1", "--warmup", "1", "--threads", "1"]
    assert main(["kernels", *counts, "--trace", str(tmp_path / "t.json.gz"), "--tensorboard", str(tmp_path / "logs")]) == 0
    said = capsys.readouterr().out
    command = "python -m profiling kernels --methods flora bmm-lora --kind code " + " ".join(counts)
    assert command in said and "batch of 2" in said and "make tensorboard LOGDIR=" in said
    assert read_trace(tmp_path / "t.json.gz")["floraLive"]["command"] == command
    assert len(list(tmp_path.glob("logs/*/flora-live.*.pt.trace.json.gz"))) == 1


def test_an_opened_trace_is_printed_and_written(tmp_path, capsys):
    """The whole command but the profiler itself, whose trace of the embedded model the tests above look into."""
    write_trace(tmp_path / "given.json.gz", fake_trace.two_methods().document)
    arguments = ["kernels", "--open", str(tmp_path / "given.json.gz"), "--json", str(tmp_path / "rows.jsonl")]
    for suffix in ("html", "md", "csv"):
        assert main([*arguments, "--report", str(tmp_path / f"report.{suffix}"), "--trace", str(tmp_path / "again.json")]) == 0
    assert "fLoRA runs 1 GEMM of 32 rows where bmm-LoRA runs 1 GEMM of 8 rows and 2 bmm" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(row["method"], row["phase"], row["launches"]) for row in rows] == [("flora", "decode", 2), ("bmm-lora", "decode", 3)]
    assert rows[0]["group"]["kernels"][0]["name"] == "aten::mm"
    assert profile_of_rows(rows) == read_profile(fake_trace.two_methods().document)
    for broken in ([], [{}], [{"group": 7}], [rows[0] | {"group": rows[0]["group"] | {"step_ms": ["x"]}}]):
        with pytest.raises(TraceError, match="the recorded rows"):
            profile_of_rows(broken)
    page = (tmp_path / "report.html").read_text()
    assert "Where a decode step" in page and "measured elsewhere" in page
    assert "aten::addmm" in (tmp_path / "report.md").read_text()
    heads, flora, bmm = (tmp_path / "report.csv").read_text().splitlines()
    assert heads.startswith("method,phase,step_ms,")
    assert flora.startswith("flora,decode,0.1,") and bmm.startswith("bmm-lora,decode,0.08,")
    assert read_trace(tmp_path / "again.json")["traceEvents"] == fake_trace.two_methods().events


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--methods", "flora"], "two or more"),
        (["--methods", "flora", "nonsense"], "no method 'nonsense'"),
        (["--methods", "flora", "flora"], "given twice"),
        (["--rows", "0"], "--rows must be from 1 to 64"),
        (["--rank", "500"], "--rank must be from 1 to 128"),
        (["--steps", "0"], "must be from 1 to"),
        (["--warmup", "-3"], "must be from 1 to"),
        (["--report", "report.pdf"], "cannot be written as .pdf"),
        (["--trace", "trace.txt"], "ends in .json or .json.gz"),
        (["--open", "missing.json"], "cannot be read: No such file"),
        (["--kind", "image"], "invalid choice"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(arguments, words, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        main(["kernels", *arguments])
    said = capsys.readouterr().err
    assert error.value.code == 2 and words in said and said.count("\n") == 1


# --------------------------------------------------------------------------------------------------------- TensorBoard

_LOAD = textwrap.dedent(
    """
    import json, logging, sys, tempfile
    from torch_tb_profiler import io
    from torch_tb_profiler.profiler import RunLoader

    if __name__ == "__main__":
        with tempfile.TemporaryDirectory() as folder, io.Cache(folder) as cache:
            run = RunLoader("run", sys.argv[1], cache).load()
            (profile,) = run.profiles.values()
            operators = [row["name"] for row in profile.operation_table_by_name["data"]]
        print(json.dumps({"views": [view.display_name for view in profile.views], "operators": operators}))
    """
)


def test_tensorboards_plugin_loads_our_run_and_has_its_views(document, tmp_path):
    from profiling.trace_file import write_tensorboard_run

    run = write_tensorboard_run(tmp_path / "logs", document).parent
    script = tmp_path / "load.py"
    script.write_text(_LOAD)  # the plugin's loader starts processes, which import whoever started them
    done = subprocess.run([sys.executable, str(script), str(run)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert {"Overview", "Operator", "Trace", "Memory"} <= set(found["views"]), found["views"]
    assert {"aten::mm", "aten::bmm"} <= set(found["operators"])


def test_a_gpus_run_has_the_plugins_kernel_view(tmp_path):
    from test_trace import gpu_trace

    from profiling.trace_file import write_tensorboard_run

    trace = gpu_trace()
    trace.annotation("ProfilerStep#1", 0, 100)
    properties = [{"id": 0, "name": "a GPU", "totalGlobalMem": 1 << 30, "computeMajor": 9, "computeMinor": 0, "numSms": 132}]
    run = write_tensorboard_run(tmp_path / "logs", trace.document | {"deviceProperties": properties}).parent
    script = tmp_path / "load.py"
    script.write_text(_LOAD)
    done = subprocess.run([sys.executable, str(script), str(run)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "Kernel" in json.loads(done.stdout.splitlines()[-1])["views"], done.stderr
