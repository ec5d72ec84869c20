"""HTML: what must not be lost or misread, from raised figures to what stands beside the main part."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
from loading import load, titles

from ingest.loaders import load_document

# raised figures ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("The deposit is 900<sup>1</sup> euros.", "The deposit is 900^1 euros."),
        ("10<sup>6</sup> m<sup>2</sup>, 10<sup>-6</sup>", "10^6 m^2, 10^-6"),
        ("2<sup>n - 1</sup> and (a+b)<sup>2 </sup>is", "2^(n - 1) and (a+b)^2 is"),
        ("900 <sup>1</sup> euros", "900 ^1 euros"),
        ("900<sup><a href='#n'>1</a></sup> euros", "900[1] euros"),
        ("900<a href='#n'><sup>1</sup></a> euros", "900[1] euros"),
        ("900<sup class='footnote-ref'>1</sup> euros", "900[1] euros"),
        ("900<a href='#n'>1</a> euros", "900[1] euros"),
        ("900<a role='doc-noteref' href='n.html'>*</a> euros", "900[*] euros"),
        ("900<sup><a href='#n'>[1]</a></sup> euros", "900[1] euros"),
        ("It ends.<sup>3</sup> Next", "It ends.[3] Next"),
        ("<a href='/land'>10<sup>6</sup> m</a>", "10^6 m"),
        ("see article <a href='#a5'>5</a>", "see article 5"),
        ("the 21<sup>st</sup>, Ca<sup>2+</sup>, Brand<sup>®</sup>", "the 21st, Ca^2+, Brand®"),
        ("<sup>1</sup> A note below.", "1 A note below."),
        ("H<sub>2</sub>O", "H2O"),
    ],
)
def test_a_raised_figure_is_no_further_digit(tmp_path: Path, html: str, text: str) -> None:
    """900 with a note 1 was read, and quoted, as 9001."""
    assert load(tmp_path, "a.html", f"<p>{html}</p>").text == text


def test_raised_figures_in_cells_and_headings_too(tmp_path: Path) -> None:
    page = "<h2>Area in m<sup>2</sup></h2><table><tr><td>a</td><td>10<sup>6</sup></td></tr></table>"
    document = load(tmp_path, "a.html", page)
    assert document.text == "Area in m^2\n\n| a | 10^6 |"
    assert titles(document) == [(2, "Area in m^2")]


# what is left out -------------------------------------------------------------------------------


def test_a_teaser_marked_as_the_article_does_not_cost_the_page(tmp_path: Path) -> None:
    """A third of the text in <article> was enough for the other two thirds to go without a word."""
    terms = "The notice period is three months. " * 14
    page = f"<article><p>{'teaser words ' * 20}</p></article><div><h2>Terms</h2><p>{terms}</p></div>"
    document = load(tmp_path, "a.html", page)
    assert terms.strip() in document.text
    assert document.warnings == ()


def test_links_beside_the_main_part_are_left_out_and_words_are_told(tmp_path: Path) -> None:
    main = "<main><p>" + "The rent is due on the first day of a month. " * 5 + "</p></main>"
    menu = "<ul>" + "<li><a href='/x'>A page of this site that is called so</a></li>" * 9 + "</ul>"
    document = load(tmp_path, "a.html", f"<div>{menu}</div>{main}")
    assert document.text.startswith("The rent is due")
    assert document.warnings == ()
    document = load(tmp_path, "b.html", f"{main}<div>By the way.</div>")
    assert "By the way" not in document.text
    assert document.warnings == (
        "11 characters that stand beside the page's main part were left out",
    )


def test_notes_and_boxes_in_the_main_part_are_kept(tmp_path: Path) -> None:
    page = (
        "<main><h1>Doc</h1><p>Text.</p><aside class='footnote'><p>1 The deposit is 900 euros.</p></aside>"
        "<aside class='warning'>Never open the lid.</aside>"
        "<aside><a href='/a'>Related page</a> <a href='/b'>Another one</a></aside></main>"
        "<aside>Beside the page.</aside>"
    )
    text = load(tmp_path, "a.html", page).text
    assert text == "Doc\n\nText.\n\n1 The deposit is 900 euros.\n\nNever open the lid."


def test_a_letters_head_and_foot_are_kept(tmp_path: Path) -> None:
    page = (
        "<header><h1>Lease of Harbour Street</h1><p>Landlord: Ms Weber</p></header>"
        "<nav>Contents</nav>{0}<footer><p>Signed 3 May 2021</p></footer>"
    )
    head = "Lease of Harbour Street\n\nLandlord: Ms Weber\n\nThe rent is 5."
    assert load(tmp_path, "a.html", page.format("<p>The rent is 5.</p>")).text == f"{head}\n\nSigned 3 May 2021"
    # A main part says that the rest is the site's, but for the title where it has none of its own.
    assert load(tmp_path, "b.html", page.format("<main><p>The rent is 5.</p></main>")).text == head
    own = page.format("<main><h1>Rent</h1><p>The rent is 5.</p></main>")
    assert load(tmp_path, "c.html", own).text == "Rent\n\nThe rent is 5."


def test_a_sections_own_head_and_foot_are_kept_and_menus_are_not(tmp_path: Path) -> None:
    page = (
        "<header><a href='/'>Home</a></header><section><header>Part one</header><p>Text.</p>"
        "<footer>By A. Weber</footer></section><footer><a href='/i'>Imprint</a> 2021</footer>"
    )
    assert load(tmp_path, "a.html", page).text == "Part one\n\nText.\n\nBy A. Weber"


def test_a_long_text_in_a_pages_foot_is_missed_aloud(tmp_path: Path) -> None:
    page = "<main><p>Text.</p></main><footer>" + "The lessor keeps the right to inspect. " * 5 + "</footer>"
    document = load(tmp_path, "a.html", page)
    assert document.text == "Text."
    assert document.warnings == (
        "194 characters that stand beside the page's main part were left out",
    )


def test_a_books_notes_are_kept(tmp_path: Path) -> None:
    page = '<p>The ship leaves at noon.<a href="#n">1</a></p><aside id="n"><p>Local time.</p></aside>'
    with zipfile.ZipFile(tmp_path / "a.epub", "w") as archive:
        archive.writestr(
            "META-INF/container.xml",
            "<container><rootfiles><rootfile full-path='c.opf'/></rootfiles></container>",
        )
        archive.writestr(
            "c.opf", "<package><manifest><item id='a' href='a.xhtml'/></manifest>"
            "<spine><itemref idref='a'/></spine></package>",
        )
        archive.writestr("a.xhtml", f"<html><body>{page}</body></html>")
    assert load_document(tmp_path / "a.epub", "a.epub").text == "The ship leaves at noon.[1]\n\nLocal time."


# tables -----------------------------------------------------------------------------------------


def test_a_cell_over_several_rows_stands_in_each_of_them(tmp_path: Path) -> None:
    """Cells below it moved to the left: Q2 became a region."""
    page = (
        "<table><thead><tr><th>Region</th><th>Quarter</th><th>Sales</th><th>Note</th></tr></thead>"
        "<tr><td rowspan=2>North</td><td>Q1</td><td>100</td><td rowspan=2>all</td></tr>"
        "<tr><td>Q2</td><td>200</td></tr><tr><td>South</td><td>Q1</td><td>5</td><td></td></tr></table>"
    )
    assert load(tmp_path, "a.html", page).text == (
        "| Region | Quarter | Sales | Note |\n| --- | --- | --- | --- |\n| North | Q1 | 100 | all |\n"
        "| North | Q2 | 200 | all |\n| South | Q1 | 5 |  |"
    )


def test_a_cell_may_span_rows_and_columns_at_once(tmp_path: Path) -> None:
    page = (
        "<table><tr><td rowspan=0 colspan=2>A</td><td>1</td></tr><tr><td>2</td></tr>"
        "<tr><td>3</td></tr><tbody><tr><td>b</td><td>c</td><td>4</td></tr></tbody></table>"
    )
    assert load(tmp_path, "a.html", page).text == (
        "| A |  | 1 |\n| --- | --- | --- |\n| A |  | 2 |\n| A |  | 3 |\n| b | c | 4 |"
    )
