"""Fit what ranks passages and sentences and what refuses: `python -m rag.bundled.fit_ranking`.

Uses only questions whose passages the bundled embedder was not trained on. Writes ranking.json
(passage weights), evidence.json (sentence weights; support weights with the refusal threshold).
Passage and sentence weights minimise the listwise softmax loss (ListNet, Cao et al., 2007);
support is a logistic regression on questions whose gold passage is there or has been taken away.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from rag import evidence, ranking
from rag.answer import Hit
from rag.bundled.heaviest_word import about_another, heaviest_word
from rag.bundled.made_questions import made_across_languages, made_by_patterns
from rag.bundled.training_data import held_out, is_measured, read_rows
from rag.document import Chunk, Document
from rag.embedder import Embedder, load_embedder
from rag.knowledge import FileRecord, KnowledgeBase, StoredChunk
from rag.language import Language, detect_language
from rag.quality.rewording import reword
from rag.retriever import CANDIDATES, Retriever, WeighedQuestion

HERE = Path(__file__).parent
LANGUAGES: tuple[Language, ...] = ("en", "zh")
PASSAGES_GIVEN = 4
_PASSAGES_ACROSS = 1500
_ELSEWHERE = 400
# People ask their documents mostly what stands in them: five questions of six.
ANSWERABLE_PRIOR = 5.0
_SUPPORT_SIGNS = {"bias": 2, "terms": 2, "no_kind": -1}
_REWORDED = (0.25, 0.4, 0.55)  # share of a question's words that give way, drawn for each


@dataclass(frozen=True, slots=True)
class FitQuestion:
    question: str
    passage: str
    answer: str | None  # a span of the passage


def questions_of(data: Path, language: Language) -> tuple[list[FitQuestion], list[str]]:
    """Held-out questions, and every passage of the collection they are asked to."""
    answers = {
        (row["question"], row["context"]): str(row["answer"])
        for row in read_rows(data / f"reading_comprehension.{language}.jsonl.xz")
        if str(row["answer"]) in row["context"]
    }
    found: list[FitQuestion] = []
    passages: dict[str, None] = {}
    for row in read_rows(data / f"retrieval_pairs.{language}.jsonl.xz"):
        if row["src"] == "medquad":
            continue
        passages[row["positive"]] = None
        if held_out(row["positive"], language) and not is_measured(row["query"]):
            answer = answers.get((row["query"], row["positive"]))
            found.append(FitQuestion(row["query"], row["positive"], answer))
    return found, list(passages)


def questions_across(data: Path, rng: random.Random) -> dict[Language, tuple[list[FitQuestion], list[str]]]:
    """For each language of questions: held-out questions about translated passages in the other one,
    and a collection of such passages with theirs among them."""
    asked = [FitQuestion(*row) for row in made_across_languages(data, rng, fitting=True)]
    others = [text for _, text, _ in made_across_languages(data, rng)]
    found: dict[Language, tuple[list[FitQuestion], list[str]]] = {}
    for language in LANGUAGES:
        mine = [item for item in asked if detect_language(item.question) == language]
        theirs = [text for text in others if detect_language(text) != language]
        found[language] = mine, [*(item.passage for item in mine), *theirs[:_PASSAGES_ACROSS]]
    return found


def questions_elsewhere(data: Path, language: Language, rng: random.Random) -> list[FitQuestion]:
    """Questions about manuals and medicine, which no passage of the collections fitted on is about."""
    asked = [question for question, _, _ in made_by_patterns(data, rng) if detect_language(question) == language]
    if language == "en":
        rows = read_rows(data / "retrieval_pairs.en.jsonl.xz")
        asked += [row["query"] for row in rows if row["src"] == "medquad" and held_out(row["positive"], "en")]
    return [FitQuestion(question, "", None) for question in rng.sample(asked, min(len(asked), _ELSEWHERE))]


def titles_of(data: Path) -> dict[str, str]:
    """Passage -> title of the English article it stands in."""
    titles: dict[str, str] = {}
    for row in read_rows(data / "text.en.squad_train_articles.jsonl.xz"):
        for paragraph in row["text"].split("\n"):
            titles[paragraph.strip()] = row["title"].replace("_", " ")
    return titles


def in_other_words(item: FitQuestion, rng: random.Random) -> FitQuestion:
    """The question with some of its words replaced by near ones that its passage does not use."""
    return replace(item, question=reword(item.question, item.passage, rng.choice(_REWORDED), rng))


def of_another_subject(items: Sequence[Searched], rng: random.Random) -> list[FitQuestion]:
    """Every second question with its heaviest word replaced by another one's: nothing answers it."""
    places = [heaviest_word(item.question.question, item.weighed.weights) for item in items]
    swapped = []
    for at in range(0, len(items), 2):
        other = rng.randrange(len(items))
        mine, word = items[at].question, items[other].question.question[slice(*places[other])]
        if question := about_another(mine.question, places[at], word, mine.passage):
            swapped.append(replace(mine, question=question))
    return swapped


