"""Many questions into a file: nothing is lost, nothing answered twice, whatever happens."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from rag.answer import Answer
from rag.batch import GROUP, answer_file
from rag.errors import GeneratorError, InputError
from rag.filter import Filter
from rag.question_file import read_questions


class Echo:
    """Answers with the question in capitals; fails where it is told to. Keeps what it was asked."""

    def __init__(self, *, fails=(), error=None):
        self.fails = set(fails)
        self.error = error or GeneratorError("out of memory")
        self.asked = []
        self.answered = []

    def batch(self, questions, *, where):
        self.asked.append(list(questions))
        if self.fails.intersection(questions):
            raise self.error
        self.answered += questions
        return [Answer(question, question.upper(), "generated") for question in questions]


def rows(count):
    return [{"id": f"q{number}", "question": f"question {number}"} for number in range(count)]


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_failed_question_is_recorded_and_stops_no_other(tmp_path):
    rag = Echo(fails=["question 5"])
    counts = answer_file(rag, rows(20), tmp_path / "out")
    assert (counts.total, counts.before, counts.failed) == (20, 0, 1)
    found = lines(tmp_path / "out")
    assert [line["id"] for line in found] == [row["id"] for row in rows(20)]
    assert found[5] == {"id": "q5", "question": "question 5", "error": "out of memory"}
    assert sum("answer" in line for line in found) == 19
    # Halved, not one by one: 16, 8, 4, 2, 2, 1, 1, 8 and so on, and nothing is answered twice.
    assert len(rag.asked) < 16 and len(rag.answered) == len(set(rag.answered)) == 19


def test_a_bug_is_recorded_by_name_and_logged_with_its_traceback(tmp_path, caplog):
    answer_file(Echo(fails=["question 0"], error=ZeroDivisionError("by zero")), rows(2), tmp_path / "out")
    assert lines(tmp_path / "out")[0]["error"] == "ZeroDivisionError: by zero"
    assert "Traceback" in caplog.text


def test_questions_go_to_the_engine_in_groups(tmp_path):
    rag = Echo()
    shown = []
    answer_file(rag, rows(GROUP + 3), tmp_path / "out", progress=lambda done, total: shown.append((done, total)))
    assert [len(group) for group in rag.asked] == [GROUP, 3]
    assert shown == [(0, 19), (16, 19), (19, 19)]


@pytest.mark.parametrize("torn", [b'{"id": "q2", "que', b'{"id": "q2", "question"\n', b'{"id": "q2", "question": "question 2", "answer": "x"}', b"\0\0\0\0", b'\xe6\x96', b"\n"])
def test_a_half_written_last_line_is_repaired(tmp_path, torn):
    out = tmp_path / "out"
    answer_file(Echo(), rows(2), out)
    with out.open("ab") as file:
        file.write(torn)
    rag = Echo()
    counts = answer_file(rag, rows(4), out)
    assert counts.before == 2 and rag.answered == ["question 2", "question 3"]
    assert [line["answer"] for line in lines(out)] == [f"QUESTION {number}" for number in range(4)]


def test_damage_in_the_middle_is_told_and_nothing_is_overwritten(tmp_path):
    out = tmp_path / "out"
    answer_file(Echo(), rows(3), out)
    whole = out.read_bytes()
    out.write_bytes(whole.replace(b'{"id": "q1"', b"garbage"))
    damaged = out.read_bytes()
    with pytest.raises(InputError, match="line 2 is no answer"):
        answer_file(Echo(), rows(3), out)
    assert out.read_bytes() == damaged


def test_failed_questions_stay_failed_until_they_are_asked_again(tmp_path):
    out = tmp_path / "out"
    answer_file(Echo(fails=["question 1"]), rows(3), out)
    again = Echo()
    assert answer_file(again, rows(3), out).failed == 1 and again.asked == []
    assert answer_file(again, rows(3), out, retry_failed=True).failed == 0
    assert again.answered == ["question 1"]
    assert [(line["id"], "error" in line) for line in lines(out)] == [("q0", False), ("q1", False), ("q2", False)]


def test_answers_from_a_part_of_the_base_are_not_mixed_with_others(tmp_path):
    where = Filter(under="contracts", type="pdf")
    answer_file(Echo(), rows(2), tmp_path / "out", where=where)
    assert [line["where"] for line in lines(tmp_path / "out")] == [{"under": ["contracts"], "type": ["pdf"]}] * 2
    assert answer_file(Echo(), rows(3), tmp_path / "out", where=where).before == 2
    with pytest.raises(InputError, match="answers from under contracts, of type pdf, and now any file is asked for"):
        answer_file(Echo(), rows(3), tmp_path / "out")


def test_two_batches_do_not_write_to_one_file(tmp_path):
    out = tmp_path / "out"

    class Nosy(Echo):
        def batch(self, questions, *, where):
            with pytest.raises(InputError, match="another batch is writing"):
                answer_file(Echo(), rows(2), out)
            return super().batch(questions, where=where)

    answer_file(Nosy(), rows(2), out)
    assert len(lines(out)) == 2 and not (tmp_path / "out.lock").exists()


def test_every_bad_line_is_named_before_any_work(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text('{"id": 1, "question": "a?"}\n{"id": 1, "question": "b?"}\nnot json\n{"id": 3}\n\n[]\n')
    with pytest.raises(InputError) as error:
        read_questions(source)
    said = str(error.value)
    assert "line 2: the id 1 stands twice, first in line 1" in said
    for part in ("line 3 is not JSON", "line 4 has no question", "line 6 is not a JSON object"):
        assert part in said


KILLED = """
import sys, time
from pathlib import Path
from rag.answer import Answer
from rag.batch import answer_file
class Slow:
    def batch(self, questions, *, where):
        with open(sys.argv[2], "a") as log:
            log.writelines(question + "\\n" for question in questions)
        time.sleep(0.15)
        return [Answer(question, "answer to " + question, "generated") for question in questions]
