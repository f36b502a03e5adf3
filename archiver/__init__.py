"""Makes archives from a checkpoint or a network of any origin, tests them, and refreshes them."""
