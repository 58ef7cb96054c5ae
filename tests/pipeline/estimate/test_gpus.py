"""What `--gpu` takes."""

from __future__ import annotations

import pytest

from align.errors import ConfigError
from align.pipeline.estimate.gpus import parse_gpus
from align.pipeline.estimate.memory import Device


@pytest.mark.parametrize(
    ("text", "device"),
    [
        ("8x24GiB", Device(24 * 2**30, 8)),
        ("24GiB x 8", Device(24 * 2**30, 8)),
        ("80GB", Device(80 * 10**9)),
        ("2 x 0.5 gib", Device(2**29, 2)),
        ("1x512MiB", Device(2**29)),
    ],
)
def test_gpus(text, device):
    assert parse_gpus(text) == device


@pytest.mark.parametrize(
    "text",
    [
        "",
        "8",
        "8x",
        "x24GiB",
        "24",
        "0x24GiB",
        "8x0GiB",
        "8x24TB",
        "-1x24GiB",
        "8*24GiB",
        "2x24GiBx8",
    ],
)
def test_others_are_refused_with_an_example(text):
    with pytest.raises(ConfigError, match="write 8x24GiB"):
        parse_gpus(text)
