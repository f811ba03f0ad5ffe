"""What a check says, and how it takes an answer: missing, of another kind than wanted, or one to be judged."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ..errors import EASError

NOT_YET = "not answered yet: put your answer in place of None, and run this cell again"


@dataclass(frozen=True)
class Verdict:
    """`right`: True, False, or None where there is no answer yet; `words` say so, with a hint or what was measured."""

    right: bool | None
    words: str

    def __repr__(self) -> str:
        return {True: "✓ right: ", False: "✗ not yet right: ", None: "… "}[self.right] + self.words


def exercise(kind: Callable[[Any], Any]) -> Callable[[Callable], Callable]:
    """Makes a check of a function that gets an answer of this kind, and returns whether it is right, and words.

    The check takes anything as an answer: None and ... are no answer; what `kind` refuses with a ValueError, and an
    EASError that judging it raises, become hints.
    """

    def wrap(judge: Callable[..., tuple[bool | None, str]]) -> Callable[..., Verdict]:
        @functools.wraps(judge)
        def check(answer: Any, *given: Any, **more: Any) -> Verdict:
            if answer is None or answer is ...:
                return Verdict(None, NOT_YET)
            try:
                return Verdict(*judge(kind(answer), *given, **more))
            except (EASError, ValueError) as error:
                return Verdict(False, str(error))

        return check

    return wrap


# -- kinds of answers: each returns the answer in one form, or raises ValueError with what was wanted ----------------


def _came(answer: Any) -> str:
    return f"got {answer!r:.60}, a {type(answer).__name__}"


def whole(answer: Any) -> int:
    """A whole number; 4.0, a numpy integer and a tensor of one number are, True is not."""
    value = number(answer)
    if not value.is_integer():
        raise ValueError(f"wanted a whole number, such as 3; {_came(answer)}")
    return int(value)


def number(answer: Any) -> float:
    try:
        if isinstance(answer, (str, bytes, bool)):
            raise TypeError
        return float(answer)
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor of several numbers
        raise ValueError(f"wanted a number, such as 0.25; {_came(answer)}") from None


def pair(answer: Any) -> tuple[float, float]:
    try:
        one, other = answer
    except (TypeError, ValueError):
        raise ValueError(f"wanted two numbers, such as (0.5, 2.0); {_came(answer)}") from None
    return number(one), number(other)


def sites(answer: Any) -> set[int]:
    """Numbers of sites or layers; an empty list is an answer."""
    if isinstance(answer, (str, bytes)) or not isinstance(answer, Iterable):
        raise ValueError(f"wanted a list of numbers, such as [2, 5]; {_came(answer)}")
    found = [operator.index(whole(one)) for one in answer]
    if len(set(found)) < len(found):
        raise ValueError(f"name each number once; {_came(answer)}")
    return set(found)


def names(answer: Any) -> set[str]:
    """Several texts; an empty list is an answer."""
    if isinstance(answer, (str, bytes)) or not isinstance(answer, Iterable):
        raise ValueError(f'wanted a list of names, such as ["base"]; {_came(answer)}')
    return {text(one) for one in answer}


def text(answer: Any) -> str:
    if not isinstance(answer, str):
        raise ValueError(f"wanted a text in quotes; {_came(answer)}")
    return answer.strip()


def anything(answer: Any) -> Any:
    return answer


# -- comparing --------------------------------------------------------------------------------------------------------


def close(answer: float, truth: float, share: float = 0.02, size: float = 5e-4) -> bool:
    """Within a share of the truth, or a size for the sake of rounding."""
    return answer == truth or math.isclose(answer, truth, rel_tol=share, abs_tol=size)


def how_far(answer: float, truth: float, **tolerance: float) -> str:
    """What is wrong with a number, without giving the right one away."""
    if close(answer, -truth, **tolerance):
        return "the size is right, the sign is not: the other way round"
    if close(answer, 100 * truth, **tolerance):
        return "a hundred times too large: wanted is a share, not percent"
    return f"{answer:.4g} is too {'large' if answer > truth else 'small'}"


def limits(answer: int, count: int, what: str) -> None:
    """Raises ValueError unless 0 <= answer < count."""
    if not 0 <= answer < count:
        raise ValueError(f"{what} are numbered 0 to {count - 1}; there is no {answer}")
