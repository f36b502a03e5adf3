"""A network in a folder of several files."""
