"""`align submit`: files for an engine that runs jobs on other machines, and what the engine says of them."""
