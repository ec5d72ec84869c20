"""Figures, formulas and charts of Word, Excel and PowerPoint files are read as they stand there."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import docx
import pytest
from docx.oxml import parse_xml
from loading import load

from ingest.loaders import load_document
from rag.document import Document

MATH = "http://schemas.openxmlformats.org/officeDocument/2006/math"
WORD = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"

Cell = str | float | None


def read_workbook(folder: Path, *rows: list[Cell], part: tuple[str, str] = ("", "")) -> Document:
    """Write a workbook of one sheet and read it. `part` replaces a pattern in the sheet's own file."""
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    book.active.title = "Costs"
    for row in rows:
        book.active.append(row)
    book.save(folder / "made.xlsx")
    with zipfile.ZipFile(folder / "made.xlsx") as made, zipfile.ZipFile(folder / "a.xlsx", "w") as changed:
        for member in made.infolist():
            data = made.read(member)
            if part[0] and member.filename.endswith("sheet1.xml"):
                assert re.search(part[0], data.decode())
                data = re.sub(part[0], part[1], data.decode()).encode()
            changed.writestr(member, data)
    return load_document(folder / "a.xlsx", "a.xlsx")


# workbooks --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (12345678901.23, "12345678901.23"), (1234567890123.45, "1234567890123.45"), (0.1 + 0.2, "0.3"),
        (2.50, "2.5"), (8.0, "8"), (-0.00001234, "-0.00001234"), (0.155, "0.155"), (1e20, "1e+20"),
    ],
)
def test_numbers_of_a_workbook_keep_the_fifteen_digits_it_holds(
    tmp_path: Path, value: float, shown: str
) -> None:
    """A turnover of 12345678901.23 was quoted as 12345678901.2."""
    document = read_workbook(tmp_path, ["Item", "Sum"], ["Revenue", value])
    assert document.text == f"Costs\n\nItem: Revenue; Sum: {shown}"


def test_a_sheet_that_misstates_its_size_is_read_whole(tmp_path: Path) -> None:
    """Some programs write that a sheet ends at A1; only that cell was read."""
    part = ('<dimension ref="[^"]*"', '<dimension ref="A1"')
    document = read_workbook(tmp_path, ["Item", "Cost"], ["Rent", 500], ["Heat", 90, "cold"], part=part)
    assert document.text == "Costs\n\nItem: Rent; Cost: 500\n\nItem: Heat; Cost: 90; cold"


def test_a_line_above_a_table_is_not_taken_for_its_names(tmp_path: Path) -> None:
    document = read_workbook(tmp_path, ["Report of the year"], ["Item", "Cost", "Note"], ["Rent", 500, "flat"])
    assert document.text == "Costs\n\nReport of the year\n\nItem; Cost; Note\n\nRent; 500; flat"


def test_formulas_that_were_never_computed_are_told(tmp_path: Path) -> None:
    """A workbook written by a program holds "=SUM(B2:B3)" and no sum: its total vanished without a word."""
    document = read_workbook(tmp_path, ["Item", "Cost"], ["Rent", 500], ["Heat", 100], ["Total", "=SUM(B2:B3)"])
    assert document.text.endswith("Item: Total")
    assert document.warnings == (
        "sheet Costs: 1 formulas hold no computed value and are left out; open the workbook in a "
        "spreadsheet program and save it",
    )


@pytest.mark.parametrize("stored", ["<v>600</v>", ""])
def test_a_computed_formula_is_no_reason_to_warn(tmp_path: Path, stored: str) -> None:
    """=IF(A1="","","x") often comes out as no text at all."""
    kind = "" if stored else ' t="str"'
    part = (r'<c r="B2"([^>]*)><f>(.*?)</f><v\s*/?>(</v>)?</c>', rf'<c r="B2"\1{kind}><f>\2</f>{stored or "<v></v>"}</c>')
    document = read_workbook(tmp_path, ["Item", "Cost"], ["Total", "=1+1"], ["Rent", 5], part=part)
    assert document.warnings == ()
    assert document.text.startswith("Costs\n\nItem: Total; Cost: 600" if stored else "Costs\n\nItem: Total\n")


