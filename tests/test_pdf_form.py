"""What is filled in a PDF's form is part of the page."""

from __future__ import annotations

from pathlib import Path

import pytest

from ingest.loaders import load_document

Label = tuple[float, float, str]


def write_form(file: Path, labels: list[Label], fields: list[str], *, shown: str = "") -> None:
    """A page of 300 x 300 points; `fields` are entries of widgets, `shown` more of the page's drawing."""
    drawn = "".join(f"BT /F1 12 Tf {x} {y} Td ({text}) Tj ET\n" for x, y, text in labels) + shown
    first = 6
    numbers = " ".join(f"{first + n} 0 R" for n in range(len(fields)))
    objects = [
        f"<</Type/Catalog/Pages 2 0 R/AcroForm<</Fields[{numbers}]/DR<</Font<</F1 5 0 R>>>>/DA(/F1 12 Tf)>>>>",
        "<</Type/Pages/Kids[3 0 R]/Count 1>>",
        f"<</Type/Page/Parent 2 0 R/MediaBox[0 0 300 300]/Contents 4 0 R"
        f"/Resources<</Font<</F1 5 0 R>>>>/Annots[{numbers}]>>",
        f"<</Length {len(drawn)}>>stream\n{drawn}\nendstream",
        "<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
        *(f"<</Type/Annot/Subtype/Widget/DA(/F1 12 Tf)/P 3 0 R{entries}>>" for entries in fields),
    ]
    out, offsets = "%PDF-1.4\n", []
    for number, content in enumerate(objects, 1):
        offsets.append(len(out))
        out += f"{number} 0 obj{content}endobj\n"
    start = len(out)
    out += f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n"
    out += "".join(f"{offset:010} 00000 n \n" for offset in offsets)
    out += f"trailer<</Size {len(objects) + 1}/Root 1 0 R>>\nstartxref\n{start}\n%%EOF"
    file.write_bytes(out.encode("latin-1"))


def text_field(name: str, value: str, rect: str, *, flags: int = 4) -> str:
    return f"/FT/Tx/T({name})/V({value})/Rect[{rect}]/F {flags}"


def test_what_is_filled_in_stands_behind_its_label(tmp_path: Path) -> None:
    """The page said "Name of the tenant:" and nothing more."""
    write_form(
        tmp_path / "a.pdf",
        [(20, 200, "Name of the tenant:"), (20, 160, "Rent:"), (20, 100, "Signed by both.")],
        [text_field("rent", "500 euros", "140 155 290 175"),
         text_field("name", "Wilhelmina Weber", "140 195 290 215")],
    )
    document = load_document(tmp_path / "a.pdf", "a.pdf")
    assert document.text == "Name of the tenant: Wilhelmina Weber\n\nRent: 500 euros\n\nSigned by both."
    assert [page.number for page in document.pages] == [1]
    assert document.warnings == ()


def test_two_fields_on_a_row_stand_behind_a_label_each(tmp_path: Path) -> None:
    write_form(
        tmp_path / "a.pdf", [(20, 200, "From:"), (160, 200, "To:")],
        [text_field("a", "May", "60 195 150 215"), text_field("b", "June", "190 195 290 215")],
    )
    assert " ".join(load_document(tmp_path / "a.pdf", "a.pdf").text.split()) == "From: May To: June"


def test_a_text_of_several_lines_and_one_without_a_label_are_kept(tmp_path: Path) -> None:
    write_form(
        tmp_path / "a.pdf", [(20, 250, "Remarks are below."), (20, 50, "The end of the page.")],
        [text_field("r", "The lift is broken.\\nThe cellar is wet.", "20 100 290 200") + "/Ff 4096"],
    )
    text = load_document(tmp_path / "a.pdf", "a.pdf").text
    assert text.split() == (
        "Remarks are below. The lift is broken. The cellar is wet. The end of the page.".split()
    )


def test_what_the_page_shows_already_is_not_said_twice(tmp_path: Path) -> None:
    write_form(
        tmp_path / "a.pdf", [(20, 200, "Name:"), (62, 200, "Wilhelmina Weber")],
        [text_field("name", "Wilhelmina Weber", "60 195 290 215")],
    )
    assert load_document(tmp_path / "a.pdf", "a.pdf").text == "Name: Wilhelmina Weber"


@pytest.mark.parametrize(
    "field",
    [text_field("a", "secret", "60 195 290 215", flags=2), text_field("a", "", "60 195 290 215"),
     text_field("a", "secret", "60 195 290 215") + "/Ff 8192"],
)
def test_hidden_empty_and_password_fields_say_nothing(tmp_path: Path, field: str) -> None:
    write_form(tmp_path / "a.pdf", [(20, 200, "Name:")], [field])
    assert load_document(tmp_path / "a.pdf", "a.pdf").text == "Name:"


def test_the_chosen_option_is_read_by_its_label(tmp_path: Path) -> None:
    field = "/FT/Ch/Ff 131072/T(c)/Opt[[(de)(Germany)][(fr)(France)]]/V(fr)/Rect[80 195 290 215]/F 4"
    write_form(tmp_path / "a.pdf", [(20, 200, "Country:")], [field])
    assert load_document(tmp_path / "a.pdf", "a.pdf").text == "Country: France"


def test_ticked_boxes_are_told(tmp_path: Path) -> None:
    field = "/FT/Btn/T(c)/V/Yes/AS/Yes/Rect[80 195 95 215]/F 4/AP<</N<</Yes 4 0 R/Off 4 0 R>>>>"
    write_form(tmp_path / "a.pdf", [(20, 200, "Smoker")], [field])
    document = load_document(tmp_path / "a.pdf", "a.pdf")
    assert document.text == "Smoker"
    assert document.warnings == ("which of its form's boxes are ticked is not read (page 1)",)
