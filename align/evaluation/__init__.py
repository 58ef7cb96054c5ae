"""Measuring what was trained: gold scores, KL, EOS rate, reward-model accuracy, each with an interval."""
