"""The pipeline: graph, fingerprints, plan, runner, lineage. Torch-free: a stage is loaded by name in its own process."""
