"""The commands, called as a user calls them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_models import make_model

from rag.__main__ import _with_known_paths
from rag.errors import InputError
from rag.knowledge import KnowledgeBase
from rag.quality.evaluation import EvalQuestion

LEASE = "# Lease\n\nThe lease began on 3 May 2021. The monthly rent is 1,250 euros.\n"
PETS = "# Pets\n\nCats may be kept in the flat. Dogs need the written consent of the owner.\n"
CONTRACT = "# 合同\n\n甲方应于每月五日前支付工资。试用期为三个月。\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny random Llama: what it writes is nonsense, the path it takes is the real one."""
    return make_model(tmp_path_factory.mktemp("model"), "llama", max_position_embeddings=4096)


@pytest.fixture
def folder(tmp_path):
    documents = tmp_path / "我的 文档"
    (documents / "sub").mkdir(parents=True)
    (documents / "lease.md").write_text(LEASE, encoding="utf-8")
    (documents / "pets.md").write_text(PETS, encoding="utf-8")
    (documents / "sub" / "合同.md").write_text(CONTRACT, encoding="utf-8")
    return documents


def run(*arguments, code=0, **environment):
    env = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    done = subprocess.run(
        [sys.executable, "-m", *map(str, arguments)], capture_output=True, text=True, env=env, timeout=120
    )
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture
def base(tmp_path, folder):
    run("ingest", folder, "--kb", tmp_path / "kb")
    return tmp_path / "kb"


