"""Splitting: every chunk is a slice, nothing is lost, headings and budgets hold."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Sequence

import pytest

from ingest import splitter
from ingest.loaders.markdown import read_markdown
from ingest.splitter import split_document
from rag.document import Chunk, Document, Heading, Page


def count_words(texts: Sequence[str]) -> list[int]:
    """A tokenizer a person can check: one token a Chinese character, a word, or a mark."""
    return [len(re.findall(r"[\u4e00-\u9fff]|[^\W\u4e00-\u9fff]+|[^\w\s]", text)) for text in texts]


def split(text: str, *, chunk_tokens: int = 40, title: str = "") -> list[Chunk]:
    """Split a markdown text."""
    _, headings = read_markdown(text)
    document = Document("file.md", text, "md", title, headings=tuple(headings))
    return split_document(document, count_words, chunk_tokens=chunk_tokens)


def assert_sound(document: Document, chunks: Sequence[Chunk]) -> None:
    covered = [False] * len(document.text)
    last_end = 0
    for chunk in chunks:
        assert chunk.text == document.text[chunk.start : chunk.end]
        assert chunk.text.strip() == chunk.text != ""
        assert chunk.start >= last_end, "chunks are in order and do not overlap"
        last_end = chunk.end
        covered[chunk.start : chunk.end] = [True] * (chunk.end - chunk.start)
    lost = [c for c, seen in zip(document.text, covered, strict=True) if not seen and not c.isspace()]
    assert not lost


PIECES = [
    "The cache keeps keys and values. ", "注意力机制让每个词元看到前面的词元。", "\n\n", "\n", "  ",
    "# Heading\n", "## 小标题\n\n", "### Third level\n", "- item one\n- item two\n", "。", "!?", "\u3000",
    "| a | b |\n|---|---|\n| 1 | 2 |\n", "x" * 90, "长" * 60, "```\ncode  here\n\n# no heading\n```\n",
    "word " * 50, "e.g. this, that; and 3.14 of it... ", "“引文。”", "\t", "\x0b", "🙂", "\u200b",
]


@pytest.mark.parametrize("seed", range(60))
def test_every_chunk_is_a_slice_of_its_document_and_nothing_is_lost(seed: int) -> None:
    chance = random.Random(seed)
    text = "".join(chance.choice(PIECES) for _ in range(chance.randrange(80)))
    _, headings = read_markdown(text)
    cuts = sorted(chance.sample(range(len(text) + 1), min(3, len(text))))
    pages = tuple(Page(number, start, start) for number, start in enumerate([0, *cuts], 1))
    document = Document("f.md", text, "md", headings=tuple(headings), pages=pages)
    budget = chance.choice([8, 20, 60, 300])
    chunks = split_document(document, count_words, chunk_tokens=budget)
    assert_sound(document, chunks)
    for chunk in chunks:
        assert chunk.page == document.page_at(chunk.start)
        assert chunk.last_page == document.page_at(chunk.end - 1)


@pytest.mark.parametrize("seed", range(30))
def test_no_chunk_is_above_the_budget(seed: int) -> None:
    # Without headings, so that nothing is glued, and without words longer than the budget.
    chance = random.Random(seed)
    pieces = [p for p in PIECES if "#" not in p and "|" not in p]
    text = "".join(chance.choice(pieces) for _ in range(60))
    budget = chance.choice([12, 30, 100])
    document = Document("f.txt", text, "txt")
    for chunk in split_document(document, count_words, chunk_tokens=budget):
        assert count_words([chunk.text])[0] <= budget


def test_a_text_that_fits_is_one_chunk() -> None:
    text = "First paragraph.\n\nSecond one.\n\n第三段。"
    assert [chunk.text for chunk in split(text)] == [text]


def test_an_empty_text_and_one_of_white_space_have_no_chunks() -> None:
    assert split("") == []
    assert split(" \n\t\u3000\n") == []


def test_headings_part_chunks_and_form_the_path() -> None:
    text = (
        "# Guide\n\n## Cache\n\n" + "the cache keeps keys and values. " * 3
        + "\n\n## 注意力\n\n" + "每个词元都看前面的词元。" * 2
    )
    chunks = split(text)
    assert [chunk.headings for chunk in chunks] == [("Guide", "Cache"), ("Guide", "注意力")]
    # A heading without text of its own goes with the section below it.
    assert chunks[0].text.startswith("# Guide\n\n## Cache")


def test_small_neighbouring_sections_share_a_chunk_under_their_parent() -> None:
    text = "# List\n\n## A\n\none.\n\n## B\n\ntwo."
    # 12 tokens in all: below the small share of 400 (40), and within the joined share (120)
    chunks = split(text, chunk_tokens=400)
    assert [chunk.headings for chunk in chunks] == [("List",)]


def test_sections_of_different_parents_are_never_joined() -> None:
    text = "# One\n\n## A\n\nfirst.\n\n# Two\n\n## B\n\nsecond.\n\n## C\n\nthird."
    chunks = split(text, chunk_tokens=400)
    # "One" and "Two" are neighbours under the document itself; A is under One only.
    assert all("first" not in chunk.text or "third" not in chunk.text or chunk.headings == ()
               for chunk in chunks)


def test_no_chunk_is_a_heading_alone() -> None:
    body = "a sentence of six words here. " * 5
    text = f"# Top\n\n## Middle\n\n### Low\n\n{body}\n\n## Last\n\n{body}\n\n## Trailing"
    chunks = split(text, chunk_tokens=30)
    assert all("sentence" in chunk.text for chunk in chunks)
    assert chunks[-1].text.endswith("## Trailing")


def test_a_long_paragraph_is_cut_at_sentence_ends_in_both_languages() -> None:
    english = "The cache keeps keys and values of all tokens. " * 12
    chinese = "键值缓存保存所有词元的键和值。" * 12
    for text, end in ((english, "."), (chinese, "。")):
        chunks = split(text)
        assert len(chunks) > 1
        assert all(chunk.text.endswith(end) for chunk in chunks)


def test_pieces_of_a_long_paragraph_are_of_nearly_equal_size() -> None:
    text = "One two three four five six seven eight nine. " * 9  # 90 tokens, budget 40 -> 3 pieces
    sizes = [count_words([chunk.text])[0] for chunk in split(text)]
    assert sizes == [30, 30, 30]


def test_a_paragraph_that_fits_is_never_cut() -> None:
    paragraphs = [f"Paragraph {n} " + "word " * 18 + "end." for n in range(8)]  # 22 tokens each
    chunks = split("\n\n".join(paragraphs))
    assert [chunk.text for chunk in chunks] == list(paragraphs)


def test_a_long_table_is_cut_between_rows_and_each_piece_knows_its_columns() -> None:
    rows = "\n".join(f"| model{n} | {n} |" for n in range(20))
    text = f"## Sizes\n\n| Model | Layers |\n| --- | --- |\n{rows}"
    chunks = split(text)
    assert len(chunks) > 1
    assert chunks[0].headings == ("Sizes",)
    for chunk in chunks[1:]:
        assert chunk.headings == ("Sizes", "Model | Layers")
        assert all(re.fullmatch(r"\| model\d+ \| \d+ \|", line) for line in chunk.text.split("\n"))


def test_wrapped_lines_are_cut_at_sentences_not_at_the_wrapping() -> None:
    # Lines of a fixed width, as in e-mail: their ends mean nothing.
    sentence = "A line of mail is wrapped at some width and goes on below. "
    words = (sentence * 14).split()
    lines, line = [], ""
    for word in words:
        if len(line) + len(word) > 60:
            lines.append(line.rstrip())
            line = ""
        line += word + " "
    text = "\n".join([*lines, line.rstrip()])
    chunks = split(text, chunk_tokens=60)
    assert len(chunks) > 1
    assert all(chunk.text.endswith(".") for chunk in chunks)


def test_lines_that_are_the_authors_are_kept_whole() -> None:
    lines = [f"{n}. entry number {n} of the list" for n in range(30)]
    chunks = split("\n".join(lines))
    assert [line for chunk in chunks for line in chunk.text.split("\n")] == lines


def test_the_budget_leaves_room_for_title_and_headings() -> None:
    title = "word " * 10
    text = "## " + "heading " * 5 + "\n\n" + "Short sentence of some words here. " * 40
    _, headings = read_markdown(text)
    document = Document("f.md", text, "md", title.strip(), headings=tuple(headings))
    for chunk in split_document(document, count_words, chunk_tokens=60):
        assert count_words([chunk.indexed_text])[0] <= 60


def test_pages_of_a_chunk_are_those_of_its_first_and_last_character() -> None:
    text = "one two three. " * 3 + "four five six."
    document = Document("f.pdf", text, "pdf", pages=(Page(1, 0, 20), Page(2, 20, len(text))))
    (chunk,) = split_document(document, count_words, chunk_tokens=100)
    assert (chunk.page, chunk.last_page) == (1, 2)


def test_pieces_without_a_token_are_in_one_chunk_only() -> None:
    # Some tokenizers know no token for a mark; such a piece once began the next chunk again.
    def count_letters(texts: Sequence[str]) -> list[int]:
        return [sum(sign.isalpha() for sign in text) for text in texts]

    document = Document("f.txt", "word -- more - " * 40, "txt")
    assert_sound(document, split_document(document, count_letters, chunk_tokens=24))


def test_an_article_keeps_its_number_in_every_piece() -> None:
    article = "第七条 " + "当事人应当遵循诚信原则，秉持诚实，恪守承诺。" * 6
    text = f"第六条 短的条文。\n\n{article}\n\n第八条 又一条短的条文。"
    starts = [(m[0], m.start()) for m in re.finditer(r"第[六七八]条", text)]
    document = Document("law.txt", text, "txt", headings=tuple(Heading(1, t, s) for t, s in starts))
    pieces = [chunk for chunk in split_document(document, count_words, chunk_tokens=60)
              if "诚信原则" in chunk.text]
    assert len(pieces) > 1
    assert all(chunk.headings == ("第七条",) for chunk in pieces)


def test_counting_is_batched() -> None:
    calls = 0

    def count(texts: Sequence[str]) -> list[int]:
        nonlocal calls
        calls += 1
        return count_words(texts)

    text = "\n\n".join(f"## H{n}\n\nParagraph {n} with a few words." for n in range(200))
    _, headings = read_markdown(text)
    split_document(Document("f.md", text, "md", headings=tuple(headings)), count, chunk_tokens=40)
    assert calls <= 5


@pytest.mark.parametrize(
    "text",
    [
        "." * 200_000, "Contents " + "." * 40_000 + "7", ".)" * 100_000, "A." * 100_000,
        "e.g." * 50_000, "?!" * 100_000 + "x", "." + ")" * 200_000, "…" * 200_000, "x. " * 60_000,
        "a" + " " * 200_000 + "b", "|" * 200_000, "- " * 100_000, "\n" * 200_000, "\n " * 100_000,
    ],
    ids=lambda text: repr(text[:4]),
)
def test_time_grows_with_the_length_of_a_line_whatever_it_holds(text: str) -> None:
    """A table of contents with 40,000 dots in a row held up a whole ingest for minutes."""
    document = Document("a.txt", text, "txt")
    began = time.perf_counter()
    chunks = split_document(document, count_words, chunk_tokens=320)
    assert time.perf_counter() - began < 5
    assert_sound(document, chunks)


def test_marks_behind_an_initial_or_an_abbreviation_end_a_sentence_from_the_second_on() -> None:
    """"e.g. this" and "J. Smith" go on; "in the USA... Then" does not."""
    found = [
        text for text in ("e.g. this", "i.e. that", "J. Smith", "the USA... Then", "e.g... this", "so. Then")
        if re.search(splitter._SEPARATORS[0], text)
    ]
    assert found == ["the USA... Then", "e.g... this", "so. Then"]
