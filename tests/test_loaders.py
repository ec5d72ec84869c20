"""Loaders: from real bytes of every format to the text a reader sees. No file is shipped."""

from __future__ import annotations

import re
import sys
import time
import zipfile
from pathlib import Path

import docx
import pytest
from loading import load, titles

from ingest.encoding import decode_text
from ingest.loaders import find_loader, load_document, why_skipped
from ingest.loaders.markdown import read_markdown
from ingest.outline import find_counted_headings, find_numbered_headings
from rag.errors import LoadError

PROJECT = Path(__file__).parent.parent
SIMPLIFIED = "缓存把每个词元的键和值留在显存里，所以下一步只算新的词元。"
TRADITIONAL = "快取把每個詞元的鍵和值留在顯示記憶體裡，所以下一步只算新的詞元。"
JAPANESE = "キャッシュは各トークンのキーと値を保持します。だから次の計算は新しいものだけです。"


# encodings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        (SIMPLIFIED, "utf-8"), (SIMPLIFIED, "utf-8-sig"), (SIMPLIFIED, "utf-16"),
        (SIMPLIFIED, "gb18030"), (SIMPLIFIED, "gbk"), (SIMPLIFIED[:8], "gb18030"),
        (TRADITIONAL, "big5"), (TRADITIONAL[:8], "big5"), (TRADITIONAL, "utf-8"),
        (JAPANESE, "shift_jis"), (JAPANESE, "utf-16"),
        ("Le café coûte déjà très cher à Besançon, où l'été est né.", "latin-1"),
        ("“Smart quotes” and a dash — in café.", "cp1252"),
        ("plain ascii text", "ascii"), ("plain ascii text", "utf-16-le"),
        ("中英 mixed 文本 with words，以及标点。", "gb18030"),
        ("第一章 总则", "gb18030"), ("你好", "gb18030"), ("你好，世界", "big5"),
    ],
)
def test_the_encoding_is_found_out(text: str, encoding: str) -> None:
    assert decode_text(text.encode(encoding)).text == text


def test_a_torn_last_character_does_not_change_the_encoding() -> None:
    decoded = decode_text((SIMPLIFIED * 2).encode("utf-8")[:-1])
    assert decoded.encoding == "utf-8"
    assert decoded.text.startswith(SIMPLIFIED)


@pytest.mark.parametrize(
    ("text", "declared"),
    [("家賃は五万円です。", "ISO-2022-JP"), ("押金为三千元。", "hz-gb-2312"), ("임대료는 백만 원", "iso-2022-kr"),
     ("Größe: 5 m", "utf-7"), ("plain", "iso-2022-jp")],
)
def test_a_declared_encoding_of_ascii_bytes_is_tried_first(text: str, declared: str) -> None:
    """Japanese mail is in ISO-2022-JP: its bytes are valid UTF-8, which shows "$B2HD$O" for words."""
    codec = "hz" if declared.startswith("hz") else declared
    assert decode_text(text.encode(codec), declared=declared).text == text


def test_a_text_that_isnt_what_it_declares_is_still_read() -> None:
    assert decode_text("Größe".encode(), declared="iso-2022-jp").text == "Größe"


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="not text"):
        load(tmp_path, "a.txt", bytes(range(128, 256)) * 40 + b"\xff\xfe\x00" * 50)


def test_a_guessed_encoding_is_said(tmp_path: Path) -> None:
    document = load(tmp_path, "a.txt", SIMPLIFIED.encode("gb18030"))
    assert document.text == SIMPLIFIED
    assert document.warnings == ("encoding taken to be gb18030",)


# text and markdown ------------------------------------------------------------------------------


def test_text_is_the_files_own_with_line_ends_made_one(tmp_path: Path) -> None:
    assert load(tmp_path, "a.txt", "one\r\ntwo\rthree\n").text == "one\ntwo\nthree\n"


def test_a_short_first_line_by_itself_is_the_title(tmp_path: Path) -> None:
    assert load(tmp_path, "a.txt", "估算显存\n\n显存由三部分组成。").title == "估算显存"
    for text in ("One sentence.\n\nAnother.", "a list:\n\nitem", "wrapped at\nthis width", "alone"):
        assert load(tmp_path, "a.txt", text).title == ""


