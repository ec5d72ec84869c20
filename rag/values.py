"""Numbers, dates and times in a sentence, as values that can be compared whichever way they are written.

"1,250 euros", "three months" and "3 个月", "5 pm" and "17:00", "3 May 2021" and "2021年5月3日". Units of
one kind are converted, so that 2 km is 2,000 m. What only names something (X200, version 1.2, page 7,
第三章) is a reference, not an amount.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from rag.simplified import simplify
from rag.terms import passage_terms

Kind = Literal["quantity", "date", "clock", "reference"]


@dataclass(frozen=True, slots=True)
class Value:
    """One value and where it stands: [start, end) of the text as `plain` gives it.

    `dimension` is what is measured, as in "length", "euro" or "count:seat"; of a reference what it
    counts. `amount` is in the dimension's base unit; of a clock minutes after midnight. A date is
    (year, month, day), None where it isn't said. `per` is the rate's unit, "" without, and "?" where a
    clock doesn't say the half of the day or a temperature its scale. `bound` is "about", "least" or
    "most", "" for an exact one.
    """

    kind: Kind
    dimension: str
    amount: float
    start: int
    end: int
    date: tuple[int | None, int | None, int | None] = (None, None, None)
    per: str = ""
    bound: str = ""


def dimension_of(unit: str) -> str | None:
    """What a unit measures: "length" for metre and 公里; None for what is no unit."""
    found = _UNITS.get(unit) or _UNITS.get(unit.removesuffix("s"))
    return found[0] if found else None


def plain(text: str) -> str:
    """The text in which values are looked for: simplified, in lower case, with digits of every script as
    0 to 9; as long as the given one, sign for sign."""
    lowered = "".join(map(_plain_sign, _WIDE_COMMA.sub(",", simplify(text))))
    for match in _CASED_UNIT.finditer(text):
        lowered = lowered[: match.start()] + match.group() + lowered[match.end() :]
    return lowered


# A Chinese comma parts clauses, so that "5，300人" is no 5,300; between wide digits it groups them.
_WIDE_COMMA = re.compile(r"(?<=[０-９])，(?=[０-９]{3}(?![０-９]))")
# Without their case, a thousandth and a million of these are one.
_CASED_UNIT = re.compile(r"(?:(?<=\d)|(?<=\d\s))(?:MW|mW|MPa|mPa)(?![A-Za-z0-9])")
_ARABIC_SIGNS = {"٬": ",", "٫": ".", "٪": "%"}


@lru_cache(maxsize=20_000)
def _plain_sign(sign: str) -> str:
    if sign == "，" or sign in _ARABIC_SIGNS:
        return _ARABIC_SIGNS.get(sign, sign)
    new = unicodedata.normalize("NFKC", sign)
    if len(new) > 1:
        new = sign
    digit = unicodedata.decimal(new, None)
    return new.lower()[0] if digit is None else str(digit)  # "İ" in lower case is two signs


# Units: how much of the dimension's base unit one of them is.
_UNITS: dict[str, tuple[str, float]] = {}
for _dimension, _members in {
    "length": "mm millimetre millimeter 毫米=.001 cm centimetre centimeter 厘米=.01 m metre meter 米=1 "
    "km kilometre kilometer 公里 千米=1000 inch inches 英寸=.0254 foot feet ft 英尺=.3048 mile miles 英里=1609.34",
    "area": "hectare hectares 公顷=10000 平方米 m² m2=1 平方公里=1000000 亩=666.7",
    "mass": "mg milligram 毫克=.001 g gram 克=1 kg kilogram 千克 公斤=1000 tonne tonnes ton tons 吨=1000000",
    "volume": "ml millilitre milliliter 毫升=.001 l litre liter 升=1",
    "duration": "ms millisecond 毫秒=.001 second sec s 秒 秒钟=1 minute min 分钟=60 hour h hr 小时 个小时 钟头=3600 "
    "day 天 日=86400 week 周 个星期 星期=604800 fortnight=1209600 month 个月=2629800 quarter 个季度=7889400 "
    "year 年=31557600 decade=315576000",
    "data": "byte bytes 字节=1 kb=1024 mb=1048576 gb=1073741824 tb=1099511627776",
    "percent": "% percent 个百分点=1",
    "euro": "euro euros € eur 欧元=1 cent cents=.01", "dollar": "dollar dollars usd $ 美元=1",
    "pound": "pound pounds £ gbp 英镑=1 pence=.01", "yuan": "yuan rmb cny 元 块 块钱 人民币=1",
    "franc": "franc francs chf 瑞士法郎=1", "yen": "yen jpy 日元=1",
    "temperature": "degree degrees ° °c ℃ celsius 度 摄氏度=1", "fahrenheit": "°f ℉ fahrenheit 华氏度=1",
    "pressure": "bar bars 巴=1 pa 帕=.00001 kpa 千帕=.01 mPa=.00000001 MPa 兆帕=10",
    "power": "w watt watts 瓦=1 kw kilowatt kilowatts 千瓦=1000 mW milliwatt milliwatts=.001 "
    "MW megawatt megawatts 兆瓦=1000000",
    "voltage": "v volt volts 伏=1", "energy": "kwh 千瓦时 度电=1",
    "count:person": "people person persons employee employees staff worker workers inhabitant inhabitants resident "
    "residents member members 人 名 位 名员工 名居民 位居民=1",
    "count:time": "time times 次=1",
}.items():
    _names: list[str] = []
    for _word in _members.split():
        _name, _, _factor = _word.partition("=")
        _names.append(_name)
        if _factor:
            for _each in _names:
                _UNITS[_each] = (_dimension, float(_factor))
            _names = []
_SIGN_UNITS = sorted(
    (unit for unit in _UNITS if not unit.isascii() or unit in "$%" or not unit.islower()), key=len, reverse=True
)
_MONEY = ("euro", "dollar", "pound", "yuan", "franc", "yen")

_SMALL = {word: number for number, word in enumerate(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen".split()
)} | {word: 10 * number for number, word in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split(), 2)}
_LARGE = {"hundred": 100.0, "thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12, "dozen": 12.0}
_HAN_DIGITS = {sign: number for number, sign in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2}
_HAN_LARGE = {"十": 10, "百": 100, "千": 1000, "万": 10_000, "亿": 100_000_000}

# Digits that touch are one number, or one that isn't understood: never is a part of it read by itself.
_TOUCHING = r"[0-9]+(?:[.,'’][0-9]+)*"
_SPACED = r"(?<![0-9] )[1-9][0-9]{0,2}(?: [0-9]{3})+(?:[.,][0-9]+)?(?![ .,'’]?[0-9])"
_DIGITS = rf"(?:{_SPACED}|{_TOUCHING})"
# 1250.5, 1,250.5, 1 250.5, 1'250.5 and, as in India, 12,50,000; then 1250,5, 1.250,5, 1 250,5 and 1.250.000.
_WITH_POINT = re.compile(
    r"[0-9]+(?:\.[0-9]+)?|[0-9]{1,3}(?P<by>[, '’])[0-9]{3}(?:(?P=by)[0-9]{3})*(?:\.[0-9]+)?|[0-9]{1,2}(?:,[0-9]{2})+,[0-9]{3}(?:\.[0-9]+)?"
)
_WITH_COMMA = re.compile(
    r"[0-9]+,[0-9]{1,2}|[0-9]{1,3}(?P<by>[. '’])[0-9]{3}(?:(?P=by)[0-9]{3})*,[0-9]+|[0-9]{1,3}(?:\.[0-9]{3}){2,}"
)
_POINT_OR_THOUSANDS = re.compile(r"[1-9][0-9]{0,2}\.[0-9]{3}")
_WORDS = rf"(?:{'|'.join((*_SMALL, *_LARGE))})(?:[ -](?:and )?(?:{'|'.join((*_SMALL, *_LARGE))}))*"
_HAN_NUMBER = r"[零〇一二两三四五六七八九十百千万亿]+"
_MONTHS = {name: number for number, name in enumerate(
    "january february march april may june july august september october november december".split(), 1
)}
_MONTH = rf"(?P<month>{'|'.join(f'{name}|{name[:3]}(?![a-z])' for name in _MONTHS)})\.?"
_HAN_DAY = r"[一二三四五六七八九十]{1,3}"
_DATES = [re.compile(pattern) for pattern in (
    rf"\b(?P<day>[0-9]{{1,2}})(?:st|nd|rd|th)?(?: of)? {_MONTH}(?:,? (?P<year>[12][0-9]{{3}}))?\b",
    rf"\b{_MONTH} (?P<day>[0-9]{{1,2}})(?:st|nd|rd|th)?(?:,? (?P<year>[12][0-9]{{3}}))?(?![0-9:])",
    rf"\b{_MONTH},? (?P<year>[12][0-9]{{3}})\b",
    r"(?<![0-9.])(?P<year>[12][0-9]{3})[-/.](?P<number>[0-9]{1,2})[-/.](?P<day>[0-9]{1,2})(?![0-9]|\.[0-9])",
    rf"(?:(?P<year>[12][0-9]{{3}}|[零〇一二三四五六七八九]{{4}}) ?年 ?)?(?P<number>[0-9]{{1,2}}|{_HAN_DAY}) ?月(?: ?(?P<day>[0-9]{{1,2}}|{_HAN_DAY}) ?[日号])?(?!份?内)",
    r"(?P<year>[12][0-9]{3}|[零〇一二三四五六七八九]{4}) ?年(?!度?[内来])",
    r"(?:\b(?:in|since|from|of|until|till|by|before|after|between|and|year|spring|summer|autumn|winter|early|late|mid|fy|report|"
    r"plan|budget|edition|the) |[(（]|^)(?P<year>1[5-9][0-9]{2}|20[0-9]{2})(?![0-9.,%]*[0-9])(?! ?[%€$£\u4e00-\u9fff]| (?:m|km|people|employees|"
    r"users|tokens|metres|meters|euros|dollars|pounds|words|times|cases|characters|documents|questions|vectors|items|copies)\b)",
    r"\b(?P<year>1[5-9][0-9]{2}|20[0-9]{2}) (?:annual |financial )?(?:report|budget|plan|edition|season)\b",
)]
_CLOCKS = [re.compile(pattern) for pattern in (
    r"\b(?P<hour>[0-9]{1,2})(?:[:.](?P<minute>[0-9]{2}))? ?(?P<half>[ap])\.?m\b\.?",
    r"(?P<half>上午|下午|晚上|早上|中午|凌晨|傍晚)?(?<![0-9:.])(?P<hour>[0-9]{1,2}):(?P<minute>[0-9]{2})(?![0-9:])",
    rf"(?P<half>上午|下午|晚上|早上|中午|凌晨|傍晚)?(?P<hour>[0-9]{{1,2}}|{_HAN_DAY})[点时](?:(?P<minute>[0-9]{{1,2}})分|(?P<thirty>半)|整)?(?=[开关前后至到起止。，；,]|$|营|打|闭|结|出|退|入)",
)]
# A number behind one of these, or with letters at it, is a name.
_REFERENCE = re.compile(
    r"(?:\b(version|chapter|section|page|figure|fig\.|table|step|part|no\.|number|article|clause|paragraph|level|phase|type|model|"
    r"python|release|rev\.?|question|example|item|room|line|gate|platform|floor|windows)s? |(第|图|表|版本|附件|步骤|型号|方案)"
    r"|\b(v)\.?)$"
)
_ORDINAL_END = re.compile(r"(版|st\b|nd\b|rd\b|th\b|章|条|款|节|页|号|楼|层(?!叠)|届|期)")
_BOUND = [(name, re.compile(pattern)) for name, pattern in (
    ("about", r"(?:\b(?:about|around|roughly|approximately|some|nearly|almost|circa|ca\.)|约为?|大约为?|大概|近|将近|~|≈) ?(?:有|为)?$"),
    ("least", r"(?:\b(?:at least|more than|over|above|minimum of|no less than|not less than)|至少|(?<!不)超过|不少于|不低于|大于|高于|≥|>) ?(?:有|为)?$"),
    ("most", r"(?:\b(?:at most|up to|less than|under|below|fewer than|maximum of|no more than|not more than|within)|至多|最多|不超过|少于|低于|小于|不到|≤|<) ?(?:有|为)?$"),
)]
_BOUND_AFTER = [("about", re.compile(r" ?(?:左右|上下|or so\b)")), ("least", re.compile(r" ?(?:以上|or more\b|多(?=[个名人元]))")),
                ("most", re.compile(r" ?(?:以内|以下|or less\b|or fewer\b|之内)"))]
_PER = re.compile(r" ?(?:per |an? |each |every |/ ?|each|every)(second|sec|s|minute|min|hour|h|day|week|month|quarter|year|person|秒|分钟|小时|天|日|周|月|年|人)\b")
_PER_BEFORE = re.compile(r"(?:每|一)(?:个)?(秒|分钟|小时|天|日|周|月|年|人)[^，。；,;0-9]{0,8}$|\b(?:per|each|every) (second|minute|hour|day|week|month|quarter|year)[^,;.]{0,4}$")
_SAME_PER = {
    "s": "秒", "sec": "秒", "second": "秒", "min": "分钟", "minute": "分钟", "h": "小时", "hour": "小时", "day": "天", "日": "天",
    "week": "周", "month": "月", "quarter": "季", "year": "年", "person": "人",
}
_NUMBER = re.compile(
    rf"(?P<sign>[$€£¥])? ?(?P<digits>(?<![0-9.]){_DIGITS})(?P<scale> ?(?:hundred|thousand|million|billion|trillion|[十百千万亿]+)|(?:k|m|bn)\b(?<![0-9.] .))?"
    rf"|\b(?P<words>{_WORDS})\b|(?<![几数第])(?P<han>{_HAN_NUMBER})"
)
_SHARES = re.compile(rf"百分之(?P<share>{_DIGITS}|{_HAN_NUMBER})|(?P<below>[二三四五六七八九十])分之(?P<above>[一二两三四五六七八九])|(?P<half>\bhalf\b(?: an?\b)?|一半|半(?=年|天|小时|个月|个小时))|(?P<third>\b(?:a|one) third\b)|(?P<quarter>\b(?:a|one) quarter\b(?! of a year))")


@lru_cache(maxsize=4096)
def find_values(text: str) -> tuple[Value, ...]:
    """The values of a sentence, in order; `text` as `plain` gives it."""
    taken = [False] * len(text)
    found: list[Value] = []
    for value in (*_dates(text), *_clocks(text), *_shares(text), *_quantities(text)):
        if any(taken[value.start : value.end]):
            continue
        taken[value.start : value.end] = [True] * (value.end - value.start)
        found.append(value)
    return tuple(sorted(found, key=lambda value: value.start))


def agree(first: Value, second: Value) -> bool:
    """Whether two values of one kind and dimension can both be true: equal, equal when rounded, or
    one within the other's bound."""
    if first.kind == "date":
        return all(a == b or a is None or b is None for a, b in zip(first.date, second.date, strict=True))
    if first.per and second.per and first.per != second.per:
        return True  # not comparable
    if first.dimension == "temperature" and first.per != second.per and "?" in (first.per, second.per):
        unsaid, said = (first, second) if first.per == "?" else (second, first)
        either = (unsaid.amount, _celsius(unsaid.amount))
        return any(agree(replace(unsaid, amount=amount, per=said.per), said) for amount in either)
    a, b = first.amount, second.amount
    if math.isclose(a, b, rel_tol=1e-6):
        return True
    if first.kind == "clock":
        return first.bound == second.bound == "" and abs(a - b) == 720 and min(a, b) < 720 and _is_open(first, second)
    bounds = {first.bound, second.bound}
    if "about" in bounds:
        return abs(a - b) <= 0.15 * max(abs(a), abs(b))
    if bounds != {""}:
        return not _is_outside(first, second) and not _is_outside(second, first)
    if first.dimension in ("duration", "data"):  # a month has 30 days or 31, a kilobyte 1,000 bytes or 1,024
        return abs(a - b) <= 0.05 * max(a, b)
    return _is_rounded(a, b) or _is_rounded(b, a)


