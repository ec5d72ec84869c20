"""JSON: objects as lines `key: value`, records parted by blank lines. Notebooks as markdown."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ingest.builder import DocumentBuilder
from ingest.loaders.markdown import read_markdown
from ingest.loaders.text import read_text
from rag.document import Document
from rag.errors import LoadError

_MAX_OUTPUT = 4_000  # characters of one notebook cell's output
_NAME_KEYS = ("title", "name", "question", "标题", "名称", "问题")
_MAX_TITLE = 80


class JsonLoader:
    """.json, .jsonl and .ndjson files."""

    media_type = "json"
    suffixes: tuple[str, ...] = (".json", ".jsonl", ".ndjson")
    version = 1

    def load(self, file: Path, path: str) -> Document:
        text, warnings = read_text(file)
        builder = DocumentBuilder()
        builder.warnings += warnings
        if path.lower().endswith(".json"):
            value = _parse(text)
            for record in value if isinstance(value, list) else [value]:
                _add_record(builder, record)
            return builder.build(path, self.media_type)
        bad: list[int] = []
        deep: list[int] = []
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    _add_record(builder, json.loads(line))
                except ValueError:
                    bad.append(number)
                except RecursionError:
                    deep.append(number)
        if bad and not deep and not builder.length:
            raise LoadError(f"no line of it is JSON (the first is line {bad[0]}).")
        if bad:
            builder.warnings.append(f"{len(bad)} lines are not JSON (the first is line {bad[0]})")
        if deep and not builder.length:
            raise LoadError("this JSON is nested too deeply to be read.")
        if deep:
            builder.warnings.append(
                f"{len(deep)} lines are nested too deeply to be read (the first is line {deep[0]})"
            )
        return builder.build(path, self.media_type)


class NotebookLoader:
    """.ipynb files: text cells as they are, code cells fenced, what they printed below them."""

    media_type = "ipynb"
    suffixes: tuple[str, ...] = (".ipynb",)
    version = 1

    def load(self, file: Path, path: str) -> Document:
        text, _ = read_text(file)
        notebook = _parse(text)
        cells = notebook.get("cells") if isinstance(notebook, dict) else None
        if not isinstance(cells, list):
            raise LoadError("this is not a Jupyter notebook (it has no cells).")
        builder = DocumentBuilder()
        title = ""
        for cell in cells:
            if not isinstance(cell, dict):
                continue
            source = _join(cell.get("source")).strip("\n")
            if cell.get("cell_type") == "markdown":
                found, headings = read_markdown(source)
                title = title or found
                part = Document(path, source, "md", headings=tuple(headings))
                builder.add_document(part)
            elif cell.get("cell_type") == "code" and source.strip():
                builder.add_text(f"```\n{source}\n```")
                for output in _outputs(cell):
                    builder.add_paragraph(output)
        return builder.build(path, self.media_type, title=title)


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise LoadError(f"this is not JSON: {error}.") from error
    except RecursionError as error:
        raise LoadError("this JSON is nested too deeply to be read.") from error


def _add_record(builder: DocumentBuilder, record: Any) -> None:
    text = "\n".join(_lines(record, 0))
    if not text.strip():
        return
    start = builder.add_text(text)
    if isinstance(record, dict):
        names = [record[key] for key in _NAME_KEYS if isinstance(record.get(key), str)]
        if names and names[0].strip() and "\n" in text:
            builder.mark_heading(1, " ".join(names[0].split())[:_MAX_TITLE], start)


def _lines(value: Any, depth: int) -> Iterator[str]:
    """An indented outline; what JSON writes with brackets and quotes, people read like this."""
    indent = "  " * depth
    if isinstance(value, dict):
        for key, inner in value.items():
            if isinstance(inner, (dict, list)) and inner:
                yield f"{indent}{key}:"
                yield from _lines(inner, depth + 1)
            else:
                yield f"{indent}{key}: {_scalar(inner)}"
    elif isinstance(value, list):
        for inner in value:
            if isinstance(inner, (dict, list)) and inner:
                yield f"{indent}-"
                yield from _lines(inner, depth + 1)
            else:
                yield f"{indent}- {_scalar(inner)}"
    else:
        yield f"{indent}{_scalar(value)}"


def _scalar(value: Any) -> str:
    if isinstance(value, str):
        return value.strip()
    return "" if value is None or value == [] or value == {} else json.dumps(value)


def _join(source: Any) -> str:
    return "".join(map(str, source)) if isinstance(source, list) else str(source or "")


def _outputs(cell: dict[str, Any]) -> Iterator[str]:
    for output in cell.get("outputs") or []:
        if not isinstance(output, dict):
            continue
        data = output.get("data")
        text = _join(output.get("text") or (data.get("text/plain") if isinstance(data, dict) else ""))
        if len(text) > _MAX_OUTPUT:
            left = len(text) - _MAX_OUTPUT
            text = f"{text[:_MAX_OUTPUT]}\n[... {left:,} more characters of output left out]"
        yield text
