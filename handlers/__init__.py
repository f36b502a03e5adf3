"""What travels in the archive: everything between the host's call and its reply.

An archive holds this package beside `convscope_entry.py` (a copy of `entry.py`) and imports nothing else of ours.
"""