def test_an_empty_file_has_no_text_and_a_warning(tmp_path: Path) -> None:
    for name in ("a.txt", "a.md", "a.html", "a.pdf"):
        document = load(tmp_path, name, b"")
        assert document.text == ""
        assert document.warnings, name


def test_markdown_headings_are_not_looked_for_in_code(tmp_path: Path) -> None:
    text = "# Real\n\n```python\n# a comment\n```\n\n~~~\n## no\n```\n~~~\n\n    # indented code\n\n## Also real ##\n"
    document = load(tmp_path, "a.md", text)
    assert document.text == text
    assert titles(document) == [(1, "Real"), (2, "Also real")]
    assert all(text.startswith("#", heading.start) for heading in document.headings)


def test_underlined_headings_count(tmp_path: Path) -> None:
    document = load(tmp_path, "a.md", "Title\n=====\n\ntext\n\nPart\n----\n\nlong text\ngoes on\n---\n")
    assert titles(document) == [(1, "Title"), (2, "Part")]
    assert document.title == "Title"


def test_front_matter_gives_the_title_and_stays_in_the_text(tmp_path: Path) -> None:
    text = "---\ntitle: 旋转位置编码\ntags: [rope]\n---\n\n# RoPE\n\n正文。\n"
    document = load(tmp_path, "a.md", text)
    assert (document.title, document.text) == ("旋转位置编码", text)
    assert titles(document) == [(1, "RoPE")]


@pytest.mark.parametrize(
    "line",
    [
        " *a" * 66_000, "**a " * 50_000, "`a " * 66_000, "[" * 200_000, "![" * 100_000, "[a](" * 50_000,
        "<!--" * 50_000, "<a" * 100_000, "{#" * 100_000, "a" + " " * 200_000 + "b", " #" * 100_000,
    ],
    ids=lambda line: line[:4],
)
def test_a_heading_of_marks_that_nothing_closes_is_read_at_once(line: str) -> None:
    """Each mark was followed to the end of the line: 24 KB of them held up the ingest for seconds."""
    began = time.perf_counter()
    title, headings = read_markdown(f"---\ntitle: {line}\n---\n# {line}\n\n{line}\n===\n")
    assert time.perf_counter() - began < 6
    assert title and headings


def test_a_picture_in_a_link_and_a_superscript_are_read_in_titles() -> None:
    """A heading's title is quoted with the answer: 10<sup>6</sup> must not become 106."""
    _, headings = read_markdown("# Area 10<sup>6</sup> m\n\n# Tool [![passing](a.svg)](b.html)\n")
    assert [heading.title for heading in headings] == ["Area 10^6 m", "Tool passing"]


def test_marks_are_taken_off_titles(tmp_path: Path) -> None:
    document = load(tmp_path, "a.md", "# **Bold** and `code` and [a link](http://x.y) {#id}\n")
    assert titles(document) == [(1, "Bold and code and a link")]


# numbered headings ------------------------------------------------------------------------------


LAW = """\
目 录

第一编 总 则

第一章 基本规定

第二章 自然人

第一编 总 则

第一章 基本规定

第一条 为了保护权益，制定本法。

第二条 本法调整平等主体之间的关系。

第二章 自然人

第三条 依照第一条规定的原则办理。
第四条规定的情形除外。
"""


def test_a_contents_list_is_not_taken_for_headings() -> None:
    found = find_numbered_headings(LAW)
    assert [(heading.level, heading.title) for heading in found] == [
        (1, "第一编 总则"), (2, "第一章 基本规定"), (3, "第一条"), (3, "第二条"),
        (2, "第二章 自然人"), (3, "第三条"),
    ]
    assert found[0].start == LAW.rindex("第一编")
    assert found[2].start == LAW.index("第一条 为了")


