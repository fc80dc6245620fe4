"""Names for the shapes that the whole package speaks of.

Polarity: in a `KeepMask`, True survives and False becomes zero.
"""

from jaxtyping import Bool, Float
from torch import Tensor

Weight = Float[Tensor, "d_out d_in"]
OneWeight = Float[Tensor, "_ d_in"]  # of several that differ in their rows
Score = Float[Tensor, "d_out d_in"]
KeepMask = Bool[Tensor, "d_out d_in"]
OneMask = Bool[Tensor, "_ d_in"]
Tokens = Float[Tensor, "tokens d_in"]
PerInput = Float[Tensor, " d_in"]
Gram = Float[Tensor, "d_in d_in"]
Groups = Float[Tensor, "groups size"]
KeepGroups = Bool[Tensor, "groups size"]

__all__ = ["Gram", "Groups", "KeepGroups", "KeepMask", "OneMask", "OneWeight", "PerInput", "Score", "Tokens", "Weight"]
