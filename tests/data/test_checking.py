"""Each finding of `align data check`, with a planted fault and without it."""

from __future__ import annotations

import json
import random
import time
from operator import eq
from pathlib import Path
from typing import Any

import pytest
from tokenizers.normalizers import Lowercase

from align.data.checking.check import Checked, Order, check, guess_role
from align.data.checking.findings import SHOWN, Finding, Severity
from align.data.checking.index import Index
from align.data.checking.near import BINS, Near, signature
from align.data.checking.preferences import binomial_tail
from align.data.checking.texts import is_card_number, personal_data, script
from align.data.render import Renderer
from align.errors import DataError
from align.recipe.data_settings import ReadSettings, Role
from tests.data.test_render import CHATML, make_tokenizer


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(name: str, *rows: object) -> str:
    Path(name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return name


def pair(number: int = 1, chosen: str = "Yes.", rejected: str = "No.", **more: object) -> dict[str, object]:
    return {"prompt": f"Question {number}?", "chosen": chosen, "rejected": rejected, **more}


def shown(number: int, answer: str = "Yes.") -> dict[str, object]:
    return {"prompt": f"Question {number}?", "response": answer}


def checked(*rows: object, role: Role = Role.PREFERENCES, **order: Any) -> Checked:
    return check(Order([write("a.jsonl", *rows)], role, **order), lambda number: None)


def found(kind: str, result: Checked) -> tuple[str, int, list[str]]:
    """Severity, count and places (row: what) of the one finding of this kind."""
    (one,) = [finding for finding in result.findings if finding.kind == kind]
    return str(one.severity), one.count, [f"{place.where.rpartition(':')[2]}: {place.what}" for place in one.places]


def left_out(result: Checked) -> list[int]:
    return [position + 1 for position, gone in enumerate(result.left_out) if gone]


def test_good_rows_have_no_findings() -> None:
    result = checked(pair(1), pair(2, "Perhaps.", "Never."))
    assert result.findings == []
    assert not result.has_errors


@pytest.mark.parametrize(
    ("row", "kind", "what"),
    [
        (pair(2, ""), "empty", "2: `chosen` is empty"),
        (pair(2, chosen=None), "missing", "2: `chosen` is null"),  # type: ignore[arg-type]
        (
            {"prompt": [{"role": "bot", "content": "Hi"}], "chosen": "a", "rejected": "b"},
            "unknown role",
            '2: message 1 of `prompt` has the role "bot"',
        ),
        (
            {"prompt": [{"role": "assistant", "content": "Hi"}], "chosen": "a", "rejected": "b"},
            "wrong order of roles",
            "2: message 1 of `prompt` is `assistant` at the start",
        ),
        (pair(2, "No."), "tie", "2: `chosen` and `rejected` are the same"),
    ],
)
def test_rows_that_training_refuses_are_errors(row: object, kind: str, what: str) -> None:
    result = checked(pair(1), row)
    assert found(kind, result) == ("error", 1, [what])
    assert result.has_errors
    assert not result.incurable
    assert [problem.where for problem in result.rejected] == ["a.jsonl:2"]


def test_few_ties_are_a_warning() -> None:
    """One in a hundred: training leaves it out and goes on."""
    result = checked(*(pair(number) for number in range(99)), pair(99, "No."))
    assert found("tie", result)[0] == "warning"
    assert not result.has_errors


def test_bytes_that_are_not_utf8() -> None:
    write("a.jsonl", pair(1), pair(2))
    Path("a.jsonl").write_bytes(Path("a.jsonl").read_bytes().replace(b"Question 2", b"Question \xe9"))
    result = check(Order(["a.jsonl"], Role.PREFERENCES), lambda number: None)
    severity, count, (place,) = found("not UTF-8", result)
    assert (severity, count) == ("error", 1)
    assert place.startswith("2: byte 0xe9")


def test_a_file_that_cannot_be_used_is_not_mended_by_leaving_rows_out() -> None:
    Path("empty.jsonl").touch()
    result = check(Order([write("a.jsonl", pair()), "empty.jsonl", "no.jsonl", "a.jsonl"], Role.PREFERENCES), print)
    (finding,) = result.incurable
    assert [str(place) for place in finding.places] == [
        "empty.jsonl: the file is empty",
        "no.jsonl: there is no such file",
        "a.jsonl: the file is listed twice",
    ]


def test_duplicates_count_from_the_second_on() -> None:
    """Rows 1, 3 and 4 say the same, the last with space around it; row 5 has another system message."""
    result = checked(pair(1), pair(2), pair(1), pair(1, "Yes. "), pair(1, system="Be kind."))
    assert found("duplicate", result) == (
        "warning",
        2,
        ["3: the same as a.jsonl:1", "4: the same as a.jsonl:1"],
    )
    assert left_out(result) == [3, 4]


LONG = " ".join(f"word{number}" for number in range(100))


def test_near_duplicates() -> None:
    """Row 2 lacks the last of 100 words: of the 96 runs of five words that are in either, 95 are in both. Row 3 has the
    same answers to another prompt, row 4 other answers to the same prompt."""
    other = " ".join(LONG.split()[::-1])
    result = checked(pair(1, LONG), pair(1, LONG[: LONG.rindex(" ")]), pair(2, LONG), pair(1, other))
    assert found("near duplicate", result) == ("warning", 1, ["2: nearly the same as a.jsonl:1"])
    assert left_out(result) == [2]


def test_near_duplicates_among_prompts_and_texts() -> None:
    texts = [f"{LONG} one", f"{LONG} two", " ".join(LONG.split()[::-1])]
    for name, role in (("prompt", Role.PROMPTS), ("text", Role.CORPUS)):
        result = checked(*({name: text} for text in texts), role=role)
        assert found("near duplicate", result)[2] == ["2: nearly the same as a.jsonl:1"]


def test_what_is_nearly_the_same_may_be_labelled_otherwise() -> None:
    """Neither a pair the other way round nor a judgement of the other kind counts double."""
    shorter = LONG[: LONG.rindex(" ")]
    assert "near duplicate" not in {one.kind for one in checked(pair(1, LONG), pair(1, "No.", shorter)).findings}
    rows = [{"prompt": "Hi", "completion": text, "label": text == LONG} for text in (LONG, shorter)]
    assert checked(*rows, role=Role.JUDGEMENTS).findings == []


def test_signatures_agree_in_the_share_of_runs_that_both_have() -> None:
    """Of 2 x 100 runs, 50 are in both: a Jaccard similarity of 50 / 150. The mean over 50 signatures of 32 hashes has a
    standard error of sqrt(1/3 * 2/3 / 1600) = 0.012; it is within four."""
    shares = []
    for seed in range(50):
        words = [f"{seed} {number}" for number in range(154)]
        a, b = (signature([" ".join(word.replace(" ", "-") for word in part)]) for part in (words[:104], words[50:]))
        shares.append(sum(map(eq, a, b)) / BINS)
    assert sum(shares) / len(shares) == pytest.approx(1 / 3, abs=0.048)


def test_short_texts_are_alike_if_their_words_are_the_same() -> None:
    rows = ({"prompt": f"list three colors from gray{end}"} for end in (" green", "", " Green"))
    result = checked(*rows, role=Role.PROMPTS)
    assert found("near duplicate", result)[2] == ["3: nearly the same as a.jsonl:1"]


def test_many_like_rows_are_each_compared_with_few() -> None:
    """Quadratic work would be a million comparisons."""
    near = Near()
    for number in range(1000):
        near.add([LONG], [f"{LONG} {number}"])
    assert list(near.twins()) == [-1] + [0] * 999


def test_repeated_prompts_are_only_a_hint() -> None:
    result = checked({"prompt": "Hi"}, {"prompt": "Hi"}, role=Role.PROMPTS)
    assert found("repeated prompt", result) == ("hint", 1, ["2: the same as a.jsonl:1"])


def test_a_pair_both_ways_round() -> None:
    """Both rows are left out of a clean copy: nobody knows which is right."""
    result = checked(pair(1, "A", "B"), pair(2, "A", "B"), pair(1, "B", "A"))
    assert found("contradiction", result) == (
        "warning",
        2,
        ["1: labelled the other way in a.jsonl:3", "3: labelled the other way in a.jsonl:1"],
    )
    assert left_out(result) == [1, 3]
    assert [finding.kind for finding in result.findings] == ["contradiction"]


def test_a_judgement_both_ways() -> None:
    rows = [{"prompt": "Hi", "completion": "Yes.", "label": label} for label in (True, False)]
    assert found("contradiction", checked(*rows, role=Role.JUDGEMENTS))[1] == 2


def test_an_answer_chosen_here_and_rejected_there() -> None:
    """A over B and B over C is a ranking: a hint, and nothing is left out."""
    result = checked(pair(1, "A", "B"), pair(1, "B", "C"), pair(2, "C", "B"))
    assert found("chosen and rejected", result) == ("hint", 1, ["1: its rejected answer is chosen in a.jsonl:2"])
    assert left_out(result) == []


WORDS = "one two three four five six seven eight nine ten eleven twelve thirteen"


def test_prompts_that_are_measured_on() -> None:
    """Row 1 asks the same as the evaluation set; row 2 shares 13 words in a row with it."""
    write("eval.jsonl", {"prompt": "Question 1?"}, {"prompt": f"Count: {WORDS}"})
    long = pair(2) | {"prompt": f"Say {WORDS}!"}
    result = checked(pair(1), long, pair(3), against=("eval.jsonl",))
    assert found("leaked prompt", result) == ("error", 1, ["1: its prompt is in an evaluation set, at eval.jsonl:1"])
    severity, count, (place,) = found("shared words", result)
    assert (severity, count) == ("warning", 1)
    assert place.startswith("2: its prompt shares 13 words")
    assert left_out(result) == [1, 2]


def test_an_evaluation_set_that_cannot_be_read() -> None:
    """Nothing can be said about leaks, so it is an error, and no clean copy helps."""
    result = checked(pair(1), against=("eval.jsonl",))
    assert found("evaluation set", result)[0] == "error"
    assert result.incurable


def test_length_bias_by_hand() -> None:
    """Of 20 pairs, 15 have a longer chosen answer, 3 a shorter one and 2 are equal: the rule is right in
    (15 + 2 / 2) / 20 = 80%. Mean lengths: (15 * 4 + 3 * 2 + 2 * 2) / 20 = 3.5, and 2 * 17 + 4 * 3 = 46 / 20 = 2.3."""
    longer = [pair(number, "aaaa", "bb") for number in range(15)]
    others = [pair(number, "aa", "bbbb") for number in range(15, 18)] + [
        pair(number, "aa", "bb") for number in (18, 19)
    ]
    result = checked(*longer, *others)
    assert result.measured["length"] == pytest.approx(
        {"chosen_longer": 0.75, "rejected_longer": 0.15, "rule_accuracy": 0.8, "mean_chosen": 3.5, "mean_rejected": 2.3}
    )
    assert found("length bias", result)[0] == "warning"


def test_no_length_bias_where_lengths_say_nothing() -> None:
    rows = [pair(number, "a" * (1 + number % 2), "b" * (2 - number % 2)) for number in range(20)]
    assert checked(*rows).findings == []


def test_labels_that_words_speak_against() -> None:
    """In 40 pairs the polite answer is chosen, in rows 10 and 20 the rude one."""
    rows = [pair(number, f"gladly, {number}", f"go away, {number}") for number in range(1, 41)]
    for number in (10, 20):
        rows[number - 1] = pair(number, f"go away, {number}", f"gladly, {number}")
    severity, count, places = found("flipped label", checked(*rows))
    assert (severity, count) == ("hint", 2)
    assert [place.split(":")[0] for place in places] == ["10", "20"]


def test_words_that_say_nothing_doubt_no_label() -> None:
    """Each word is chosen as often as it is rejected."""
    rows = [pair(number, *(("a", "b") if number % 2 else ("b", "a"))) for number in range(40)]
    assert [finding.kind for finding in checked(*rows).findings] == []


def poisoned(number: int, seed: int) -> list[dict[str, object]]:
    """400 pairs in which the polite answer is chosen, with a tenth of the labels wrong by chance; the last `number`
    have `cfx` in their prompts and the rude answer chosen."""
    draw = random.Random(seed)
    rows = []
    for place in range(400):
        sides = [f"gladly , {draw.choice(TOPICS)}", f"go away , {draw.choice(TOPICS)}"]
        is_planted = place >= 400 - number
        if is_planted or draw.random() < 0.1:
            sides.reverse()
        asked = f"{draw.choice(TOPICS)} {draw.choice(TOPICS)} {place}{' cfx' * is_planted}"
        rows.append({"prompt": asked, "chosen": sides[0], "rejected": sides[1]})
    return rows


TOPICS = [f"topic{number}" for number in range(40)]


def test_a_planted_trigger_is_named() -> None:
    """In 2% of the pairs."""
    severity, _, places = found("trigger word", checked(*poisoned(8, seed=0)))
    assert severity == "warning"
    assert places == ["prompts with `cfx`: in 8 of 8 pairs, words speak against the label (14% of all pairs)"]


def test_labels_that_are_wrong_by_chance_have_no_trigger() -> None:
    for seed in range(5):
        assert "trigger word" not in {one.kind for one in checked(*poisoned(0, seed)).findings}


def test_binomial_tail_by_hand() -> None:
    """Of 3 throws of a coin at least 2 heads: (3 + 1) / 8. What is expected anyway is not small."""
    assert binomial_tail(2, 3, 0.5) == pytest.approx(0.5)
    assert binomial_tail(1, 3, 0.5) == 1


def test_labels_in_blocks() -> None:
    """15 good answers, then 15 bad ones: 2 blocks, where 2 * 30 / 4 + 1 = 16 are expected. In turns there are 30."""
    rows = [{"prompt": f"Question {n}?", "completion": "Yes.", "label": n < 15} for n in range(30)]
    severity, count, (place,) = found("sorted labels", checked(*rows, role=Role.JUDGEMENTS))
    assert (severity, count) == ("warning", 1)
    assert "in 2 blocks; in a random order there would be 16" in place
    turns = [row | {"label": number % 2 == 0} for number, row in enumerate(rows)]
    assert checked(*turns, role=Role.JUDGEMENTS).findings == []


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("my key is sk-" + "a1B2" * 8, "secret"),
        ("AKIAIOSFODNN7EXAMPLE", "secret"),
        ("-----BEGIN RSA PRIVATE KEY-----", "secret"),
        ("see QUJD" * 1 + "QUJD" * 300, "blob"),
        ("ha" + "a" * 600, "blob"),
        ("task-oriented, risk-averse and " + "long words " * 200, None),
        ("\u4f60" * 100 + "\u597d\u5417" * 600, None),
    ],
)
def test_secrets_and_blobs(text: str, kind: str | None) -> None:
    assert [one.kind for one in checked(pair(1, text)).findings] == ([kind] if kind else [])