def test_english_chapters_and_articles_count() -> None:
    text = "PART I\n\nChapter 1. Scope\n\nSection 2 Terms\n\nThis act applies.\n\nChapter 2\n\nMore text."
    assert [(h.level, h.title) for h in find_numbered_headings(text)] == [
        (1, "PART I"), (2, "Chapter 1. Scope"), (3, "Section 2 Terms"), (2, "Chapter 2"),
    ]


def test_short_lines_with_running_numbers_are_headings_where_text_stands_between() -> None:
    body = "\n\n" + "各部门应当按照分工落实责任，加强协调配合，确保各项措施取得实效。" * 2 + "\n\n"
    text = f"一、总体要求{body}（一）指导思想{body}（二）基本原则{body}二、主要任务{body}三、保障措施{body}"
    assert [(heading.level, heading.title) for heading in find_counted_headings(text)] == [
        (1, "一、总体要求"), (2, "（一）指导思想"), (2, "（二）基本原则"), (1, "二、主要任务"),
        (1, "三、保障措施"),
    ]
    english = "1. Scope\n\n{0}\n\n1.1 Terms\n\n{0}\n\n1.2 Rules\n\n{0}\n\n2. Use\n\n{0}".format("Some text. " * 12)
    assert [(heading.level, heading.title) for heading in find_counted_headings(english)] == [
        (1, "1. Scope"), (2, "1.1 Terms"), (2, "1.2 Rules"), (1, "2. Use"),
    ]


def test_a_numbered_list_is_not_taken_for_headings() -> None:
    assert find_counted_headings("Buy:\n\n1. bread\n2. milk\n3. two apples\n") == []
    assert find_counted_headings("一、这是一句完整的话，不是标题。\n\n" + "正文。" * 60) == []


# html -------------------------------------------------------------------------------------------


def test_html_that_is_none_says_so(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="this is not HTML"):
        load(tmp_path, "a.html", bytes(range(256)) * 40)


def test_html_is_read_as_a_reader_sees_it(tmp_path: Path) -> None:
    page = """<!DOCTYPE html><html><head><title>The  cache</title><style>p {color: red}</style>
    <script>var hidden = 1;</script></head><body><nav><a href="/">Home</a> About</nav>
    <header>Site name</header><main><h1>KV cache</h1><p>Keys and <b>values</b>
    stay.</p><ul><li>one</li><li>two<ol><li>inner</li></ol></li></ul>
    <h2>Sizes</h2><table><tr><th>Model</th><th>MB</th></tr><tr><td>small</td><td>1|2</td></tr></table>
    <pre>a = 1
    b = 2</pre><p style="display: none">secret</p><p hidden>secret</p></main>
    <footer>Imprint</footer></body></html>"""
    document = load(tmp_path, "a.html", page)
    assert document.title == "The cache"
    assert document.text == (
        "KV cache\n\nKeys and values stay.\n\n- one\n- two\n  1. inner\n\nSizes\n\n"
        "| Model | MB |\n| --- | --- |\n| small | 1\\|2 |\n\na = 1\n    b = 2"
    )
    assert titles(document) == [(1, "KV cache"), (2, "Sizes")]


def test_marks_that_show_nothing_do_not_part_words(tmp_path: Path) -> None:
    document = load(tmp_path, "a.html", "<p>infor&shy;mation, zero\u200bwidth, e\ufb03cient</p>")
    assert document.text == "information, zerowidth, efficient"


def test_html_without_structure_keeps_all_its_text(tmp_path: Path) -> None:
    document = load(tmp_path, "a.htm", "just <i>words</i><br>and more & more &eacute;")
    assert document.text == "just words\nand more & more é"


@pytest.mark.parametrize(("charset", "text"), [("gb2312", SIMPLIFIED), ("big5", TRADITIONAL)])
def test_the_charset_a_page_declares_is_used(tmp_path: Path, charset: str, text: str) -> None:
    page = f'<html><head><meta charset="{charset}"></head><body><p>{text}</p></body></html>'
    assert load(tmp_path, "a.html", page.encode(charset)).text == text


