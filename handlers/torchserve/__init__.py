"""Departures from TorchServe's public interface inside a worker, all in one place.

Each one checks the exact version that it was written for, is named in a line of the worker's log and in the metric
`convscope_patch_active`, and is off with `CONVSCOPE_PATCHES=0` (the launcher's `--no-patches`). The worker serves
without any of them.
"""