def _is_open(first: Value, second: Value) -> bool:
    """Whether one of two clocks doesn't say which half of the day it means: 5 o'clock, 17:00."""
    return "?" in (first.per, second.per)


def _is_outside(value: Value, other: Value) -> bool:
    """Whether `value`, where it is exact, lies outside of the bound `other`."""
    if value.bound:
        return False
    return (other.bound == "least" and value.amount < other.amount) or (
        other.bound == "most" and value.amount > other.amount
    )


def _is_rounded(rough: float, exact: float) -> bool:
    """Whether 4.2 is 4.17 with fewer digits: rounded to as many as it has, of which there are few."""
    if not rough or not exact:
        return False
    digits = len(f"{abs(rough):.6g}".replace(".", "").lstrip("0").rstrip("0").partition("e")[0])
    more = len(f"{abs(exact):.6g}".replace(".", "").lstrip("0").rstrip("0").partition("e")[0])
    return 2 <= digits < more and math.isclose(float(f"{exact:.{digits}g}"), rough, rel_tol=1e-9)


def _dates(text: str) -> Iterator[Value]:
    for pattern in _DATES:
        for match in pattern.finditer(text):
            groups = match.groupdict()
            month = groups.get("month")
            number = next(n for name, n in _MONTHS.items() if name.startswith(month[:3])) if month else _integer(groups.get("number"))
            year, day = _integer(groups.get("year"), is_year=True), _integer(groups.get("day"))
            if number is not None and not 1 <= number <= 12 or day is not None and not 1 <= day <= 31:
                continue
            start = match.start("year") if number is None else match.start()
            yield Value("date", "date", 0.0, start, match.end(), (year, number, day))


