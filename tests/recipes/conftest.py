"""An empty working directory for every command, and small inputs."""

from support.cli import inputs as inputs, shell as shell
from support.data import few_digits as few_digits
from support.embedding import tiny_folder as tiny_folder