def test_a_megabyte_of_nested_tags_is_survived(tmp_path: Path) -> None:
    for tag in ("div", "b", "table", "ul"):
        page = f"<{tag}>" * 50_000 + "the middle" + f"</{tag}>" * 50_000 + "<p>the end</p>"
        text = load(tmp_path, "a.html", page).text
        assert "the middle" in text, tag
        assert "the end" in text, tag


# docx -------------------------------------------------------------------------------------------


def test_word_documents_are_read_in_order(tmp_path: Path) -> None:
    source = docx.Document()
    source.core_properties.title = "量化"
    source.add_heading("量化的原理", level=1)
    source.add_paragraph("把权重存成八位整数。")
    source.add_paragraph("first", style="List Bullet")
    source.add_paragraph("second", style="List Bullet")
    table = source.add_table(rows=2, cols=2)
    for cell, text in zip((c for row in table.rows for c in row.cells), ["Bits", "MB", "8", "900"]):
        cell.text = text
    source.add_heading("Limits", level=2)
    source.add_paragraph("Outliers hurt.\nA line of its own.")
    source.save(str(tmp_path / "a.docx"))
    document = load_document(tmp_path / "a.docx", "a.docx")
    assert document.title == "量化"
    assert document.text == (
        "量化的原理\n\n把权重存成八位整数。\n\n- first\n- second\n\n| Bits | MB |\n| --- | --- |\n"
        "| 8 | 900 |\n\nLimits\n\nOutliers hurt.\nA line of its own."
    )
    assert titles(document) == [(1, "量化的原理"), (2, "Limits")]


def test_bold_lines_are_headings_where_there_are_no_styles(tmp_path: Path) -> None:
    source = docx.Document()
    for title in ("Mission", "Vision"):
        source.add_paragraph().add_run(title).bold = True
        source.add_paragraph("What it says is said in a sentence or two.")
        source.add_paragraph("And in another one.")
    source.save(str(tmp_path / "a.docx"))
    document = load_document(tmp_path / "a.docx", "a.docx")
    assert titles(document) == [(1, "Mission"), (1, "Vision")]


def test_a_docx_that_is_not_one_says_so(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="not a Word document"):
        load(tmp_path, "a.docx", b"just text")
    with pytest.raises(LoadError, match="password-protected or was saved by an old"):
        load(tmp_path, "b.docx", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600))
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as archive:
        archive.writestr("hello.txt", "hello")
    with pytest.raises(LoadError, match="not a Word document"):
        load(tmp_path, "c.docx", (tmp_path / "c.zip").read_bytes())


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.docx", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("word/document.xml", b"\0" * (60 << 20))
    with pytest.raises(LoadError, match="zip bomb"):
        load_document(tmp_path / "a.docx", "a.docx")


# pdf --------------------------------------------------------------------------------------------


def write_pdf(file: Path, pages: list[list[tuple[float, float, str]]], **options: object) -> None:
    """Pages of (x, y, line) in points from the lower left corner; 11-point type."""
    from reportlab.pdfbase import pdfmetrics
    from reportlab.pdfbase.cidfonts import UnicodeCIDFont
    from reportlab.pdfgen.canvas import Canvas

    pdfmetrics.registerFont(UnicodeCIDFont("STSong-Light"))
    canvas = Canvas(str(file), pagesize=(595, 842), **options)
    for lines in pages:
        for x, y, text in lines:
            size = 18 if text.startswith("#") else 11
            canvas.setFont("Helvetica" if text.isascii() else "STSong-Light", size)
            canvas.drawString(x, y, text.lstrip("# "))
        canvas.showPage()
    canvas.save()


def column(lines: list[str], *, top: float = 700, x: float = 72) -> list[tuple[float, float, str]]:
    return [(x, top - 16 * number, line) for number, line in enumerate(lines)]


def test_wrapped_english_lines_are_joined_and_hyphens_taken_out(tmp_path: Path) -> None:
    lines = [
        "The cache keeps the keys and the values of all tokens that were read before, so that",
        "every step computes the new token only. It grows with the length of the conver-",
        "sation, and its size is known before the first word is read by the model.",
    ]
    write_pdf(tmp_path / "a.pdf", [column(lines)])
    document = load_document(tmp_path / "a.pdf", "a.pdf")
    assert document.text == (
        "The cache keeps the keys and the values of all tokens that were read before, so that "
        "every step computes the new token only. It grows with the length of the conversation, "
        "and its size is known before the first word is read by the model."
    )
    assert [(page.number, page.start, page.end) for page in document.pages] == [
        (1, 0, len(document.text))
    ]


