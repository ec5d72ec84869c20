"""A sentence -> questions that it answers, by patterns in both languages. No model is asked.

In Chinese the asked-for part is replaced where it stands ("每层有 32 个头" -> "每层有多少个头？");
in English the sentence is turned round ("The rent is 900 euros" -> "What is the rent?"). A pattern
that could go wrong is left out: a question less does no harm, a senseless one does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Set
from dataclasses import dataclass

from rag.language import detect_language
from rag.terms import HAN


@dataclass(frozen=True, slots=True)
class Draft:
    """A question with the part of its sentence that answers it. `start`, `end`: in the sentence."""

    kind: str  # "definition", "fact", "number", "time", "reason", "name"
    question: str
    start: int
    end: int


def drafts(sentence: str, *, heading: str | None = None, names: Set[str] = frozenset()) -> list[Draft]:
    """The questions that a sentence answers, at most one a pattern.

    `heading` stands for a pronoun that begins the sentence; `names` are the words that keep their
    capital letter inside a question.
    """
    opening = _OPENING.match(sentence)
    begin = opening.end() if opening else 0
    body = sentence[begin:].rstrip()
    if not 10 <= len(body) <= 260 or _UNUSABLE.search(body):
        return []
    language = detect_language(body)
    if body[-1] not in ("。！；;" if language == "zh" else ".!"):
        return []  # a heading, a table's cell, a line of a list that is no sentence
    body = body.rstrip("。！；;.!")
    found = _chinese(body, heading) if language == "zh" else _english(body, heading, names)
    seen: set[str] = set()
    kept = []
    for draft in found:
        question = _plain(draft.question)
        answer = body[draft.start : draft.end]
        if question in seen or not answer.strip() or _PRONOUN_ANSWER.match(answer):
            continue
        if not 6 <= len(question) <= 140:
            continue
        seen.add(question)
        kept.append(Draft(draft.kind, question, begin + draft.start, begin + draft.end))
    return kept


_OPENING = re.compile(
    r"\s*(?:[-*•·>]|\d{1,2}[.)、]|[（(]?[一二三四五六七八九十\d]{1,3}[)）、.]|第[一二三四五六七八九十百千零\d]+[条款章节])\s+"
    r"|\s*[（(][一二三四五六七八九十\d]{1,3}[)）]"
)
# Tables, formulas, code, links, and sentences that speak of a picture or of what stands elsewhere.
_UNUSABLE = re.compile(
    r"[|{}<>=×∑√→\\\n\t]|https?:|\w\(\)|\.\.\.|…|上[图表文]|下[图表文列]|如[图表]|\b(?:figure|table|above|below|following)\b"
    r"|以上|以下|前面|后面|上述", re.IGNORECASE,
)
_PRONOUN_ANSWER = re.compile(r"(?:it|this|that|they|them|so|not|no)$|[它他她这那其]", re.IGNORECASE)


def _plain(question: str) -> str:
    """Without Markdown's marks, blanks once."""
    return " ".join(re.sub(r"\*\*|__|`|（）|\(\)", "", question).split())


# Chinese

