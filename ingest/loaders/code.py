"""Source code: the file's own text, with a heading at each function, class and method."""

from __future__ import annotations

import re
from pathlib import Path

from ingest.loaders.text import read_text
from rag.document import Document, Heading

_PYTHON = re.compile(r"^([ \t]*)(?:async[ \t]+)?(?:def|class)[ \t]+\w+", re.MULTILINE)
_NAMED = re.compile(
    r"^([ \t]*)(?:(?:export|default|public|private|protected|internal|static|final|abstract|async|pub"
    r"(?:\([a-z]+\))?|unsafe|extern|inline|virtual|override|sealed|partial|open|data)[ \t]+)*"
    r"(?:function\*?|func|fn|class|interface|struct|enum|trait|impl|module|namespace|def|sub|object|"
    r"protocol|extension|fun|procedure)[ \t(<][^\n;]*",
    re.MULTILINE,
)
# In C and its kin a definition has no word of its own: a type, a name, parentheses, an open brace.
_C_FUNCTION = re.compile(
    r"^()[A-Za-z_][\w:<>,*& \t\[\]~]*[ \t*&]~?[A-Za-z_][\w:~]*[ \t]*\([^;{}]{0,400}\)[^;{}\n]{0,60}\n?[ \t]*\{",
    re.MULTILINE,
)
_SQL = re.compile(r"^()(?:CREATE|ALTER)[ \t][^\n(;]+", re.MULTILINE | re.IGNORECASE)
_NONE = re.compile(r"(?!)()")
_PATTERNS: dict[str, tuple[re.Pattern[str], ...]] = {
    **dict.fromkeys((".py", ".pyi"), (_PYTHON,)),
    **dict.fromkeys(
        (".js", ".jsx", ".mjs", ".ts", ".tsx", ".go", ".rs", ".rb", ".php", ".kt", ".swift", ".scala",
         ".lua", ".jl", ".pl"),
        (_NAMED,),
    ),
    **dict.fromkeys((".c", ".h", ".cc", ".cpp", ".cxx", ".hpp", ".hh", ".m"), (_NAMED, _C_FUNCTION)),
    **dict.fromkeys((".java", ".cs"), (_NAMED,)),
    ".sql": (_SQL,),
    **dict.fromkeys(
        (".sh", ".bash", ".zsh", ".ps1", ".bat", ".r", ".css", ".scss", ".toml", ".yaml", ".yml",
         ".ini", ".cfg", ".conf", ".xml", ".proto", ".dockerfile"),
        (_NONE,),
    ),
}
_MAX_TITLE = 100  # characters


class CodeLoader:
    """Source files of common languages. What is inside of another definition is a level below it."""

    media_type = "code"
    suffixes: tuple[str, ...] = tuple(_PATTERNS)
    version = 1

    def load(self, file: Path, path: str) -> Document:
        text, warnings = read_text(file)
        headings = find_definitions(text, Path(path).suffix.lower())
        return Document(
            path, text, self.media_type, headings=tuple(headings), warnings=tuple(warnings)
        )


def find_definitions(text: str, suffix: str) -> list[Heading]:
    """One heading for each definition; its level is how deep the line is indented."""
    found: dict[int, tuple[int, str]] = {}
    for pattern in _PATTERNS.get(suffix, ()):
        for match in pattern.finditer(text):
            title = " ".join(match[0].rstrip("{ \t\n").split())
            found.setdefault(match.start(), (len(match[1].expandtabs(4)), title[:_MAX_TITLE]))
    indents = sorted({indent for indent, _ in found.values()})
    return [
        Heading(indents.index(found[start][0]) + 1, found[start][1], start)
        for start in sorted(found)
    ]