def write_lines(path, *rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_retrieve_keeps_order_and_ids_and_points_into_the_text(base, tmp_path, folder):
    source = write_lines(
        tmp_path / "in.jsonl", {"id": "b", "question": "试用期多长？"}, {"id": 7, "question": "How high is the rent?"}
    )
    run("rag", "retrieve", source, tmp_path / "out.jsonl", "--kb", base, "--top-k", 2)
    first, second = read_lines(tmp_path / "out.jsonl")
    assert (first["id"], second["id"]) == ("b", 7)
    assert first["hits"][0]["path"] == "sub/合同.md" and second["hits"][0]["path"] == "lease.md"
    assert len(first["hits"]) <= 2
    hit = second["hits"][0]
    assert set(hit) >= {"path", "page", "heading", "start", "end", "score", "text"}
    assert hit["page"] is None and LEASE[hit["start"] : hit["end"]] == hit["text"]


def test_ask_json_is_one_object_with_everything_the_contract_names(base, model):
    done = run("rag", "ask", "How high is the monthly rent?", "--kb", base, "--json", "--max-new-tokens", 8,
               RAG_GENERATOR=str(model))
    answer = json.loads(done.stdout)
    assert set(answer) >= {"question", "answer", "refused", "citations", "hits", "stats"}
    assert answer["hits"][0]["path"] == "lease.md"
    stats = answer["stats"]
    assert stats["prompt_tokens"] > 20 and stats["new_tokens"] > 0 and stats["device"] == "cpu"
    assert set(stats) >= {"reused_tokens", "seconds_to_first_token", "tokens_per_second"}


def test_a_question_can_be_kept_to_files_by_folder_name_type_and_day(base, tmp_path):
    source = write_lines(tmp_path / "in.jsonl", {"id": 1, "question": "How much is the rent?"})
    target = tmp_path / "out.jsonl"
    everything = ["lease.md", "pets.md", "sub/合同.md"]
    for options, expected in (
        (["--under", "sub"], everything[2:]), (["--file", "pets*", "--file", "合*"], everything[1:]),
        (["--type", "md", "--since", "2020-01-01"], everything),
    ):
        run("rag", "retrieve", source, target, "--kb", base, *options)
        assert sorted(hit["path"] for hit in read_lines(target)[0]["hits"]) == expected, options
    for command in (["ask", "How much?"], ["retrieve", source, target], ["batch", source, target]):
        done = run("rag", *command, "--kb", base, "--under", "sub", "--type", "pdf", code=1)
        assert "none of the 3 files in this knowledge base is under sub, of type pdf." in done.stderr
        assert "types md (3)" in done.stderr
    assert "since is 'May'" in run("rag", "ask", "x", "--kb", base, "--since", "May", code=1).stderr


def test_ask_refuses_before_a_model_is_loaded(base):
    done = run("rag", "ask", "Who won the football world cup in Brazil?", "--kb", base, "--json",
               RAG_GENERATOR="/no/such/model")
    assert json.loads(done.stdout)["refused"] is True


def test_batch_answers_all_in_order_and_resumes_where_it_stopped(base, model, tmp_path):
    rows = [{"id": n, "question": question} for n, question in enumerate(
        ["How high is the rent?", "May cats be kept in the flat?", "Who won the world cup in Brazil?"])]
    source, out = write_lines(tmp_path / "in.jsonl", *rows), tmp_path / "out.jsonl"
    settings = ("--kb", base, "--generator", model, "--max-new-tokens", 4)
    run("rag", "batch", source, out, *settings)
    whole = out.read_bytes()
    assert [row["id"] for row in read_lines(out)] == [0, 1, 2]
    lines = whole.splitlines(keepends=True)
    out.write_bytes(lines[0] + lines[1][:40])  # killed while it wrote the second line
    done = run("rag", "batch", source, out, *settings)
    assert "1 of them answered before" in done.stderr
    assert [row["answer"] for row in read_lines(out)] == [row["answer"] for row in map(json.loads, lines)]


def test_batch_does_not_write_over_answers_to_other_questions(base, tmp_path):
    source = write_lines(tmp_path / "in.jsonl", {"id": 1, "question": "How high is the rent?"})
    out = write_lines(tmp_path / "out.jsonl", {"id": 1, "question": "Something else?", "answer": "precious"})
    done = run("rag", "batch", source, out, "--kb", base, code=1)
    assert "other questions" in done.stderr and "precious" in out.read_text()


def test_eval_json_ends_with_one_object_of_all_figures(base, model, tmp_path):
    source = write_lines(
        tmp_path / "q.jsonl",
        {"question": "How high is the monthly rent?", "answer": "1,250 euros", "path": "lease.md"},
        {"question": "Who won the world cup in Brazil?", "unanswerable": True},
    )
    done = run("rag", "eval", source, "--kb", base, "--json", "--generator", model, "--max-new-tokens", 4)
    figures = json.loads(done.stdout.splitlines()[-1])
    assert set(figures) >= {"n", "hit@1", "hit@5", "mrr", "em", "f1", "answer_in_text", "citation_precision",
                            "refusal_accuracy"}
    assert figures["n"] == 2 and figures["hit@1"] == 1.0
    assert set(figures["by_type"]) == {"en number", "en unanswerable"}


def test_eval_saves_a_run_compares_two_and_writes_a_report(base, model, tmp_path):
    pytest.importorskip("matplotlib", reason="plots are an extra")
    source = write_lines(
        tmp_path / "q.jsonl",
        {"question": "How high is the monthly rent?", "answer": "1,250 euros", "path": "lease.md"},
        {"question": "May cats be kept in the flat?", "path": "pets.md"},
    )
    saved, page = tmp_path / "run.json", tmp_path / "report.html"
    run("rag", "eval", source, "--kb", base, "--generator", model, "--max-new-tokens", 4, "--save", saved, "--html", page)
    assert "How high is the monthly rent?" in page.read_text(encoding="utf-8")
    done = run("rag", "eval", "--compare", saved, saved, "--json")  # needs no knowledge base
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["questions"] == 2 and found["differences"]["hit@1"]["p"] == 1.0
    assert "nothing to measure" in run("rag", "eval", code=1).stderr


def test_questions_are_made_of_the_documents_and_eval_reads_them(base, model, tmp_path):
    run("rag", "questions", tmp_path / "q.jsonl", "--kb", base, "--unanswerable", 0)
    rows = read_lines(tmp_path / "q.jsonl")
    assert {row["question"] for row in rows} >= {"What is the monthly rent?", "甲方应于每月几日前支付工资？"}
    assert next(row for row in rows if row["path"] == "sub/合同.md")["answer"] == "五日"
    done = run("rag", "eval", tmp_path / "q.jsonl", "--kb", base, "--json", "--generator", model, "--max-new-tokens", 2)
    assert json.loads(done.stdout.splitlines()[-1])["hit@1"] == 1.0


def test_calibrate_says_how_many_questions_are_missing(base):
    done = run("rag", "calibrate", "--kb", base, code=1)
    assert "a fit needs 20 of each" in done.stderr and not (base / "refusal.json").exists()


def test_doctor_repairs_the_index_file(base, model):
    (base / "vectors.faiss").write_bytes(b"broken")
    done = run("rag", "doctor", "--kb", base, "--generator", model)
    assert "damaged" in done.stdout and "now current" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("ask", "Q?", "--kb", "nowhere"), "python -m ingest"),
        (("ask", "Q?", "--top-k", "0"), "top_k"),
        (("retrieve", "missing.jsonl", "out.jsonl"), "missing.jsonl is not a file"),
    ],
)
def test_a_mistake_is_one_clear_line_without_a_traceback(arguments, said, tmp_path):
    done = run("rag", *arguments, code=1)
    assert said in done.stderr and "Traceback" not in done.stderr


