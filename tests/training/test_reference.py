"""The reference's log-probabilities on disk: what the key holds, and that a reader sees a whole file or none."""

from __future__ import annotations

import threading

import pytest
import torch
from transformers import LlamaConfig

from align.training.reference import read_logprobs, reference_key, write_logprobs

ROWS = [
    {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5], "other": 1},
    {"prompt_ids": [1], "chosen_ids": [2, 3], "rejected_ids": [4], "other": 2},
]
SAME = {
    "weights": "w",
    "config": LlamaConfig(hidden_size=32),
    "rows": ROWS,
    "columns": ("prompt_ids", "chosen_ids", "rejected_ids"),
    "precision": "torch.float32, no, cpu",
}


@pytest.mark.parametrize(
    "change",
    [
        {"weights": "v"},
        {"config": LlamaConfig(hidden_size=32, rms_norm_eps=1e-5)},
        {"rows": ROWS[::-1]},
        {"rows": ROWS[:1]},
        {"rows": [{**ROWS[0], "chosen_ids": [4]}, ROWS[1]]},
        {"rows": [{**ROWS[0], "prompt_ids": [1], "chosen_ids": [2, 3]}, ROWS[1]]},  # the same ids, cut elsewhere
        {"precision": "torch.float32, bf16, cpu"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_changes_the_values_changes_the_key(change):
    assert reference_key(**{**SAME, **change}) != reference_key(**SAME)


def test_what_does_not_change_them_does_not():
    """Columns that are not passed through the model, and where the model lies."""
    rows = [{**row, "other": 7} for row in ROWS]
    moved = LlamaConfig(hidden_size=32, name_or_path="elsewhere")
    assert reference_key(**{**SAME, "rows": rows, "config": moved}) == reference_key(**SAME)


def test_round_trip(tmp_path):
    """Bit for bit; nothing there is None."""
    path = tmp_path / "folder" / "key.safetensors"
    assert read_logprobs(path) is None
    values = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)) * 100
    write_logprobs(path, values)
    assert torch.equal(read_logprobs(path), values)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text"])
def test_a_damaged_file_is_none(tmp_path, damage):
    path = tmp_path / "key.safetensors"
    write_logprobs(path, torch.ones(100, 2))
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-5] ^= 4
    path.write_bytes({"cut": whole[:-8], "flipped": bytes(flipped), "empty": b"", "text": b"no tensors"}[damage])
    assert read_logprobs(path) is None


def test_many_writers_and_readers_at_once(tmp_path):
    """Four stages write the same key while four others read it: what is read is whole, every time, and no temporary
    file is left."""
    path, values = tmp_path / "key.safetensors", torch.arange(20_000.0).view(-1, 2)
    write_logprobs(path, values)
    wrong: list[str] = []

    def write() -> None:
        for _ in range(10):
            write_logprobs(path, values)

    def read() -> None:
        for _ in range(30):
            found = read_logprobs(path)
            if found is None or not torch.equal(found, values):
                wrong.append("torn")

    threads = [threading.Thread(target=work) for work in (write, read) * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert [one.name for one in tmp_path.iterdir()] == ["key.safetensors"]
