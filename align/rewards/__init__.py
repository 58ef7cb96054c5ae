"""Rewards that are not a reward model: Python functions and HTTP endpoints; and how several make one."""