def _clocks(text: str) -> Iterator[Value]:
    for pattern in _CLOCKS:
        for match in pattern.finditer(text):
            groups = match.groupdict()
            hour = _integer(groups["hour"])
            if hour is None or hour > 24:
                continue
            half = groups["half"] or ""
            minute = 30 if groups.get("thirty") else _integer(groups.get("minute")) or 0
            if half in ("p", "下午", "晚上", "傍晚") and hour < 12:
                hour += 12
            elif half in ("a", "上午", "早上", "凌晨") and hour == 12:
                hour = 0
            unclear = "" if half or hour > 12 or groups.get("minute") else "?"
            yield Value("clock", "clock", 60 * hour + minute, match.start(), match.end(), per=unclear)


def _shares(text: str) -> Iterator[Value]:
    for match in _SHARES.finditer(text):
        groups = match.groupdict()
        if groups["half"] and not groups["half"].startswith("一半"):
            unit = _unit(text, match.end())
            if unit is not None and unit[0] == "duration":  # half a year, 半年
                yield Value("quantity", "duration", 0.5 * unit[1], match.start(), unit[2])
                continue
        if groups["share"]:
            said = _number(groups["share"])
            if said is None:
                continue
            amount = said
        elif groups["below"]:
            amount = 100 * _han(groups["above"]) / _han(groups["below"])
        else:
            amount = 50.0 if groups["half"] else 100 / 3 if groups["third"] else 25.0
        yield Value("quantity", "percent", amount, match.start(), match.end(), bound=_bound(text, match.start(), match.end()))


