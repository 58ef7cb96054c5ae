"""Models: loading with every check, saving as plain Hugging Face folders, adapters, reward heads, hand-over."""
