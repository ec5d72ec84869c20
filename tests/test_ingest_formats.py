"""Loaders of office, data and container formats; the first five formats are in test_loaders.py."""

from __future__ import annotations

import json
import zipfile
from email.message import EmailMessage
from pathlib import Path

import pytest
from loading import load, titles

from ingest.loaders import LOADERS, load_document
from rag.errors import LoadError

# tables -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "delimiter"), [("a.csv", ","), ("a.csv", ";"), ("a.csv", "|"), ("a.tsv", "\t")]
)
def test_every_row_of_a_table_keeps_its_columns_names(
    tmp_path: Path, name: str, delimiter: str
) -> None:
    rows = [["Name", "Age", "City"], ["Alice", "30", "New York"], ["王芳", "", "上海"]]
    document = load(tmp_path, name, "\n".join(delimiter.join(row) for row in rows))
    assert document.text == "Name: Alice; Age: 30; City: New York\n\nName: 王芳; City: 上海"


def test_quoted_cells_may_hold_delimiters_and_lines(tmp_path: Path) -> None:
    document = load(tmp_path, "a.csv", 'item,note\n1,"one, two\nthree"\n')
    assert document.text == "item: 1; note: one, two three"


def test_a_table_without_names_is_read_as_values(tmp_path: Path) -> None:
    assert load(tmp_path, "a.csv", "1,2\n3,4\n").text == "1; 2\n\n3; 4"


def test_long_rows_are_sections(tmp_path: Path) -> None:
    answer = "The cache keeps the keys and the values of all tokens that were read before. " * 2
    document = load(tmp_path, "a.csv", f"id,question,answer\n7,What is it?,{answer}\n8,Why?,{answer}\n")
    assert titles(document) == [(1, "What is it?"), (1, "Why?")]
    assert document.text.startswith("id: 7\nquestion: What is it?\nanswer: The cache")