_FIRST_TWO = re.compile(r"[0-9]+(?:\.[0-9]+)?")  # version 1.2.3 is taken for 1.2
_CURRENCY = {"$": "dollar", "€": "euro", "£": "pound", "¥": "yuan"}


def _quantities(text: str) -> Iterator[Value]:
    for match in _NUMBER.finditer(text):
        written = match["digits"] or match["words"] or match["han"]
        end = match.end()
        start = match.start("sign") if match["sign"] else end - len(match.group().lstrip())
        before = text[:start]
        if match["digits"] and re.search(r"[a-z0-9][-_]?$", before):
            continue  # x200, gpt-4
        if match["digits"] and re.match(r"[a-z]*[0-9]|[-_][a-z0-9]", text[end:]) and not match["scale"]:
            continue  # 7b-instruct
        number = _number(written)
        scale = (match["scale"] or "").strip()
        if scale == "m" and not match["sign"] and not _is_money(_unit(text, end)):
            scale, end = "", match.start("scale")  # metres
        after = text[end:]
        if (reference := _REFERENCE.search(before)) or _ORDINAL_END.match(after):
            ending = _ORDINAL_END.match(after)
            name = next(filter(None, reference.groups()), "") if reference else ending.group() if ending else ""
            name = {"v": "version", "版": "version", "版本": "version", "release": "version"}.get(name, name)
            named = float(_FIRST_TWO.findall(written)[0]) if number is None else number
            yield Value("reference", f"reference:{name}", named, start, end)
            continue
        if number is None:
            continue
        amount = number * (_scale(scale) if scale else 1.0)
        unit = _unit(text, end)
        if match["sign"]:
            dimension, factor, stop = _CURRENCY[match["sign"]], 1.0, end
        elif unit is not None:
            dimension, factor, stop = unit
        else:
            if match["han"] and len(written) == 1:
                continue  # 一 and 两 are more often words than amounts
            dimension, factor, stop = "number", 1.0, end
        if match["words"] == "one" and dimension.startswith("count"):
            continue  # a pronoun more often than a count
        if dimension in _MONEY and not scale and _POINT_OR_THOUSANDS.fullmatch(written):
            continue  # 1.250 euros: 1,250 or 1.25?
        per = _PER.match(text[stop:])
        if per:
            rate, stop = per.group(1), stop + per.end()
        else:
            earlier = _PER_BEFORE.search(before)
            rate = next(filter(None, earlier.groups()), "") if earlier else ""
        if dimension in ("temperature", "fahrenheit"):
            yield _temperature(text, start, end, dimension, amount, per=_SAME_PER.get(rate, rate), stop=stop)
            continue
        yield Value(
            "quantity", dimension, amount * factor, start, stop, per=_SAME_PER.get(rate, rate),
            bound=_bound(text, start, stop),
        )


