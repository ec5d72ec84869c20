"""Which files a filter chooses, and what it says where it chooses none."""

from datetime import date, datetime

import pytest

from rag.errors import InputError
from rag.filter import Filter
from rag.knowledge import FileRecord


def record(path: str, modified: str | None = None, *, pipeline: str = "", status: str = "ok") -> FileRecord:
    when = None if modified is None else datetime.fromisoformat(modified).timestamp()
    return FileRecord(path, "h", 1, status, pipeline=pipeline, modified=when)


FILES = {
    each.path: each
    for each in (
        record("contracts/2023/lease.pdf", "2023-05-01T00:00", pipeline="pdf/3 splitter/1 tokens/320"),
        record("contracts/2024/lease.pdf", "2024-01-31T23:59"),
        record("contracts old/notes.MD", "2024-02-01"),
        record("page.htm", "2024-06-01", pipeline="html/2 splitter/1 tokens/320"),
        record("合同/résumé.docx", "2025-01-01"),
        record("broken.pdf", "2024-01-01", status="failed"),
    )
}


@pytest.mark.parametrize(
    ("conditions", "chosen"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"under": "contracts"}, [0, 1]),
        ({"under": ["contracts/2024/", "./合同"]}, [1, 4]),
        ({"under": "contracts\\2023"}, [0]),
        ({"under": "contracts/2024/lease.pdf"}, [1]),
        ({"file": "lease*"}, [0, 1]),
        ({"file": "*.pdf"}, [0, 1]),  # a bare name matches in every folder
        ({"file": "contracts/*.pdf"}, [0, 1]),  # * also stands for /
        ({"file": "*/2023/*"}, [0]),
        ({"file": "合同/re\u0301sume\u0301.docx"}, [4]),  # accents as one character or as two
        ({"type": "pdf"}, [0, 1]),
        ({"type": [".MD", "docx"]}, [2, 4]),
        ({"type": "html"}, [3]),  # the kind, where the ending says it otherwise
        ({"since": "2024-01-31", "until": "2024-02-01"}, [1, 2]),
        ({"since": date(2024, 6, 1)}, [3, 4]),
        ({"until": datetime(2023, 5, 1, 12)}, [0]),
        ({"under": "contracts", "type": "pdf", "since": "2024-01-01"}, [1]),
    ],
)
def test_a_filter_chooses_files_that_fulfil_every_condition(conditions, chosen):
    readable = [path for path, one in FILES.items() if one.status == "ok"]
    assert Filter(**conditions).choose(FILES) == [readable[at] for at in chosen]


def test_no_match_says_what_there_is():
    error = str(Filter(under="nowhere", type="pdf").nothing_matches(FILES))
    assert error.startswith("none of the 5 files in this knowledge base is under nowhere, of type pdf. There is: folders ")
    for part in ("contracts/2023 (1)", "合同 (1)", "pdf (2)", "md (1)", "dates 2023-05-01 to 2025-01-01"):
        assert part in error
    assert "There is: nothing." in str(Filter(under="x").nothing_matches({}))


@pytest.mark.parametrize(
    "conditions",
    [{"since": "yesterday"}, {"until": "2024-13-01"}, {"since": "2024-02-01", "until": "2024-01-01"}, {"under": ""},
     {"type": [" "]}, {"file": [3]}],
)
def test_what_cannot_be_understood_is_refused(conditions):
    with pytest.raises(InputError):
        Filter(**conditions)


def test_a_filter_survives_json_and_equals_itself():
    where = Filter(under="a/", file=["*.x", "*.x"], type="PDF", since="2024-01-01")
    assert where.to_dict() == {"under": ["a"], "file": ["*.x"], "type": ["pdf"], "since": "2024-01-01"}
    assert Filter.from_dict(where.to_dict()) == where and hash(Filter.from_dict(where.to_dict())) == hash(where)
    assert Filter().is_everything and Filter().to_dict() == {} and not where.is_everything
    with pytest.raises(InputError, match="no condition 'folder'"):
        Filter.from_dict({"folder": "a"})
