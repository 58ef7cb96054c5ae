"""align: one command from a base language model to an aligned one."""

__version__ = "0.1.0"
