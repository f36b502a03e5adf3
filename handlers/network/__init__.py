"""What an archive holds: the network, its layers and their geometry, and the engines that run it."""
