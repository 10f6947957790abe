"""How many patches the masking chooses, and which views it returns."""

from __future__ import annotations

from typing import NamedTuple


class Plan(NamedTuple):
    """chosen: number of patches of highest (if `low`: lowest) score that are chosen. swap: how many of them change places with
    others. first, second: number of patches in the two views. The first view holds the chosen patches (`chosen_first`) or all
    others; the second is drawn from the rest. temperature: of the softmax over patches."""

    chosen: int
    swap: int
    first: int
    second: int
    chosen_first: bool
    low: bool
    temperature: float