@pytest.mark.parametrize(
    ("table", "text"),
    [
        ("Item,2021,2022\nRevenue,100,120\n", "Item: Revenue; 2021: 100; 2022: 120"),
        ("Item,2021/22,2020/21,Note\nCosts,80,-,old\nRent,5,6,\n",
         "Item: Costs; 2021/22: 80; 2020/21: -; Note: old\n\nItem: Rent; 2021/22: 5; 2020/21: 6"),
        (",2021,2022\nRevenue,100,120\n", "Revenue; 2021: 100; 2022: 120"),
        # tables without names
        ("Alice,1987,2010\nBob,1990,2012\n", "Alice; 1987; 2010\n\nBob; 1990; 2012"),
        ("Lamp,2000\nDesk,350\n", "Lamp; 2000\n\nDesk; 350"),
        ("7,2021,2022\n8,100,120\n", "7; 2021; 2022\n\n8; 100; 120"),
    ],
)
def test_years_above_numbers_name_their_columns(tmp_path: Path, table: str, text: str) -> None:
    """Which year was the revenue of 120? The row said only "Revenue; 100; 120"."""
    assert load(tmp_path, "a.csv", table).text == text


# word documents ---------------------------------------------------------------------------------


def read_paragraph(folder: Path, *runs: tuple[str, bool]) -> str:
    """Write a document of one paragraph of (text, is raised) runs and read it."""
    source = docx.Document()
    paragraph = source.add_paragraph()
    for text, is_raised in runs:
        paragraph.add_run(text).font.superscript = True if is_raised else None
    source.save(str(folder / "a.docx"))
    return load_document(folder / "a.docx", "a.docx").text


@pytest.mark.parametrize(
    ("runs", "text"),
    [
        ([("The land has 10", False), ("6", True), (" square metres.", False)], "The land has 10^6 square metres."),
        ([("10", False), ("-", True), ("3", True), (" m", False), ("2", True)], "10^-3 m^2"),
        ([("It costs 900.", False), ("1", True)], "It costs 900.^1"),
        ([("2", False), ("n", True), (" steps", False)], "2^n steps"),
        ([("the 1", False), ("st", True), (" of May, Acme", False), ("TM", True)], "the 1st of May, AcmeTM"),
        ([("900", False), ("*", True), (" euros", False)], "900* euros"),
        ([("1", True), (" See below.", False)], "1 See below."),
    ],
)
def test_raised_figures_keep_apart_from_what_they_stand_behind(
    tmp_path: Path, runs: list[tuple[str, bool]], text: str
) -> None:
    """10 with a raised 6 was quoted as 106."""
    assert read_paragraph(tmp_path, *runs) == text


def test_a_raised_link_is_a_note_and_a_style_may_raise(tmp_path: Path) -> None:
    source = docx.Document()
    style = source.styles.add_style("Power", 2)  # a style of characters
    style.font.superscript = True
    paragraph = source.add_paragraph("10")
    paragraph.add_run("6", style="Power")
    paragraph.add_run(" for 900")
    paragraph._p.append(parse_xml(
        f'<w:hyperlink xmlns:w="{WORD}" w:anchor="n"><w:r><w:rPr><w:vertAlign w:val="superscript"/></w:rPr>'
        "<w:t>1</w:t></w:r></w:hyperlink>"
    ))
    source.save(str(tmp_path / "a.docx"))
    assert load_document(tmp_path / "a.docx", "a.docx").text == "10^6 for 900[1]"


def run(text: str) -> str:
    return f"<m:r><m:t>{text}</m:t></m:r>"


@pytest.mark.parametrize(
    ("formula", "text"),
    [
        (run("E=mc^2"), "E=mc^2"),
        (f"{run('E=m')}<m:sSup><m:e>{run('c')}</m:e><m:sup>{run('2')}</m:sup></m:sSup>", "E=mc^2"),
        (f"<m:f><m:num>{run('a+b')}</m:num><m:den>{run('2')}</m:den></m:f>", "(a+b)/2"),
        (f"<m:rad><m:deg/><m:e>{run('x+1')}</m:e></m:rad>", "√(x+1)"),
        (f"{run('2')}<m:d><m:e>{run('a+b')}</m:e></m:d>", "2(a+b)"),
        (f'<m:nary><m:naryPr><m:chr m:val="∑"/></m:naryPr><m:sub>{run("i=1")}</m:sub><m:sup>{run("n")}</m:sup>'
         f'<m:e><m:sSub><m:e>{run("x")}</m:e><m:sub>{run("i")}</m:sub></m:sSub></m:e></m:nary>', "∑_(i=1)^n x_i"),
        (f"<m:m><m:mr><m:e>{run('1')}</m:e><m:e>{run('0')}</m:e></m:mr><m:mr><m:e>{run('0')}</m:e>"
         f"<m:e>{run('2')}</m:e></m:mr></m:m>", "1, 0; 0, 2"),
    ],
)
def test_equations_are_read_in_one_line(tmp_path: Path, formula: str, text: str) -> None:
    """"The energy is [an equation] joules." was read as "The energy is joules."."""
    source = docx.Document()
    paragraph = source.add_paragraph("The energy is ")
    paragraph._p.append(parse_xml(f'<m:oMath xmlns:m="{MATH}">{formula}</m:oMath>'))
    paragraph.add_run(" joules.")
    source.save(str(tmp_path / "a.docx"))
    assert load_document(tmp_path / "a.docx", "a.docx").text == f"The energy is {text} joules."


