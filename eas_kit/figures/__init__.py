"""The figures of Effective Attention Skipping: pure functions, data in, a plotly `go.Figure` out.

Nothing is shown and nothing global is set: `eas_kit.live.show(figure)` shows, `figure_png(figure)` makes the static
copy. Site numbers are zero-based everywhere. Plotly is imported with the first figure, matplotlib with the first copy.
"""

from __future__ import annotations

from .choices import agreement_matrix, mask_comparison, scorer_comparison
from .gallery import gallery
from .merging import latency_bars, merge_scatter
from .paper import measured_beside_published, redundancy_and_accuracy, skipped_sites
from .playback import save_playback, search_playback
from .png import figure_png
from .preferences import preference_heatmap, search_figure
from .redundancy import probe_curves, single_site_bars
from .spending import time_shares
from .style import FigureError
from .tradeoff import accuracy_vs_speed
from .tuning import arms_accuracy, training_curves

__all__ = [
    "FigureError",
    "accuracy_vs_speed",
    "agreement_matrix",
    "arms_accuracy",
    "figure_png",
    "gallery",
    "latency_bars",
    "mask_comparison",
    "measured_beside_published",
    "merge_scatter",
    "preference_heatmap",
    "probe_curves",
    "redundancy_and_accuracy",
    "save_playback",
    "scorer_comparison",
    "search_figure",
    "search_playback",
    "single_site_bars",
    "skipped_sites",
    "time_shares",
    "training_curves",
]
