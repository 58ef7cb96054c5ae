"""The command line. Importing a module registers its commands, in the order `align --help` lists them."""

# ruff: noqa: F401, I001
from align.cli import run, submit, generate, show, data, init, env
from align.cli.app import app, main

__all__ = ["app", "main"]