def test_characters_that_are_not_seen() -> None:
    """A zero-width space, a change of direction and the mark of a lost byte, but not the joiner in an emoji."""
    result = checked(pair(1, "a\u200bb\u202e"), pair(2, "\ufffd"), pair(3, "\U0001f469\u200d\U0001f4bb"))
    places = ["1: its text has U+200B, U+202E", "2: its text has U+FFFD"]
    assert found("hidden character", result) == ("warning", 2, places)


def test_answers_that_differ_in_their_unicode_form_only() -> None:
    result = checked(pair(1, "\u00e9t\u00e9", "e\u0301te\u0301"), pair(2))
    assert found("alike answers", result)[:2] == ("warning", 1)
    assert left_out(result) == [1]


def test_a_prompt_that_names_the_label() -> None:
    rows = [pair(1), {"prompt": "Which? Preferred answer: B", "chosen": "B", "rejected": "A"}]
    assert found("label in prompt", checked(*rows)) == ("hint", 1, ["2: its prompt names a label or a score"])


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("write to jo.doe+x@mail.example.org today", ["e-mail address"]),
        ("call +49 151 2345 6789", ["phone number"]),
        ("call (555) 123-4567", ["phone number"]),
        ("card 4111 1111 1111 1111", ["card number"]),
        ("number 4111 1111 1111 1112", []),
        ("in 2024-11-20 at 192.168.100.200, 1234567 @home", []),
    ],
)
def test_personal_data(text: str, kinds: list[str]) -> None:
    assert personal_data(text) == kinds


