"""What the *Accuracy* tab says: headline, matrix and answers as values of its live components. Pure Python, all text escaped."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping
from typing import Any

from flora.evaluate.rows import METHODS, Answer, Item, Score
from profiling import accuracy
from profiling.accuracy import HIGHER_IS_BETTER, METRICS, Estimate, Means, Recorded, language_name
from profiling.accuracy_figures import ADAPTER_STYLES, METRIC_WORDS, interval, marks, models, percent
from profiling.dashboard.code_html import highlighted, marked_transcript, transcript
from profiling.dashboard.live_cells import cells_value

NOTHING = "–"
_MINUS = "\N{MINUS SIGN}"
_TITLE_LENGTH = 64  # characters of an item's title in its menu
_LEGEND = "Struck out: missed. Underlined: written instead, or too much."
_DARKEST = 0.7  # of the method's colour behind the best cell of the matrix, so that the ink reads in light and dark


def method_label(method: str) -> str:
    """The method's name with its colour."""
    style = ADAPTER_STYLES[method]
    return f'<span class="swatch" style="--accent: {style.colour}"></span>{html.escape(style.label)}'


def commands(recorded: Recorded) -> list[str]:
    """The commands that made the scores; the one that would, where there are none."""
    return list(dict.fromkeys(score.command for score in recorded.scores)) or [accuracy.report_command(recorded.task)]


# ------------------------------------------------------------------------------------------------------------ headline


def status(recorded: Recorded) -> dict[str, Any]:
    """A sentence where a file is missing or broken, with the command that makes it; else nothing."""
    command = f"<code>{html.escape(accuracy.report_command(recorded.task))}</code>"
    words = f"{html.escape(' '.join(recorded.complaints))} {command} makes them." if recorded.complaints else ""
    return cells_value({"words": words}, {"words": "note" if words else "absent"})


def headings(recorded: Recorded) -> dict[str, Any]:
    """What stands above the two panels, so that nobody takes one's numbers for the other's."""
    task, scores = recorded.task, recorded.scores
    measured = f"measured here: {' + '.join(models(scores)) or f'embedded {task} model'}"
    if scores:
        measured += f", {_items_words(accuracy.own_scores(scores, METRICS[task][0]).values())} held-out items a language"
    tables = accuracy.paper_tables(task)
    printed = f"printed in the paper: {' and '.join(table.model for table in tables)}, {tables[0].benchmark}"
    return cells_value(
        {
            "measured": html.escape(measured),
            "printed": html.escape(printed),
            "recipe": html.escape(f"{accuracy.PAPER_RECIPES[task]}. {accuracy.PAPER}."),
        }
    )


def _items_words(scores: Iterable[Score]) -> str:
    """ "100", or "60 to 100"."""
    counts = {score.items for score in scores if score.value is not None} or {0}
    return f"{min(counts)}" if len(counts) == 1 else f"{min(counts)} to {max(counts)}"


def headline(recorded: Recorded) -> dict[str, Any]:
    """fLoRA beside LoRA in one number, and the means of all methods, ours and the paper's."""
    task = recorded.task
    found = {metric: accuracy.means(recorded.scores, recorded.means, metric) for metric in METRICS[task]}
    first = METRICS[task][0]
    cells = {"table": _means_table(task, found), "facts": _facts(recorded, found)}
    verdict = f"mean {METRIC_WORDS[first]}, fLoRA minus LoRA"
    if (difference := found[first].estimates.get(("flora", "lora"))) is not None:
        cells["difference"] = _points(difference)
        cells["verdict"] = f"{verdict}: {_verdict(difference, HIGHER_IS_BETTER[task])}"
    else:
        cells |= {"difference": NOTHING, "verdict": verdict}
    return cells_value(cells)


def _points(difference: Estimate) -> str:
    """A difference of fractions as "−0.6 points [−3.1, +1.9]"."""
    ends = "" if difference.low is None else f" [{_signed(difference.low)}, {_signed(difference.high)}]"
    return f"{_signed(difference.value)} <small>points{ends}</small>"


def _signed(fraction: float) -> str:
    rounded = round(100 * fraction, 1)
    return f"{'+' if rounded > 0 else _MINUS if rounded < 0 else ''}{abs(rounded):.1f}"


def _verdict(difference: Estimate, higher_is_better: bool) -> str:
    if difference.low is None:
        return "without an interval it says little"
    if difference.low <= 0 <= difference.high:
        return "no difference beyond noise"
    return f"fLoRA is {'better' if (difference.value > 0) == higher_is_better else 'worse'}"