_BELOW_ZERO = re.compile(r"(?:(?<![^\s(（:=,，])[-−–]|\bminus |零下|负)$")
_SCALE_BEFORE = re.compile(r"(摄氏|华氏)$")
_NO_SCALE = re.compile(r"[ -]?(?:degrees?(?! (?:celsius|fahrenheit))|°(?![cf])|度)")


def _temperature(text: str, start: int, end: int, unit: str, amount: float, *, per: str, stop: int) -> Value:
    """Degrees as Celsius and with their sign; the number is [start, end), its unit ends before `stop`."""
    if below := _BELOW_ZERO.search(text[:start]):
        amount, start = -amount, below.start()
    scale = _SCALE_BEFORE.search(text[:start])
    if scale:
        start = scale.start()
    if unit == "fahrenheit" or scale and scale[1] == "华氏":
        amount = _celsius(amount)
    elif not scale and _NO_SCALE.match(text[end:]):
        per = per or "?"
    return Value("quantity", "temperature", amount, start, stop, per=per, bound=_bound(text, start, stop))


def _celsius(fahrenheit: float) -> float:
    return (fahrenheit - 32) / 1.8


def _is_money(unit: tuple[str, float, int] | None) -> bool:
    return unit is not None and unit[0] in _MONEY


def _bound(text: str, start: int, end: int) -> str:
    before, after = text[:start], text[end:]
    for name, pattern in _BOUND:
        if pattern.search(before):
            return name
    return next((name for name, pattern in _BOUND_AFTER if pattern.match(after)), "")


