"""Names of the tensor shapes in this package; tests check them at run time.

In a `KeepMask`, True marks a weight that survives, and False one that becomes zero.
"""

from jaxtyping import Bool, Float, Int
from torch import Tensor

Weight = Float[Tensor, "d_out d_in"]
# One of several weights with the same inputs, which may differ in d_out.
OneWeight = Float[Tensor, "_ d_in"]
Score = Float[Tensor, "d_out d_in"]
KeepMask = Bool[Tensor, "d_out d_in"]
OneMask = Bool[Tensor, "_ d_in"]
Tokens = Float[Tensor, "tokens d_in"]
PerInput = Float[Tensor, " d_in"]
PerUnit = Float[Tensor, " units"]
Units = Bool[Tensor, " units"]  # some hidden units
PerRow = Int[Tensor, " d_out"]
RowWeights = Float[Tensor, " d_out"]
Gram = Float[Tensor, "d_in d_in"]
Solved = tuple[Weight, KeepMask]
OneSolved = tuple[OneWeight, OneMask]
Groups = Float[Tensor, "groups size"]
PerGroup = Float[Tensor, "groups 1"]
KeepGroups = Bool[Tensor, "groups size"]
Counts = Int[Tensor, " groups"]