def _means_table(task: str, found: Mapping[str, Means]) -> str:
    """Methods × (metrics measured here, models of the paper)."""
    tables = accuracy.paper_tables(task)
    groups = _group("measured here", len(found)) + _group("printed in the paper", len(tables), "border")
    columns = "".join(f'<th scope="col">mean {html.escape(METRIC_WORDS[metric])}</th>' for metric in found)
    columns += "".join(f'<th scope="col"{_border(place)}>{html.escape(table.model)}</th>' for place, table in enumerate(tables))
    body = ""
    for method in METHODS:
        cells = "".join(f"<td>{_mean_cell(means.estimates.get((method, None)))}</td>" for means in found.values())
        for place, table in enumerate(tables):
            cells += f"<td{_border(place)}>{percent(accuracy.paper_mean(table, method) / 100)}</td>"
        body += f'<tr><th scope="row">{method_label(method)}</th>{cells}</tr>'
    head = f'<tr><th rowspan="2" scope="col">method</th>{groups}</tr><tr>{columns}</tr>'
    return f'<table class="figures means"><thead>{head}</thead><tbody>{body}</tbody></table>'


def _group(name: str, num_columns: int, border: str = "") -> str:
    return f'<th scope="colgroup" colspan="{num_columns}" class="group {border}">{name}</th>'


def _border(place: int) -> str:
    """The line between what was measured and what was printed."""
    return ' class="border"' if place == 0 else ""


def _mean_cell(estimate: Estimate | None) -> str:
    return NOTHING if estimate is None else f"{percent(estimate.value)} <small>{interval(estimate)}</small>"


def _facts(recorded: Recorded, found: Mapping[str, Means]) -> str:
    """What a reader must know beside the numbers."""
    task, scores = recorded.task, recorded.scores
    if not scores:
        return "nothing recorded yet"
    parts = ["recorded, not live"]
    if tags := found[METRICS[task][0]].tags:
        parts.append(f"means over {len(tags)} languages, each counted the same")
    if missing := accuracy.reasons(scores):
        parts.append("not graded: " + ", ".join(f"{language_name(task, tag)} ({reason})" for tag, reason in missing.items()))
    combined = ", a mean's combined from its languages', the difference's as if its two were independent"
    of_means = combined if any(means.combined for means in found.values()) else ", the difference's of the same items for both"
    parts.append(f"{percent(scores[0].confidence, 0)} intervals{of_means if tags else ''}")
    samples, temperatures = _spread(score.samples for score in scores), _spread(score.temperature for score in scores)
    parts.append(f"{samples} answer{'' if samples == '1' else 's'} an item at temperature {temperatures}")
    ranks = {method: _spread(score.rank for score in scores if score.method == method and score.rank) for method in METHODS}
    if any(ranks.values()):
        parts.append("rank: " + ", ".join(f"{ADAPTER_STYLES[method].label} {rank}" for method, rank in ranks.items() if rank))
    parts += [_spread(score.source for score in scores), f"seed {_spread(score.seed for score in scores)}"]
    parts += [_spread(f"{score.device}, {score.dtype}" for score in scores)]
    parts.append(", ".join(dict.fromkeys(f"{name} {number}" for score in scores for name, number in score.versions.items())))
    return html.escape(" · ".join(parts))


def _spread(values: Iterable[Any]) -> str:
    """Every distinct value, in order: "1", or "1 + 4"."""
    return " + ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in dict.fromkeys(values))


# -------------------------------------------------------------------------------------------------------------- matrix


def matrix(recorded: Recorded) -> dict[str, Any]:
    """Languages × adapters of one method as a table of shaded numbers, and the sentence of what it shows."""
    task = recorded.task
    metric, method = METRICS[task][0], accuracy.cross_method(recorded.scores)
    cells = accuracy.cross_scores(recorded.scores, metric, method) if method else {}
    if not cells:
        empty = '<p class="empty">No adapter has been tried on another language\'s items yet.</p>'
        return cells_value({"matrix": empty, "sentence": ""}, {"save": "absent"})
    missing = accuracy.reasons(recorded.scores)
    tags = accuracy.languages(task, (language for language, _ in cells))
    adapters: list[str | None] = accuracy.languages(task, (adapter for _, adapter in cells if adapter is not None))
    adapters += [None] * any(adapter is None for _, adapter in cells)
    style = ADAPTER_STYLES[method]
    head = f'<th scope="col" class="corner">{metric}, %</th>'
    for adapter in adapters:
        name = "base" if adapter is None else html.escape(adapter)
        title = "no adapter" if adapter is None else f"the adapter of {html.escape(language_name(task, adapter))}"
        head += f'<th scope="col" title="{title}">{name}</th>'
    body = ""
    for tag in tags:
        body += f'<tr><th scope="row">{html.escape(language_name(task, tag))}</th>'
        if tag in missing:
            words = html.escape(f"not graded: {missing[tag]}")
            body += f'<td class="missing" colspan="{len(adapters)}">{words}</td></tr>'
            continue
        for adapter in adapters:
            body += _matrix_cell(cells.get((tag, adapter)), tag == adapter, HIGHER_IS_BETTER[task], style.colour)
        body += "</tr>"
    table = f'<table class="matrix"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    sentence = html.escape(_matrix_sentence(cells, task, style.label))
    return cells_value({"matrix": table, "sentence": sentence}, {"save": "quiet-button"})


