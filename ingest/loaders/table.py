"""Tables of records: .csv, .tsv, .xlsx. Every row keeps the names of its columns.

    Name: Alice; Age: 30; City: New York

Rows with long cells (a question and its answer) become sections of their own, a line a cell.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from ingest.archive import check_zip
from ingest.builder import DocumentBuilder, clean_line
from ingest.loaders.text import read_text
from rag.document import Document
from rag.errors import LoadError

_X = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"
_DELIMITERS = ",;\t|"
_LONG_ROW = 120  # characters on average, from which a row is a section
_MAX_TITLE = 80  # characters of a row's name
_LETTERS = re.compile(r"[^\W\d_]{2,}|[\u3400-\u9fff]")
_YEAR = re.compile(r"(?:19\d\d|20\d\d|2100)(?:[/-]\d{2,4})?")  # 2021, 2021/22, 2021-03
_CHECKED_ROWS = 50  # below the names, when they look like years
_NUMBER = re.compile(r"[-+(]?[\d.,:/%€$¥£ -]*\d[\d.,:/%€$¥£ )-]*")


class CsvLoader:
    """.csv and .tsv files; the delimiter is the one that divides the first lines most evenly."""

    media_type = "csv"
    suffixes: tuple[str, ...] = (".csv", ".tsv", ".tab")
    version = 2

    def load(self, file: Path, path: str) -> Document:
        text, warnings = read_text(file)
        builder = DocumentBuilder()
        builder.warnings += warnings
        delimiter = "\t" if path.lower().endswith((".tsv", ".tab")) else _find_delimiter(text)
        # A quote that is never closed would make the rest of the file one cell.
        csv.field_size_limit(1 << 22)
        try:
            rows = list(csv.reader(io.StringIO(text), delimiter=delimiter, skipinitialspace=True))
        except csv.Error as error:
            raise LoadError(f"this is not a table of values ({error}).") from error
        add_records(builder, rows)
        return builder.build(path, self.media_type)


class XlsxLoader:
    """.xlsx files: every sheet with its name, values as last computed by the program that saved it."""

    media_type = "xlsx"
    suffixes: tuple[str, ...] = (".xlsx", ".xlsm")
    version = 2

    def load(self, file: Path, path: str) -> Document:
        check_zip(file, "an Excel workbook")
        try:
            import openpyxl
        except ImportError as error:
            raise LoadError("reading .xlsx needs a package: pip install openpyxl") from error
        try:
            book = openpyxl.load_workbook(file, read_only=True, data_only=True)
        except Exception as error:  # the library raises KeyError, ValueError, BadZipFile, ...
            raise LoadError(
                f"this is not an Excel workbook, or it is damaged: {clean_line(str(error))}"
            ) from error
        builder = DocumentBuilder()
        try:
            for sheet in book.worksheets:
                if sheet.sheet_state != "visible":
                    continue
                rows = _read_rows(sheet)
                if rows:
                    builder.add_heading(1, sheet.title)
                    add_records(builder, rows, level=2)
                if empty := _count_uncomputed(book, sheet):
                    builder.warnings.append(
                        f"sheet {clean_line(sheet.title)}: {empty} formulas hold no computed value and are "
                        "left out; open the workbook in a spreadsheet program and save it"
                    )
        except Exception as error:  # a sheet is read only now, and may be damaged like the book
            raise LoadError(f"a sheet of it is damaged: {clean_line(str(error))}") from error
        title = clean_line(book.properties.title or "")
        book.close()
        return builder.build(path, self.media_type, title=title)


def _read_rows(sheet: Any) -> list[list[str]]:
    """The rows that hold something, all as wide as the widest of them."""
    sheet.reset_dimensions()  # what a file says of its size may be wrong, and would cut its rows off
    rows = [[show_value(value) for value in row] for row in sheet.iter_rows(values_only=True)]
    rows = [row for row in rows if any(row)]
    width = max((index + 1 for row in rows for index, cell in enumerate(row) if cell), default=0)
    return [row[:width] + [""] * (width - len(row)) for row in rows]


def _count_uncomputed(book: Any, sheet: Any) -> int:
    """Formulas whose value no program has stored. One that came out as "" is of the type "str"."""
    from lxml import etree

    count = 0
    with book._archive.open(sheet._worksheet_path) as source:
        for _, row in etree.iterparse(source, tag=f"{_X}row", resolve_entities=False, no_network=True):
            for cell in row:
                if cell.find(f"{_X}f") is not None and cell.get("t") != "str":
                    count += not cell.findtext(f"{_X}v")
            row.clear()
    return count


def show_value(value: Any) -> str:
    """A cell's value as a person would write it: 3 and not 3.0, no time where it is midnight."""
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    if isinstance(value, float):
        shown = f"{value:.15g}"  # what a spreadsheet keeps: 0.1 + 0.2 is 0.3
        return f"{Decimal(shown):f}" if 1e-15 < abs(value) < 1e15 else shown
    return str(value).removesuffix(" 00:00:00")