def test_wrapped_chinese_lines_are_joined_without_a_space(tmp_path: Path) -> None:
    line = "键值缓存保存所有词元的键和值于是每一步只需要计算新的词元并且显存"
    write_pdf(tmp_path / "a.pdf", [column([line, line, "占用随长度线性增长。"])])
    assert load_document(tmp_path / "a.pdf", "a.pdf").text == line + line + "占用随长度线性增长。"


def test_each_article_starts_a_paragraph(tmp_path: Path) -> None:
    line = "第一条 为了保护当事人的合法权益维护社会和经济秩序根据宪法制定本"
    lines = [line, "法。", "第二条 本法适用于一切合同。", "第三条 本法自公布之日起施行。"]
    write_pdf(tmp_path / "a.pdf", [column(lines)])
    document = load_document(tmp_path / "a.pdf", "a.pdf")
    assert document.text == "\n\n".join([line + "法。", *lines[2:]])
    assert titles(document) == [(1, "第一条"), (1, "第二条"), (1, "第三条")]


def test_running_heads_and_page_numbers_are_dropped_and_pages_kept(tmp_path: Path) -> None:
    pages = [
        [(72, 800, f"Annual Report 2024, page {n} of 6"), (290, 40, str(n)),
         *column([f"This is what stands on page {n} and nowhere else."])]
        for n in range(1, 7)
    ]
    write_pdf(tmp_path / "a.pdf", pages)
    document = load_document(tmp_path / "a.pdf", "a.pdf")
    assert "Annual" not in document.text
    paragraphs = document.text.split("\n\n")
    assert paragraphs == [f"This is what stands on page {n} and nowhere else." for n in range(1, 7)]
    for n in range(1, 7):
        assert document.page_at(document.text.index(f"page {n} ")) == n


def test_a_sentence_goes_on_over_the_page_break(tmp_path: Path) -> None:
    first = ["A paragraph of some length that fills the line up to the right-hand edge of the page",
             "and that is not at its end yet when the page is full, because the sentence goes over"]
    second = ["to the next page, where it ends.", "A second paragraph stands here by itself, after it."]
    pages = [column(first), [*column(second[:1]), (72, 650, second[1])]]
    write_pdf(tmp_path / "a.pdf", pages)
    document = load_document(tmp_path / "a.pdf", "a.pdf")
    assert document.text == " ".join([*first, second[0]]) + "\n\n" + second[1]
    assert document.page_at(document.text.index("because")) == 1
    assert document.page_at(document.text.index("to the next")) == 2


def test_columns_that_were_drawn_row_by_row_are_read_one_after_the_other(tmp_path: Path) -> None:
    first = [f"The first column goes on with line {n:02}" for n in range(12)]
    second = [f"while the second one has line {n:02} too" for n in range(12)]
    rows = [(x, 700 - 16 * n, side[n]) for n in range(12) for x, side in ((60, first), (320, second))]
    title = "# A title over both of the columns of the page"
    write_pdf(tmp_path / "a.pdf", [[(60, 750, title), *rows]])
    text = load_document(tmp_path / "a.pdf", "a.pdf").text
    assert text == "\n\n".join([title[2:], " ".join([*first, *second])])


def test_tables_become_markdown_rows(tmp_path: Path) -> None:
    table = [("Model", "Layers", "Size"), ("small", "8", "60 MB"), ("large one", "24", "1.2 GB")]
    rows = [(x, 660 - 20 * n, cell) for n, row in enumerate(table) for x, cell in zip((60, 220, 380), row)]
    before = (60, 700, "The sizes of the models are in the table below.")
    after = (60, 560, "They are those of the files on the disk.")
    write_pdf(tmp_path / "a.pdf", [[before, *rows, after]])
    assert load_document(tmp_path / "a.pdf", "a.pdf").text == (
        "The sizes of the models are in the table below.\n\n"
        "| Model | Layers | Size |\n| --- | --- | --- |\n| small | 8 | 60 MB |\n"
        "| large one | 24 | 1.2 GB |\n\nThey are those of the files on the disk."
    )


