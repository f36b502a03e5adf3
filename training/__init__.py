"""Training: from pictures to a checkpoint, and from a checkpoint to an archive."""
