"""What all tests share."""

from hypothesis import settings
from jaxtyping import install_import_hook

install_import_hook("wanda_lightning.core", "beartype.beartype")  # before anything imports wanda_lightning

settings.register_profile("tests", deadline=None, derandomize=True, database=None, max_examples=50)
settings.load_profile("tests")
