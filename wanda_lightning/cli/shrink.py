"""`wanda-lightning shrink`: take out the hidden units that are zero, and save what is left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wanda_lightning.cli.common_options import TIMM
from wanda_lightning.cli.measure import push, save_model
from wanda_lightning.cli.options import ShrinkOptions
from wanda_lightning.cli.output import print_line
from wanda_lightning.hub.upload import list_files
from wanda_lightning.modules import CausalLMModule, ImageClassifierModule
from wanda_lightning.shrinking import shrink
from wanda_lightning.streaming import shrink_from_disk


def run(options: ShrinkOptions) -> None:
    """Shrink a model and save it; without a folder, say what could be taken out."""
    if options.stream:
        assert options.save_model is not None
        where: dict[str, Any] = options.source(options.model).hub
        dtype = options.dtype or "auto"
        print_line(str(shrink_from_disk(options.model, options.save_model, options.overwrite, dtype=dtype, **where)))
        push(Path(options.save_model), list_files(options.save_model), options)
        return
    module: Any
    if options.model.startswith(TIMM):
        module = ImageClassifierModule(options.model)
    else:
        source = options.source(options.model)
        module = CausalLMModule(source.name, dtype=options.dtype or "auto", **source.hub)
    if options.save_model is None:
        print_line(str(shrink(module.model)))
        print_line("Nothing was saved. To save the smaller model, add --save_model DIR.")
        return
    folder = save_model(module, options.save_model, options.overwrite, shrink=True)
    push(folder, list_files(folder) if folder else [], options)
