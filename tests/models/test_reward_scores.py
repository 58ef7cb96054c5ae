"""Scores: pooled by length, whatever the padding is; normalised by an affine map that is saved with the model."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from align.models.handover import probe_values
from align.models.opened import open_reward
from align.models.reward import normalise, score_sequences
from align.models.roles import reward_role
from tests.models.tiny import probes


def test_normalised_scores_have_mean_0_and_std_1_on_the_same_samples(scorer):
    """RMn: after normalise(mean, std) the samples that gave mean and std score 0 on average, with spread 1, and the
    ranking is what it was."""
    samples = probes(scorer.renderer, 40)
    before = score_sequences(reward_role(scorer.model), samples, 0).detach()
    normalise(scorer.model, float(before.mean()), float(before.std(unbiased=False)))
    after = score_sequences(reward_role(scorer.model), samples, 0).detach()
    assert abs(float(after.mean())) < 0.02
    assert abs(float(after.std(unbiased=False)) - 1) < 0.02
    assert torch.equal(before.argsort(), after.argsort())


def test_normalising_twice_is_normalising_once_with_both(scorer):
    """((r - 3) / 2 - 1) / 4 on the head and the offset that are there already: worked numbers."""
    ids = probes(scorer.renderer, 1)
    raw = float(score_sequences(reward_role(scorer.model), ids, 0).detach())
    normalise(scorer.model, 3.0, 2.0)
    normalise(scorer.model, 1.0, 4.0)
    score = float(score_sequences(reward_role(scorer.model), ids, 0).detach())
    assert score == pytest.approx(((raw - 3) / 2 - 1) / 4, abs=1e-5)


def test_pad_id_cannot_change_a_score(scorer):
    """RMp: PAD flipped to EOS, or to any other id, gives bit-identical scores: the position read comes from the
    length and padding is never attended to."""
    sequences = probes(scorer.renderer, 6)
    assert len({len(sequence) for sequence in sequences}) > 1
    scores = score_sequences(reward_role(scorer.model), sequences, scorer.renderer.pad_id)
    for pad_id in (scorer.tokenizer.eos_token_id, 7, 255):
        assert torch.equal(scores, score_sequences(reward_role(scorer.model), sequences, pad_id))


def test_width_of_the_batch_cannot_change_a_score(scorer):
    """The same sequence alone, or padded to the longest of a batch: equal to rounding."""
    sequences = probes(scorer.renderer, 6)
    together = score_sequences(reward_role(scorer.model), sequences, scorer.renderer.pad_id)
    for sequence, score in zip(sequences, together, strict=True):
        alone = score_sequences(reward_role(scorer.model), [sequence], scorer.renderer.pad_id)
        torch.testing.assert_close(alone[0], score, rtol=0, atol=1e-5)


def test_score_at_a_token_knows_nothing_of_what_follows(scorer):
    """Prefix invariance: the score of a prefix is what the whole sequence's hidden state at that token gives."""
    sequence = probes(scorer.renderer, 1)[0]
    changed = [*sequence[:10], *reversed(sequence[10:])]
    hidden = [scorer.model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, 9] for ids in (sequence, changed)]
    torch.testing.assert_close(hidden[0], hidden[1], rtol=0, atol=1e-6)
    score = scorer.model.score(hidden[0]) + scorer.model.config.reward_offset
    torch.testing.assert_close(score, score_sequences(reward_role(scorer.model), [sequence[:10]], 0), rtol=0, atol=1e-5)


def test_left_padding_gives_the_librarys_scores(scorer):
    """The pad side: the library, fed the same rows padded on the left with position ids, agrees with ours, offset
    apart."""
    sequences = probes(scorer.renderer, 4)
    width, pad = max(map(len, sequences)), scorer.renderer.pad_id
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in sequences])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in sequences])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    library = scorer.model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, 0]
    ours = score_sequences(reward_role(scorer.model), sequences, pad)
    torch.testing.assert_close(library + scorer.model.config.reward_offset, ours, rtol=0, atol=1e-5)


def test_a_bf16_head_does_not_make_scores_tie(scorer):
    """Scores are float32 whatever the weights are: in bf16 numbers around 1 are 0.008 apart."""
    model = scorer.model.to(torch.bfloat16)
    scores = score_sequences(reward_role(model), probes(scorer.renderer, 8), 0)
    assert scores.dtype is torch.float32
    assert not torch.equal(scores, scores.to(torch.bfloat16).float())


def test_saved_reward_is_a_plain_folder_and_differs_by_the_offset(reward, scorer):
    """`AutoModelForSequenceClassification`, knowing nothing of align, plus config.reward_offset gives our scores."""
    plain = AutoModelForSequenceClassification.from_pretrained(reward.path)
    sequences = probes(scorer.renderer, 4)
    logits = torch.stack([plain(input_ids=torch.tensor([ids])).logits[0, 0] for ids in sequences])
    assert plain.config.reward_offset == -0.75
    ours = score_sequences(reward_role(scorer.model), sequences, scorer.renderer.pad_id)
    torch.testing.assert_close(logits + plain.config.reward_offset, ours, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        torch.tensor(probe_values(plain.eval(), sequences, is_reward=True)), ours, rtol=0, atol=1e-5
    )


def test_offset_travels(reward):
    """Loading with align keeps the offset."""
    assert open_reward(reward, "auto").model.config.reward_offset == -0.75