def test_a_line_that_is_not_json_is_named(base, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"id": 1, "question": "ok?"}\n{"id": 2, question}\n')
    done = run("rag", "retrieve", tmp_path / "in.jsonl", tmp_path / "out.jsonl", "--kb", base, code=1)
    assert "line 2" in done.stderr and not (tmp_path / "out.jsonl").exists()


def test_another_embedder_is_refused_and_reembedding_mends_it(base, tmp_path, folder):
    import shutil

    from rag.embedder import BUNDLED

    other = tmp_path / "other"
    shutil.copytree(BUNDLED, other)
    tokenizer = next(other.rglob("tokenizer.json"))
    tokenizer.write_text(tokenizer.read_text() + " ")
    source = write_lines(tmp_path / "in.jsonl", {"id": 1, "question": "How high is the rent?"})
    retrieve = ("rag", "retrieve", source, tmp_path / "out.jsonl", "--kb", base, "--embedder", other)
    done = run(*retrieve, code=1)
    assert "--reembed" in done.stderr
    run("ingest", folder, "--kb", base, "--reembed", RAG_EMBEDDER=str(other))
    run(*retrieve)
    assert read_lines(tmp_path / "out.jsonl")[0]["hits"][0]["path"] == "lease.md"


def test_asking_works_after_an_ingest_was_killed(base, folder, tmp_path):
    for number in range(300):
        (folder / f"{number}.md").write_text(f"# Note {number}\n\nThe code of room {number} is {number * 7}.\n" * 20)
    ingest = subprocess.Popen(
        [sys.executable, "-m", "ingest", str(folder), "--kb", str(base)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )
    time.sleep(1.5)
    os.killpg(ingest.pid, signal.SIGKILL)
    ingest.wait()
    source = write_lines(tmp_path / "in.jsonl", {"id": 1, "question": "How high is the monthly rent?"})
    run("rag", "retrieve", source, tmp_path / "out.jsonl", "--kb", base)
    assert read_lines(tmp_path / "out.jsonl")[0]["hits"][0]["path"] == "lease.md"
    run("ingest", folder, "--kb", base)
    done = run("ingest", folder, "--kb", base, "--json")
    counts = json.loads(done.stdout.splitlines()[-1])
    assert (counts["unchanged"], counts["added"], counts["failed"]) == (303, 0, 0)


NO_NETWORK = """
import runpy, socket, sys
def refuse(*arguments, **keywords):
    raise AssertionError(f"the network was used: {arguments[1:]}")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = refuse
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def test_ingest_and_ask_never_touch_the_network(folder, tmp_path, model):
    assert socket.socket.connect is not None
    for arguments in (
        ("ingest", folder, "--kb", tmp_path / "kb"),
        ("rag", "ask", "How high is the monthly rent?", "--kb", tmp_path / "kb", "--generator", model,
         "--max-new-tokens", 4),
    ):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        done = subprocess.run(
            [sys.executable, "-c", NO_NETWORK, *map(str, arguments)], capture_output=True, text=True,
            env=environment, timeout=120,
        )
        assert done.returncode == 0, done.stderr


def test_the_questions_are_never_written_over(tmp_path):
    """With one name for both, `batch` called the questions answered, and `retrieve` replaced them."""
    source = write_lines(tmp_path / "q.jsonl", {"question": "How high is the rent?"})
    written = source.read_text()
    (tmp_path / "link.jsonl").symlink_to(source)
    beside = tmp_path / "out.jsonl.new"  # under which name `retrieve` writes out.jsonl
    beside.write_text(written)
    for command, asked, target in (
        ("batch", source, source), ("retrieve", source, source), ("retrieve", source, tmp_path / "link.jsonl"),
        ("retrieve", beside, tmp_path / "out.jsonl"),
    ):
        done = run("rag", command, asked, target, "--kb", tmp_path / "none", code=1)
        assert "would be written over. Name another output file." in done.stderr, (command, target)
    done = run("rag", "eval", source, "--save", tmp_path / "a", "--details", tmp_path / "a", code=1)
    assert "two outputs" in done.stderr
    assert source.read_text() == beside.read_text() == written


def test_an_output_that_cannot_be_written_is_told_before_any_work(tmp_path):
    """It used to be tried when all was answered, and everything was lost."""
    source = write_lines(tmp_path / "q.jsonl", {"question": "How high is the rent?"})
    for output, said in ((tmp_path, "is a folder"), (tmp_path / "no" / "out", "can't be written")):
        commands = [("retrieve", source, output), ("batch", source, output), ("questions", output)]
        commands += [("eval", source, option, output) for option in ("--save", "--details")]
        for command in commands:
            done = run("rag", *command, "--kb", tmp_path / "none", code=1)
            assert said in done.stderr and "Traceback" not in done.stderr, command
    assert [path.name for path in tmp_path.iterdir()] == ["q.jsonl"]


def test_questions_written_before_are_kept_unless_forced(base, tmp_path):
    """A file looked through by hand used to be replaced without a word."""
    own = write_lines(tmp_path / "q.jsonl", {"question": "Mended by hand?"})
    done = run("rag", "questions", own, "--kb", base, code=1)
    assert "--force" in done.stderr and "Mended by hand?" in own.read_text()
    run("rag", "questions", own, "--kb", base, "--force")
    assert "Mended by hand?" not in own.read_text()


def test_half_a_character_is_a_clear_error(base, tmp_path):
    (tmp_path / "q.jsonl").write_text('{"question": "What is \\ud83d?"}\n')
    for command in ("retrieve", "batch", "eval"):
        target = () if command == "eval" else (tmp_path / "out.jsonl",)
        done = run("rag", command, tmp_path / "q.jsonl", *target, "--kb", base, code=1)
        assert "line 1 holds half a character" in done.stderr and "Traceback" not in done.stderr
    asked = subprocess.run([sys.executable, "-m", "rag", "ask", b"How high is the r\xe9nt?", "--kb", str(base)],
                           capture_output=True, timeout=120)
    assert asked.returncode == 1 and b"holds half a character" in asked.stderr and b"Traceback" not in asked.stderr


def test_a_damaged_database_is_one_clear_line(base, tmp_path):
    file = base / "knowledge.sqlite"
    whole = file.read_bytes()
    file.write_bytes(whole[:4096] + b"\x5a" * (len(whole) - 4096))
    source = write_lines(tmp_path / "q.jsonl", {"question": "How high is the rent?"})
    for command in (("retrieve", source, tmp_path / "out.jsonl"), ("doctor",), ("ask", "How high is the rent?")):
        done = run("rag", *command, "--kb", base, code=1)
        assert "Restore it from a copy" in done.stderr and "Traceback" not in done.stderr, command


def test_files_that_questions_name_and_the_base_lacks_are_told(base, capsys):
    """They used to count as not found without a word."""
    store = KnowledgeBase.open(base)
    lines = [{"question": "q", "path": path} for path in ("lease.md", "gone.md", "gone.md", "pets.md")]
    questions = [EvalQuestion.parse(line, 1) for line in lines]
    assert _with_known_paths(questions, store) == questions
    assert "1 of 3 files that the questions name are not in this knowledge base" in capsys.readouterr().err
    with pytest.raises(InputError, match="no file that the questions name is in this knowledge base: gone.md. A path"):
        _with_known_paths(questions[1:3], store)


def test_calibrate_refuses_a_store_whose_threshold_nothing_would_read(base):
    done = run("rag", "calibrate", "--kb", base, "--store", "milvus", "--milvus-uri", "kb.db", code=1)
    assert "store is 'milvus'" in done.stderr


def test_what_eval_measured_is_written_though_nobody_reads_its_figures(base, tmp_path):
    """`rag eval --details FILE | head -1` wrote no details: the closed pipe came first."""
    source = write_lines(tmp_path / "q.jsonl", {"question": "How high is the rent?", "path": "lease.md"})
    command = [sys.executable, "-u", "-m", "rag", "eval", str(source), "--details", "d.jsonl", "--save", "s.json", "--kb", str(base)]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                          env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}) as process:
        process.stdout.close()
        process.wait(timeout=120)
    assert (tmp_path / "d.jsonl").read_text(encoding="utf-8").count("\n") == 1
    assert json.loads((tmp_path / "s.json").read_text(encoding="utf-8"))["summary"]["n"] == 1
