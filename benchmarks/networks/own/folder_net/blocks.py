"""The blocks that `folder_net.net` is made of."""

from torch import nn


class Residual(nn.Module):
    """Two convolutions beside a shortcut; (N, C, h, w) in and out."""

    def __init__(self, channels):
        super().__init__()
        self.one, self.two = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, maps):
        """Run."""
        return self.relu(self.norm2(self.two(self.relu(self.norm1(self.one(maps))))) + maps)