_HAN_RUN = rf"[{HAN}\w]"
# What a sentence that stands on its own doesn't begin with.
_ZH_LEANS = re.compile(
    r"它|他|她|牠|祂|这|后[赴来又再于任]|曾|现[被任为]|于|随[后即]|所[签有属]|仅|那|其|此|该|本[节章条款文合协公院校线路站市县区片书届]|我|你|您|咱|如果|假[如设]|若|要是|当|因|所以|于是|但|而|不过|可是|然|并|也|"
    r"还|又|再|就|只|更|反|另|同时|同样|例如|比如|譬如|即|换|总|首先|其次|最后|第[一二三四五六七八九十百千零\d]+[步点是，部条章款节]|"
    r"否则|除|虽|尽管|无论|不管|结果|原因|好处|坏处|目的|前者|后者|两者|二者|至|前[一两几]|后[一两几]|上[一面述]|下[一面述]|"
    r"有[时的些人]|没有|不是|不要|不能|不|请|应当|是|的|一[种个般旦方边些]"
)
_ZH_X = rf"(?P<x>《?{_HAN_RUN}[^，。；：！？、—\n]{{1,21}}?)"
# "是" as a part of another word, or behind an adverb.
_ZH_NO_COPULA = "但于可只还都总不也正凡要若或即便而算先却像更最既老仍才"
_ZH_IS = re.compile(rf"^{_ZH_X}(?<![{_ZH_NO_COPULA}])(?P<v>(?:就)?是(?:指)?|指的是|(?<![所被作别])指(?![定导示挥责派引出令使标向甲纹明数]))(?P<y>(?!：|否|不|的|基于|由于|根据|按照|在|从|通过|为了|多少|什么|怎|哪|[谁为]).{{4,80}})$")
_ZH_SITU: tuple[tuple[str, re.Pattern[str], str], ...] = tuple(
    (kind, re.compile(rf"^{_ZH_X}(?P<v>{verb})(?P<y>[^，；：]{{2,40}})(?<!时)(?=[，；：]|$)"), tail) for kind, verb, tail in (
        ("fact", r"取决于", "取决于什么？"),
        ("fact", r"(?<![适使作应专])(?:用于|用来)", "用来做什么？"),
        ("fact", r"(?<![部成])分[为成](?![别员])(?=[^，；：]*(?:、|和|与|种|类|部分|档|步|阶段|层|级))", "分为哪几种？"),
        ("fact", r"(?:包括|包含)", "包括什么？"),
        ("fact", r"等于", "等于什么？"),
        ("name", r"(?:称为|叫做|叫作|称作|被称为)", "称为什么？"),
    )
)
_ZH_WHY = (
    re.compile(r"^(?P<x>(?!因为|由于|之所以).{5,36}?)，?(?:这)?(?:就)?是?因为(?P<y>.{6,90})$"),
    re.compile(r"^(?:之所以)(?P<x>.{4,36}?)，是?因为(?P<y>.{6,90})$"),
    re.compile(r"^(?:因为|由于)(?P<y>[^，]{5,50})，(?:所以|因此|因而)?(?P<x>[^，]{5,36})$"),
)
_ZH_WHO = re.compile(
    r"^(?P<x>.{2,30}?)由(?P<y>(?:(?!担任|共同|依法|自行|分别)[^，。、的由]){2,14}?)(?:共同|依法|自行|分别)?"
    r"(?P<v>提出|发明|创立|创建|编写|设计|开发|制定|负责|承担|支付|决定|管理|审批)(?P<z>(?![人权费者书])[^，。；]{0,12}?)的?(?=[，。；]|$)"
)
_MEASURE = (
    r"个月|周岁|小时|分钟|毫秒|微秒|公里|千米|毫米|厘米|公斤|千克|平方米|人民币|美元|欧元|词元|参数|字节|工作日|"
    r"[个种年月天日周秒米克吨元块页章层维位次倍人名条项款本篇份张台辆家级届岁字词步轮卷套组枚座间户成号]|"
    r"GB|MB|KB|TB|ms|km|kg|cm|mm|Hz|GHz|W|kW|万元|亿元"
)
_NUMERAL = r"(?:\d[\d,，]*(?:\.\d+)?(?:\s?[万亿千百])?|[一二两三四五六七八九十百千万半][一二三四五六七八九十百千万零]*)"
_ZH_DATES = (
    (re.compile(r"(?:公元前?)?\d{4}\s?年\s?\d{1,2}\s?月\s?\d{1,2}\s?日"), "哪一天"),
    (re.compile(r"(?<!\d)\d{1,2}\s?月\s?\d{1,2}\s?日"), "哪一天"),
    (re.compile(r"(?:公元前?)?(?<!\d)[12]\d{3}\s?年\s?\d{1,2}\s?月"), "哪年哪月"),
    (re.compile(r"(?:公元前?)?(?<!\d)[12]\d{3}\s?年(?!代|度|级)"), "哪一年"),
)
_ZH_NUMBER = re.compile(
    rf"(?<![A-Za-z\d第.+\-^/每])(?<![A-Za-z第] )(?<![几数第一二三四五六七八九十百千万零])(?P<n>{_NUMERAL}(?:\s?(?:到|至|~|–|-)\s?{_NUMERAL})?)\s?(?P<u>{_MEASURE}|%|％)(?![A-Za-z\d²³队代号])"
)
_ZH_PERCENT = re.compile(r"百分之[一二三四五六七八九十百零\d.]+")


