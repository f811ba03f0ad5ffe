"""Answers in generated text: finding them, and making two ways to write one alike.

``normalise`` and ``normalise_reference`` do what the official VQAv2 evaluation does to a prediction and to a
ground-truth answer (github.com/GT-Vision-Lab/VQA, PythonEvaluationTools), its slips included: only then can scores be
compared. The rest finds an answer in what a model wrote; None, never a guess, where it is not clear.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from eas_kit.errors import TaskError

# ---------------------------------------------------------------------- the official VQAv2 evaluation
# Slip: of the usual marks : ' | # $ % & * ~ ^ are not in the list, and stay.
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
# Slip: meant was "no digit before and none after", but the look-behind is misspelt and bars nothing: "5.a" is "5a".
_PERIOD = re.compile(r"\.(?!\d)")
_PERIODS_AT_MOST = 32  # slip: the flag re.UNICODE (32) is given where `sub` takes the number of replacements
_DIGITS = "zero one two three four five six seven eight nine ten"
_NUMBERS = {"none": "0", **{word: str(i) for i, word in enumerate(_DIGITS.split())}}
_ARTICLES = {"a", "an", "the"}
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't
    needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've
    somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
    that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've
    weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll
    why're why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""


def _apostrophes() -> dict[str, str]:
    """Misspelt word to contraction: every way to leave out one apostrophe.

    Not here, as words are in lower case by then: the official keys Im, Ive, Id've, I'dve ("im" stays "im").
    """
    table = {w[:i] + w[i + 1 :]: w for w in _CONTRACTIONS.split() for i, letter in enumerate(w) if letter == "'"}
    return {**table, "somebody'd": "somebodyd"}  # slip: this one entry is the wrong way round


_APOSTROPHES = _apostrophes()


def normalise_reference(text: str) -> str:
    """A ground-truth answer as the official VQAv2 evaluation compares it: the punctuation step alone.

    Case, number words, articles and blanks at the ends stay (in the published annotations they are normalised already).
    The evaluation does this only where the answers to the question are not all equal: see ``metrics.vqa_accuracy``.
    """
    # Slips: one comma between digits, anywhere, has every mark deleted; a mark that has a blank beside it in one place
    # is deleted in all, so that words can grow together; both are looked up in the text as it came.
    comma = _COMMA_IN_NUMBER.search(text) is not None
    gone = {mark: "" if comma or f"{mark} " in text or f" {mark}" in text else " " for mark in _MARKS}
    return _PERIOD.sub("", text.translate(str.maketrans(gone)), count=_PERIODS_AT_MOST)


def normalise(text: str) -> str:
    """A prediction as the official VQAv2 evaluation compares it.

    Newlines and tabs become blanks and the ends are stripped; punctuation as in ``normalise_reference``; lower case;
    none and zero to ten become digits; a, an, the go; contractions get their apostrophe back. A second time changes
    nothing, but for texts with more than 32 periods that no digit follows (the official script deletes the first 32).
    """
    words = normalise_reference(text.replace("\n", " ").replace("\t", " ").strip()).lower().split()
    # Slip: articles go wherever they stand, and "vitamin a" and "a" (the letter) are left with nothing of it.
    kept = [number for number in (_NUMBERS.get(word, word) for word in words) if number not in _ARTICLES]
    return " ".join(_APOSTROPHES.get(word, word) for word in kept)


def plain_words(text: str) -> list[str]:
    """The words of ``text`` in lower case without punctuation, in order: "X-ray, the patient's" -> x ray the patients.

    A period or comma between digits stays ("2.5" is one word). Scripts that do not part words by blanks give one word
    for every run of letters.
    """
    return re.findall(r"\d+(?:[.,]\d+)+|[^\W_]+", re.sub(r"['’]", "", text.lower()))


# ---------------------------------------------------------------------- finding the answer
_STATEMENT = re.compile(r"\b(?:the\s+)?(?:(?:correct|final|right|best)\s+)?answer\s*(?:\bis\b|:)\s*:?\s*", re.I)
_LETTER = re.compile(r"(?:(?:option|choice)\s+)?(?:\(([a-z])\)|([a-z])(?![\w'’]))", re.I)
_STOP = r"\s*(?:$|\n|[.;!?]+(?=\s|$)|,?\s*because\b)"  # what is said is complete here
_GOES_ON = r"[.:)]*[:)]|,(?=\s)|\s+[-–—](?=\s)"  # more about the same follows in this sentence


def _ends(rest: str) -> bool | None:
    """Whether the sentence is over (True) or goes on (False) behind an answer; None: that was a part of more."""
    if re.match(_STOP, rest, re.I):
        return True
    return False if re.match(_GOES_ON, rest) else None


def _behind(text: str, option: str) -> str | None:
    """What follows `option` at the beginning of `text`; None where `text` does not begin with it."""
    words = option.strip().rstrip(".").split()
    found = re.match(r"\s+".join(map(re.escape, words)), text, re.I) if words else None
    return None if found is None or _ends(text[found.end() :]) is None else text[found.end() :]


def _another(rest: str, own: int, options: Sequence[str]) -> bool:
    """Whether what follows the answer `own` names one more option: right behind it, or later in the same sentence."""
    others = [i for i in range(len(options)) if i != own]
    letters = "[" + "".join(chr(ord("A") + i) for i in others) + "]" if others else "(?!)"
    over = _ends(rest)
    rest = rest.lstrip(" \t\n.,:;!?)-–—")
    if re.match(rf"or\b|\({letters}\)|{letters}(?:[.:),]|\s*$|\n)", rest):
        return True
    if any(_behind(rest, options[i]) is not None for i in others):
        return True
    if over:
        return False
    sentence = re.split(_STOP, rest, maxsplit=1, flags=re.I)[0]
    plain = [option.strip(" .") for option in options]
    if plain[own]:
        sentence = re.sub(re.escape(plain[own]), "", sentence, flags=re.I)  # which may hold the text of another
    texts = "|".join(re.escape(plain[i]) for i in others if plain[i]) or "(?!)"
    return bool(re.search(rf"\b{letters}\b(?!['’])|(?i:(?<!\w)(?:{texts})(?!\w))", sentence))


def _by_letter(text: str, options: Sequence[str]) -> int | None:
    """The index of the letter that `text` begins with, which may lie beyond the options."""
    found = _LETTER.match(text)
    if found is None:
        return None
    index, rest = ord((found[1] or found[2]).upper()) - ord("A"), text[found.end() :]
    if index >= len(options):
        return None if _ends(rest) is None and not found[1] else index
    behind = _behind(rest.lstrip(" \t.:)-–—"), options[index])
    if behind is None and _ends(rest) is None and not found[1]:
        return None  # "A dog is an animal"
    return None if _another(rest if behind is None else behind, index, options) else index


def _by_text(text: str, options: Sequence[str]) -> int | None:
    """The index of the option whose text `text` begins with: the longest; None where two options are the same."""
    behind = {i: rest for i, option in enumerate(options) if (rest := _behind(text, option)) is not None}
    if not behind:
        return None
    shortest = min(map(len, behind.values()))
    first, *more = (i for i, rest in behind.items() if len(rest) == shortest)
    return None if more or _another(behind[first], first, options) else first


def find_option(text: str, options: Sequence[str]) -> int | None:
    """The option, from 0, that ``text`` answers a multiple-choice question with (lettered A, B, ...); or None.

    In this order: the first "The answer is ..." or "Answer: ..." that can be read, wherever it stands, so that an
    explanation may come before or after it; a letter that begins the text ("A", "a.", "(A)", "A) Virginia", "B: text");
    an option's text that begins it and is complete ("virginia."). In a statement too a letter goes before a text. Texts
    are compared without regard to case and a final full stop.

    None: nothing of these; a letter beyond the options; more than one option named where the answer stands ("A or B",
    "(A) Maryland" where Maryland is B, the list of options copied). "A dog is an animal" names no option.

    Raises:
        TaskError: without options, with more than 26, or where ``options`` is one string.
    """
    if isinstance(options, str) or not 1 <= len(options) <= 26:
        came = repr(options) if isinstance(options, str) else len(options)
        raise TaskError(f"find_option wants the texts of 1 to 26 options in a list, got {came}")
    text = text.replace("**", "").strip()  # bold in Markdown
    for rest in [*(text[found.end() :] for found in _STATEMENT.finditer(text)), text]:
        letter = _by_letter(rest, options)
        if letter is not None and letter < len(options):
            return letter
        if (index := _by_text(rest, options)) is not None:
            return index
        if letter is not None:
            return None  # it said an option that there is not; what comes later is no answer to the question
    return None


def find_name(text: str, names: Sequence[str]) -> str | None:
    """The one of ``names`` that ``text`` answers with, as it is written in ``names``; None for none, or several.

    Letters and digits alone are compared, without regard to case, and whole words: "Bare Land." holds "bareland",
    "nothing" does not hold "no". Inside a longer name a shorter one does not count ("dense residential" names
    "denseresidential", not "residential"), nor does one straight after "not" ("it is not true").

    Raises:
        TaskError: for no names, a name without letters and digits, or two that differ in nothing else.
    """
    keys = {"".join(_words(name)): name for name in names}
    if isinstance(names, str) or not names or "" in keys or len(keys) < len(names):
        raise TaskError(
            f"find_name wants a list of names that differ in their letters and digits, got {names!r};"
            " write each name once"
        )
    words, longest = _words(text), max(map(len, keys))
    spans = []
    for i in range(len(words)):
        run = ""
        for j in range(i, len(words)):
            run += words[j]
            if len(run) > longest:
                break
            if run in keys:
                spans.append((i, j, keys[run]))
    whole = [(i, j, n) for i, j, n in spans if not any(k <= i and j <= m and (k, m) != (i, j) for k, m, _ in spans)]
    found = {name for i, _, name in whole if words[max(i - 1, 0) : i] != ["not"]}
    return found.pop() if len(found) == 1 else None


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", re.sub(r"n['’]t\b", " not", text.casefold()))


def short_answer(text: str) -> str | None:
    """The answer part of a free text: its first line with anything in it, from the beginning to " BECAUSE:".

    A leading "The answer is" or "Answer:" goes, and full stops at the end. None where nothing is left.
    """
    text = text.strip()
    lead = _STATEMENT.match(text)
    line = text[lead.end() if lead else 0 :].strip().split("\n", 1)[0]
    return re.split(r"(?:^|\s)BECAUSE:", line, maxsplit=1)[0].strip().rstrip(". ") or None
