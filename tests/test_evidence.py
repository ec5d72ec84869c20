import math

import pytest

from rag.answer import Hit
from rag.document import Chunk
from rag.evidence import Evidence, asked_for, quotations, rank_sentences, sentence_features
from rag.sentences import best_sentence_start, sentence_spans
from rag.term_weights import term_weights
from rag.terms import question_terms


def split(text):
    return [text[start:end] for start, end in sentence_spans(text)]


def test_sentences_end_at_the_marks_of_both_languages():
    assert split("甲方付款。乙方交货！是吗？好；行") == ["甲方付款。", "乙方交货！", "是吗？", "好；行"]
    assert split("It is 3.5 m. Really? Yes.") == ["It is 3.5 m.", "Really?", "Yes."]


def test_a_point_inside_a_number_version_or_abbreviation_ends_nothing():
    for text in ("Use v2.1 here.", "See e.g. this one.", "圆周率是 3.14、e.g. 和 v2.0。", "Dr. Li came."):
        assert split(text) == [text]


def test_a_line_is_a_sentence():
    assert split("| a | b |\n| 1 | 2 |\n\n- item") == ["| a | b |", "| 1 | 2 |", "- item"]


WRAPPED = (
    "The tenant pays the rent of 900 euros at the beginning of\n"
    "every month. Pets are allowed if they are small and if the\n"
    "neighbours have agreed."
)
CHINESE_WRAPPED = (
    "承租人应当在每月的第一天之前支付九百元的租金，出租\n人收到之后应当在三天之内确认。只要同层的邻居事先书\n面同意，可以饲养宠物。"
)


def test_a_line_that_was_wrapped_goes_on_in_the_next_one():
    assert split(WRAPPED) == [
        "The tenant pays the rent of 900 euros at the beginning of\nevery month.",
        "Pets are allowed if they are small and if the\nneighbours have agreed.",
    ]
    assert split(CHINESE_WRAPPED) == [
        "承租人应当在每月的第一天之前支付九百元的租金，出租\n人收到之后应当在三天之内确认。",
        "只要同层的邻居事先书\n面同意，可以饲养宠物。",
    ]


@pytest.mark.parametrize(
    "lines",
    [
        # the next word would have fitted: this line was ended on purpose
        ["Lines end in the middle of words", "The document was typeset in columns with hyphenation and more"],
        ["The following documents have to be handed in this week", "- the signed contract and its annexes in two copies"],
        ["| a table with quite a number of columns | and a row |", "| another row of the very same table here | and more |"],
        ["2026-11-21 12:00:01 INFO the server has been started", "2026-11-21 12:00:02 INFO the first client is connected"],
        ["春风又绿江南岸", "明月何时照我还"],
    ],
)
def test_a_line_that_was_ended_on_purpose_is_a_sentence(lines):
    assert split("\n".join(lines)) == lines


def test_clauses_around_a_chinese_semicolon_stay_together_while_they_are_short():
    assert split("甲方付款；乙方交货。") == ["甲方付款；乙方交货。"]
    long = "甲" * 70 + "；"
    assert split(long + long + "乙方交货。") == [long, long + "乙方交货。"]


def test_the_best_sentence_is_the_one_with_most_weight():
    text = "Cats sleep. Dogs bark at cats. Birds sing."
    assert best_sentence_start(text, {"dog": 1.0, "bark": 1.0, "cat": 0.5}) == text.index("Dogs")
    assert best_sentence_start(text, {"fish": 1.0}) == 0


@pytest.mark.parametrize(
    ("question", "kinds"),
    [("How many pages?", {"number"}), ("合同哪一年生效？", {"time"}), ("Why is it so?", {"reason"}), ("谁付款？", {"name"}),
     ("What is the exit code when a file is unreadable?", set()), ("Which tenant who left owes rent?", set()),
     ("When did it open, and who paid?", {"time", "name"}), ("Where is the office?", {"name"})],
)
def test_what_is_asked_for_is_seen_in_both_languages(question, kinds):
    assert asked_for(question) == kinds


def ranked(question, *passages, headings=()):
    terms = question_terms(question)
    hits = [Hit(Chunk("a", text, 0, len(text), headings=headings), 1.0) for text in passages]
    return rank_sentences(question, terms, term_weights(terms, {}, 0), hits)[0].sentences


def test_the_sentence_that_has_what_is_asked_for_wins():
    first = ranked("When was the bridge built?", "The bridge is made of stone. The bridge was built in 1786.")[0]
    assert first.text == "The bridge was built in 1786."


def test_other_words_for_the_same_are_understood():
    first = ranked("How do I remove a program?", "Click here to start. To uninstall software, open the panel.")[0]
    assert first.text == "To uninstall software, open the panel."


def test_a_heading_is_never_quoted():
    assert [item.text for item in ranked("What is a page?", "# What is a page?\nA page holds 16 tokens.")] == [
        "A page holds 16 tokens."
    ]


def sentence(number, start, end, score):
    return Evidence(number, start, end, "x" * (end - start), score)


def test_one_clear_winner_is_quoted_alone_and_equals_together():
    assert quotations([sentence(1, 0, 9, 5.0), sentence(1, 10, 20, 0.0)]) == [(1, 0, 9)]
    # Two equal sentences have one half each: 0.5 < 0.95, so both are needed.
    assert quotations([sentence(2, 0, 9, 1.0), sentence(1, 30, 40, 1.0)]) == [(2, 0, 9), (1, 30, 40)]


