"""Starts and watches TorchServe on one machine: `python -m server`. The second host is in `kserve/`.

Reads only the manifests of archives. Imports nothing of archiver, training and client, and never torch; of the handlers
`kserve/` alone imports the contract.
"""
