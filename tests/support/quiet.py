"""`prune` as most tests call it: without a progress bar."""

from functools import partial

import wanda_lightning

prune = partial(wanda_lightning.prune, progress=False)
