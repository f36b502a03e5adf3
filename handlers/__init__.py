"""The package inside an archive: everything between the host's call and its response.

An archive holds this package beside `convscope_entry.py` (a copy of `entry.py`) and imports nothing else of ours.
"""