def build_base(
    passages: Sequence[str], titles: dict[str, str], embedder: Embedder, folder: Path
) -> KnowledgeBase:
    """A knowledge base with each passage as one chunk, a hundred to a file.

    Only half of the passages know their title, as in real folders.
    """
    base = KnowledgeBase.create(folder)
    with base.writing():
        base.bind_embedder(embedder)
        for begin in range(0, len(passages), 100):
            path = "text" + "x" * (begin // 100)  # a name without a word of any question
            chunks, position = [], 0
            for number, text in enumerate(passages[begin : begin + 100]):
                title = titles.get(text.strip(), "") if number % 2 else ""
                chunks.append(Chunk(path, text, position, position + len(text), title=title))
                position += len(text) + 10  # a gap, so that no two are neighbours
            base.put_file(
                FileRecord(path, "", 0, "ok"), Document(path, "", "txt"), chunks,
                embedder.embed_passages([chunk.indexed_text for chunk in chunks]),
            )
        base.publish()
    return base


@dataclass(slots=True)
class Searched:
    question: FitQuestion
    weighed: WeighedQuestion
    stored: list[StoredChunk]
    features: np.ndarray  # (candidates, ranking.FEATURES)
    gold: int | None  # which candidate is the gold passage
    scores: dict[int, float] = field(default_factory=dict)  # of both stages, best first
    known: dict[tuple[int, ...], evidence.SentenceFeatures] = field(default_factory=dict)

    def read(self, order: tuple[int, ...], hits: Sequence[Hit]) -> evidence.SentenceFeatures:
        """The sentences of these candidates, kept, as two fits look at them."""
        if order not in self.known:
            weighed = self.weighed
            self.known[order] = evidence.sentence_features(weighed.text, weighed.terms, weighed.weights, hits)
        return self.known[order]


def search(retriever: Retriever, questions: Sequence[FitQuestion]) -> Iterator[Searched]:
    for item in questions:
        vector = retriever.embedder.embed_questions([item.question])[0]
        with retriever.base.snapshot():
            dense = retriever.base.search_dense(vector[None], CANDIDATES)[0]
            weighed = retriever.weigh(item.question)
            stored, features = retriever._candidates(weighed, vector, dense, CANDIDATES)
        gold = next((at for at, one in enumerate(stored) if one.chunk.text == item.passage), None)
        yield Searched(item, weighed, stored, features, gold)


def fit_listwise(
    lists: Sequence[tuple[np.ndarray, np.ndarray]], names: Sequence[str], *,
    signs: dict[str, int], decay: float = 1e-3,
) -> dict[str, float]:
    """Weights that put the right ones (bool (n,)) of each list of features (n, f) first.

    `signs` holds +1 or -1 where a weight may only have that sign, 0 where it stays zero.
    """
    stacked = np.concatenate([features for features, _ in lists])
    scale = stacked.std(axis=0) + 1e-9
    # What never varies in these questions can't be fitted and stays at zero.
    signs = signs | {name: 0 for name, constant in zip(names, stacked.std(axis=0) == 0) if constant}
    free = torch.full((len(names),), -1.0, dtype=torch.float64, requires_grad=True)
    sign = torch.tensor([signs.get(name, 2) for name in names], dtype=torch.float64)
    longest = max(len(right) for _, right in lists)
    features = torch.zeros(len(lists), longest, len(names), dtype=torch.float64)
    valid = torch.zeros(len(lists), longest, dtype=torch.bool)
    right = torch.zeros(len(lists), longest, dtype=torch.bool)
    for at, (rows, correct) in enumerate(lists):
        features[at, : len(rows)] = torch.from_numpy(rows / scale)
        valid[at, : len(rows)] = True
        right[at, : len(rows)] = torch.from_numpy(correct)
    optimizer = torch.optim.LBFGS([free], max_iter=300, line_search_fn="strong_wolfe")

    def signed() -> torch.Tensor:
        return torch.where(sign == 2, free + 1.0, sign * torch.nn.functional.softplus(free))

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        weights = signed()
        scores = (features @ weights).masked_fill(~valid, -1e9)
        won = scores.masked_fill(~right, -1e9)
        value = (scores.logsumexp(1) - won.logsumexp(1)).mean() + decay * (weights**2).sum()
        value.backward()
        return value

    optimizer.step(loss)
    fitted = signed().detach().numpy() / scale
    return {name: round(float(value), 5) for name, value in zip(names, fitted, strict=True)}


def first_right(lists: Sequence[tuple[np.ndarray, np.ndarray]], weights: dict[str, float]) -> float:
    """Share of lists whose best-scored row is right."""
    vector = np.array(list(weights.values()))
    return float(np.mean([right[np.argmax(rows @ vector)] for rows, right in lists]))


def fit_support(
    rows: np.ndarray, labels: np.ndarray, *, lenient: bool = False
) -> tuple[dict[str, float], float, float]:
    """Logistic weights, the threshold that refuses most rightly, and the one below which to doubt.

    Each weight has the sign its meaning gives it: folders differ from the questions fitted on, and
    two features that cancel out here would not cancel there. For refusing, a question that has an
    answer counts ANSWERABLE_PRIOR times one that has none; for doubting, both count the same.
    """
    names = evidence.SUPPORT_FEATURES
    scale = rows.std(axis=0) + 1e-9
    scale[0] = 1.0
    x, y = torch.from_numpy(rows / scale), torch.from_numpy(labels.astype(np.float64))
    sign = torch.tensor([_SUPPORT_SIGNS.get(name, 1) for name in names], dtype=torch.float64)
    free = torch.zeros(rows.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([free], max_iter=400, line_search_fn="strong_wolfe")

    def signed() -> torch.Tensor:
        return torch.where(sign == 2, free, sign * torch.nn.functional.softplus(free - 2.0))

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        weights = signed()
        value = torch.nn.functional.binary_cross_entropy_with_logits(x @ weights, y)
        value = value + 1e-3 * (weights[1:] ** 2).sum()
        value.backward()
        return value

    optimizer.step(loss)
    fitted = signed().detach().numpy() / scale
    probability = 1 / (1 + np.exp(-(rows @ fitted)))
    weights = {name: round(float(weight), 5) for name, weight in zip(names, fitted, strict=True)}
    refuse, doubt = (
        _best_threshold(probability, labels, prior, lenient=lenient) for prior in (ANSWERABLE_PRIOR, 1.0)
    )
    return weights, refuse, doubt


def _best_threshold(
    probability: np.ndarray, labels: np.ndarray, prior: float, *, lenient: bool = False
) -> float:
    """The threshold that decides rightly most often.

    `lenient`: the least one that does so within a standard error (Breiman et al., 1984), where the
    questions fitted on are nearer to their passages than people's are.
    """
    candidates = np.linspace(0.02, 0.95, 94)
    kept = np.array([(probability[labels] >= at).mean() for at in candidates])
    refused = np.array([(probability[~labels] < at).mean() for at in candidates])
    right = prior * kept + refused
    best = int(np.argmax(right))
    error = np.sqrt(
        prior**2 * kept[best] * (1 - kept[best]) / labels.sum()
        + refused[best] * (1 - refused[best]) / (~labels).sum()
    )
    return float(candidates[int(np.argmax(right >= right[best] - (error if lenient else 0.0)))])


def _close_lists(
    items: Sequence[Searched], weights: dict[str, float]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Features of the second stage, where the first left the gold passage among the best."""
    lists = []
    for item in items:
        front, features = _close(item, weights)
        if item.gold in front:
            lists.append((features, np.array([at == item.gold for at in front])))
    return lists


def _close(item: Searched, weights: dict[str, float]) -> tuple[list[int], np.ndarray]:
    first = item.features @ np.array(list(weights.values()))
    best = [int(at) for at in np.argsort(-first)]
    front = best[: ranking.count_close([item.stored[at].chunk.text for at in best])]
    texts = [item.stored[at].chunk.text for at in front]
    return front, ranking.close_features(item.question.question, first[front], texts)


def _rank_all(items: Sequence[Searched], weights: dict[str, float], close: dict[str, float]) -> None:
    """Set `scores` as the retriever would."""
    vector = np.array(list(close.values()))
    for item in items:
        front, features = _close(item, weights)
        scored = sorted(zip((features @ vector).tolist(), front, strict=True), reverse=True)
        item.scores = {at: score for score, at in scored}


def _hits(item: Searched, *, without_gold: bool) -> tuple[list[Hit], list[int]]:
    order = [at for at in item.scores if not (without_gold and at == item.gold)][:PASSAGES_GIVEN]
    return [Hit(item.stored[at].chunk, item.scores[at]) for at in order], order


def _sentence_lists(
    items: Sequence[Searched]
) -> list[tuple[np.ndarray, np.ndarray]]:
    lists = []
    for item in items:
        if item.gold is None or not item.question.answer:
            continue
        hits, order = _hits(item, without_gold=False)
        if item.gold not in order:
            continue
        found = item.read(tuple(order), hits)
        gold = order.index(item.gold) + 1
        answer = item.question.answer
        right = np.array([s.hit_number == gold and (answer in s.text or s.text in answer) for s in found.sentences])
        if right.any():
            lists.append((found.rows, right))
    return lists


def _support_rows(
    items: Sequence[Searched], sentence_weights: np.ndarray, *, swapped: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Support features and whether there is an answer. `swapped`: there is none, whatever is found."""
    rows, labels = [], []
    for item in items:
        if item.gold is None and not swapped:
            continue
        for without_gold in (False,) if swapped else (False, True):
            hits, order = _hits(item, without_gold=without_gold)
            if not hits or not (without_gold or swapped or item.gold in order):
                continue
            found = item.read(tuple(order), hits)
            if not found.sentences:
                continue
            best = found.rows[int(np.argmax(found.rows @ sentence_weights))]
            rows.append(evidence.support_features(
                item.weighed.terms, evidence=evidence.RankedEvidence((), best, found.absent), hit=item.features[order].max(axis=0),
                pool=np.median(item.features, axis=0),
            ))
            labels.append(not without_gold and not swapped)
    return np.array(rows), np.array(labels)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the .jsonl.xz files")
    parser.add_argument("--embedder", default="bundled")
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--questions", type=int, default=1300, help="most questions of a language")
    parser.add_argument("--passages", type=int, default=4000, help="most passages of a language")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    embedder = load_embedder(options.embedder)
    fit_parts: dict[Language, list[Searched]] = {}
    test_parts: dict[Language, list[Searched]] = {}
    reworded: dict[Language, list[Searched]] = {}
    swapped: dict[Language, list[Searched]] = {}
    far_test: dict[Language, list[Searched]] = {}
    work = Path(tempfile.mkdtemp(prefix="fit-ranking-"))
    try:
        for language in LANGUAGES:
            questions, passages = questions_of(options.data, language)
            rng.shuffle(questions)
            questions = questions[: options.questions]
            asked = dict.fromkeys(item.passage for item in questions)
            others = [text for text in passages if text not in asked]
            room = max(0, min(options.passages - len(asked), len(others)))
            mixed = [*asked, *rng.sample(others, room)]
            rng.shuffle(mixed)
            titles = titles_of(options.data) if language == "en" else {}
            base = build_base(mixed, titles, embedder, work / language)
            retriever = Retriever(base, embedder)
            items = list(search(retriever, questions))
            cut = int(len(items) * 0.7)
            fit_parts[language], test_parts[language] = items[:cut], items[cut:]
            swapped[language] = list(search(retriever, of_another_subject(items[:cut], rng)))
            reworded[language] = list(search(retriever, [in_other_words(item, rng) for item in questions[:cut]]))
            elsewhere = list(search(retriever, questions_elsewhere(options.data, language, rng)))
            half = len(elsewhere) * 7 // 10
            swapped[language] += elsewhere[:half]
            far_test[language] = elsewhere[half:]
            print(f"{language}: {len(items)} questions searched", flush=True)
        across: dict[Language, list[Searched]] = {}
        for language, (questions, passages) in questions_across(options.data, rng).items():
            base = build_base(list(dict.fromkeys(passages)), {}, embedder, work / f"across-{language}")
            across[language] = list(search(Retriever(base, embedder), rng.sample(questions, len(questions))))
            print(f"{language}: {len(questions)} questions about the other language searched", flush=True)
        _fit_and_write(Parts(fit_parts, reworded, swapped, test_parts, far_test, across), options.out)
    finally:
        shutil.rmtree(work)


@dataclass(frozen=True, slots=True)
class Parts:
    """Searched questions by their language: to fit on; the same in other words; about another subject,
    which nothing answers; to measure on, with and without an answer; and, of translations, about
    passages in the other language."""

    fit: dict[Language, list[Searched]]
    reworded: dict[Language, list[Searched]]
    swapped: dict[Language, list[Searched]]
    test: dict[Language, list[Searched]]
    far_test: dict[Language, list[Searched]]
    across: dict[Language, list[Searched]]


def _fit_and_write(parts: Parts, out: Path) -> None:
    """Fit on 70% of the questions, measure on the rest.

    Passage weights are fitted for each language; sentence and support weights on both together, and
    on the same questions in other words too: who wrote these questions had the passage before them.
    Support also sees questions that nothing answers: of which one word has become another's, and about
    what the collection does not speak of.
    """
    passage = {
        language: fit_listwise(_passage_lists(items), ranking.FEATURES, signs=_PASSAGE_SIGNS)
        for language, items in parts.fit.items()
    }
    # No Chinese collection here has titles to fit on.
    share = passage["en"]["place"] / passage["en"]["coverage"]
    passage["zh"]["place"] = round(share * passage["zh"]["coverage"], 5)
    close = {
        language: fit_listwise(
            _close_lists(items, passage[language]), ranking.CLOSE_FEATURES,
            signs=dict.fromkeys(ranking.CLOSE_FEATURES, 1),
        )
        for language, items in parts.fit.items()
    }
    for group in (parts.fit, parts.reworded, parts.swapped, parts.test, parts.far_test, parts.across):
        for language, items in group.items():
            _rank_all(items, passage[language], close[language])
    print("passages fitted", flush=True)
    own, threshold, doubt = fit_evidence([*parts.fit.values(), *parts.reworded.values()], parts.swapped.values())
    halves = [(items[: int(len(items) * 0.7)], items[int(len(items) * 0.7) :]) for items in parts.across.values()]
    across, across_threshold, _ = fit_evidence([items for items, _ in halves], (), lenient=True)
    # One threshold serves both: the probabilities across languages are moved to where it is right for them.
    across.support["bias"] = round(across.support["bias"] + _logit(threshold) - _logit(across_threshold), 5)
    figures = {
        language: _measure(items, passage[language], own, threshold, parts.far_test[language])
        for language, items in parts.test.items()
    }
    across_figures = {
        language: _measure(items, passage[language], across, threshold)
        for language, (_, items) in zip(parts.across, halves, strict=True)
    }
    _write(out / "ranking.json", {"weights": passage, "close_weights": close, "figures": figures,
                                  "figures_across": across_figures})
    _write(out / "evidence.json", {**asdict(own), "across": asdict(across), "threshold": round(threshold, 3),
                                   "doubt": round(doubt, 3)})
    print(json.dumps({"own": figures, "across": across_figures}, indent=1))


@dataclass(frozen=True, slots=True)
class EvidenceWeights:
    sentence: dict[str, float]
    support: dict[str, float]


def fit_evidence(
    groups: Sequence[Sequence[Searched]], swapped: Iterable[Sequence[Searched]], *, lenient: bool = False
) -> tuple[EvidenceWeights, float, float]:
    """Sentence and support weights on ranked questions, and the thresholds of `fit_support`."""
    sentence = fit_listwise(
        [row for items in groups for row in _sentence_lists(items)], evidence.FEATURES, signs=_SENTENCE_SIGNS
    )
    vector = np.array(list(sentence.values()))
    parts = [_support_rows(items, vector) for items in groups]
    parts += [_support_rows(items, vector, swapped=True) for items in swapped]
    support, threshold, doubt = fit_support(
        np.concatenate([rows for rows, _ in parts]), np.concatenate([labels for _, labels in parts]),
        lenient=lenient,
    )
    return EvidenceWeights(sentence, support), threshold, doubt


def _logit(share: float) -> float:
    return math.log(share / (1 - share))


def _passage_lists(items: Sequence[Searched]) -> list[tuple[np.ndarray, np.ndarray]]:
    return [
        (item.features, np.arange(len(item.stored)) == item.gold)
        for item in items if item.gold is not None
    ]


def _measure(
    items: Sequence[Searched], passage: dict[str, float], weights: EvidenceWeights, threshold: float,
    far: Sequence[Searched] = (),
) -> dict[str, float]:
    """Figures on questions that nothing was fitted on; `far` are about what is not there."""
    lists = _passage_lists(items)
    found = len(lists) / max(1, len(items))
    first = [next(iter(item.scores)) == item.gold for item in items]
    only = {name: dict.fromkeys(ranking.FEATURES, 0.0) | {name: 1.0} for name in ("bm25", "dense")}
    rows, labels = _support_rows(items, np.array(list(weights.sentence.values())))
    vectors = np.array(list(weights.sentence.values())), np.array(list(weights.support.values()))
    probability = 1 / (1 + np.exp(-(rows @ vectors[1])))
    far_rows, _ = _support_rows(far, vectors[0], swapped=True)
    far_said = 1 / (1 + np.exp(-(far_rows @ vectors[1]))) >= threshold if len(far_rows) else np.zeros(0)
    said = probability >= threshold
    above = probability[labels][:, None] > probability[~labels][None, :]
    return {
        "questions": len(items),
        "gold among candidates": round(found, 4),
        "hit@1": round(float(np.mean(first)), 4),
        "hit@1 first stage": round(first_right(lists, passage) * found, 4),
        "hit@1 bm25": round(first_right(lists, only["bm25"]) * found, 4),
        "hit@1 dense": round(first_right(lists, only["dense"]) * found, 4),
        "sentence@1": round(first_right(_sentence_lists(items), weights.sentence), 4),
        "support AUC": round(float(above.mean()), 4),
        "answerable kept": round(float(said[labels].mean()), 4),
        "unanswerable refused": round(float((~said[~labels]).mean()), 4),
        **({"of another subject refused": round(1 - float(far_said.mean()), 4)} if len(far_said) else {}),
    }


# The cosine itself stays out: its range is another one with every embedder.
_PASSAGE_SIGNS = dict.fromkeys(ranking.FEATURES, 1) | {"dense": 0}
_SENTENCE_SIGNS = {
    "coverage": 1, "context": 1, "soft": 1, "soft_context": 1, "dense": 1, "hit": 1, "pairs": 1,
    "number": 1, "no_number": -1, "time": 1, "no_time": -1, "name": 1, "no_name": -1, "reason": 1,
    "no_reason": -1, "question": -1, "place": 1, "digits_kept": 1, "read": 1, "key": 1,
}


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