def _matrix_cell(score: Score | None, right: bool, higher_is_better: bool, colour: str) -> str:
    if score is None or score.value is None:
        return f"<td>{NOTHING}</td>"
    good = min(1.0, max(0.0, score.value if higher_is_better else 1 - score.value))
    red, green, blue = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    shade = f"background: rgb({red} {green} {blue} / {100 * _DARKEST * good:.0f}%)"
    title = f"{percent(score.value)} {interval(Estimate(score.value, score.low, score.high))}, {score.items} items"
    name = ' class="right"' if right else ""
    return f'<td{name} style="{shade}" title="{title}" data-value="{100 * score.value:.2f}">{100 * score.value:.0f}</td>'


def _matrix_sentence(cells: Mapping[tuple[str, str | None], Score], task: str, label: str) -> str:
    graded = {place: score.value for place, score in cells.items() if score.value is not None}
    better = (lambda a, b: a > b) if HIGHER_IS_BETTER[task] else (lambda a, b: a < b)
    rights, wrongs, best = [], [], 0
    for tag in dict.fromkeys(language for language, _ in graded):
        wrong = [value for (language, adapter), value in graded.items() if language == tag and adapter not in (None, tag)]
        if (tag, tag) in graded and wrong:
            right = graded[tag, tag]
            rights.append(right)
            wrongs.append(sum(wrong) / len(wrong))
            best += all(better(right, value) for value in wrong)
    shown = f"{label}'s adapter of each language (column) on the items of every language (row); darker is better."
    if not rights:
        return shown
    won = f"The right adapter, outlined, beats every wrong one in {best} of {len(rights)} languages"
    right, wrong = percent(sum(rights) / len(rights)), percent(sum(wrongs) / len(wrongs))
    items = _spread(score.items for place, score in cells.items() if place in graded and place[1] not in (None, place[0]))
    return f"{shown} {won}: {right} {METRICS[task][0]} on average, {wrong} with a wrong one, on {items} items of each language."


# ---------------------------------------------------------------------------------------------------------------- items


def item_languages(recorded: Recorded) -> list[tuple[str, str]]:
    """The menu of languages that have items: (name, tag)."""
    tags = accuracy.languages(recorded.task, (item.language for item in recorded.items))
    return [(f"{tag} · {language_name(recorded.task, tag)}", tag) for tag in tags]


def item_titles(recorded: Recorded, tag: str | None) -> list[tuple[str, str]]:
    """The menu of a language's items: (title, name of the item)."""
    return [(_title(item), item.item) for item in recorded.items if item.language == tag]


def telling_item(recorded: Recorded, tag: str | None) -> str | None:
    """The item of a language that is shown first: one that fLoRA answers right and the base model wrong, if there is one."""
    passed = {(answer.item, answer.method): answer.passed for answer in recorded.answers if answer.language == tag}
    names = [name for _, name in item_titles(recorded, tag)]
    telling = [name for name in names if passed.get((name, "flora")) and passed.get((name, "base")) is False]
    return next(iter([*telling, *names]), None)


def _title(item: Item) -> str:
    text = item.reference if item.prompt is None else item.prompt.strip()
    line = text.splitlines()[0].strip("#/;- ") if text else ""
    title = f"{item.item} · {line}"
    return title if len(title) <= _TITLE_LENGTH else f"{title[: _TITLE_LENGTH - 1].rstrip()}…"


