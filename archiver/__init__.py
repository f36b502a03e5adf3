"""Archives of networks: made from a checkpoint or from a network of any origin, checked, and refreshed."""
