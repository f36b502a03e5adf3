"""The content of an archive, and the engines that run its network."""