def _find_delimiter(text: str) -> str:
    lines = [line for line in text[:20_000].split("\n")[:30] if line.strip()]

    def evenness(delimiter: str) -> tuple[float, int]:
        counts = [len(row) for row in csv.reader(lines, delimiter=delimiter) if row]
        common, times = Counter(counts).most_common(1)[0]
        return (times / len(counts) if common > 1 else 0.0, common)

    try:
        return max(_DELIMITERS, key=evenness) if lines else ","
    except csv.Error:
        return ","


def add_records(builder: DocumentBuilder, rows: Iterable[Sequence[str]], *, level: int = 1) -> None:
    """Add rows, the first of them the columns' names if it looks like that."""
    cells = [[clean_line(cell) for cell in row] for row in rows]
    cells = [row for row in cells if any(row)]
    if not cells:
        return
    if len(cells) == 1 or max(len(row) for row in cells) == 1:
        for row in cells:
            builder.add_paragraph(" | ".join(cell for cell in row if cell))
        return
    names = cells[0] if _is_header(cells) else []
    records = [list(_name_cells(row, names)) for row in cells[bool(names):]]
    long = sum(len(part) for record in records for part in record) >= _LONG_ROW * len(records)
    for row, record in zip(cells[bool(names):], records, strict=True):
        if not record:
            continue
        if long and len(record) > 1:
            title = next((cell for cell in row if _LETTERS.search(cell)), "")
            start = builder.add_text("\n".join(record))
            if title:
                builder.mark_heading(level, title[:_MAX_TITLE], start)
        else:
            builder.add_paragraph("; ".join(record))


def _is_header(cells: Sequence[Sequence[str]]) -> bool:
    """Names are filled in, different, short, and no numbers, unless they are years in their order."""
    names = [name for name in cells[0] if name]
    if len(names) < max(1, len(cells[0]) - 1) or len(set(names)) < len(names):
        return False
    years = _year_columns(cells)
    return all(
        len(name) <= 60 and (index in years or not _NUMBER.fullmatch(name))
        for index, name in enumerate(cells[0])
    )


def _year_columns(cells: Sequence[Sequence[str]]) -> list[int]:
    """The columns that years name: two or more, rising or falling, above numbers that aren't all years.

    The first column must be one of words, or a table of names with two dates each would lose its first row.
    """
    first, *below = cells[: _CHECKED_ROWS + 1]
    columns = [index for index, name in enumerate(first) if _YEAR.fullmatch(name)]
    years = [first[index] for index in columns]
    is_ordered = years in (sorted(years), sorted(years, reverse=True))
    if len(years) < 2 or not is_ordered or 0 in columns or _NUMBER.fullmatch(first[0]):
        return []
    if not any(row[0] and not _NUMBER.fullmatch(row[0]) for row in below):
        return []
    values = [row[index] for row in below for index in columns if index < len(row) and row[index]]
    num_numbers = sum(bool(_NUMBER.fullmatch(value)) for value in values)
    are_all_years = all(_YEAR.fullmatch(value) for value in values)
    return columns if num_numbers > 0.5 * len(values) and not are_all_years else []


def _name_cells(row: Sequence[str], names: Sequence[str]) -> Iterator[str]:
    for index, cell in enumerate(row):
        if cell:
            name = names[index] if index < len(names) else ""
            yield f"{name}: {cell}" if name else cell