def answers(recorded: Recorded, item: Item | None, playable: bool = False) -> dict[str, Any]:
    """An item and what every method answered to it, side by side. playable: its clip stands above them."""
    task = recorded.task
    if item is None:
        cells = {"problem": "", "reference": ""} | {f"{part}_{method}": "" for part in ("answer", "verdict") for method in METHODS}
        return cells_value(cells | {"empty": "No answers are recorded yet."}, {"browser": "absent", "empty": "empty"})
    found = {
        answer.method: answer
        for answer in recorded.answers
        if (answer.language, answer.item) == (item.language, item.item) and answer.adapter in (None, item.language)
    }
    if task == "code":
        prompt = item.prompt or ""
        cells = {
            "problem": highlighted(prompt, "", item.language),
            "reference": highlighted(prompt, item.reference, item.language, show_prompt=False),
        }
    else:
        cells = {"problem": "", "reference": transcript(item.reference, item.language)}
        cells["legend"] = _LEGEND if playable else f"{_LEGEND} This clip is not among those that ship, so it cannot be played."
    for method in METHODS:
        answer = found.get(method)
        cells[f"verdict_{method}"] = _verdict_words(answer)
        cells[f"answer_{method}"] = _answer_html(item, answer)
    return cells_value(cells, {"browser": f"browser {task}", "empty": "absent"})


def _answer_html(item: Item, answer: Answer | None) -> str:
    if answer is None:
        return '<p class="nothing">no answer recorded</p>'
    if not answer.text.strip() and answer.task == "code":
        return '<p class="nothing">it wrote nothing</p>'
    if answer.task == "code":
        return highlighted(item.prompt or "", answer.text, item.language, show_prompt=False)
    return marked_transcript(item.reference, answer.text, item.language)


def _verdict_words(answer: Answer | None) -> str:
    """Passed or failed in a sign and a word, not by colour alone."""
    if answer is None:
        return ""
    if answer.passed is None:
        return '<span class="verdict">– not graded</span>'
    cause = {"error": ": error", "timeout": ": timeout", "memory": ": out of memory"}.get(answer.outcome or "", "")
    words = "✓ passed" if answer.passed else f"✗ failed{cause}"
    rate = "" if answer.wer is None else f' <span class="rate">WER {percent(answer.wer)}</span>'
    return f'<span class="verdict {"passed" if answer.passed else "failed"}">{words}</span>{rate}'


# ------------------------------------------------------------------------------------------------------------ templates

STATUS_TEMPLATE = '<p class="absent" data-cell="words" role="status"></p>'

HEADLINE_TEMPLATE = (
    '<div class="strip"><div class="ratio-block"><div class="ratio" data-cell="difference"></div>'
    '<div class="ratio-words" data-cell="verdict"></div></div>'
    '<div class="wide" data-cell="table" tabindex="0" role="region" aria-label="means over the languages"></div>'
    '<div class="facts" data-cell="facts"></div></div>'
)


def _heading_template(cell: str, hollow: bool) -> str:
    legend = "".join(
        f'<li><span style="color: {colour}" aria-hidden="true">{mark}</span> {html.escape(label)}</li>'
        for mark, colour, label in marks(hollow)
    )
    return f'<h2 class="panel-title" data-cell="{cell}"></h2><ul class="marks" aria-label="marks in the chart">{legend}</ul>'


MEASURED_TEMPLATE = _heading_template("measured", hollow=False)
PRINTED_TEMPLATE = _heading_template("printed", hollow=True)

RECIPE_TEMPLATE = '<p class="recipe" data-cell="recipe"></p>'

MATRIX_TEMPLATE = (
    '<h2 class="panel-title">is each adapter needed?</h2>'
    '<figure class="live-plot"><div class="wide" data-cell="matrix" tabindex="0" role="region"'
    ' aria-label="every adapter on every language"></div><figcaption><span data-cell="sentence"></span>'
    '<button type="button" class="absent" data-cell="save" data-save="matrix" data-file="flora-live-wrong-adapters.csv"'
    ' title="download what the table shows as CSV">data</button></figcaption></figure>'
)

ANSWERS_TEMPLATE = (
    '<div class="absent" data-cell="browser"><section class="given problem"><h3>problem</h3>'
    '<div class="output" data-cell="problem" tabindex="0" role="region" aria-label="problem"></div></section>'
    '<section class="given"><h3>reference</h3>'
    '<div class="output" data-cell="reference" tabindex="0" role="region" aria-label="reference"></div></section>'
    + "".join(
        f'<section><h3>{method_label(method)} <span data-cell="verdict_{method}"></span></h3>'
        f'<div class="output" data-cell="answer_{method}" tabindex="0" role="region"'
        f' aria-label="answer of {ADAPTER_STYLES[method].label}"></div></section>'
        for method in METHODS
    )
    + '<p class="legend" data-cell="legend"></p></div>'
    '<p class="empty" data-cell="empty">No answers are recorded yet.</p>'
)