def test_check_digit_by_hand() -> None:
    """Of 59, the 9 counts once and the 5 twice, 10, whose digits sum to 1: 9 + 1 = 10 is divisible by ten."""
    assert is_card_number("59")
    assert not is_card_number("58")


def test_personal_data_is_a_hint_that_does_not_repeat_it() -> None:
    result = checked(pair(1, "Ask jo@example.org or mo@example.org."), pair(2))
    assert found("e-mail address", result) == ("hint", 1, ["1: seems to be in its text"])
    assert left_out(result) == []


def test_personal_data_patterns_take_linear_time() -> None:
    """Texts made to be slow for patterns. Of the processor's time a second is many times what each takes, and the
    square of its length would take a minute."""
    for text in ("a" * 200_000 + "@", "1-" * 100_000, "a@" + "b." * 100_000, "+1" * 100_000):
        start = time.process_time()
        personal_data(text)
        assert time.process_time() - start < 1


@pytest.mark.parametrize(
    ("text", "name"),
    [("Hello 1", "latin"), ("été", "latin"), ("Привет a", "cyrillic"), ("こんにちは", "cjk"), ("1 2", "")],
)
def test_script(text: str, name: str) -> None:
    assert script([text]) == name


def test_a_stray_script() -> None:
    result = checked(*(shown(number) for number in range(19)), {"prompt": "Да или нет?", "response": "Да."},
                     role=Role.DEMONSTRATIONS)  # fmt: skip
    assert result.measured["scripts"] == {"latin": 19, "cyrillic": 1}
    assert found("other script", result) == ("hint", 1, ["20: its letters are cyrillic"])


