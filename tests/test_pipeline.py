"""Question to answer, with a scripted model in place of a big one and the real embedder."""

from dataclasses import replace

import pytest
from fakes import ScriptedGenerator, base_of

from rag import Rag, Settings
from rag.confidence import Calibration
from rag.document import Chunk, Document, Page
from rag.embedder import load_embedder
from rag.errors import InputError, KnowledgeBaseError
from rag.filter import Filter
from rag.knowledge import FileRecord, KnowledgeBase
from rag.language import REFUSAL

TEXTS = {
    "lease.txt": "The lease of the flat in Harbour Street began on 3 May 2021. The monthly rent is 1,250 "
    "euros. The deposit amounts to three months of rent.",
    "boiler.txt": "The boiler in the cellar is serviced every October. Its pressure must stay above 1.2 bar. "
    "Call the engineer when the red lamp blinks.",
    "合同.txt": "甲方应于每月五日前向乙方支付工资。试用期为三个月。合同自二〇二二年一月一日起生效。",
    "pets.txt": "Cats may be kept in the flat. Dogs need the written consent of the owner.",
}
CERTAIN = Calibration(bias=0.0, logprob=10.0, support=0.0, threshold=0.2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return base_of(tmp_path_factory.mktemp("kb"), TEXTS, load_embedder("bundled")).folder


def rag_with(folder, *texts, calibration=None, **options):
    rag = Rag.open(settings=Settings(kb=str(folder)))
    generator = ScriptedGenerator(*texts, **options)
    rag.use_generator(generator, calibration)
    return rag, generator


def test_an_answer_cites_the_sentence_it_comes_from(folder):
    rag, _ = rag_with(folder, "The monthly rent is 1,250 euros.")
    answer = rag.ask("How much is the monthly rent of the flat?")
    assert answer.kind == "generated" and answer.text == "The monthly rent is 1,250 euros [1]."
    (citation,) = answer.citations
    assert citation.path == "lease.txt"
    assert TEXTS["lease.txt"][citation.start : citation.end] == citation.quote == "The monthly rent is 1,250 euros."
    assert answer.hits[0].chunk.path == "lease.txt"


def test_a_stream_ends_with_the_answer_and_its_pieces_are_the_text(folder):
    rag, _ = rag_with(folder, "The monthly rent is 1,250 euros.")
    *pieces, last = rag.stream("How much is the monthly rent of the flat?")
    assert "".join(pieces) == "The monthly rent is 1,250 euros."
    assert last.text == "The monthly rent is 1,250 euros [1]."


@pytest.mark.parametrize(
    ("question", "language"),
    [("Who won the football world cup in Brazil?", "en"), ("太阳系最大的行星叫什么名字？", "zh")],
)
def test_nothing_is_generated_where_nothing_supports_an_answer(folder, question, language):
    rag, generator = rag_with(folder)
    answer = rag.ask(question)
    assert answer.refused and answer.text == REFUSAL[language]
    assert generator.prompts == []
    assert answer.citations == ()


def test_the_words_a_model_refuses_with_become_a_refusal(folder):
    rag, _ = rag_with(folder, REFUSAL["en"])
    assert rag.ask("How much is the monthly rent of the flat?").refused


def test_a_small_model_that_is_unsure_is_replaced_by_a_quotation(folder):
    rag, _ = rag_with(folder, "Dogs pay rent.", calibration=CERTAIN, logprob=-3.0)
    answer = rag.ask("How much is the monthly rent of the flat?")
    assert answer.kind == "quoted"
    assert "The monthly rent is 1,250 euros." in answer.citations[0].quote
    assert "1,250 euros" in answer.text and "[1]" in answer.text


def test_a_small_model_that_is_sure_but_unsupported_is_replaced_too(folder):
    rag, _ = rag_with(folder, "It is 999 pounds.", calibration=CERTAIN, logprob=-0.01)
    assert rag.ask("How much is the monthly rent of the flat?").kind == "quoted"


@pytest.mark.parametrize(("support", "doubtful"), [(0.15, True), (0.95, False)])
def test_a_quotation_says_where_the_passages_may_not_answer(folder, monkeypatch, support, doubtful):
    monkeypatch.setattr("rag.pipeline.support_probability", lambda *_: (support, 0.1))
    rag, _ = rag_with(folder, "Nonsense.", calibration=Calibration(-9.0, 0.0, 0.0, 0.5))
    answer = rag.ask("How much is the monthly rent of the flat?")
    assert answer.kind == "quoted" and answer.doubtful == answer.to_dict()["doubtful"] == doubtful


def test_words_of_a_model_held_back_never_show_in_the_stream(folder):
    rag, _ = rag_with(folder, "Dogs pay rent.", calibration=CERTAIN, logprob=-3.0)
    pieces = [piece for piece in rag.stream("How much is the monthly rent of the flat?") if isinstance(piece, str)]
    assert "Dogs" not in "".join(pieces)


def test_an_unsupported_sentence_is_reported(folder):
    rag, _ = rag_with(folder, "The monthly rent is 1,250 euros [1]. Heating is included in it [1].")
    answer = rag.ask("How much is the monthly rent of the flat?")
    assert answer.unsupported == ("Heating is included in it.",)


def test_a_follow_up_is_searched_with_the_question_before(folder):
    rag, generator = rag_with(folder, "It amounts to three months of rent.")
    history = [("How much is the monthly rent of the flat?", "The monthly rent is 1,250 euros [1].")]
    answer = rag.ask("And the deposit?", history=history)
    assert answer.hits[0].chunk.path == "lease.txt"
    assert [message.role for message in generator.prompts[0].messages] == ["system", "user", "assistant", "user"]


def test_a_batch_gives_the_answers_of_single_questions_in_order(folder):
    questions = ["试用期是多长时间？", "Who won the football world cup in Brazil?", "What pressure must the boiler keep?"]
    texts = ["试用期为三个月。", "Its pressure must stay above 1.2 bar."]
    batch = rag_with(folder, *texts)[0].batch(questions)
    rag, _ = rag_with(folder, *texts)
    single = [rag.ask(question) for question in questions]
    assert [answer.text for answer in batch] == [answer.text for answer in single]
    assert [answer.kind for answer in batch] == ["generated", "refused", "generated"]


def test_the_page_of_a_hit_is_where_the_best_sentence_stands(tmp_path):
    embedder = load_embedder("bundled")
    text = "The first page speaks of gardens and of rain.\nThe second page says the fee is 40 euros."
    cut = text.index("\n") + 1
    base = KnowledgeBase.create(tmp_path)
    chunk = Chunk("a.pdf", text, 0, len(text), page=1, last_page=2)
    with base.writing():
        base.bind_embedder(embedder)
        base.put_file(
            FileRecord("a.pdf", "h", 1, "ok"),
            Document("a.pdf", text, "pdf", pages=(Page(1, 0, cut), Page(2, cut, len(text)))), [chunk],
            embedder.embed_passages([text]),
        )
    rag = Rag.open(tmp_path)
    assert rag.retrieve("How high is the fee in euros?")[0].page == 2
    assert rag.retrieve("What is said of gardens and rain?")[0].page == 1


def test_an_empty_question_and_an_empty_base_are_told_apart(folder, tmp_path):
    rag, _ = rag_with(folder)
    with pytest.raises(InputError, match="empty"):
        rag.ask("  ")
    with pytest.raises(KnowledgeBaseError, match="python -m ingest"):
        Rag.open(tmp_path / "none")
    KnowledgeBase.create(tmp_path / "kb")
    assert Rag.open(tmp_path / "kb").ask("Anything?").refused


def test_half_a_character_in_question_or_history_is_an_error_that_says_so(folder):
    rag, _ = rag_with(folder)
    for question, history in (("What is \ud83d?", ()), ("And then?", [("What is \ud83d?", "Nothing.")])):
        with pytest.raises(InputError, match="half a character"):
            rag.ask(question, history=history)


def test_an_answer_holds_the_prompt_and_the_memory_it_was_made_with(folder):
    rag, generator = rag_with(folder, "The monthly rent is 1,250 euros.", "The monthly rent is 1,250 euros.")
    answer = rag.ask("How much is the monthly rent of the flat?")
    assert answer.prompt == generator.prompt_text(generator.prompts[0])
    assert "The monthly rent is 1,250 euros" in answer.prompt
    assert (answer.stats.model_bytes, answer.stats.cache_bytes) == (3 * 2**20, 2 * 2**20)
    assert "prompt" not in answer.to_dict()
    assert answer.to_dict(with_prompt=True)["prompt"] == answer.prompt
    (batched,) = rag.batch(["How much is the monthly rent of the flat?"])
    assert batched.prompt == answer.prompt


def test_strict_shows_only_what_is_supported_and_refuses_where_nothing_is(folder):
    rag = Rag.open(settings=Settings(kb=str(folder), citations="strict"))
    rag.use_generator(ScriptedGenerator(
        "The monthly rent is 1,250 euros. Elephants never forget their keepers.", "Elephants never forget their keepers.",
    ))
    answer = rag.ask("How much is the monthly rent of the flat?")
    assert answer.text == "The monthly rent is 1,250 euros [1]."
    assert answer.unsupported == ("Elephants never forget their keepers.",)
    assert rag.ask("How much is the monthly rent of the flat?").refused


@pytest.mark.parametrize(
    "written",
    [
        "The monthly rent is 1,250 euros. Elephants never forget their keepers. The deposit amounts to three months of rent.",
        "Elephants never forget their keepers [1].",
        "Sure! Elephants never forget their keepers.",
        REFUSAL["en"] + " The monthly rent is 1,250 euros.",
    ],
)
def test_a_strict_stream_is_the_finished_answer_and_shows_nothing_else(folder, written):
    rag = Rag.open(settings=Settings(kb=str(folder), citations="strict"))
    rag.use_generator(ScriptedGenerator(written))
    *pieces, answer = rag.stream("How much is the monthly rent of the flat?")
    assert "".join(pieces) == answer.text and "Elephants" not in answer.text
    if written.startswith("The monthly"):
        assert pieces[0] == "The monthly rent is 1,250 euros [1]."  # long before the end


def test_a_question_can_be_kept_to_a_part_of_the_base(folder):
    question = "How much is the monthly rent of the flat?"
    elsewhere = Filter(file=["boiler.txt", "pets.txt"])
    rag, generator = rag_with(folder, "The monthly rent is 1,250 euros.", "Dogs need consent.")
    assert {hit.chunk.path for hit in rag.retrieve(question, 9, where=elsewhere)} == {"boiler.txt", "pets.txt"}
    assert rag.ask(question, where=Filter(under="lease.txt")).citations[0].path == "lease.txt"
    for answer in (rag.ask(question, where=elsewhere), rag.batch([question], where=elsewhere)[0]):
        assert answer.refused and "lease.txt" not in {hit.chunk.path for hit in answer.hits}
    with pytest.raises(InputError, match=r"none of the 4 files .* under nowhere\. There is: folders \(no folder\) \(4\); types txt \(4\)"):
        rag.ask(question, where=Filter(under="nowhere"))


def test_an_answer_says_where_its_tokens_were_only_estimated(folder):
    rag, generator = rag_with(folder, "The monthly rent is 1,250 euros.")
    result = generator._result
    generator._result = lambda *given: replace(result(*given), counts_estimated=True)
    assert rag.ask("How much is the monthly rent of the flat?").to_dict()["stats"]["counts_estimated"] is True
