"""From messages to token ids: the one place where text becomes tokens, shared by every stage.

SFT, reward model, DPO and PPO must see the same prompt bytes, so none of them renders by itself, and the training
libraries only ever get token ids. What is generated is never re-tokenised for the same tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal

from jinja2 import TemplateError

from align.data.files import RowProblem
from align.data.rows import Message
from align.errors import ArtifactError, DataError

PAD_TOKEN = "<|pad|>"
REMEMBERED = 8
"""Texts whose ids are kept: the answers to one prompt begin with the same text."""


class Renderer:
    """Renders conversations for one tokenizer.

    `template` "chat" uses the tokenizer's chat template, "plain" concatenates prompt text and response, "auto" picks
    chat when there is a template. A rendered response always ends with exactly one end-of-turn token, so the model
    learns to stop.
    """

    def __init__(self, tokenizer: Any, template: Literal["auto", "chat", "plain"] = "auto"):
        if template == "chat" and not tokenizer.chat_template:
            raise ArtifactError(
                f"{tokenizer.name_or_path}: data.template is 'chat' but the tokenizer has no chat template; "
                "set data.template=plain, or use a model with a template"
            )
        if tokenizer.eos_token_id is None:
            raise ArtifactError(f"{tokenizer.name_or_path}: the tokenizer has no EOS token, so no response could end")
        self.tokenizer = tokenizer
        self._known = lru_cache(REMEMBERED)(self._new_ids)
        self.is_chat = bool(tokenizer.chat_template) and template != "plain"
        self.end_of_turn = self._find_end_of_turn() if self.is_chat else tokenizer.eos_token_id
        self.stop_ids: tuple[int, ...] = tuple(sorted({self.end_of_turn, tokenizer.eos_token_id}))
        self.pad_id: int = tokenizer.pad_token_id
        if self.pad_id is None or self.pad_id in self.stop_ids:
            raise ArtifactError(
                f"{tokenizer.name_or_path}: PAD must be a token of its own, distinct from EOS, or models never learn "
                "to stop; load the tokenizer through align.models.load"
            )
        self._control_texts = tuple(tokenizer.all_special_tokens)

    def prompt(self, messages: Sequence[Message], source: str = "") -> list[int]:
        """Ids of a prompt, ready for a response to follow."""
        self._refuse_control_text(messages, source)
        if self.is_chat:
            return self._encode(self._text(messages, source, add_generation_prompt=True))
        ids = self.tokenizer("".join(message["content"] for message in messages))["input_ids"]
        is_closed = ids[-1:] == [self.tokenizer.eos_token_id]  # some tokenizers end every text with EOS
        return ids[:-1] if is_closed else ids

    def response(self, messages: Sequence[Message], text: str, source: str = "") -> list[int]:
        """Ids of a response to `messages`, end-of-turn token included; they follow `prompt(messages)`."""
        if not self.is_chat:
            self._refuse_control_text([{"role": "assistant", "content": text}], source)
            return [*self._encode(text), self.end_of_turn]
        ids, mask = self.conversation([*messages, {"role": "assistant", "content": text}], source)
        return ids[_last_run_start(mask) :]

    def conversation(self, messages: Sequence[Message], source: str = "") -> tuple[list[int], list[bool]]:
        """Ids of a conversation that ends with the assistant, and a mask of the same length that is True on every
        assistant token, end-of-turn tokens included."""
        if not self.is_chat:
            prompt = self.prompt(messages[:-1], source)
            response = self.response(messages[:-1], messages[-1]["content"], source)
            return prompt + response, [False] * len(prompt) + [True] * len(response)
        self._refuse_control_text(messages, source)
        text = self._text(messages, source)
        edges = [0]
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                edges.append(self._prefix_length(messages[:index], text, source, add_generation_prompt=True))
                is_last = index == len(messages) - 1
                edges.append(len(text) if is_last else self._prefix_length(messages[: index + 1], text, source))
        ids: list[int] = []
        mask: list[bool] = []
        end = 0
        for number, segment in enumerate(self._segments(text, edges)):  # what is asked and answered, in turn
            is_answer = number % 2 == 1
            length = next((place + 1 for place, token in enumerate(segment) if token in self.stop_ids), 0)
            if is_answer and not length:
                what = "the chat template does not end the assistant's turn with a stop token"
                raise DataError(RowProblem(source, what, kind="missing EOS"))
            end = len(ids) + length
            ids += segment
            mask += [is_answer and place < length for place in range(len(segment))]
        return ids[:end], mask[:end]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of response ids, without end-of-turn and other special tokens."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def without_control_text(self, text: str) -> str:
        """Text that a model produced, without anything this tokenizer would read as a control token."""
        while any(control in text for control in self._control_texts):  # taking one out may join another
            for control in self._control_texts:
                text = text.replace(control, "")
        return text

    def _text(self, messages: Sequence[Message], source: str = "", add_generation_prompt: bool = False) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except TemplateError as error:  # templates refuse roles and orders that they do not know
            what = f"the chat template refuses this conversation: {error}"
            hint = "remove the turn, or data.template=plain"
            raise DataError(RowProblem(source or "prompt", what, hint, "template refuses")) from error
        for number, message in enumerate(messages, start=1):
            # Templates may strip texts, and quote what tools say.
            if message["role"] != "tool" and message["content"].strip() not in text:
                what = f"the chat template leaves out what message {number} says, by `{message['role']}`"
                hint = "remove the turn, or data.template=plain"
                raise DataError(RowProblem(source or "prompt", what, hint, "template drops"))
        return text

    def _encode(self, text: str) -> list[int]:
        """Ids of text that is not a whole prompt, or whose template has written its BOS already."""
        return list(self._known(text))

    def _new_ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _prefix_length(
        self, messages: Sequence[Message], text: str, source: str, add_generation_prompt: bool = False
    ) -> int:
        prefix = self._text(messages, source, add_generation_prompt)
        if not text.startswith(prefix):
            raise DataError(
                RowProblem(
                    source,
                    "the chat template is not prefix-stable: rendering the conversation up to a turn is not a prefix "
                    "of rendering it whole, so the loss mask would be wrong",
                    "use a template that does not rewrite earlier turns, or data.template=plain",
                    "loss mask",
                )
            )
        return len(prefix)

    def _segments(self, text: str, edges: Sequence[int]) -> list[list[int]]:
        """Ids of the text between each two edges.

        As the whole text is tokenised, unless a token would lie across an edge (an answer that starts with a newline
        after a prompt that ends with one): then each segment by itself, which is how the model meets them, because
        it generates after the prompt's own ids.
        """
        whole = self._encode(text)
        known = {0: [], len(text): whole}
        prefixes = [known[edge] if edge in known else self._encode(text[:edge]) for edge in edges]
        if all(whole[: len(prefix)] == prefix for prefix in prefixes):
            return [whole[len(before) : len(after)] for before, after in pairwise(prefixes)]
        return [self._encode(text[before:after]) for before, after in pairwise(edges)]

    def _find_end_of_turn(self) -> int:
        """The special token with which the template ends an assistant turn."""
        prompt = [{"role": "user", "content": "a"}]
        start = len(self._encode(self._text(prompt, add_generation_prompt=True)))
        ids = self._encode(self._text([*prompt, {"role": "assistant", "content": "b"}]))
        special = set(self.tokenizer.all_special_ids)
        return next((token for token in ids[start:] if token in special), self.tokenizer.eos_token_id)

    def _refuse_control_text(self, messages: Sequence[Message], source: str) -> None:
        """Special tokens written as text would be read as control tokens: a way to inject turns into a prompt."""
        for message in messages:
            for text in self._control_texts:
                if text in message["content"]:
                    raise DataError(
                        RowProblem(
                            source or "prompt",
                            f"the text contains {text!r}, a control token of this tokenizer",
                            "remove it from the data; it would be read as the end or start of a turn",
                            "control text",
                        )
                    )


def _last_run_start(mask: Sequence[bool]) -> int:
    """Index where the last run of True begins; the mask ends with True."""
    start = len(mask)
    while start and mask[start - 1]:
        start -= 1
    return start
