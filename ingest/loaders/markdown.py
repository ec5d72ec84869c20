"""Markdown: the file's own text, so that offsets are exact; headings outside of code fences."""

from __future__ import annotations

import re
from pathlib import Path

from ingest.loaders.text import read_text
from ingest.outline import add_articles
from rag.document import Document, Heading

_ATX = re.compile(r" {0,3}(#{1,6})(?:[ \t]+(.*))?$")
_CLOSING_HASHES = re.compile(r"(?<=[ \t])#+$")
_SETEXT = re.compile(r" {0,3}(=+|-{2,})[ \t]*$")
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})(.*)$")
_NOT_A_PARAGRAPH = re.compile(r"\s*(?:[-*+>|#]|\d+[.)])|\s*$| {4}|\t")
_FRONT_MATTER = re.compile(r"---[ \t]*\n(.*?\n)?(?:---|\.\.\.)[ \t]*(?:\n|$)", re.DOTALL)
_FRONT_TITLE = re.compile(r"^title[ \t]*:[ \t]*([^ \t\n].*)$", re.MULTILINE | re.IGNORECASE)
_MARK = re.compile(r"(\*\*|__|\*|`|~~)(?=\S)")
_CLOSING_MARKS = {mark: re.compile(rf"(?<=\S){re.escape(mark)}") for mark in ("**", "__", "*", "`", "~~")}
# Bounded: of a line of openings that nothing closes, each would otherwise be followed to the line's end.
_LINK = re.compile(r"!?\[([^\[\]]*)\]\([^)]{0,1000}\)")
_SUPERSCRIPT = re.compile(r"(?<=\w)<sup>([^<]{1,40})</sup>", re.IGNORECASE)
_ESCAPE = re.compile(r"\\([\\`*_{}\[\]()#+\-.!|<>~])")
_TAG = re.compile(r"</?[A-Za-z][^>]{0,1000}>|<!--.{0,1000}?-->|\{#[^}]{0,300}\}$")


class MarkdownLoader:
    """.md files. The title is the front matter's, else the first heading of the first level."""

    media_type = "md"
    suffixes: tuple[str, ...] = (".md", ".markdown", ".mdown", ".mkd", ".mdx")
    version = 2

    def load(self, file: Path, path: str) -> Document:
        text, warnings = read_text(file)
        title, headings = read_markdown(text)
        return Document(
            path, text, self.media_type, title, headings=tuple(headings), warnings=tuple(warnings)
        )


def read_markdown(text: str) -> tuple[str, list[Heading]]:
    """The title ("" where there is none) and the headings of a markdown text."""
    title = ""
    start = 0
    if front := _FRONT_MATTER.match(text):
        if found := _FRONT_TITLE.search(front[1] or ""):
            title = found[1].rstrip(" \t").strip("\"'")
        start = front.end()
    headings = _read_headings(text, start)
    if not title:
        first = [heading for heading in headings if heading.level == 1][:1]
        title = first[0].title if first else ""
    return title, add_articles(headings, text)


def _read_headings(text: str, start: int) -> list[Heading]:
    headings: list[Heading] = []
    fence = ""
    previous: tuple[int, str] | None = None  # a paragraph's line, which "===" makes a heading
    for line in text[start:].split("\n"):
        position, start = start, start + len(line) + 1
        if match := _FENCE.match(line):
            if not fence:
                if match[1][0] != "`" or "`" not in match[2]:
                    fence = match[1]
            elif match[1].startswith(fence) and not match[2].strip():
                fence = ""
            previous = None
            continue
        if fence:
            continue
        if match := _ATX.match(line):
            if title := clean_title(_CLOSING_HASHES.sub("", (match[2] or "").rstrip(" \t"))):
                headings.append(Heading(len(match[1]), title, position))
            previous = None
        elif previous and (match := _SETEXT.match(line)):
            level = 1 if match[1][0] == "=" else 2
            if title := clean_title(previous[1]):
                headings.append(Heading(level, title, previous[0]))
            previous = None
        elif _NOT_A_PARAGRAPH.match(line) and not line.lstrip().startswith("**"):
            previous = None
        else:
            # only a paragraph of one line: "text\n---" below a longer one is a rule
            previous = (position, line) if previous is None else None
    return headings


def clean_title(title: str) -> str:
    """A heading as it is read: without links, emphasis and escapes."""
    for _ in range(2):  # "[![picture](...)](...)", "***bold italic***"
        title = _LINK.sub(r"\1", title)
    title = _SUPERSCRIPT.sub(r"^\1", title)  # 10<sup>6</sup> is not 106
    title = _TAG.sub("", title)
    for _ in range(2):
        title = _take_off_emphasis(title)
    return " ".join(_ESCAPE.sub(r"\1", title).split())


def _take_off_emphasis(title: str) -> str:
    """Without the marks around *words*; one that nothing closes stays. Each kind is looked for in vain once."""
    kept: list[str] = []
    copied = position = 0
    unclosed: set[str] = set()
    while opening := _MARK.search(title, position):
        start = opening.start()
        position = start + 1
        for mark in ("**", "*") if opening[1] == "**" else (opening[1],):
            if mark in unclosed:
                continue
            if closing := _CLOSING_MARKS[mark].search(title, start + len(mark) + 1):
                kept += title[copied:start], title[start + len(mark) : closing.start()]
                copied = position = closing.end()
                break
            unclosed.add(mark)
    return "".join([*kept, title[copied:]])
