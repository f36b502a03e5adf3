"""What an operator does to a deployment: `make secrets`, `make key`, `make update` and their kin.

They run on the host, which has Docker, make, openssl and Python 3.9 or newer, and no package beside it: only the
standard library is imported here.
"""