# slides -----------------------------------------------------------------------------------------


def test_a_text_box_that_shares_the_titles_number_is_read(tmp_path: Path) -> None:
    """Copied slides repeat the numbers of shapes; the text box was taken for the title."""
    pptx = pytest.importorskip("pptx")
    deck = pptx.Presentation()
    slide = deck.slides.add_slide(deck.slide_layouts[5])
    slide.shapes.title.text = "Sales"
    box = slide.shapes.add_textbox(0, 0, 900_000, 900_000)
    box.text_frame.text = "The discount is 15 percent of 10"
    raised = box.text_frame.paragraphs[0].add_run()
    raised.text = "6"
    raised.font._rPr.set("baseline", "30000")
    box.element.nvSpPr.cNvPr.set("id", str(slide.shapes.title.shape_id))
    deck.save(str(tmp_path / "a.pptx"))
    document = load_document(tmp_path / "a.pptx", "a.pptx")
    assert document.text == "Sales\n\nThe discount is 15 percent of 10^6"


def read_chart(folder: Path, num_categories: int) -> Document:
    pptx = pytest.importorskip("pptx")
    from pptx.chart.data import CategoryChartData
    from pptx.enum.chart import XL_CHART_TYPE

    data = CategoryChartData()
    data.categories = ["North", "South", "West"][:num_categories] or [f"C{n}" for n in range(201)]
    data.add_series("Q1", [100, 200.5, None][:num_categories] or range(201))
    data.add_series("Q2", [3, 4, 5][:num_categories] or range(201))
    deck = pptx.Presentation()
    slide = deck.slides.add_slide(deck.slide_layouts[5])
    slide.shapes.title.text = "Sales"
    shape = slide.shapes.add_chart(XL_CHART_TYPE.BAR_CLUSTERED, 0, 0, 900_000, 900_000, data)
    shape.chart.has_title = True
    shape.chart.chart_title.text_frame.text = "By region"
    deck.save(str(folder / "a.pptx"))
    return load_document(folder / "a.pptx", "a.pptx")


def test_a_chart_is_read_as_the_table_it_was_drawn_from(tmp_path: Path) -> None:
    document = read_chart(tmp_path, 3)
    assert document.text == (
        "Sales\n\nBy region\n\n|  | Q1 | Q2 |\n| --- | --- | --- |\n| North | 100 | 3 |\n"
        "| South | 200.5 | 4 |\n| West |  | 5 |"
    )
    assert document.warnings == ()


def test_a_chart_of_very_many_values_is_cut_and_says_so(tmp_path: Path) -> None:
    document = read_chart(tmp_path, 0)
    assert "| C199 | 199 | 199 |" in document.text and "C200" not in document.text
    assert document.warnings == ("slide 1: of a chart, 200 categories and 20 series are read",)


def test_a_chart_of_points_says_that_only_their_heights_are_read(tmp_path: Path) -> None:
    pptx = pytest.importorskip("pptx")
    from pptx.chart.data import XyChartData
    from pptx.enum.chart import XL_CHART_TYPE

    data = XyChartData()
    series = data.add_series("Speed")
    series.add_data_point(1, 10)
    series.add_data_point(2, 30)
    deck = pptx.Presentation()
    slide = deck.slides.add_slide(deck.slide_layouts[6])
    slide.shapes.add_chart(XL_CHART_TYPE.XY_SCATTER, 0, 0, 900_000, 900_000, data).chart.has_title = False
    deck.save(str(tmp_path / "a.pptx"))
    document = load_document(tmp_path / "a.pptx", "a.pptx")
    assert document.text == "| Speed |\n| --- |\n| 10 |\n| 30 |"
    assert document.warnings == ("slide 1: of a chart of points, only their heights are read",)