rows = [{"id": number, "question": f"question {number}"} for number in range(160)]
answer_file(Slow(), rows, Path(sys.argv[1]))
"""


def test_killed_with_kill_9_and_started_again_every_question_is_answered_once(tmp_path):
    out, log = tmp_path / "out.jsonl", tmp_path / "log"
    command = [sys.executable, "-c", KILLED, str(out), str(log)]
    for _ in range(2):  # twice, so that a resumed run is killed too
        before = out.stat().st_size if out.exists() else 0
        work = subprocess.Popen(command)
        while not out.exists() or out.stat().st_size == before:
            assert work.poll() is None, "it ended before it could be killed"
            time.sleep(0.01)
        os.kill(work.pid, signal.SIGKILL)
        assert work.wait() == -signal.SIGKILL
    # A kill rarely falls into a write, so the torn line is added by hand.
    with out.open("ab") as file:
        file.write(b'{"id": 159, "quest')
    standing = len(out.read_bytes().splitlines()) - 1
    assert 2 * GROUP <= standing < 160
    subprocess.run(command, check=True)
    found = lines(out)
    assert [line["id"] for line in found] == list(range(160))
    assert all(line["answer"] == f"answer to question {line['id']}" for line in found)
    # What a kill interrupted is asked again, one group each time; what stood in the file never.
    asked = log.read_text().splitlines()
    assert len(asked) <= 160 + 2 * GROUP


def test_a_question_with_half_a_character_is_recorded_and_stops_no_other(tmp_path):
    """One emoji cut in two used to end the batch in a traceback, and every run that went on with it."""
    out = tmp_path / "out"
    broken = [{"id": 0, "question": "How \ud83d?"}, {"id": 1, "question": "question 1"}]
    rag = Echo(fails=["How \ud83d?"], error=InputError("half a character"))
    assert answer_file(rag, broken, out).failed == 1
    assert [line.get("error") for line in lines(out)] == ["half a character", None]
    assert answer_file(Echo(), broken, out).before == 2
    assert lines(out)[0]["question"] == "How \ud83d?"


def test_a_line_with_half_a_character_is_named_before_any_work(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text(
        '{"question": "whole \\ud83d\\ude00?"}\n{"question": "half \\ud83d?"}\n{"id": "\\ude00", "question": "q"}\n'
    )
    with pytest.raises(InputError) as error:
        read_questions(source)
    said = str(error.value).splitlines()
    assert len(said) == 2 and "line 2 holds half a character" in said[0] and "line 3" in said[1]


@pytest.mark.parametrize("last", ["", '{"id": "q1", "question": "question 1", "answer": "x"}\n'])
def test_a_file_of_questions_is_not_taken_for_their_answers(tmp_path, last):
    """A copy of the questions as output file used to be reported as answered, with no answer in it."""
    out = tmp_path / "out"
    written = '{"id": "q0", "question": "question 0"}\n' + last
    out.write_text(written)
    with pytest.raises(InputError, match="line 1 holds neither an answer nor an error"):
        answer_file(Echo(), rows(2), out)
    assert out.read_text() == written
