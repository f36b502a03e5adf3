"""Networks with scores of every kind, and inputs of every kind."""

from torch import nn


class Net(nn.Module):
    """Three convolutions and a linear head: pictures (N, channels, H, W) of any size to scores (N, outputs)."""

    def __init__(self, outputs=10, channels=3):
        super().__init__()
        layers, before = [], channels
        for after in (16, 32, 64):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
            before = after
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(before, outputs)

    def forward(self, images):
        """Run."""
        return self.head(self.pool(self.features(images)).flatten(1))


class Squeezed(Net):
    """One value a picture, (N,)."""

    def __init__(self):
        super().__init__(outputs=1)

    def forward(self, images):
        """Run."""
        return super().forward(images).squeeze(1)


class Named(Net):
    """A dict: scores beside an embedding."""

    def forward(self, images):
        """Run."""
        embedding = self.pool(self.features(images)).flatten(1)
        return {"embedding": embedding, "logits": self.head(embedding)}


class Numbered(Net):
    """A tuple: scores, then an embedding."""

    def forward(self, images):
        """Run."""
        embedding = self.pool(self.features(images)).flatten(1)
        return self.head(embedding), embedding


class Probabilities(Net):
    """Probabilities instead of logits, one a label."""

    def forward(self, images):
        """Run."""
        return super().forward(images).sigmoid()
