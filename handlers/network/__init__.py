"""What an archive holds, and the engines that run its network."""
