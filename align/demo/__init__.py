"""The embedded demo: a small synthetic language of instructions with a known gold reward, made by this generator."""
