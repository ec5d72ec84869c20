import random
import re

import pytest

from rag.answer import Hit
from rag.citations import (
    MarkerStream,
    StrictStream,
    _numbers,
    check_citations,
    is_refusal,
    strip_markers,
)
from rag.document import Chunk
from rag.language import REFUSAL

FIRST = "The lease began on 3 May 2021. The monthly rent is 1,250 euros, paid in advance."
SECOND = "The deposit is three months of rent. It isn't paid back before the keys are returned."
THIRD = "合同于2021年5月3日生效。押金为三个月租金，退房时不退还利息。"
HITS = tuple(Hit(Chunk(f"{n}.txt", text, 100, 100 + len(text)), 1.0) for n, text in enumerate((FIRST, SECOND, THIRD), 1))


def check(text, **options):
    return check_citations(text, HITS, page_at=lambda path, offset: 7 if path == "1.txt" else None, **options)


def test_a_right_marker_stays_and_points_at_the_sentence():
    checked = check("The monthly rent is 1,250 euros [1].")
    assert checked.text == "The monthly rent is 1,250 euros [1]."
    (citation,) = checked.citations
    assert (citation.marker, citation.path, citation.page) == (1, "1.txt", 7)
    assert citation.quote == "The monthly rent is 1,250 euros, paid in advance."
    assert FIRST[citation.start - 100 : citation.end - 100] == citation.quote


def test_a_marker_out_of_range_is_removed():
    # [0] would be the last passage in Python, [9] none at all.
    assert check("The monthly rent is 1,250 euros [0][9].").text == "The monthly rent is 1,250 euros [1]."
    assert check("Bananas grow in Ecuador [9].").text == "Bananas grow in Ecuador."


def test_a_marker_at_the_wrong_passage_is_corrected():
    assert check("The deposit is three months of rent [1].").text == "The deposit is three months of rent [2]."


def test_a_missing_marker_is_set():
    assert check("押金为三个月租金。").text == "押金为三个月租金。 [3]"


def test_a_wrong_number_is_unsupported():
    checked = check("The monthly rent is 1,350 euros [1].")
    assert checked.unsupported == ("The monthly rent is 1,350 euros.",)
    assert checked.citations == ()


def test_a_wrong_date_is_unsupported():
    assert check("The lease began on 4 May 2021 [1].").unsupported == ("The lease began on 4 May 2021.",)
    assert check("合同于2021年6月3日生效。[3]").unsupported == ("合同于2021年6月3日生效。",)


def test_a_negation_turned_round_is_unsupported():
    assert check("The deposit is paid back before the keys are returned [2].").citations == ()


def test_every_sentence_is_checked_on_its_own():
    checked = check("The lease began on 3 May 2021 [1]. Elephants never forget their keepers [1].")
    assert checked.text == "The lease began on 3 May 2021 [1]. Elephants never forget their keepers."
    assert checked.unsupported == ("Elephants never forget their keepers.",)


def test_chinese_brackets_count_as_markers():
    assert strip_markers("押金为三个月租金【3】。") == "押金为三个月租金。"


def test_the_refusal_is_recognised_with_or_without_a_marker():
    assert is_refusal(REFUSAL["en"]) and is_refusal(REFUSAL["zh"] + " [1]")
    assert not is_refusal("The rent is due.")


def test_strict_takes_out_what_nothing_supports_and_still_reports_it():
    text = "Sure! The lease began on 3 May 2021 [1]. Elephants never forget their keepers [1].\n押金为三个月租金。"
    checked = check(text, strict=True)
    assert checked.text == "Sure! The lease began on 3 May 2021 [1]. 押金为三个月租金。 [3]"
    assert checked.unsupported == ("Elephants never forget their keepers.",)
    assert check("Elephants never forget their keepers [1].", strict=True).text == ""


@pytest.mark.parametrize(
    ("said", "holds"),
    [
        ("押金为3个月租金。", True), ("押金为四个月租金。", False), ("押金为两个月租金。", False),
        ("The deposit is 3 months of rent.", True), ("The deposit is four months of rent.", False),
    ],
)  # fmt: skip
def test_numbers_agree_however_they_are_written(said, holds):
    assert bool(check(said).citations) == holds


def test_chinese_numerals_are_read_as_numbers():
    values = {"三": 3, "十": 10, "十二": 12, "二十五": 25, "一百零五": 105, "一万二千": 12_000, "二〇二一": 2021, "两千": 2000}
    for numeral, value in values.items():
        assert _numbers(f"共{numeral}年") == {str(value)}, numeral


