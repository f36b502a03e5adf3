"""Networks whose answer is a picture or an embedding, and no scores: `--scores none`."""

import torch
from torch import nn


def block(before, after):
    """Two convolutions, each with batch normalisation and ReLU."""
    layers = []
    for channels in (before, after):
        layers += [nn.Conv2d(channels, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """A U-Net of three scales: pictures (N, 3, H, W) to the logits of a mask, (N, classes, H, W)."""

    def __init__(self, classes=4):
        super().__init__()
        self.down1, self.down2, self.bottom = block(3, 16), block(16, 32), block(32, 64)
        self.pool = nn.MaxPool2d(2)
        self.grow2, self.grow1 = nn.ConvTranspose2d(64, 32, 2, stride=2), nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.up2, self.up1 = block(64, 32), block(32, 16)
        self.head = nn.Conv2d(16, classes, 1)

    def forward(self, images):
        """Run."""
        one = self.down1(images)
        two = self.down2(self.pool(one))
        three = self.bottom(self.pool(two))
        two = self.up2(torch.cat([self.grow2(three), two], 1))
        one = self.up1(torch.cat([self.grow1(two), one], 1))
        return self.head(one)


class Autoencoder(nn.Module):
    """Pictures (N, 3, H, W) in 0..1 through a code (N, 16, H/8, W/8) back to pictures."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 16, 3, stride=2, padding=1),
            nn.ReLU(),
        )
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(16, 32, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(32, 16, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(16, 3, 4, stride=2, padding=1),
            nn.Sigmoid(),
        )

    def forward(self, images):
        """Run."""
        return self.decoder(self.encoder(images))


class Siamese(nn.Module):
    """Two pictures to how far they are from each other, (N,): an archive takes one picture, so use `Branch`."""

    def __init__(self, size=32):
        super().__init__()
        self.branch = nn.Sequential(block(3, 16), nn.MaxPool2d(2), block(16, size), nn.AdaptiveAvgPool2d(1))

    def forward(self, left, right):
        """Run."""
        return (self.branch(left) - self.branch(right)).flatten(1).norm(dim=1)


class Branch(nn.Module):
    """One side of a `Siamese`, under the names that its weights have: a picture to its embedding (N, size, 1, 1)."""

    def __init__(self, size=32):
        super().__init__()
        self.branch = Siamese(size).branch

    def forward(self, images):
        """Run."""
        return self.branch(images)