def _chinese(body: str, heading: str | None) -> Iterator[Draft]:
    leading = re.match(r"(?:它|这)(?=是|指|用|由|分)", body)
    shift = 0
    if leading and heading and re.fullmatch(rf"[{HAN}\w -]{{2,14}}", heading):
        body, shift = heading + body[1:], len(heading) - 1
    elif _ZH_LEANS.match(body):
        return
    for draft in _chinese_of_whole(body):
        yield Draft(draft.kind, draft.question, draft.start - shift, draft.end - shift)


def _chinese_of_whole(body: str) -> Iterator[Draft]:
    # what is it
    match = _ZH_IS.match(body)
    if match and _zh_subject(match["x"]) and not match["y"].endswith(("的", "了", "吗", "呢")):
        told = match["y"]
        kind = "definition" if re.match(r"一[种个类套项组条门段层]|指", told) or "指" in match["v"] else "fact"
        verb = "指的是" if "指" in match["v"] else "是"
        yield Draft(kind, f"{match['x'].strip()}{verb}什么？", match.start("y"), match.end("y"))
    # other verbs
    for kind, pattern, tail in _ZH_SITU:
        match = pattern.match(body)
        if match and _zh_subject(match["x"]) and not re.search(r"[区省市县国州]$", match["y"]):
            yield Draft(kind, f"{match['x'].strip()}{tail}", match.start("y"), match.end("y"))
    # why
    for pattern in _ZH_WHY:
        match = pattern.match(body)
        if match and not _ZH_LEANS.match(match["x"]) and not _ZH_LEANS.match(match["y"]):
            asked = match["x"].strip("，, ")
            if "为什么" not in asked and "？" not in asked and not re.search("[它他她牠这那]", asked):
                yield Draft("reason", f"为什么{asked}？", match.start("y"), match.end("y"))
            break
    # by whom
    match = _ZH_WHO.match(body)
    if match and not re.search(r"自$|理$|来$", match["x"]):
        yield Draft("name", f"{match['x']}由谁{match['v']}{match['z']}？", match.start("y"), match.end("y"))
    yield from _chinese_numbers(body)


def _zh_subject(text: str) -> bool:
    """Whether it can be asked about by itself: "好处" or "最常用的" can't."""
    bare = text.strip("《》 ")
    if text.count("“") != text.count("”"):
        return False
    if re.search(
        r"[的了着则时后前各]$|(?:往往|一直|必须|可以|可能|通常|一般|几乎|大多|多半|常常|应该|应当|不再|分别|当然|显然|恰好|甚至|并不|"
        r"实际上|主要|本来|依然|同样|也许)$|^最|如果|因为|所以|虽然|但|这|那|它|其中|之一|吗|呢", bare
    ):
        return False
    return len(re.findall(rf"[{HAN}]", bare)) >= 3 or re.search(r"[A-Za-z]{2,}", bare) is not None


def _chinese_numbers(body: str) -> Iterator[Draft]:
    """The first date and the first number with its measure, asked for where they stand."""
    for pattern, asked in _ZH_DATES:
        match = pattern.search(body)
        if match:
            yield from _in_place(body, match.start(), match.end(), asked, "time")
            break
    else:
        match = _ZH_PERCENT.search(body)
        if match:
            yield from _in_place(body, match.start(), match.end(), "百分之多少", "number")
        for match in _ZH_NUMBER.finditer(body):
            number, unit = match["n"], match["u"]
            if unit == "元" and not number[0].isdigit():
                continue  # "二元"
            if number in ("一", "两", "半", "千", "万", "百", "十") or re.fullmatch(r"一[万千百]?", number):
                continue  # "一个", "万一": no figure
            if unit in ("%", "％"):
                asked = "百分之多少"
            elif number[0].isdigit() or len(number) > 2:
                asked = f"多少{' ' if unit[0].isascii() else ''}{unit}"
            else:
                asked = f"几{unit}"
            yield from _in_place(body, match.start(), match.end(), asked, "number")
            break


# A clause that ends so only leads to the next one.
_ZH_UNFINISHED = re.compile(r"(?:时|后|前|中|里|上|下|相比|来说|而言|报告|发现|表明|指出|认为|规定|的|例如|模型|以来|起|内)$")


