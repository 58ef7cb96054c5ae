"""What every engine is built from: how prompts are padded."""

from __future__ import annotations

from align.generation.engine import left_pad
from tests.generation.conftest import PAD


def test_prompts_are_padded_on_the_left():
    """Row 1: the last token of every prompt is in the last column; the mask says what is a prompt, also where a prompt
    holds PAD."""
    ids, mask = left_pad([[5], [6, PAD, 7]], PAD, "cpu")
    assert ids.tolist() == [[PAD, PAD, 5], [6, PAD, 7]]
    assert mask.tolist() == [[0, 0, 1], [1, 1, 1]]