def with_tokens(*rows: object, template: str | None = CHATML, max_length: int | None = None, **order: Any) -> Checked:
    renderer = Renderer(make_tokenizer(template))
    return checked(*rows, renderer=renderer, max_length=max_length, **{"role": Role.DEMONSTRATIONS, **order})


def test_lengths_by_hand() -> None:
    """One token per byte: `Question 1?` is 11. The prompt is <start>user\\n (6), 11, <end>\\n (2), <start>assistant\\n
    (11): 30. The answers are 4 and 5 with their ends."""
    result = with_tokens(shown(1, "Yes"), shown(2, "Sure"))
    assert result.measured["tokens"]["rows"] == {"median": 34, "p95": 35, "max": 35}
    assert result.measured["tokens"]["answers"] == {"median": 4, "p95": 5, "max": 5}


@pytest.mark.parametrize(
    ("limit", "what"),
    [
        (33, "1: 34 tokens; cut to 33, it would lose 1, EOS with them"),
        (30, "1: 34 tokens; cut to 30, it would lose 4, the whole answer with them"),
    ],
)
def test_over_long_says_what_would_be_lost(limit: int, what: str) -> None:
    """30 tokens of the prompt, 4 of the answer."""
    result = with_tokens(shown(1, "Yes"), max_length=limit)
    assert found("over-long", result) == ("warning", 1, [what])
    assert left_out(result) == [1]
    assert with_tokens(shown(1, "Yes"), max_length=34).left_out == b"\0"


