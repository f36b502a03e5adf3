"""Types of the arguments that the clients' methods take, for annotations."""

from __future__ import annotations

from convscope._pictures import Picture
from convscope._request import MapDtype, Method

__all__ = ["MapDtype", "Method", "Picture"]