def test_workbooks_are_read_sheet_by_sheet(tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    sheet = book.active
    sheet.title = "模型"
    for row in (["Name", "Layers"], ["small", 8.0], ["large", 24.5]):
        sheet.append(row)
    book.create_sheet("Empty")
    hidden = book.create_sheet("Hidden")
    hidden.append(["secret"])
    hidden.sheet_state = "hidden"
    book.save(tmp_path / "a.xlsx")
    document = load_document(tmp_path / "a.xlsx", "a.xlsx")
    assert document.text == "模型\n\nName: small; Layers: 8\n\nName: large; Layers: 24.5"
    assert titles(document) == [(1, "模型")]


def test_slides_are_pages(tmp_path: Path) -> None:
    pptx = pytest.importorskip("pptx")
    deck = pptx.Presentation()
    for title, text in (("缓存", "键和值"), ("Sizes", "Two bytes a number")):
        slide = deck.slides.add_slide(deck.slide_layouts[1])
        slide.shapes.title.text = title
        slide.placeholders[1].text = text
    deck.slides[1].notes_slide.notes_text_frame.text = "Say it slowly."
    deck.save(str(tmp_path / "a.pptx"))
    document = load_document(tmp_path / "a.pptx", "a.pptx")
    assert document.text == "缓存\n\n键和值\n\nSizes\n\nTwo bytes a number\n\nSay it slowly."
    assert titles(document) == [(1, "缓存"), (1, "Sizes")]
    assert document.page_at(document.text.index("Two bytes")) == 2
    assert document.page_at(0) == 1


@pytest.mark.parametrize("name", ["a.xlsx", "a.pptx", "a.zip", "a.epub"])
def test_office_files_that_are_none_say_so(tmp_path: Path, name: str) -> None:
    with pytest.raises(LoadError, match="this is not an? "):
        load(tmp_path, name, "text")


# json and notebooks -----------------------------------------------------------------------------


def test_json_is_read_as_an_outline(tmp_path: Path) -> None:
    value = {"title": "缓存", "sizes": {"layers": 8, "heads": [1, 2]}, "note": None, "on": True}
    document = load(tmp_path, "a.json", json.dumps(value))
    assert document.text == (
        "title: 缓存\nsizes:\n  layers: 8\n  heads:\n    - 1\n    - 2\nnote: \non: true"
    )
    assert titles(document) == [(1, "缓存")]


def test_lines_that_are_no_json_are_counted(tmp_path: Path) -> None:
    document = load(tmp_path, "a.jsonl", '{"a": 1}\nnot json\n\n{"a": 2}\n')
    assert document.text == "a: 1\n\na: 2"
    assert document.warnings == ("1 lines are not JSON (the first is line 2)",)
    with pytest.raises(LoadError, match="no line of it is JSON"):
        load(tmp_path, "b.jsonl", "one\ntwo\n")
    with pytest.raises(LoadError, match="nested too deeply"):
        load(tmp_path, "c.json", "[" * 100_000)


def test_a_record_that_is_nested_too_deeply_costs_only_itself(tmp_path: Path) -> None:
    """One such line between two good ones lost the file."""
    deep = "[" * 100_000 + "]" * 100_000
    document = load(tmp_path, "a.jsonl", f'{{"a": "good"}}\n{deep}\n{{"b": "good"}}\n')
    assert document.text == "a: good\n\nb: good"
    assert document.warnings == ("1 lines are nested too deeply to be read (the first is line 2)",)
    with pytest.raises(LoadError, match="nested too deeply"):
        load(tmp_path, "c.jsonl", deep)


def test_half_a_character_in_a_title_is_replaced_as_in_the_text(tmp_path: Path) -> None:
    """The text was mended and the title was not, which ended the process that reads."""
    document = load(tmp_path, "a.json", '[{"title": "\\ud800 lone", "a": "x"}]')
    assert document.text == "title: \ufffd lone\na: x"
    assert titles(document) == [(1, "\ufffd lone")]


def test_notebooks_keep_text_code_and_output(tmp_path: Path) -> None:
    cells = [
        {"cell_type": "markdown", "source": ["# Cache\n", "\n", "Its size."]},
        {"cell_type": "code", "source": "# a comment\nprint(2 * 3)", "outputs": [{"text": ["6\n"]}]},
    ]
    document = load(tmp_path, "a.ipynb", json.dumps({"cells": cells}))
    assert document.text == "# Cache\n\nIts size.\n\n```\n# a comment\nprint(2 * 3)\n```\n\n6"
    assert titles(document) == [(1, "Cache")]
    assert document.title == "Cache"


# containers -------------------------------------------------------------------------------------


def test_an_archive_is_read_and_what_it_calls_its_files_is_never_a_place(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("docs/a.md", "# Title\n\nText of a.")
        archive.writestr("../../outside.txt", "Text from outside.")
        archive.writestr("inner.zip", b"PK\x05\x06" + bytes(18))
        archive.writestr("picture.png", "x")
        archive.writestr("__MACOSX/a.md", "x")
    document = load_document(tmp_path / "a.zip", "a.zip")
    assert titles(document) == [(1, "../../outside.txt"), (1, "docs/a.md"), (2, "Title")]
    assert "Text of a." in document.text
    assert document.text[document.headings[2].start :].startswith("# Title")
    assert document.warnings == (
        "inner.zip: an archive in an archive, not opened",
        "picture.png: .png is a picture; only documents are read",
    )
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.zip"]
    assert not (tmp_path.parent.parent / "outside.txt").exists()


def test_a_damaged_member_is_named_and_the_others_are_read(tmp_path: Path) -> None:
    """A few flipped bytes in one of them lost the whole archive."""
    file = tmp_path / "a.zip"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.txt", "The rent is 500 euros.")
        archive.writestr("b.txt", " ".join(str(number * number) for number in range(500)))
        archive.writestr("c.txt", "The deposit is 900 euros.")
    data = bytearray(file.read_bytes())
    start = data.find(b"b.txt") + 10
    data[start : start + 50] = bytes(byte ^ 0xFF for byte in data[start : start + 50])
    file.write_bytes(data)
    document = load_document(file, "a.zip")
    assert document.text == "a.txt\n\nThe rent is 500 euros.\n\nc.txt\n\nThe deposit is 900 euros."
    (warning,) = document.warnings
    assert warning.startswith("b.txt: can't be read, it may be damaged (Error -3")


def test_an_archive_of_one_file_with_pages_keeps_them(tmp_path: Path) -> None:
    from reportlab.pdfgen.canvas import Canvas

    canvas = Canvas(str(tmp_path / "a.pdf"))
    for text in ("The first page holds this line.", "The second page holds that line."):
        canvas.drawString(72, 700, text)
        canvas.showPage()
    canvas.save()
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(tmp_path / "a.pdf", "a.pdf")
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.write(tmp_path / "a.pdf", "a.pdf")
        archive.write(tmp_path / "a.pdf", "b.pdf")
    document = load_document(tmp_path / "a.zip", "a.zip")
    assert [page.number for page in document.pages] == [1, 2]
    assert (document.page_at(0), document.page_at(document.text.index("The second"))) == (1, 2)
    assert document.page_at(document.text.index("The second") - 1) == 1
    assert load_document(tmp_path / "b.zip", "b.zip").pages == (), "page 2 of which of them?"


BOOK = {
    "META-INF/container.xml": "<container><rootfiles><rootfile full-path='c.opf'/></rootfiles></container>",
    "c.opf": "<package><manifest><item id='a' href='a.xhtml'/><item id='b' href='b.xhtml'/></manifest>"
             "<spine><itemref idref='a'/><itemref idref='b'/><itemref idref='c'/></spine></package>",
}


def test_a_chapter_that_is_not_there_is_named_and_the_others_are_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.epub", "w") as archive:
        for name, text in {**BOOK, "a.xhtml": "<p>The ship leaves at noon.</p>"}.items():
            archive.writestr(name, text)
    document = load_document(tmp_path / "a.epub", "a.epub")
    assert document.text == "The ship leaves at noon."
    assert document.warnings == (
        "b.xhtml: left out, the book does not hold it", "chapter c: left out, the book does not hold it",
    )
    with zipfile.ZipFile(tmp_path / "b.epub", "w") as archive:
        for name, text in BOOK.items():
            archive.writestr(name, text)
    with pytest.raises(LoadError, match="no chapter of this EPUB book can be read. a.xhtml: left out"):
        load_document(tmp_path / "b.epub", "b.epub")


def test_books_are_read_in_their_order(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.epub", "w") as archive:
        archive.writestr(
            "META-INF/container.xml",
            '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>'
            '<rootfile full-path="book/package.opf"/></rootfiles></container>',
        )
        archive.writestr(
            "book/package.opf",
            '<package xmlns="http://www.idpf.org/2007/opf"><metadata>'
            '<dc:title xmlns:dc="http://purl.org/dc/elements/1.1/">缓存之书</dc:title></metadata>'
            '<manifest><item id="b" href="two.xhtml"/><item id="a" href="text/one%20a.xhtml"/></manifest>'
            '<spine><itemref idref="a"/><itemref idref="b"/></spine></package>',
        )
        archive.writestr("book/text/one a.xhtml", "<html><body><h1>第一章</h1><p>一</p></body></html>")
        archive.writestr("book/two.xhtml", "<html><body><h1>第二章</h1><p>二</p></body></html>")
    document = load_document(tmp_path / "a.epub", "a.epub")
    assert (document.title, document.text) == ("缓存之书", "第一章\n\n一\n\n第二章\n\n二")
    assert titles(document) == [(1, "第一章"), (1, "第二章")]


def test_messages_keep_who_when_and_what(tmp_path: Path) -> None:
    message = EmailMessage()
    message["From"], message["To"], message["Subject"] = "a@x.org", "b@x.org", "缓存的大小"
    message.set_content("The cache holds 2 GB.\n")
    message.add_alternative("<p>not read</p>", subtype="html")
    message.add_attachment(b"data", maintype="application", subtype="pdf", filename="sizes.pdf")
    document = load(tmp_path, "a.eml", message.as_bytes())
    assert document.text == (
        "缓存的大小\n\nFrom: a@x.org\nTo: b@x.org\n\nThe cache holds 2 GB."
    )
    assert document.title == "缓存的大小"
    assert document.warnings == ("attachments are not read: sizes.pdf",)


def test_mail_headers_sent_in_bare_gbk_are_read(tmp_path):
    """Old mail programs name no encoding there; subject and sender came out as replacement characters."""
    head = "From: 张三 <zhang@example.org>\nSubject: 关于押金的通知\nContent-Type: text/plain; charset=gbk\n\n"
    document = load(tmp_path, "a.eml", (head + "押金为九百元，退租后七日内退还。\n").encode("gbk"))
    assert document.title == "关于押金的通知"
    assert "张三" in document.text and "押金为九百元" in document.text


# source code ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.py", "import os\n\nclass A:\n    def run(self):\n        pass\n\ndef main():\n    pass\n",
         [(1, "class A"), (2, "def run"), (1, "def main")]),
        ("a.go", "package a\n\nfunc Run(x int) error {\n\treturn nil\n}\n", [(1, "func Run(x int) error")]),
        ("a.ts", "export async function run(x: number) {\n}\nexport class B {\n}\n",
         [(1, "export async function run(x: number)"), (1, "export class B")]),
        ("a.c", "#include <a.h>\n\nstatic int run(int x)\n{\n  if (x) { return 1; }\n}\n",
         [(1, "static int run(int x)")]),
        ("a.rs", "pub fn run(x: u8) -> u8 {\n  x\n}\n", [(1, "pub fn run(x: u8) -> u8")]),
    ],
)
def test_code_is_split_at_its_definitions(
    tmp_path: Path, name: str, text: str, expected: list[tuple[int, str]]
) -> None:
    document = load(tmp_path, name, text)
    assert document.text == text
    assert titles(document) == expected


def test_no_two_loaders_claim_one_suffix() -> None:
    suffixes = [suffix for loader in LOADERS for suffix in loader.suffixes]
    assert len(suffixes) == len(set(suffixes))
    assert all(suffix == suffix.lower() and suffix.startswith(".") for suffix in suffixes)
