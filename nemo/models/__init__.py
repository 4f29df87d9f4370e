"""The paper's six models (its section 5.1), and any timm model, from one registry.

model = build_model("vgg16", num_classes=10, image_size=32, shape=CnnShape(width=0.25))
"""

from nemo.models import cnn, vit
from nemo.models.registry import MODELS, build_model, family_of

__all__ = ["MODELS", "build_model", "cnn", "family_of", "vit"]
