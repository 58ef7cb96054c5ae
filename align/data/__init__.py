"""Data files to checked, canonical rows."""
