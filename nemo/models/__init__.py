"""The paper's six models (its section 5.1), and any timm model, from one registry.

model = build_model("vgg16", num_classes=10, image_size=32, shape=CnnShape(width=0.25))
"""

from nemo.models.registry import MODELS, build_model, family_named, family_of, model
from nemo.models.shapes import CnnShape, DeitShape, TimmShape, VitShape

__all__ = [
    "MODELS",
    "CnnShape",
    "DeitShape",
    "TimmShape",
    "VitShape",
    "build_model",
    "family_named",
    "family_of",
    "model",
]
