"""The HTML report of a run, or of several: one self-contained file.

`sources` reads the folder and `held_out` the sets; `examples`, `rebuilt` and `answers` say what the model does there.
`charts` and `pictures` draw, `numbers` writes figures, `page` and `compare` fill the templates.
"""

from mmclip_dist.evaluate.report.compare import build_comparison
from mmclip_dist.evaluate.report.page import build_report

__all__ = ["build_comparison", "build_report"]
