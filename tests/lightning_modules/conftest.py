"""A tiny embedding model."""

from support.embedding import tiny as tiny, tiny_folder as tiny_folder
