"""Decompose a masked model into a smaller one that computes the same logits (ours).

The paper (arXiv 2508.11348, section 4.4) cuts modules by one hand-written procedure per
architecture. Here one algorithm works on the traced graph of any model under its masks, in phases:
`trace` and `normal` give a graph of few ops, `passes` edit it, `facts` finds what is constant and
what is needed, `plan` chooses the indices to keep, `rewrite` writes the module. What each kind of
op asks for is its rule in `rules`. `nemo.proof` then compares the module with the masked model.
"""

from nemo.cut.decomposer import decompose
from nemo.cut.to_size import shrink
from nemo.module.check import ExactnessError
from nemo.module.decomposed import DecomposedModule

__all__ = ["DecomposedModule", "ExactnessError", "decompose", "shrink"]
