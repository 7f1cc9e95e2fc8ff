"""The charts: fixed ranges, few points, one style per method."""

import json
import math

import numpy as np
import pytest

from flora.ops import METHODS
from profiling import figures
from profiling.events import StepTimed


def measured(num_steps, seconds=0.01, kinds=("code", "speech"), methods=("flora", "bmm-lora")):
    return [
        StepTimed(step, kind, method, "decode" if step else "prefill", seconds * (1 + i), 4)
        for step in range(num_steps)
        for i, method in enumerate(methods)
        for kind in kinds
    ]


def test_every_method_has_a_look_of_its_own():
    assert set(figures.METHOD_STYLES) >= set(METHODS)
    styles = figures.METHOD_STYLES.values()
    assert len({style.colour for style in styles}) == len(styles) == len({style.symbol for style in styles})
    assert len({(style.dash, style.symbol) for style in styles}) == len(styles)


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


@pytest.mark.parametrize("method", ["flora", "bmm-lora", "flora-modulate", "mixed", "base"])
def test_the_main_colours_read_on_white_and_on_black(method):
    own = luminance(figures.METHOD_STYLES[method].colour)
    for page in ("#ffffff", "#14171a"):
        light, dark = sorted((own, luminance(page)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 3.0, (method, page)


@pytest.mark.parametrize("draw", [figures.live_tokens_per_s, figures.step_times])
@pytest.mark.parametrize("num_steps", [0, 1, 2, 48, 5000])
def test_a_figure_is_plain_json_of_few_points_with_fixed_ranges_and_a_sentence(draw, num_steps):
    figure, sentence = draw(measured(num_steps), ("flora", "bmm-lora"), max(num_steps, 48))
    assert json.loads(json.dumps(figure, allow_nan=False)) == figure
    assert sentence.endswith(".") and "\n" not in sentence
    assert len(figure["data"]) == 2 and all(len(trace["x"]) == len(trace["y"]) <= 1000 for trace in figure["data"])
    layout = figure["layout"]
    assert layout["xaxis"]["range"] == [0, max(num_steps, 48)] and layout["uirevision"] and layout["paper_bgcolor"].endswith(", 0)")
    for trace in figure["data"]:
        assert all(0 <= y <= layout["yaxis"]["range"][1] for y in trace["y"])


def test_both_kinds_count_together_and_prefill_is_not_drawn():
    figure, sentence = figures.live_tokens_per_s(measured(3), ("flora", "bmm-lora"), 3)
    assert figure["data"][0]["x"] == [1, 2] and figure["data"][0]["y"] == pytest.approx([400, 400])  # 8 tokens in 20 ms
    assert "fLoRA 400" in sentence and "bmm-LoRA 200" in sentence and "2 steps" in sentence
    figure, _ = figures.step_times(measured(3), ("flora", "bmm-lora"), 3)
    assert figure["data"][1]["y"] == pytest.approx([40, 40])


def test_the_axis_stays_while_the_numbers_move_a_little():
    drawn = [figures.step_times(measured(5, seconds), ("flora",), 9).figure for seconds in (0.0100, 0.0105, 0.011)]
    assert len({figure["layout"]["yaxis"]["range"][1] for figure in drawn}) == 1


def test_a_rare_spike_does_not_press_the_rest_to_the_floor_and_is_told():
    steps = measured(40)
    spike = StepTimed(40, "code", "bmm-lora", "decode", 5.0, 4)
    figure, sentence = figures.step_times([*steps, spike], ("flora", "bmm-lora"), 48)
    assert figure["layout"]["yaxis"]["range"][1] < 200 and max(figure["data"][1]["y"]) == 5000
    assert sentence.endswith("1 point lies above the axis.")


@pytest.mark.parametrize("highest", [1e-9, 0.37, 0.999, 1.0, 9.6, 99.99, 123456.0])
def test_the_ceiling_holds_what_is_below_it(highest):
    ceiling = figures.axis_ceiling(highest)
    assert highest < ceiling <= 2 * highest and math.isfinite(ceiling)
