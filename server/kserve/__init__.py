"""The second host: the archives of the model store in KServe's model server, over the Open Inference Protocol.

The contract of `proto/` is answered too, at the same REST path and the same gRPC service as TorchServe's.
"""
