"""Run `shrink`: take out hidden units that are zero, without pruning."""

from wanda_lightning.cli.model_and_data import load
from wanda_lightning.cli.options import Folder, Model
from wanda_lightning.cli.printing import print_line
from wanda_lightning.streaming import shrink_from_disk
from wanda_lightning.units.shrink import shrink as shrink_in_memory


def shrink(model: Model, results: Folder) -> None:
    """Shrink a model and save it; without a folder, say what could be taken out."""
    folder = results.save_model
    if folder is None:
        removable = shrink_in_memory(load(model, model.model).model)
        print_line(str(removable))
        if removable.layers:
            print_line("Nothing was saved. To save the smaller model, add --save_model DIR.")
        else:
            print_line("Prune with --pattern structured first.")
        return

    if results.stream:
        hub = model.source(model.model).hub
        shrunk = shrink_from_disk(model.model, folder, results.overwrite, dtype=model.dtype, **hub)
    else:
        module = load(model, model.model)
        shrunk = module.save_pretrained(folder, results.overwrite, shrink=True)
    print_line(f"{shrunk}\nThe model is in {folder}.")
