"""What a stage will need, from its settings and the shapes of its models: memory by part, disk, steps, tokens."""