_NOUN = re.compile(r"[ -]?((?:[a-z][\w'’-]*|°[cf]?|%|€)(?:[ -][a-z][\w'’-]*){0,2})")
_HAN_COUNT = re.compile(r" ?(?:个|种|门|条|项|件|台|只|张|本|款|级|块|所|家|间|辆|部|步|章|组|层|头|枚|篇|册|份|座|棵|株|匹|艘|架|幅|封|箱|袋|瓶|页|行|列|颗)([\u4e00-\u9fff]{0,2})")


def _unit(text: str, at: int) -> tuple[str, float, int] | None:
    """(dimension, factor, end) of what is counted behind `at`; None where nothing is."""
    skipped = at + (1 if text[at : at + 1] in (" ", "-") else 0)
    for unit in _SIGN_UNITS:
        if text.startswith(unit, skipped):
            if unit in ("名", "位") and (noun := re.match(r"[\u4e00-\u9fff]{2}", text[skipped + 1 :])):
                name = noun.group()
                if name not in ("员工", "居民", "职工", "会员", "成员"):
                    return f"count:{name}", 1.0, skipped + 1
            return (*_UNITS[unit], skipped + len(unit))
    if counted := _HAN_COUNT.match(text[at:]):
        return f"count:{counted.group(1)}", 1.0, at + counted.start(1)
    noun = _NOUN.match(text[at:])
    if noun is None:
        return None
    words = noun.group(1).split(" ")
    word = words[0]
    if word in ("degree", "degrees") and len(words) > 1 and words[1] in ("celsius", "fahrenheit"):
        return (*_UNITS[words[1]], at + noun.start(1) + len(f"{word} {words[1]}"))
    for form in (word, word.removesuffix("s")):
        if form in _UNITS:
            return (*_UNITS[form], at + noun.start(1) + len(word))
    if word in _NO_NOUN:
        return None
    stem = passage_terms(words[0])
    return (f"count:{stem[-1]}", 1.0, at + noun.start(1)) if stem else None