def test_a_name_that_the_passage_does_not_hold_is_unsupported():
    text = "The bridge of Kelvin was rebuilt by Morton in 1954. It carries trams. Its toll is paid in Harwich."
    hits = (Hit(Chunk("a.txt", text, 0, len(text)), 1.0),)

    def supported(said):
        return bool(check_citations(said, hits, page_at=lambda path, offset: None).citations)

    assert supported("The bridge of Kelvin was rebuilt by Morton in 1954.")
    assert not supported("The bridge of Kelvin was rebuilt by Preston in 1954.")
    assert supported("The toll of the Kelvin bridge is paid in Harwich.")  # named two sentences before
    assert not supported("Its toll is paid in Dover.")


def streamed(pieces, hits=3):
    stream = MarkerStream(hits)
    return [*(stream.push(piece) for piece in pieces), stream.finish()]


@pytest.mark.parametrize(
    "text",
    ["Rent is due [1]. Pets may [2, 3].", "押金为三个月【3】。利息不退 [1][2]", "a [1", "x = a[0", "array [ 12 ] and [note] here"],
)
def test_a_marker_in_a_stream_comes_whole_or_not_at_all(text):
    for size in (1, 2, 3, 5):
        pieces = streamed([text[at : at + size] for at in range(0, len(text), size)])
        assert "".join(pieces) == text.replace(" [ 12 ]", "")
        shown = ""
        for piece in pieces[:-1]:
            shown += piece
            assert not re.search(r"[\[【][\d\s,]*$", shown), shown


def test_a_marker_of_no_passage_never_shows_in_a_stream():
    assert "".join(streamed(list("Cats [9] sleep [0] here [2]."))) == "Cats sleep here [2]."


def strictly(text, size):
    stream = StrictStream(HITS, page_at=lambda path, offset: None)
    pieces = [stream.push(text[at : at + size]) for at in range(0, len(text), size)]
    assert "".join(pieces) == stream.shown
    return pieces


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(
    "text",
    [
        "Sure! The lease began on 3 May 2021 [1]. Elephants never forget their keepers [1].\n押金为三个月租金。",
        "The monthly rent is 1,250 euros [9][2]. Elephants never forget. The deposit is three months of rent. Fine.",
        "押金为三个月租金。【3】大象从不忘记饲养员。合同于2021年5月3日生效【3】。退房时不退还利息。",
        "  [1] The rent is 1,250 euros. [see](http://evil.test). The lease began on 3 May 2021. It costs 3.5 million.",
        "Elephants never forget their keepers. Bananas grow in Ecuador.",
        "Sure! Fine! OK.",
        REFUSAL["en"] + " The monthly rent is 1,250 euros. The lease began on 3 May 2021.",
        "The lease began on 3 May 2021. " + REFUSAL["zh"] + "押金为三个月租金。",
    ],
)
def test_a_strict_stream_shows_only_what_the_answer_keeps(text, size):
    checked = check(text, strict=True)
    answer = "" if is_refusal(text) or not checked.citations else checked.text
    shown = "".join(strictly(text, size))
    assert answer.startswith(shown)
    assert "Elephants" not in shown and "大象" not in shown


def test_a_strict_stream_shows_a_sentence_as_soon_as_the_next_has_begun():
    pieces = strictly("The lease began on 3 May 2021. It costs 3.5 million. The deposit is three months of rent. A", 1)
    shown = [piece for piece in pieces if piece]
    assert shown == ["The lease began on 3 May 2021 [1].", " The deposit is three months of rent [2]."]
    first = next(at for at, piece in enumerate(pieces) if piece)
    assert first == len("The lease began on 3 May 2021. I") - 1


OWN = "Rotary embeddings, introduced by Su et al. [2] and refined in [3], rotate pairs. Probabilities lie in the interval [0, 1]. " \
    "The first item is read with items[0] in Python. The deposit[1] is paid at once."


def check_own(text, **options):
    return check_citations(text, (Hit(Chunk("a.txt", OWN, 0, len(OWN)), 1.0),) * 3, page_at=lambda path, offset: None, **options)


