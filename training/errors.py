"""Errors of a training run, for people at a command line.

TrainingError
├── DataError         the pictures cannot be used
└── CheckpointError   a checkpoint cannot be read, or not continued like this
"""

from __future__ import annotations


class TrainingError(Exception):
    """The run cannot be started or go on; the message says why and what to do."""


class DataError(TrainingError):
    """The pictures are missing, unreadable, or not what the network takes."""


class CheckpointError(TrainingError):
    """The checkpoint is missing, damaged, or belongs to another run."""
