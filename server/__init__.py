"""Starting and watching TorchServe on one machine: `python -m server`. The second host is in `kserve/`.

Knows the archives only by their manifests; imports nothing of archiver, training or client, and never torch. Of
handlers only `kserve/` imports the contract.
"""
