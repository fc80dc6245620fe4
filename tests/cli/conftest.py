"""An empty working directory for every command, and small inputs."""

from support.cli import images as images
from support.cli import inputs as inputs
from support.cli import pruned as pruned
from support.cli import refused as refused
from support.cli import shell as shell
from support.cli import text as text
