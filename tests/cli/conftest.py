"""An empty working directory for every command, and small inputs."""

from support.cli import (
    images as images,
    inputs as inputs,
    pruned as pruned,
    refused as refused,
    shell as shell,
    text as text,
)
