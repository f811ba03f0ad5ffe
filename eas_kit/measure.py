"""Everything that is measured under one name: eas_kit.measure.parameters(net), .flops(...), .latency(...), and more."""

from __future__ import annotations

from .counting import PARTS, count_flops, flops, parameters
from .roofline import bandwidth, decode_bytes
from .spending import time_parts
from .timing import attention_share, compare_calls, compare_latency, latency, peak_memory

__all__ = [
    "PARTS",
    "attention_share",
    "bandwidth",
    "compare_calls",
    "compare_latency",
    "count_flops",
    "decode_bytes",
    "flops",
    "latency",
    "parameters",
    "peak_memory",
    "time_parts",
]
