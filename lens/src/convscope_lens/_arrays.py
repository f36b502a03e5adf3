"""Pictures that are arrays: .npy files, told from other picture files by their first bytes."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def load_npy(file: bytes) -> NDArray[Any] | None:
    """Return the array in a .npy file; None if the file is of another format.

    Args:
        file: Content of the file.

    Raises:
        ValueError: It is damaged, or holds Python objects.
    """
    if not file.startswith(np.lib.format.MAGIC_PREFIX):
        return None
    try:
        array: NDArray[Any] = np.load(io.BytesIO(file), allow_pickle=False)
    except (ValueError, MemoryError):
        raise
    except Exception as error:  # A malformed header can raise almost anything.
        raise ValueError(f"the .npy file is damaged: {error}") from error
    return array
