"""Everything that is measured under one name: eas_kit.measure.parameters(net), .flops(...), .latency(...), and more."""

from __future__ import annotations

from .counting import PARTS, count_flops, flops, parameters
from .timing import attention_share, compare_latency, latency, peak_memory

__all__ = [
    "PARTS",
    "attention_share",
    "compare_latency",
    "count_flops",
    "flops",
    "latency",
    "parameters",
    "peak_memory",
]
