"""Take hidden units that are zero on both sides out of a model, and save what is left as an ordinary smaller model."""

from wanda_lightning.shrinking.configuration import fit_configuration, write_modeling_file
from wanda_lightning.shrinking.take_out import Shrunk, example_batch, shrink, shrunk

__all__ = [
    "Shrunk",
    "example_batch",
    "fit_configuration",
    "shrink",
    "shrunk",
    "write_modeling_file",
]
