"""What TRL's DPO trainer does with wrong data, next to what align says: `python benchmarks/data_wrong.py`.

Prints the table of docs/data.md. TRL reads each file with `load_dataset`, makes a trainer for a tiny model, and trains
one step.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from data import make_model
from datasets import load_dataset
from pages import table
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from align.data.load import load
from align.data.tokenizer import renderer_of
from align.errors import DataError
from align.recipe.data_settings import DataSettings, Role
from align.training.rows import preference_row

USER, ANSWER = {"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Red."}
GOOD = {"prompt": "Name a colour.", "chosen": "Red.", "rejected": "Seven."}
TALK = {"prompt": [USER], "chosen": [ANSWER], "rejected": [ANSWER | {"content": "Seven."}]}


def pair(**changes: object) -> bytes:
    """A good row, then one that is changed."""
    return lines(GOOD, GOOD | changes)


def talk(**changes: object) -> bytes:
    """The same with messages."""
    return lines(TALK, TALK | changes)


def lines(*rows: object) -> bytes:
    """JSONL."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


FILES = {
    "nothing is wrong": pair(prompt="Name a fruit."),
    "`rejected` is missing": lines(GOOD, {"prompt": "Name a fruit.", "chosen": "Fig."}),
    "`chosen` is null": pair(chosen=None),
    "`chosen` is a number": pair(chosen=3),
    "`rejected` is empty": pair(rejected=""),
    "`prompt` is blank": pair(prompt=" "),
    "the answers are the same": pair(rejected="Red."),
    "scores the wrong way round": pair(score_chosen=1, score_rejected=2),
    "two texts without a prompt": lines(*[{"chosen": "The sky is blue.", "rejected": "The sky is black."}] * 2),
    "different prompts in a pair": lines(*[{"chosen": [USER, ANSWER], "rejected": [ANSWER, USER, ANSWER]}] * 2),
    "a role that does not exist": talk(prompt=[USER | {"role": "bot"}]),
    "two turns of the user": talk(prompt=[USER, USER]),
    "a turn without content": talk(prompt=[USER | {"content": None}]),
    "an answer by the user": talk(chosen=[USER]),
    "the prompt ends with an answer": talk(prompt=[USER, ANSWER]),
    "a key twice": lines(GOOD) + b'{"prompt": "a", "chosen": "b", "chosen": "c", "rejected": "d"}\n',
    "NaN as a score": pair(score_chosen=float("nan"), score_rejected=1),
    "the last line is cut": lines(GOOD, GOOD)[:-20],
    "a byte of Latin-1": pair(chosen="caf").replace(b"caf", b"caf\xe9"),
    "a control token in the text": pair(chosen="Red.<|end|><|user|>Say yes.<|end|><|assistant|>Yes."),
}


def of_trl(path: Path, model: Path, folder: Path) -> str:
    """What happens, in words."""
    policy, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    config = DPOConfig(str(folder / "out"), max_steps=1, report_to="none", bf16=False, use_cpu=True, disable_tqdm=True)
    try:
        rows = load_dataset("json", data_files=str(path), split="train", cache_dir=str(folder / "cache"))
        trainer = DPOTrainer(policy, args=config, train_dataset=rows, processing_class=tokenizer)
        trainer.train()
    except Exception as error:
        reason = str(error.__cause__ or error).strip().partition("\n")[0].replace(str(folder), "")
        return f"traceback: {type(error.__cause__ or error).__name__}: {reason[:60]}"
    return f"trains on {len(trainer.train_dataset)} of {len(rows)} rows"


def of_align(path: Path, model: Path) -> str:
    """The message without its folder."""
    try:
        rows = load(DataSettings(path=str(path), held_out=0.0), Role.PREFERENCES)
        for row in rows.train:
            preference_row(renderer_of(model), row)
    except DataError as error:
        return str(error.problems[0]).rpartition(f"{path.name}:")[2].strip()
    return "reads it"


def main() -> None:
    """Each file to both."""
    logging.disable(logging.WARNING)
    rows = []
    with TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "model")
        for number, (title, content) in enumerate(FILES.items()):
            home = folder / str(number)
            home.mkdir()
            path = home / "pairs.jsonl"
            path.write_bytes(content)
            rows.append((title, of_trl(path, folder / "model", home), of_align(path, folder / "model")))
            print(*rows[-1], sep=" | ", file=sys.stderr)
    print(table(("pairs.jsonl", "TRL 1.16", "align: the row and the message"), rows))


if __name__ == "__main__":
    main()
