"""What the trainers share: masked statistics and log-probabilities."""
