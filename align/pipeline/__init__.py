"""The pipeline: graph, fingerprints, plan, runner, lineage. Torch-free: stages load in their own process."""
