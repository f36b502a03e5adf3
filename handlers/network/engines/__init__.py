"""Engines that run a network: torch always, a faster one if it is available."""