@pytest.mark.parametrize("angle", [90, -90, 180])
def test_a_page_set_sideways_is_read_in_its_own_direction(tmp_path: Path, angle: int) -> None:
    from reportlab.pdfgen.canvas import Canvas

    lines = ["A line that runs along the side of the page and is wrapped at its end, so that the",
             "paragraph goes on here."]
    canvas = Canvas(str(tmp_path / "a.pdf"), pagesize=(595, 842))
    canvas.translate(300, 420)
    canvas.rotate(angle)
    canvas.setFont("Helvetica", 11)
    for x, y, text in column(lines, top=100, x=-270):
        canvas.drawString(x, y, text)
    canvas.save()
    assert load_document(tmp_path / "a.pdf", "a.pdf").text == " ".join(lines)


def test_large_type_makes_headings(tmp_path: Path) -> None:
    page = [(72, 700, "# Key-value cache"),
            *column(["The cache keeps keys and values of all tokens, so that a step is quick.",
                     "It is freed at the end."], top=660),
            (72, 600, "# Its size"), *column(["Two numbers for each layer, head and token."], top=570)]
    write_pdf(tmp_path / "a.pdf", [page])
    document = load_document(tmp_path / "a.pdf", "a.pdf")
    assert titles(document) == [(1, "Key-value cache"), (1, "Its size")]


def test_rows_of_an_airy_grid_and_centred_cells_are_one_table(tmp_path: Path) -> None:
    from reportlab.pdfbase.pdfmetrics import stringWidth

    # 44 points from row to row at 11-point type; the cells of the second table have their middles
    # in line, and neither their left nor their right edges.
    airy = [(x, 700 - 44 * row, f"{row}.{column} MB") for row in range(3)
            for column, x in enumerate((72, 200, 330))]
    before = "What these countries have is in the table below, and more of it is said in the text."
    table = [("Country", "Population (millions)", "Capital city"), ("Peru", "34.0 in all", "Lima"),
             ("Chad", "17.2 or above", "N'Djamena")]
    centred = [(middle - stringWidth(cell, "Helvetica", 11) / 2, 500 - 16 * row, cell)
               for row, cells in enumerate(table) for middle, cell in zip((100, 230, 370), cells)]
    write_pdf(tmp_path / "a.pdf", [airy])
    write_pdf(tmp_path / "b.pdf", [[(72, 530, before), *centred]])
    assert load_document(tmp_path / "a.pdf", "a.pdf").text == (
        "| 0.0 MB | 0.1 MB | 0.2 MB |\n| --- | --- | --- |\n| 1.0 MB | 1.1 MB | 1.2 MB |\n"
        "| 2.0 MB | 2.1 MB | 2.2 MB |"
    )
    assert load_document(tmp_path / "b.pdf", "b.pdf").text == (
        before + "\n\n| Country | Population (millions) | Capital city |\n| --- | --- | --- |\n"
        "| Peru | 34.0 in all | Lima |\n| Chad | 17.2 or above | N'Djamena |"
    )


def test_a_pdf_with_a_password_says_so(tmp_path: Path) -> None:
    from reportlab.lib.pdfencrypt import StandardEncryption

    secret = StandardEncryption("secret", strength=128)
    write_pdf(tmp_path / "a.pdf", [column(["hidden"])], encrypt=secret)
    with pytest.raises(LoadError, match="^password-protected"):
        load_document(tmp_path / "a.pdf", "a.pdf")
    open_to_all = StandardEncryption("", "owner", strength=128)
    write_pdf(tmp_path / "b.pdf", [column(["Text that may be read by anyone."])], encrypt=open_to_all)
    document = load_document(tmp_path / "b.pdf", "b.pdf")
    assert document.text == "Text that may be read by anyone."
    assert document.warnings == ("encrypted, but its text can be read without a password",)


