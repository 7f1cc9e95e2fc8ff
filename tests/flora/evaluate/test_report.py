"""Tables of an evaluation and whether its promises hold."""

from flora.evaluate.report import Target, confusion_table, score_table, target_table, text_table

from .test_rows import score

# --------------------------------------------------------------------------------------------------------------- tables


def test_a_table_has_its_columns_aligned():
    lines = text_table(["tag", "value"], [["lua", "7.0"], ["r", "100.25"]]).split("\n")
    assert lines == ["tag   value", "---  ------", "lua     7.0", "r    100.25"]
    assert text_table(["alone"], []).split("\n") == ["alone", "-----"]


def test_scores_stand_by_language_and_method_with_their_interval_and_mean():
    scores = [
        score("lua", "flora", 0.8),
        score("lua", "base", 0.4),
        score("rb", "base", 0.2),
        score("rb", "flora", 0.6),
        score("rb", "flora", 0.1, adapter="lua"),
        score("swift", "base", None, graded=False, low=None, high=None, reason="swift is not installed"),
        score("swift", "flora", None, graded=False, low=None, high=None, reason="swift is not installed"),
        score("d", "base", 0.5, low=None, high=None),
        score("lua", "base", 0.99, metric="pass@10"),
    ]
    table = score_table(scores, "pass@1").split("\n")
    cells = [line.split() for line in table]
    assert cells[0] == ["pass@1", "base", "flora"], "the methods' own order"
    assert cells[2] == "lua 40.0 % [35.0, 45.0] 80.0 % [75.0, 85.0]".split()
    assert cells[4] == "swift not graded not graded".split()
    assert cells[5] == "d 50.0 % –".split()
    assert cells[6] == "mean of 2 30.0 % 70.0 %".split(), "over the languages that every method has"
    assert score_table(scores, "WER") == ""


def test_the_wrong_adapters_stand_in_a_table_of_their_own():
    scores = [
        score("lua", "flora", 0.8),
        score("rb", "flora", 0.6),
        score("rb", "flora", 0.1, adapter="lua"),
        score("rb", "lora", 0.9),
    ]
    table = [line.split() for line in confusion_table(scores, "pass@1").split("\n")]
    assert table[0] == ["pass@1", "%,", "flora", "lua's", "rb's"]
    assert table[2:] == [["lua", "80.0", "–"], ["rb", "10.0", "60.0"]]
    assert confusion_table(scores[:2], "pass@1") == "" == confusion_table(scores, "WER")


def test_a_promise_is_met_or_not_or_was_not_measured():
    table = target_table([Target("a", "1 %", True), Target("b", "2 %", False), Target("c", None, None)]).split("\n")
    assert [line.split()[-1] for line in table[2:]] == ["met", "MET", "measured"]
    assert "NOT MET" in table[3] and "not measured" in table[4]
