"""The HTML report of a run: one self-contained file.

`sources` reads the folder, `charts` and `examples` draw, `numbers` writes figures, `page` fills `template.html`.
"""

from mmclip_dist.evaluate.report.page import build_report

__all__ = ["build_report"]