def _in_place(body: str, start: int, end: int, asked: str, kind: str) -> Iterator[Draft]:
    """The sentence up to the end of the clause, `asked` in the place of [start, end)."""
    stop = re.search(r"[，；：（(。]", body[end:])
    close = end + stop.start() if stop else len(body)
    question = body[:start].rstrip() + asked + body[end:close].lstrip()
    if close == end < len(body) and not re.search(r"[为是有达共过约只到占需要近具长高重深宽设得取][约近]?$", body[:start].rstrip()):
        return  # "on the third day, …" only leads to what is said
    if start == 0 or body[:start] in ("在", "于", "到", "从", "由") or body[end : end + 1] == "的" or "：" in body[:start]:
        return
    if _ZH_UNFINISHED.search(body[:close]) or re.search(r"[这那它他她牠]", body[:close]):
        return
    clause = re.split(r"[，；：]", body[:start])[-1]
    rest = re.sub(r"[^\w]", "", body[:start] + body[end:close])
    if len(question) > 52 or len(rest) < 7 or re.search(r"[（(][^）)]*$", body[:start]):
        return
    if re.match(r"如果|假[如设]|若|当|例如|比如|譬如", clause) or len(re.findall(r"\d+", question)) > 2:
        return
    if re.search(r"[“《‘\"][^”》’\"]*$", body[:start]):
        return  # inside a quotation
    yield Draft(kind, question.strip() + "？", start, end)


# English

