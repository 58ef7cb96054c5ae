"""`align generate`: answers of a trained policy, through the real command, on both engines."""

from __future__ import annotations

import json

import pytest

PROMPTS = 120


def read(path) -> list[dict]:
    """Lines end with a newline and nothing else: a response may hold what Unicode calls a line break."""
    with path.open(encoding="utf-8", newline="\n") as lines:
        return [json.loads(line) for line in lines]


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_every_prompt_is_answered_in_order(engine, chain, tmp_path):
    """Two responses to each prompt, in the order of the file; the same seed gives the same, another seed others."""
    policy = str(chain.folder_of("sft"))
    outputs = [tmp_path / name for name in ("a.jsonl", "b.jsonl", "c.jsonl")]
    for output, seed in zip(outputs, ("0", "0", "1"), strict=True):
        options = ["-n", "2", "--max-tokens", "6", "--engine", engine, "--seed", seed]
        said = chain.align("generate", "prompts.jsonl", "--model", policy, "-o", str(output), *options)
        assert f"engine: {engine}, " in said and "wrote 240 responses" in said
    rows = read(outputs[0])
    asked = [row["prompt"] for row in read(chain.folder / "prompts.jsonl")]
    assert [row["messages"][-1]["content"] for row in rows] == [prompt for prompt in asked for _ in range(2)]
    assert set(rows[0]) == {"messages", "response", "finished"}
    assert read(outputs[1]) == rows != read(outputs[2])


def test_the_best_of_several_by_the_reward_model(chain, tmp_path):
    """The same draws: the highest score of every four is what --best-of 4 writes."""
    models = ["--model", str(chain.folder_of("sft")), "--reward", str(chain.folder_of("reward"))]
    options = ["--max-tokens", "6", "--engine", "transformers"]
    every, best = tmp_path / "every.jsonl", tmp_path / "best.jsonl"
    chain.align("generate", "prompts.jsonl", *models, *options, "-n", "4", "-o", str(every))
    chain.align("generate", "prompts.jsonl", *models, *options, "--best-of", "4", "-o", str(best))
    rows = read(every)
    highest = [max(rows[start : start + 4], key=lambda row: row["score"]) for start in range(0, len(rows), 4)]
    assert len(highest) == PROMPTS and read(best) == highest


def test_wrong_use_is_told_and_nothing_is_written(chain, tmp_path):
    """All problems of the command line at once; a model of another kind; a file that is there; prompts too long."""
    policy, reward = str(chain.folder_of("sft")), str(chain.folder_of("reward"))
    taken = tmp_path / "taken.jsonl"
    taken.write_text("mine\n", encoding="utf-8")
    said = chain.align("generate", "prompts.jsonl", "--model", policy, "-o", str(taken), "--best-of", "2", expect=2)
    assert "already exists, and is not overwritten" in said and "add --reward FOLDER" in said
    assert taken.read_text(encoding="utf-8") == "mine\n"
    output = tmp_path / "new.jsonl"
    said = chain.align("generate", "prompts.jsonl", "--model", reward, "-o", str(output), expect=4)
    assert "this is a reward model; a policy is needed here" in said
    said = chain.align("generate", "none.jsonl", "--model", policy, "-o", str(output), expect=3)
    assert "none.jsonl" in said
    long = ["--max-tokens", "500", "--engine", "transformers"]
    said = chain.align("generate", "prompts.jsonl", "--model", policy, "-o", str(output), *long, expect=2)
    assert "lower --max-tokens" in said and "Traceback" not in said
    assert not output.exists()
