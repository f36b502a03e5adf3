"""Starting and watching TorchServe on one machine: `python -m server`.

Knows the archives only by their manifests; imports nothing of handlers, archiver, training or client, and never torch.
"""
