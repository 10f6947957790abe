"""What the masking of patches is told: how many are chosen, and which views are taken."""

from __future__ import annotations

from typing import NamedTuple


class Plan(NamedTuple):
    """chosen: patches of highest score (of lowest, if `low`) that are set apart, `swap` of which change places with others.
    first, second: patches of the two views; the first holds the chosen ones (`chosen_first`) or all others, the second is
    drawn from what is left. temperature: of the softmax over patches."""

    chosen: int
    swap: int
    first: int
    second: int
    chosen_first: bool
    low: bool
    temperature: float
