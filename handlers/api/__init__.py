"""What a caller may ask, and what goes wrong: requests, options, limits, errors, the model card."""