_EN_WORD = r"[A-Za-z][\w'’/-]*"
_EN_X = rf"(?P<x>(?:{_EN_WORD}|\d[\w-]*)(?: (?:{_EN_WORD}|\d[\w-]*)){{0,7}}?)"
_EN_NO_START = frozenset(
    """it its this that these those they them their he she his her we our you your i my there here if when
    while what which who whom whose how why where but and or so then thus hence therefore because since as although
    though however moreover also both such another other others in on at for with without by from to of into onto
    under over after before during once until unless only even just not no nothing nobody none some many most
    few several more less all each either neither one two three first second third finally instead rather
    any usual twice half still yet again otherwise perhaps maybe for example let note see please do don't does is are was were""".split()
)
# A noun phrase holds none of these: a second clause would begin there.
_EN_NO_INSIDE = frozenset(
    """that which who whom when while if because since although though unless until whether is are was were be
    been has have had do does did can could may might must shall should will would not it they them he she this
    these those and or but so then there what how why where""".split()
)
_NUMBER_WORDS = "one two three four five six seven eight nine ten eleven twelve fifteen twenty thirty forty fifty sixty ninety"
_EN_N = rf"(?:\d[\d,]*(?:\.\d+)?(?: (?:thousand|million|billion|trillion))?|(?:{'|'.join(_NUMBER_WORDS.split()[1:])}))"
_HEDGE = r"(?:about |around |roughly |at most |at least |up to |only |exactly |over |nearly |almost |more than )?"
MONTH = "January|February|March|April|May|June|July|August|September|October|November|December"
_DATE = rf"(?:(?:in|on|since|until) )?(?:\d{{1,2}} (?:{MONTH})(?: \d{{4}})?|(?:{MONTH})(?: \d{{1,2}})?,? \d{{4}}|(?:{MONTH}) \d{{1,2}}|[12]\d{{3}})"
BASE_FORMS = {
    "has": "have", "takes": "take", "needs": "need", "uses": "use", "contains": "contain", "holds": "hold",
    "requires": "require", "costs": "cost", "produces": "produce", "reads": "read", "stores": "store",
    "includes": "include", "covers": "cover", "measures": "measure", "keeps": "keep", "gives": "give",
    "lasts": "last", "weighs": "weigh", "employs": "employ", "returns": "return", "saves": "save",
    "means": "mean", "prevents": "prevent", "causes": "cause", "replaces": "replace", "removes": "remove",
    "controls": "control", "determines": "determine", "decides": "decide", "reduces": "reduce",
    "computes": "compute", "predicts": "predict", "describes": "describe", "represents": "represent",
    "provides": "provide", "compares": "compare", "receives": "receive", "pays": "pay", "adds": "add",
}  # fmt: skip
_COUNTED = "has takes needs uses contains holds requires costs produces reads stores includes covers keeps lasts weighs employs receives pays adds".split()
_VAGUE = ("has", "gives", "keeps", "adds", "takes", "holds", "reads")  # "What does the page have?"
_EN_IS = re.compile(rf"^{_EN_X} (?P<v>is|are|was|were) (?P<y>(?:an?(?! example)\b|the\b|one of\b|to\b|that\b|called\b|about\b|roughly\b|\d|[A-Z“\"]).{{2,140}})$")
_EN_COUNT = re.compile(
    rf"^{_EN_X} (?P<v>{'|'.join(_COUNTED)}) (?P<n>{_HEDGE}{_EN_N}(?: to {_EN_N})?) (?P<u>[a-z]+(?: [a-z-]+)?s)\b(?P<z>(?: (?:in|for|per|of|each|every) [^,;:.(]{{2,40}})?)(?=[,;:.( ]|$)"
)
_EN_DOES = re.compile(rf"^{_EN_X} (?P<v>{'|'.join(verb for verb in BASE_FORMS if verb not in _VAGUE)}) (?P<y>(?!to |no |not )[^;:]{{12,120}})(?=[;:]|$)")
_EN_FIXED = tuple(
    (kind, re.compile(rf"^{_EN_X} {verb} (?P<y>[^,;:]{{2,110}})(?=[,;:]|$)"), asked) for kind, verb, asked in (
        ("definition", "stands for", "What does {x} stand for?"),
        ("fact", "consists of", "What does {x} consist of?"),
        ("fact", "depends on", "What does {x} depend on?"),
        ("fact", "depend on", "What do {x} depend on?"),
        ("fact", "consist of", "What do {x} consist of?"),
        ("definition", "refers to", "What does {x} refer to?"),
        ("fact", "is used (?:to|for)", "What is {x} used for?"),
        ("fact", "are used (?:to|for)", "What are {x} used for?"),
        ("name", "is (?:also )?(?:called|known as)", "What is {x} called?"),
        ("name", "are (?:also )?(?:called|known as)", "What are {x} called?"),
    )
)
_EN_WHEN = re.compile(
    rf"^{_EN_X} (?P<v>was|were|is|are) (?P<p>[a-z]+(?:ed|built|made|born|written|sold|held|found|bought|sent|set|taken|given|begun|shown|paid|lost|won|drawn))(?P<z>(?: [^,;:.]{{2,40}}?)?) (?P<y>(?:in|on|since|until) {_DATE[len('(?:(?:in|on|since|until) )?'):]})(?=[,;: ]|$)"
)
_EN_BY = re.compile(
    rf"^{_EN_X} (?P<v>was|were) (?P<p>[a-z]+(?:ed|built|made|written|found|given|drawn|led)) by (?P<y>[A-Z][\w.'’-]+(?: (?:[A-Z][\w.'’-]+|and|de|von|of))*)"
)
_EN_WHY = re.compile(rf"^{_EN_X} (?P<v>is|are|was|were|can|cannot|must|should|will|could) (?P<r>[^,;:]{{3,80}}?),? because (?!of )(?P<y>.{{8,140}})$")


def _english(body: str, heading: str | None, names: Set[str]) -> Iterator[Draft]:
    leading = re.match(r"(?:It|This) (?=is |has |takes |means |stands )", body)
    shift = 0
    if leading and heading and re.fullmatch(r"[A-Z][\w'’-]*(?: [\w'’-]+){0,3}", heading):
        name = heading.split(" ")[0]
        body, shift = f"{heading} {body[leading.end():]}", len(heading) + 1 - leading.end()
        if name.lower() in _EN_NO_START:
            return
        names = names | {name}
    for draft in _english_of_whole(body, names):
        yield Draft(draft.kind, draft.question, draft.start - shift, draft.end - shift)


