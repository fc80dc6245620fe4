"""The mathematics of one-shot pruning, as pure functions of tensors. A method of your own is built on these classes."""

from wanda_lightning.core.allocation import (
    OWL as OWL,
    Allocation as Allocation,
    DenseLayer as DenseLayer,
    Fisher as Fisher,
    PerLayer as PerLayer,
    Uniform as Uniform,
    match_target as match_target,
)
from wanda_lightning.core.criteria import (
    RIA as RIA,
    Criterion as Criterion,
    Magnitude as Magnitude,
    Saliency as Saliency,
    Wanda as Wanda,
)
from wanda_lightning.core.patterns import (
    NM as NM,
    EqualShare as EqualShare,
    Experts as Experts,
    Pattern as Pattern,
    Structured as Structured,
    Unstructured as Unstructured,
)
from wanda_lightning.core.selection import Selection as Selection
from wanda_lightning.core.solvers import (
    ADMM as ADMM,
    Refit as Refit,
    Solver as Solver,
    SparseGPT as SparseGPT,
    ZeroOut as ZeroOut,
)
from wanda_lightning.core.statistics import InputStatistics as InputStatistics