@pytest.mark.parametrize(
    ("written", "checked"),
    [
        ("Probabilities lie in the interval [0, 1].", "Probabilities lie in the interval [0, 1] [1]."),
        ("Probabilities lie in the interval [0, 1] [2].", "Probabilities lie in the interval [0, 1] [2]."),
        ("The first item is read with `items[0]` in Python [1].", "The first item is read with `items[0]` in Python [1]."),
        ("The first item is read with items[0] in Python[1].", "The first item is read with items[0] in Python [1]."),
        ("Embeddings introduced by Su et al. [2] and refined in [3], rotate pairs [1].",
         "Embeddings introduced by Su et al. [2] and refined in [3], rotate pairs [1]."),
        ("The deposit[1] is paid at once.", "The deposit[1] is paid at once [1]."),
        ("Pairs [1, 2, 9] of `a[1]` are odd [9].", "Pairs [1, 2, 9] of `a[1]` are odd."),
    ],
)
def test_brackets_that_cite_nothing_stay_in_the_text(written, checked):
    """Once "the interval [0, 1]" became "the interval [1]" and `items[0]` became `items`."""
    assert check_own(written).text == checked
    for size in (1, 2, 5, 1000):
        stream = MarkerStream(3, [OWN])
        shown = "".join(stream.push(written[at : at + size]) for at in range(0, len(written), size)) + stream.finish()
        assert shown == written.removesuffix(" [9].") + "." * written.endswith(" [9].")


def test_where_the_sources_are_unknown_a_bracket_with_a_zero_is_no_marker():
    assert strip_markers("An interval [0, 1], `a[0]`, b[0] and rent [2].") == "An interval [0, 1], `a[0]`, b[0] and rent."


def test_a_made_up_sentence_finds_no_support_in_a_line_before_it():
    """A line without a full stop was once read on as if it had been wrapped to a width."""
    text = "The heating costs of the flat are paid separately by the tenant. Pets are allowed."
    hits = (Hit(Chunk("a.txt", text, 0, len(text)), 1.0),)
    said = "The heating costs of the flat are paid separately by the tenant\nThe moon is made of cheese."
    checked = check_citations(said, hits, page_at=lambda path, offset: None, strict=True)
    assert checked.unsupported == ("The moon is made of cheese.",)
    assert checked.text == "The heating costs of the flat are paid separately by the tenant [1]"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("There are 1,200 employees.", "There are 1200 employees."), ("There are 1200 employees.", "There are 1,200 employees."),
        ("There are three employees.", "There are 3 employees."), ("There are 3 employees.", "There are three employees."),
        ("There are ١٢ employees.", "There are 12 employees."),
    ],
)
def test_a_number_holds_however_its_digits_are_written(source, said):
    hits = (Hit(Chunk("a.txt", source, 0, len(source)), 1.0),)
    assert check_citations(said, hits, page_at=lambda path, offset: None).citations
    assert not check_citations(said.replace("employees", "camels"), hits, page_at=lambda path, offset: None).citations


@pytest.mark.parametrize("said", ["合同沒有規定違約金的數額。", "合同没有规定违约金的数额。"])
def test_a_denial_in_traditional_characters_is_seen(said):
    text = "合同規定了違約金的數額。租客可以在房間裡養寵物。"
    hits = (Hit(Chunk("a.txt", text, 0, len(text)), 1.0),)
    assert check_citations(said, hits, page_at=lambda path, offset: None).unsupported == (said,)


SAID = (
    "The rent is 1,250 euros per month", "Heating costs are paid separately by the tenant of the house", "The moon is made of cheese",
    "Bicycles are kept in the cellar", "押金为两个月租金", "月亮是奶酪做的", "introduced by Su et al. [2] and refined in [3]", "See `a[0]`",
)
BETWEEN = (". ", ".\n", "\n", "\n\n", " [1]\n", " [1].\n", "。", "；", "【2】。", ". [1][9] ", ". [2] ", "! ")


def test_a_strict_stream_never_shows_a_sentence_twice():
    """Of such texts one in twenty came once in pieces, with what nothing supports, and then again as a whole."""
    chosen = random.Random(7)
    text = "Heating costs are paid separately by the tenant of the house. Bicycles are kept in the cellar. The rent is 1,250 euros per month."
    hits = [Hit(Chunk(f"{n}.txt", each, 0, len(each)), 1.0) for n, each in enumerate((text, OWN, "押金为两个月租金。"))]
    for _ in range(300):
        written = "".join(chosen.choice(SAID) + chosen.choice(BETWEEN) for _ in range(chosen.randint(1, 4)))
        stream = StrictStream(hits, page_at=lambda path, offset: None)
        at, pieces = 0, []
        while at < len(written):
            size = chosen.randint(1, 9)
            pieces.append(stream.push(written[at : at + size]))
            at += size
        answer = check_citations(written, hits, page_at=lambda path, offset: None, strict=True).text
        assert "".join(pieces) == stream.shown and answer.startswith(stream.shown), written
        if written.isascii():  # a Chinese sentence behind an English full stop isn't parted from what is before it
            assert "cheese" not in answer, written
