"""Checks of the notebooks' exercises: the reader's answer against what the notebook itself has measured.

    from eas_kit import exercises

    answer = None  # the reader's
    exercises.most_needed_attention(answer, base, reading, limit=examples)

A check returns a `Verdict`, which a notebook shows as the last line of its cell. An answer that is still None (or ...)
is "not answered yet": nothing is computed, and nothing fails, so that a notebook runs headless as it is. A wrong answer
gets a hint that is about this answer; what is right is always computed from what is passed, here and now.
"""

from .comparing import pairs_apart, rows_that_fold
from .finding import (
    better_mask,
    most_needed_attention,
    most_needed_feed_forward,
    most_skipped_site,
    saved_mask,
    shared_by_the_worst,
    surplus_of_both,
    underestimated_masks,
    width_of_rewards,
)
from .using import (
    column_of_largest_change,
    error_of_the_slip,
    record_left_out,
    share_at_ranks,
    target_tokens,
    tokens_to_win_back,
)
from .verdict import Verdict

__all__ = [
    "Verdict",
    "better_mask",
    "column_of_largest_change",
    "error_of_the_slip",
    "most_needed_attention",
    "most_needed_feed_forward",
    "most_skipped_site",
    "pairs_apart",
    "record_left_out",
    "rows_that_fold",
    "saved_mask",
    "share_at_ranks",
    "shared_by_the_worst",
    "surplus_of_both",
    "target_tokens",
    "tokens_to_win_back",
    "underestimated_masks",
    "width_of_rewards",
]
