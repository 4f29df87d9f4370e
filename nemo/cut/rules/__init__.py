"""The rules: how each kind of op is cut. Importing this registers them.

A file of your own may add one, see `rule`:

    @rule(torch.ops.mylib.shrink.default)
    class Shrink(Pointwise):
        '''Element by element.'''
"""

from nemo.cut.rules import along, attention, linear, lookup, moves, norms, pointwise, recurrent  # noqa: F401
from nemo.cut.rules.along import Along
from nemo.cut.rules.base import OneInput, Rule, rule, rule_of
from nemo.cut.rules.pointwise import Pointwise

__all__ = ["Along", "OneInput", "Pointwise", "Rule", "rule", "rule_of"]