_NO_NOUN = frozenset(
    """and or of in on at to is was are were a an the for from by per with as than that which when while if but not it
    each every until since between into out up down over under within before after so such only also""".split()
)


def _integer(text: str | None, *, is_year: bool = False) -> int | None:
    if not text:
        return None
    if text.isascii():
        return int(text)
    if is_year:
        return int("".join(str(_HAN_DIGITS[sign]) for sign in text))
    return int(_han(text))


def _number(text: str) -> float | None:
    """None where digits are joined in a way that isn't understood: 1.2.3, 1,2,3."""
    if not text[0].isascii():
        return _han(text)
    if text[0].isalpha():
        return _spelled(text)
    if _WITH_POINT.fullmatch(text):
        return float(re.sub("[, '’]", "", text))
    if _WITH_COMMA.fullmatch(text):
        return float(re.sub("[. '’]", "", text).replace(",", "."))
    return None


def _spelled(text: str) -> float:
    """"three hundred and five" is 305."""
    total = part = 0.0
    for word in re.split(r"[ -]", text):
        if word in _SMALL:
            part += _SMALL[word]
        elif word == "hundred" or word == "dozen":
            part = (part or 1) * _LARGE[word]
        elif word in _LARGE:
            total, part = total + (part or 1) * _LARGE[word], 0.0
    return total + part


def _han(text: str) -> float:
    """二十五 is 25, 一万二千 is 12,000, 二〇二一 is 2021."""
    if len(text) > 1 and all(sign in _HAN_DIGITS for sign in text):
        return float("".join(str(_HAN_DIGITS[sign]) for sign in text))
    total = part = digit = 0
    for sign in text:
        if sign in ("万", "亿"):
            total, part, digit = (total + part + digit or 1) * _HAN_LARGE[sign], 0, 0
        elif sign in _HAN_LARGE:
            part, digit = part + (digit or 1) * _HAN_LARGE[sign], 0
        else:
            digit = _HAN_DIGITS[sign]
    return float(total + part + digit)


def _scale(text: str) -> float:
    if text in _LARGE:
        return _LARGE[text]
    if text in ("k", "m", "bn"):
        return {"k": 1e3, "m": 1e6, "bn": 1e9}[text]
    scale = 1.0
    for sign in text:
        scale *= _HAN_LARGE[sign]
    return scale