def test_scanned_and_empty_pages_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ingest.loaders.pdf.find_tesseract", lambda: None)
    from PIL import Image
    from reportlab.pdfgen.canvas import Canvas

    Image.new("L", (60, 80), 200).save(tmp_path / "scan.png")
    canvas = Canvas(str(tmp_path / "a.pdf"), pagesize=(595, 842))
    canvas.drawImage(str(tmp_path / "scan.png"), 0, 0, 595, 842)
    canvas.showPage()
    canvas.drawString(72, 700, "One page has text on it.")
    canvas.showPage()
    canvas.showPage()
    canvas.save()
    document = load_document(tmp_path / "a.pdf", "a.pdf")
    assert document.text == "One page has text on it."
    assert [page.number for page in document.pages] == [1, 2, 3]
    assert document.page_at(0) == 2
    assert document.warnings == (
        "1 of 3 pages is scanned, a picture without text; install tesseract with its languages "
        "chi_sim and eng to have it read (page 1)",
        "1 of 3 pages is empty (page 3)",
    )


FAKE_TESSERACT = """\
#!{python}
import sys
if "--list-langs" in sys.argv:
    print("List of available languages (2):\\nchi_sim\\neng\\nosd")
else:
    assert sys.argv[1:5] == ["stdin", "stdout", "-l", "chi_sim+eng"]
    assert sys.stdin.buffer.read(2) == b"P5"
    print("level\\tpage_num\\tblock_num\\tpar_num\\tline_num\\tword_num\\tleft\\ttop\\twidth\\theight\\tconf\\ttext")
    words = [(1, 300, "扫描"), (1, 400, "件"), (2, 300, "Two"), (2, 420, "words"), (3, 300, "~~")]
    for line, left, word in words:
        conf = 5 if word == "~~" else 91.5
        print(5, 1, 1, 1, line, 1, left, 300 + 200 * line, 90, 40, conf, word, sep="\\t")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="a program made of a script")
def test_scanned_pages_are_read_where_tesseract_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image
    from reportlab.pdfgen.canvas import Canvas

    from ingest.ocr import find_tesseract

    program = tmp_path / "bin" / "tesseract"
    program.parent.mkdir()
    program.write_text(FAKE_TESSERACT.replace("{python}", sys.executable), encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    find_tesseract.cache_clear()
    Image.new("L", (60, 80), 200).save(tmp_path / "scan.png")
    canvas = Canvas(str(tmp_path / "a.pdf"), pagesize=(595, 842))
    canvas.drawImage(str(tmp_path / "scan.png"), 0, 0, 595, 842)
    canvas.save()
    try:
        document = load_document(tmp_path / "a.pdf", "a.pdf")
    finally:
        find_tesseract.cache_clear()
    assert document.text == "扫描件\n\nTwo words"
    assert document.page_at(0) == 1
    assert document.warnings == (
        "1 of 1 pages is scanned and read by OCR, which makes mistakes (page 1)",
    )


FULL_TSV = """\
level page_num block_num par_num line_num word_num left top width height conf text
5 1 1 1 1 1 100 100 50 40 90 第三
5 1 1 1 1 2 152 100 30 40 90 条
5 1 1 1 1 3 190 100 90 40 50 ”应当
5 1 1 1 1 4 282 100 40 40 12 另
5 1 1 1 1 5 325 100 40 40 90 行
5 1 1 1 1 6 370 130 10 12 90 ,
5 1 1 1 1 7 390 100 80 40 90 约定
5 1 1 1 1 8 475 120 10 12 90 :
5 1 1 1 2 1 100 200 90 30 90 Model
5 1 1 1 2 2 300 200 60 38 90 MB
5 1 2 1 1 1 100 900 90 40 8 xx
""".replace(" ", "\t")


def test_words_of_a_recognised_line_are_put_together_as_they_are_printed() -> None:
    from ingest.ocr import read_tsv

    reading = read_tsv(FULL_TSV, 1000)
    # A speck behind the number is no quote, a doubtful word of a good line stays, marks between
    # Chinese are Chinese ones without spaces, cells stay apart; what is doubtful as a whole goes.
    assert [line.text for line in reading.lines] == ["第三条 应当另行，约定：", "Model MB"]
    assert [(gap.start, gap.end) for gap in reading.lines[1].gaps] == [(5, 6)]
    first, second = reading.lines
    assert first.height == second.height, "boxes are as tight as the letters; the type is the same"


def _scan(file: Path, *pages: tuple[str, int]) -> None:
    """A PDF of pictures: the upper half of page 1 of shipped documents, turned by so many degrees."""
    import pypdfium2
    from reportlab.lib.utils import ImageReader
    from reportlab.pdfgen.canvas import Canvas

    canvas = Canvas(str(file), pagesize=(595, 842))
    for name, degrees in pages:
        source = pypdfium2.PdfDocument(PROJECT / "knowledge" / name)
        picture = source[0].render(scale=200 / 72, grayscale=True).to_pil()
        picture = picture.crop((0, 0, picture.width, picture.height // 2)).rotate(degrees)
        canvas.drawImage(ImageReader(picture), 0, 200, 595, 421)
        canvas.showPage()
    canvas.save()


def test_real_scans_in_both_languages_read_as_the_text_they_were_made_of(tmp_path: Path) -> None:
    from difflib import SequenceMatcher

    from ingest.ocr import find_tesseract

    find_tesseract.cache_clear()
    tesseract = find_tesseract()
    if tesseract is None or {"chi_sim", "eng"} - set(tesseract.languages.split("+")):
        pytest.skip("tesseract with the languages chi_sim and eng is not installed")
    names = ("zh/07-自回归解码与KV缓存.pdf", "en/08-prefill-decode-and-batching.pdf")
    _scan(tmp_path / "a.pdf", (names[0], 0), (names[1], 180))
    document = load_document(tmp_path / "a.pdf", "a.pdf")
    assert document.warnings == (
        "2 of 2 pages are scanned and read by OCR, which makes mistakes (page 1-2)",
    )
    for page, name in zip(document.pages, names, strict=True):
        read = "".join(document.text[page.start : page.end].split())
        printed = "".join(load_document(PROJECT / "knowledge" / name, "b.pdf").text.split())
        matcher = SequenceMatcher(None, read, printed[: len(read)], autojunk=False)
        assert len(read) > 200 and matcher.ratio() > 0.9, (name, matcher.ratio(), read[:200])
    assert " " not in "".join(re.findall("[\u4e00-\u9fff] ?[\u4e00-\u9fff]", document.text))


def test_unread_scans_say_what_would_help(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ingest import ocr

    english = ocr.Tesseract("tesseract", "eng")
    told = ("1 of 1 pages is scanned and read by OCR (eng only; add tesseract's language chi_sim "
            "for Chinese), which makes mistakes (page 1)",)
    monkeypatch.setattr(ocr, "find_tesseract", lambda: english)
    assert not ocr.can_be_read_now(told, 120)
    monkeypatch.setattr(ocr, "find_tesseract", lambda: ocr.Tesseract("tesseract", "chi_sim+eng"))
    assert ocr.can_be_read_now(told, 120)
    late = ("2 of 9 pages are scanned, not read for want of time; give a longer --timeout than 120 "
            "(page 8-9)",)
    assert not ocr.can_be_read_now(late, 120)
    assert ocr.can_be_read_now(late, 600)


def test_a_damaged_pdf_says_so(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="not a PDF, or it is damaged"):
        load(tmp_path, "a.pdf", b"%PDF-1.7\nbroken")


# which loader -----------------------------------------------------------------------------------


def test_files_are_known_by_their_suffix_whatever_its_case() -> None:
    assert find_loader("A.PDF") is find_loader("b.pdf") is not None
    assert find_loader("README") is find_loader("a.txt")
    assert find_loader("photo.jpg") is None
    assert "a picture" in why_skipped("photo.jpg")
    assert why_skipped("old.doc") == ".doc is Word's old format; save it as .docx"
    assert why_skipped("a.xyz") == "no loader for .xyz files"
