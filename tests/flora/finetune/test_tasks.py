"""Batches and scores against what can be counted by hand, and the order in which examples come."""

from __future__ import annotations

import math

import jiwer
import numpy as np
import pytest
import tiny_models
import torch
from hypothesis import given
from hypothesis import strategies as st

from flora.audio import load_audio
from flora.corpus.speech import LANGUAGES
from flora.errors import DataError
from flora.finetune import Recipe
from flora.finetune.tasks import IGNORED, RunData, group_by_length, make_task, run_order
from flora.models import load_model

from .conftest import programs, write_lines


@pytest.fixture(scope="module")
def code_model(checkpoints):
    return load_model(checkpoints["code"].model, "cpu", "float32")


@pytest.fixture(scope="module")
def speech_model(checkpoints):
    return load_model(checkpoints["speech"].model, "cpu", "float32")


def task_of(loaded, source, **options):
    recipe = Recipe(loaded.kind, data=str(source), model="tiny", steps=options.pop("steps", 6), batch_size=3, **options)
    recipe = recipe.for_model(loaded.model)
    return make_task(recipe, loaded), recipe


# ------------------------------------------------------------------------------------------------------------------ order


@given(st.integers(1, 40), st.integers(1, 200), st.integers(0, 3))
def test_every_example_is_seen_once_before_any_is_seen_again(num_examples, length, seed):
    order = run_order(num_examples, length, seed)
    assert len(order) == length
    for first in range(0, length, num_examples):
        part = order[first : first + num_examples]
        assert len(set(part)) == len(part) and set(part) <= set(range(num_examples))


@given(st.lists(st.integers(1, 500), min_size=1, max_size=300), st.integers(1, 9))
def test_grouping_moves_examples_within_their_window_and_shortens_batches(lengths, batch_size):
    order, lengths = np.arange(len(lengths)), np.array(lengths)
    grouped = group_by_length(order, lengths, batch_size, seed=0)
    window = 16 * batch_size
    for first in range(0, len(order), window):
        assert sorted(grouped[first : first + window]) == list(order[first : first + window])

    def padded(places):
        whole = len(places) // batch_size * batch_size
        return lengths[places[:whole]].reshape(-1, batch_size).max(axis=1).sum()

    assert padded(grouped) <= padded(order)


def test_a_place_holds_the_same_example_however_often_it_is_asked_for(code_model, code_file):
    task, recipe = task_of(code_model, code_file, seed=3)
    data = RunData(task, recipe)
    assert len(data) == recipe.num_examples == 18
    backwards = [data[place] for place in reversed(range(18))]
    assert [data[place] for place in range(18)] == backwards[::-1]
    assert {tuple(map(tuple, data[place])) for place in range(18)} <= {tuple(map(tuple, example)) for example in task.train}