@pytest.mark.parametrize(
    ("before", "opening", "brings"),
    [
        ("The LoRA matrices are small. ", "They are merged after training.", True),
        ("Quantization rounds weights. ", "This means that some precision is lost.", True),
        ("Quantization rounds weights. ", "This method is old.", False),
        ("量化会舍入权重。", "它能省内存。", True),
        ("量化会舍入权重。", "其他办法也有。", False),
        # A heading was quoted run on with what stood under it: "Why the first answer is slow That is ..."
        ("Why the first answer is slow\n", "That is because the model is loaded then.", False),
        ("The first answer is slow (so is the first search).\n", "That is because the model is loaded then.", True),
    ],
)
def test_a_quotation_that_begins_with_a_pronoun_brings_the_sentence_before(before, opening, brings):
    end = len(before) + len(opening)
    first = Evidence(1, 0, len(before.rstrip()), before.rstrip(), 0.0)
    best = Evidence(1, len(before), end, opening, 9.0)
    assert quotations([best, first]) == [(1, 0 if brings else len(before), end)]


def test_neighbours_become_one_quotation_and_never_more_than_five_sentences():
    equal = [sentence(1, 10 * at, 10 * at + 9, math.log(2)) for at in (1, 0, 3, 6, 7, 9)]
    assert quotations(equal) == [(1, 0, 19), (1, 30, 39), (1, 60, 79)]


def test_the_best_sentence_comes_first_and_the_others_in_reading_order():
    said = [sentence(1, 60, 69, 1.0), sentence(1, 30, 39, 0.5), sentence(1, 0, 9, 0.4)]
    assert quotations(said) == [(1, 60, 69), (1, 0, 9), (1, 30, 39)]


def test_no_more_than_two_passages_are_quoted():
    equal = [sentence(number, 0, 9, math.log(2)) for number in (3, 1, 2)] + [sentence(1, 20, 29, 0.0)]
    # Shares 2/7, 2/7, 2/7 and 1/7: passage 2 is left out, a weaker sentence of passage 1 is not.
    assert quotations(equal) == [(3, 0, 9), (1, 0, 9), (1, 20, 29)]


@pytest.mark.parametrize("number", ["1.", "4)", "（二）", "三、", "b."])
def test_the_number_of_a_list_item_alone_is_never_quoted(number):
    # PDF text often has it on a line of its own, and an answer once quoted "1." and "4.".
    text = f"{number}\nThe keys are computed once.\n{number}\nThe values too."
    hit = Hit(Chunk("a.pdf", text, 0, len(text)), 1.0)
    found = sentence_features("What is computed?", ["computed"], {"computed": 1.0}, [hit])
    assert [item.text for item in found.sentences] == ["The keys are computed once.", "The values too."]


def test_lines_of_notes_without_a_full_stop_are_no_headings():
    """Each stood between blank lines and was taken for one, so that a note of the Wi-Fi password was refused."""
    notes = ["Wi-Fi guest password is hunter22", "Dentist appointment on 14 March", "备用钥匙在李阿姨家", "牙医预约在3月14日"]
    found = [item.text for item in ranked("When is the dentist appointment? 牙医预约在哪天？", "\n\n".join(notes))]
    assert sorted(found) == sorted(notes)


def test_a_heading_above_a_heading_that_is_known_is_one_too():
    text = "What is cached\n\nKeys and values\n\nKeys and values of every layer are cached."
    found = [item.text for item in ranked("What is cached?", text, headings=("Keys and values",))]
    assert found == ["Keys and values of every layer are cached."]


@pytest.mark.parametrize(("question", "kind"), [
    ("這座橋是什麼時候建成的？", "time"), ("為什麼要交押金？", "reason"), ("租期有幾個月？", "number"), ("誰負責維修？", "name"),
])
def test_what_is_asked_for_is_seen_in_traditional_characters(question, kind):
    assert asked_for(question) == {kind}


@pytest.mark.parametrize("heading", ["三、缓存的是什么", "1. Reading documents", "What is cached", "缓存里有什么"])
def test_a_short_line_between_blank_lines_is_a_heading(heading):
    text = f"前文在此。\n\n{heading}\n\n缓存的是键和值 what is cached。"
    assert heading not in [item.text for item in ranked("缓存的是什么 what is cached?", text)]


@pytest.mark.parametrize("line", ["- 缓存三天", "| 缓存 | 3 |", "缓存三天。", "The cache is kept for three days."])
def test_a_list_item_a_table_row_and_a_sentence_are_no_headings(line):
    quoted = line.removeprefix("- ")  # a quotation is no list
    assert quoted in [item.text for item in ranked("缓存多久 cache?", f"前文在此。\n\n{line}\n\n后文。")]


def test_the_head_of_a_table_and_its_rule_are_not_quoted():
    table = "| 项目 | 天数 |\n| --- | --- |\n| 缓存 | 3 |\n| 日志 | 30 |"
    assert sorted(item.text for item in ranked("缓存保留多少天？", table)) == ["| 日志 | 30 |", "| 缓存 | 3 |"]
