"""Reference models: each is built of bigops' ops, or of torch's own layers with `plain=True`.

Both forms have the same parameter names and, from the same seed, the same initial values, so a
state dict of one loads into the other and the two can be trained side by side.
"""

from bigops.models.cnn import CNN
from bigops.models.resnet import ResNet18, ResNet50
from bigops.models.transformer import Transformer

__all__ = ["CNN", "ResNet18", "ResNet50", "Transformer"]