def test_another_seed_is_another_order(code_model, code_file):
    orders = [RunData(*task_of(code_model, code_file, seed=seed)).order.tolist() for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


# ------------------------------------------------------------------------------------------------------------------- code


def test_a_batch_of_code_predicts_the_completions_and_their_ends_alone(code_model, code_file):
    task, _ = task_of(code_model, code_file)
    end = code_model.tokenizer.eos_token_id
    examples = [task.train[0], task.train[30]]
    batch = task.collate(examples)
    length = max(len(prompt) + len(completion) for prompt, completion in examples)
    assert batch["input_ids"].shape == batch["labels"].shape == (2, length)
    for (prompt, completion), ids, labels in zip(examples, batch["input_ids"], batch["labels"], strict=True):
        assert completion[-1] == end
        assert ids[: len(prompt) + len(completion)].tolist() == prompt + completion
        assert labels[: len(prompt)].eq(IGNORED).all() and labels[len(prompt) + len(completion) :].eq(IGNORED).all()
        assert labels[len(prompt) : len(prompt) + len(completion)].tolist() == completion


def test_texts_that_are_too_long_are_cut_and_nothing_is_lost(code_model, tmp_path):
    text = "abcdefghij" * 30
    task, _ = task_of(code_model, write_lines(tmp_path / "x.jsonl", [{"text": text}, {"text": "short one"}] * 2), max_length=50)
    pieces = [prompt + completion for prompt, completion in task.train + task.held_out if len(prompt + completion) > 12]
    assert len(pieces) > 6 and max(map(len, pieces)) == 50
    assert code_model.tokenizer.decode([token for piece in pieces for token in piece], skip_special_tokens=True) == text * 2


def test_a_prompt_that_leaves_no_room_is_a_bad_row(code_model, tmp_path):
    rows = [*programs(99), {"prompt": "x" * 60, "completion": "y"}]
    task, _ = task_of(code_model, write_lines(tmp_path / "x.jsonl", rows), max_length=60)
    assert task.tallies[0].bad == ["line 100 has a prompt of 60 tokens, where an example has 60"]


@torch.inference_mode()
@pytest.mark.parametrize("tokens_at_once", [8192, 70, 1])
def test_the_score_of_code_is_that_of_one_program_at_a_time(tokens_at_once, code_model, code_file, monkeypatch):
    monkeypatch.setattr("flora.finetune.tasks.SCORED_TOKENS", tokens_at_once)
    task, _ = task_of(code_model, code_file, validation="0.5")
    assert task.num_held_out == 20
    nats, tokens, right, whole = 0.0, 0, 0, 0
    for prompt, completion in task.held_out:
        logits = code_model.model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].double()
        nats -= logits.log_softmax(-1)[range(len(completion)), completion].sum().item()
        hits = (logits.argmax(-1) == torch.tensor(completion)).tolist()
        tokens, right, whole = tokens + len(hits), right + sum(hits), whole + all(hits)
    score = task.score(code_model.model)
    assert score["loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert score["next tokens right"] == right / tokens and score["whole completions right"] == whole / 20


def test_plain_texts_are_not_judged_as_wholes(code_model, tmp_path):
    task, _ = task_of(code_model, write_lines(tmp_path / "x.jsonl", [{"text": f"x = {number}"} for number in range(9)]))
    assert set(task.score(code_model.model)) == {"loss", "next tokens right"}


def test_a_source_of_its_own_can_be_held_out(code_model, code_file, tmp_path):
    other = write_lines(tmp_path / "other.jsonl", [{"prompt": "-- other\n", "completion": "return"}] * 3)
    task, _ = task_of(code_model, code_file, validation=str(other))
    assert len(task) == 40 and task.num_held_out == 3
    assert {code_model.tokenizer.decode(prompt) for prompt, _ in task.held_out} == {"-- other\n"}
    for share in ("0", "1", "-3", "nan"):
        with pytest.raises(DataError, match="--validation is a share between 0 and 1, or a source"):
            task_of(code_model, code_file, validation=share)


def test_the_corpus_gives_a_run_all_the_programs_it_takes():
    loaded = load_model("assets/models/code", "cpu", "float32")
    recipe = Recipe("code", "lua", steps=5, batch_size=4, held_out=7).for_model(loaded.model)
    task = make_task(recipe, loaded)
    assert len(task) == 20 and task.num_held_out == 7 and task.language == "Lua"
    with pytest.raises(DataError, match="no code language 'cobol' in the corpus: choose one of d, pl, rb"):
        make_task(Recipe("code", "cobol").for_model(loaded.model), loaded)


def test_the_other_kind_of_model_is_refused(speech_model, code_file):
    with pytest.raises(DataError, match="is a speech model: say `speech`, or give another --model"):
        make_task(Recipe("code", data=str(code_file)).for_model(speech_model.model), speech_model)


# ----------------------------------------------------------------------------------------------------------------- speech


def test_a_batch_of_speech_is_what_whisper_hears_and_is_to_write(speech_model, clips_folder):
    task, recipe = task_of(speech_model, clips_folder, validation="0.25")
    assert len(task) == 9 and task.num_held_out == 3
    batch = task.collate([RunData(task, recipe)[place] for place in range(3)])
    assert batch["input_features"].shape == (3, 20, 100) and batch["input_features"].dtype == torch.float32
    tokenizer = speech_model.tokenizer
    for place in range(3):
        index = RunData(task, recipe).order[place]
        labels = [token for token in batch["labels"][place].tolist() if token != IGNORED]
        assert labels == tokenizer(task.train_texts[index]).input_ids[1:]  # the model puts the start token in front
        assert tokenizer.decode([token for token in labels if token > 1]) == task.train_texts[index]
        samples, rate = load_audio(task.train_features.clips[index].audio)
        features = speech_model.processor.feature_extractor(samples, sampling_rate=rate, return_tensors="pt").input_features[0]
        assert torch.equal(batch["input_features"][place], features)


@torch.inference_mode()
def test_the_score_of_speech_is_that_of_one_clip_at_a_time(speech_model, clips_folder):
    task, _ = task_of(speech_model, clips_folder, validation="0.4")
    nats, tokens, transcripts = 0.0, 0, []
    for index, labels in enumerate(task.held_out_labels):
        features = torch.from_numpy(task.held_out_features[index])[None]
        logits = speech_model.model(features, labels=torch.tensor([labels])).logits[0].double()
        nats -= logits.log_softmax(-1)[range(len(labels)), labels].sum().item()
        tokens += len(labels)
        made = speech_model.model.generate(features, max_new_tokens=min(32, 2 * max(map(len, task.held_out_labels)) + 8))
        transcripts.append(" ".join(speech_model.processor.decode(made[0], skip_special_tokens=True).split()))
    score = task.score(speech_model.model)
    assert score["loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert score["word error rate"] == jiwer.wer(task.held_out_texts, transcripts)


def test_a_transcript_longer_than_the_model_writes_is_a_bad_row(speech_model, clips_folder, tmp_path):
    rows = [{"audio": str(clips_folder / "0.wav"), "text": f"n{number}"} for number in range(99)]
    rows += [{"audio": str(clips_folder / "1.wav"), "text": "y" * 60}]
    task, _ = task_of(speech_model, write_lines(tmp_path / "x.jsonl", rows))
    assert task.tallies[0].bad == ["line 100 has a text of 62 tokens, and the model writes 40"]


def test_a_multilingual_whisper_is_told_the_language(clips_folder, tmp_path):
    folder = tiny_models.save_speech_model(tmp_path / "many", languages=tiny_models.LANGUAGES)
    loaded = load_model(folder, "cpu", "float32")
    with pytest.raises(DataError, match="this Whisper is multilingual: say the clips' language"):
        task_of(loaded, clips_folder)
    with pytest.raises(DataError, match="this Whisper has no language 'tlh'"):
        task_of(loaded, clips_folder, language="tlh")
    task, _ = task_of(loaded, clips_folder, language="cs")
    _, language, *rest = loaded.tokenizer.prefix_tokens
    assert rest == loaded.tokenizer.convert_tokens_to_ids(["<|transcribe|>", "<|notimestamps|>"])
    assert all(labels[:3] == [language, *rest] for labels in task.train_labels)
    assert task.generate_options == {"language": "cs", "task": "transcribe"}
    assert math.isfinite(task.score(loaded.model)["word error rate"])


def test_the_card_of_mongolian_says_whose_voice_reads_it(monkeypatch):
    assert "Kazakh" in LANGUAGES["mn"].note
    loaded = load_model("assets/models/speech", "cpu", "float32")

    def two_clips(folder, counts, **options):
        from flora.corpus.speech import Clips

        samples, offsets = np.full(32_000, 1000, np.int16), np.array([0, 16_000, 32_000])
        return {key: Clips(*key, samples, offsets, ["нэг", "хоёр"], ["kk+m1"] * 2) for key in counts}

    monkeypatch.setattr("flora.finetune.tasks.build_dataset", two_clips)
    task = make_task(Recipe("speech", "mn", clips=2, held_out=2).for_model(loaded.model), loaded)
    assert task.notes == (LANGUAGES["mn"].note,) and task.language == "Mongolian"
    with pytest.raises(DataError, match="no spoken language 'tlh' in the corpus: choose one of ar, cs"):
        make_task(Recipe("speech", "tlh").for_model(loaded.model), loaded)
