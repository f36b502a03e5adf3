"""The contract with callers: requests, options, limits, errors, the model card."""