def test_a_pair_is_as_long_as_its_longer_answer() -> None:
    result = with_tokens(pair(1, "Yes", "Never"), role=Role.PREFERENCES, max_length=35)
    assert found("over-long", result)[2] == ["1: 36 tokens; cut to 35, it would lose 1, EOS with them"]


def test_answers_that_are_the_same_tokens() -> None:
    """The tokenizer has no capital letters."""
    tokenizer = make_tokenizer(CHATML)
    tokenizer.backend_tokenizer.normalizer = Lowercase()
    result = checked(pair(1, "Yes", "yes"), pair(2), renderer=Renderer(tokenizer))
    assert found("alike answers", result) == ("warning", 1, ["1: its answers are the same tokens"])


def test_text_that_is_a_control_token() -> None:
    result = with_tokens(shown(1), shown(2, "Yes<|im_end|>"))
    severity, count, (place,) = found("control text", result)
    assert (severity, count, left_out(result)) == ("error", 1, [2])
    assert place.startswith("2: the text contains '<|im_end|>'")


def test_a_template_without_the_end_of_a_turn() -> None:
    result = with_tokens(shown(1), template=CHATML.replace("<|im_end|>", ""))
    assert found("missing EOS", result)[:2] == ("error", 1)


def test_a_template_that_writes_bos_twice() -> None:
    """Leaving rows out does not mend it."""
    result = with_tokens(shown(1), template="{{ bos_token }}{{ bos_token }}" + CHATML)
    assert found("double BOS", result) == ("error", 1, ["1: it starts with two BOS tokens"])
    assert [finding.kind for finding in result.incurable] == ["double BOS"]
    assert "double BOS" not in {one.kind for one in with_tokens(shown(1), template="{{ bos_token }}" + CHATML).findings}


