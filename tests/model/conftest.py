"""Shared by the tests of the model."""

from __future__ import annotations

import pytest

from mmclip_dist.data.batch import Batch
from tests.batches import mixed_batch


@pytest.fixture
def batch(sets, tokenizer) -> Batch:
    return mixed_batch(sets, tokenizer)
