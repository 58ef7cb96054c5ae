"""The recipe: one YAML that is complete. What is not in it is a default in a typed settings class."""