def _english_of_whole(body: str, names: Set[str]) -> Iterator[Draft]:
    def subject(match: re.Match[str] | None) -> str | None:
        return _en_subject(match["x"], names) if match else None

    # why comes first, as "X is Y because Z" isn't asked "what is X"
    match = _EN_WHY.match(body)
    if match and (x := subject(match)) and not re.match(r"(?:it|they|this|that)\b", match["r"]):
        yield Draft("reason", f"Why {match['v']} {x} {match['r']}?", match.start("y"), match.end("y"))
        return
    match = _EN_WHEN.match(body)
    if match and (x := subject(match)):
        yield Draft("time", f"When {match['v']} {x} {match['p']}{match['z']}?", match.start("y"), match.end("y"))
    match = _EN_BY.match(body)
    if match and (x := subject(match)):
        yield Draft("name", f"Who {match['v']} {x} {match['p']} by?", match.start("y"), match.end("y"))
    # how many
    match = _EN_COUNT.match(body)
    if match and (x := subject(match)):
        rest = match["z"] if len(match["z"].split()) <= 7 else ""
        asked = f"How many {match['u']} does {x} {BASE_FORMS[match['v']]}{rest}?"
        yield Draft("number", asked, match.start("n"), match.end("u"))
        return
    # what
    for kind, pattern, asked in _EN_FIXED:
        match = pattern.match(body)
        if match and (x := subject(match)):
            yield Draft(kind, asked.format(x=x), match.start("y"), match.end("y"))
            return
    match = _EN_DOES.match(body)
    if match and (x := subject(match)) and not re.match(r"(?:it|them|that|how|whether)\b", match["y"]):
        yield Draft("fact", f"What does {x} {BASE_FORMS[match['v']]}?", match.start("y"), match.end("y"))
        return
    match = _EN_IS.match(body)
    if match and (x := subject(match)):
        kind = "definition" if re.match(r"an? |one of ", match["y"]) else "number" if re.match(r"about \d|roughly \d|\d", match["y"]) else "fact"
        yield Draft(kind, f"What {match['v']} {x}?", match.start("y"), match.end("y"))


_ADVERB = re.compile(
    r"(?!(?:(?:dai|week|month|quarter|year|hour|ear|fami|supp|assemb|rep|cost|friend|like)ly)$)[a-z]+ly"
)
_EN_PREPOSITIONS = frozenset("of in on for with to by from at into per between over as under than without".split())
# "The simple way" says too little without the sentence before.
_EN_GENERIC = frozenset(
    """way remedy thing things step part case point problem result reason form kind choice rule idea method answer
    question solution cost price effect advantage drawback example cases approach fix trick value size number
    goal aim purpose name title set list rest total""".split()
)


def _dangling_determiner(words: list[str]) -> bool:
    """ "Say the answer" is no noun phrase; "the size of the cache" and "leaving the door open" are."""
    return not words[0].lower().endswith("ing") and any(
        word in ("the", "a", "an", "its", "their", "your", "every", "each") and words[at] not in _EN_PREPOSITIONS
        for at, word in enumerate(words[1:])
    )


def _en_subject(text: str, names: Set[str]) -> str | None:
    """The noun phrase as it stands inside a question; None where it isn't one, or says too little."""
    words = text.split(" ")
    first = words[0].lower()
    if first in _EN_NO_START or any(word.lower() in _EN_NO_INSIDE for word in words[1:]):
        return None
    if any(_ADVERB.fullmatch(word) for word in words):
        return None
    determined = first in ("the", "a", "an", "every")
    bare = words[1:] if determined else words
    if not bare or len(words) > 8:
        return None
    # "The model", "the second": of which?
    if determined and first == "the" and len(bare) == 1 and bare[0].islower() and len(bare[0]) < 12:
        return None
    if words[-1] in ("one", "ones", "it") or _dangling_determiner(words):
        return None
    if determined and bare[-1] in _EN_GENERIC and not _EN_PREPOSITIONS.intersection(words):
        return None
    if bare[0] in ("same", "former", "latter", "other", "others", "rest", "whole", "first", "second", "last", "next",
                   "result", "reason", "answer", "difference", "only", "usual", "idea", "point"):  # fmt: skip
        return None
    if len(bare) == 1 and len(bare[0]) < 4 and not bare[0].isupper():
        return None
    numbered = len(words) > 1 and words[1][0].isdigit()  # "Llama 2"
    if determined or (words[0][1:].islower() and words[0] not in names and not numbered):
        words[0] = words[0].lower() if words[0][-2:] not in ("'s", "’s") else words[0]
    return " ".join(words)
