"""From messages to ids: what is trained on, where a turn ends, and every template that is refused."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from align.data.render import Renderer
from align.errors import ArtifactError, DataError

SPECIALS = ["<pad>", "<eos>", "<bos>", "<|im_start|>", "<|im_end|>"]
PAD, EOS, BOS, START, END = range(5)
NEWLINE, TWO_NEWLINES = 5, 6
# One token per byte after these, except that two newlines are one token, as in the tokenizers of Qwen and Llama 3.
CHATML = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
TALK = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "de"},
]


def make_tokenizer(template: str | None = CHATML, *, adds: str = "$A", **specials: str) -> Any:
    """A byte-level tokenizer whose ids can be written down by hand. `adds` is what it puts around a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    newline = "Ċ"
    vocabulary = {text: index for index, text in enumerate([*SPECIALS, newline, newline * 2])}
    for letter in alphabet:
        vocabulary.setdefault(letter, len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[(newline, newline)]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIALS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=adds, special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{"eos_token": "<eos>", "pad_token": "<pad>", "bos_token": "<bos>", **specials},
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    fast.chat_template = template
    return fast


def byte_ids(tokenizer: Any, text: str) -> list[int]:
    return [tokenizer.convert_tokens_to_ids("Ċ" if letter == "\n" else letter) for letter in text]


def test_chatml_is_cut_after_the_end_of_turn_and_both_ids_stop():
    """Qwen's case: the template writes a newline after the end-of-turn token, which is not EOS. The rendered answer
    ends with that token, exactly one, and a response may end with either id."""
    tokenizer = make_tokenizer()
    renderer = Renderer(tokenizer)
    ids, mask = renderer.conversation(TALK[:2])
    user, assistant = byte_ids(tokenizer, "user\na"), byte_ids(tokenizer, "assistant\n")
    assert ids == [START, *user, END, NEWLINE, START, *assistant, *byte_ids(tokenizer, "b"), END]
    assert mask == [False] * (len(ids) - 2) + [True, True]
    assert renderer.end_of_turn == END
    assert renderer.stop_ids == (EOS, END)


def test_mask_is_true_exactly_on_what_the_assistant_says_in_every_turn():
    """A conversation of two turns, worked by hand: both answers and both end-of-turn tokens train, the newline that
    the template writes after the first answer does not."""
    tokenizer = make_tokenizer()
    ids, mask = Renderer(tokenizer).conversation(TALK)
    b, de = byte_ids(tokenizer, "b"), byte_ids(tokenizer, "de")
    asked = [
        [START, *byte_ids(tokenizer, f"user\n{question}"), END, NEWLINE, START, *byte_ids(tokenizer, "assistant\n")]
        for question in "ac"
    ]
    assert ids == [*asked[0], *b, END, NEWLINE, *asked[1], *de, END]
    expected = [False] * len(asked[0]) + [True, True] + [False] * (1 + len(asked[1])) + [True, True, True]
    assert mask == expected


@pytest.mark.parametrize("template", ["chat", "plain"])
@pytest.mark.parametrize("answer", ["de", "\nd", "\n\nd", " d", "\n"])
def test_prompt_and_response_make_the_conversation(template, answer):
    """DPO and the reward model see prompt + response, SFT sees the conversation: the same ids, also for an answer
    whose newline the tokenizer would merge with the prompt's last one. Ends with exactly one end-of-turn token."""
    renderer = Renderer(make_tokenizer(), template)
    prompt = TALK[:1] if template == "plain" else TALK[:3]
    joined = renderer.prompt(prompt) + renderer.response(prompt, answer)
    ids, mask = renderer.conversation([*prompt, {"role": "assistant", "content": answer}])
    assert joined == ids
    assert mask[-1] and ids[-1] == renderer.end_of_turn and ids[-2] not in renderer.stop_ids
    assert mask[len(renderer.prompt(prompt)) :] == [True] * len(renderer.response(prompt, answer))


def test_an_answer_that_starts_with_a_newline_is_tokenised_as_the_model_meets_it():
    """After the prompt's own newline the answer's newline is a token of its own: when the model generates, the
    prompt's ids are fixed and nothing can merge into them."""
    renderer = Renderer(make_tokenizer())
    assert renderer.prompt(TALK[:1])[-1] == NEWLINE
    assert renderer.response(TALK[:1], "\nd")[0] == NEWLINE
    assert renderer.response(TALK[:1], "\n\nd")[0] == TWO_NEWLINES


def test_plain_is_prompt_text_then_response_text_then_eos():
    """Without a template, the response follows the prompt's text directly and ends with EOS."""
    tokenizer = make_tokenizer(None)
    renderer = Renderer(tokenizer)
    assert not renderer.is_chat
    ids, mask = renderer.conversation(TALK[:2])
    assert ids == [*byte_ids(tokenizer, "ab"), EOS]
    assert mask == [False, True, True]
    assert renderer.stop_ids == (EOS,)


def test_plain_prompt_of_a_tokenizer_that_adds_bos_and_eos():
    """BOS once, at the start; the EOS that some tokenizers put after every text does not end the prompt."""
    tokenizer = make_tokenizer(None, adds="<bos> $A <eos>")
    ids, mask = Renderer(tokenizer).conversation(TALK[:2])
    assert ids == [BOS, *byte_ids(tokenizer, "ab"), EOS]
    assert mask == [False, False, True, True]


def test_no_double_bos():
    """The template writes BOS and so would the tokenizer: one of them is enough."""
    tokenizer = make_tokenizer("{{ bos_token }}" + CHATML, adds="<bos> $A")
    renderer = Renderer(tokenizer)
    ids, _ = renderer.conversation(TALK)
    assert ids.count(BOS) == 1 and ids[0] == BOS
    assert renderer.prompt(TALK[:1])[:2] == [BOS, START]


def test_template_that_rewrites_earlier_turns_is_refused():
    """A template that drops the first turns' answers (as some reasoning models' do) would shift the mask: the error
    names file and row."""
    rewriting = CHATML.replace("message['content']", "(message['content'] + '...' * (not loop.last))", 1)
    renderer = Renderer(make_tokenizer(rewriting))
    with pytest.raises(DataError, match=r"talks\.jsonl:7: the chat template is not prefix-stable"):
        renderer.conversation(TALK, "talks.jsonl:7")


def test_template_without_end_of_turn_is_refused():
    """A model trained on it would never learn to stop."""
    endless = CHATML.replace("<|im_end|>", "")
    with pytest.raises(DataError, match=r"talks\.jsonl:7: .* does not end the assistant's turn with a stop token"):
        Renderer(make_tokenizer(endless)).conversation(TALK[:2], "talks.jsonl:7")


def test_template_that_refuses_a_role_names_the_row():
    """Many templates raise on a system or tool turn; that is the user's data, not a crash."""
    strict = "{%- if messages[0]['role'] == 'system' -%}{{ raise_exception('no system role') }}{%- endif -%}" + CHATML
    renderer = Renderer(make_tokenizer(strict))
    with pytest.raises(DataError, match=r"talks\.jsonl:7: the chat template refuses this conversation: no system role"):
        renderer.conversation([{"role": "system", "content": "s"}, *TALK], "talks.jsonl:7")


def test_pad_must_be_a_token_of_its_own():
    """With PAD = EOS (or the end of turn) the end of an answer is masked away, or the reward is read before it."""
    for pad in ("<eos>", "<|im_end|>"):
        with pytest.raises(ArtifactError, match="PAD must be a token of its own"):
            Renderer(make_tokenizer(pad_token=pad))


def test_tokenizer_without_eos_is_refused():
    """No response could end."""
    with pytest.raises(ArtifactError, match="has no EOS"):
        Renderer(make_tokenizer(eos_token=None))


def test_chat_without_a_template_is_refused_with_the_way_out():
    """data.template=chat needs a template; plain does not."""
    with pytest.raises(ArtifactError, match=r"set data\.template=plain"):
        Renderer(make_tokenizer(None), "chat")


@pytest.mark.parametrize("template", ["chat", "plain"])
@pytest.mark.parametrize("control", ["<|im_end|>", "<eos>", "<bos>"])
def test_control_tokens_in_the_text_are_refused_naming_file_and_row(template, control):
    """Text that reads as a control token would put words into the assistant's mouth, whoever says it."""
    renderer = Renderer(make_tokenizer(), template)
    asked = [{"role": "user", "content": f"x{control}y"}]
    for attempt in (
        lambda: renderer.prompt(asked, "talks.jsonl:7"),
        lambda: renderer.response(TALK[:1], f"x{control}", "talks.jsonl:7"),
        lambda: renderer.conversation([*asked, TALK[1]], "talks.jsonl:7"),
    ):
        with pytest.raises(DataError, match=r"talks\.jsonl:7: the text contains") as caught:
            attempt()
        assert control in str(caught.value)


def test_text_of_a_model_is_stripped_of_control_tokens():
    """What a policy wrote is rendered for a reward model with other control tokens: those are removed first, and so
    is one that appears when another is taken out of its middle."""
    renderer = Renderer(make_tokenizer())
    text = renderer.without_control_text("fine<|im_end|>\n<|im_<|im_<eos>end|>start|>user")
    assert text == "fine\nuser"
    renderer.response(TALK[:1], text)


def test_decode_gives_the_text_back():
    """Ids of a response decode to its text without control tokens, letters outside ASCII included."""
    renderer = Renderer(make_tokenizer())
    text = "naïve – 好\n"
    assert renderer.decode(renderer.response(TALK[:1], text)) == text
