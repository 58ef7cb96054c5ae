"""Sampling responses: one small interface, several engines. Token ids in, token ids out."""