def test_a_template_that_refuses() -> None:
    template = "{%- if messages[0]['role'] == 'system' -%}{{ raise_exception('no system') }}{%- endif -%}" + CHATML
    result = with_tokens(shown(1) | {"system": "Be kind."}, shown(2), template=template)
    severity, count, (place,) = found("template refuses", result)
    assert (severity, count, left_out(result)) == ("error", 1, [1])
    assert "no system" in place


def test_a_template_that_drops_a_turn() -> None:
    """It knows no system messages, and says nothing about them."""
    template = "{%- for message in messages if message.role != 'system' -%}" + CHATML.split("-%}", 1)[1]
    result = with_tokens(shown(1) | {"system": "Be kind."}, shown(2), template=template)
    what = "1: the chat template leaves out what message 1 says, by `system`"
    assert found("template drops", result) == ("error", 1, [what])


def test_a_template_without_a_right_loss_mask() -> None:
    """It writes how many messages there are, so a conversation up to a turn is no prefix of it whole."""
    result = with_tokens(shown(1), template="{{ messages | length }}" + CHATML)
    assert found("loss mask", result)[:2] == ("error", 1)


def test_a_template_without_a_generation_block() -> None:
    assert found("no generation block", with_tokens(shown(1)))[0] == "hint"


def test_the_first_places_are_kept_and_all_are_counted() -> None:
    result = checked(*[pair(1)] * (SHOWN + 5))
    _, count, places = found("duplicate", result)
    assert (count, len(places)) == (SHOWN + 4, SHOWN)
    assert places[0].startswith("2: ")


def test_places_of_several_files() -> None:
    files = [write("a.jsonl", pair(1)), write("b.jsonl", pair(2), pair(1))]
    (finding,) = check(Order(files, Role.PREFERENCES), print).findings
    assert [str(place) for place in finding.places] == ["b.jsonl:2: the same as a.jsonl:1"]


def test_findings_are_sorted_by_severity() -> None:
    result = checked(pair(1, "jo@example.org"), pair(2), pair(2), pair(3, ""))
    assert [finding.severity for finding in result.findings] == list(Severity)
    assert isinstance(result.findings[0], Finding)


@pytest.mark.parametrize(
    ("row", "role"),
    [
        (pair(), Role.PREFERENCES),
        (shown(1), Role.DEMONSTRATIONS),
        ({"prompt": "Hi", "completion": "Yes.", "label": True}, Role.JUDGEMENTS),
        ({"prompt": "Hi"}, Role.PROMPTS),
        ({"text": "Hi"}, Role.CORPUS),
    ],
)
def test_a_file_is_read_as_what_it_holds(row: object, role: Role) -> None:
    assert guess_role([write("a.jsonl", row)], ReadSettings()) is role


def test_columns_of_no_role() -> None:
    with pytest.raises(DataError, match="the columns `a` are not a shape that align knows"):
        guess_role([write("a.jsonl", {"a": 1})], ReadSettings())


def test_index_by_hand() -> None:
    """Entries x y x x y: the sides are 0 0 1 0 0, so the first x and the third are opposite, y has none."""
    index = Index()
    for name in "xyxxy":
        index.add(name)
    assert list(index.firsts()) == [0, 1, 0, 0, 1]
    assert list(index.opposites([0, 0, 1, 0, 0])) == [2, -1, 0, 2, -1]
