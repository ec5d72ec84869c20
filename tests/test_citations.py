from rag.answer import Hit
from rag.citations import check_citations, is_refusal, strip_markers
from rag.document import Chunk
from rag.language import REFUSAL

FIRST = "The lease began on 3 May 2021. The monthly rent is 1,250 euros, paid in advance."
SECOND = "The deposit is three months of rent. It isn't paid back before the keys are returned."
THIRD = "合同于2021年5月3日生效。押金为三个月租金，退房时不退还利息。"
HITS = tuple(Hit(Chunk(f"{n}.txt", text, 100, 100 + len(text)), 1.0) for n, text in enumerate((FIRST, SECOND, THIRD), 1))


def check(text):
    return check_citations(text, HITS, page_at=lambda path, offset: 7 if path == "1.txt" else None)


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
