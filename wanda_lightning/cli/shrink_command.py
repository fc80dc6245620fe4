"""Run `shrink` without `--units` and `--experts`: take out hidden units that are zero."""

from wanda_lightning.cli.model_and_data import load
from wanda_lightning.cli.options import Model, Results
from wanda_lightning.cli.printing import print_line
from wanda_lightning.common.errors import UserError
from wanda_lightning.streaming.shrinking_from_disk import take_out_from_disk
from wanda_lightning.units.zero_units import take_out_zero_units


def take_out_zeros(model: Model, results: Results) -> None:
    """Shrink a model and save it; without a folder, say what could be taken out."""
    folder = results.save_model
    if folder is not None and results.stream:
        source = model.source(model.model)
        print_line(str(take_out_from_disk(source, folder, results.overwrite, model.dtype)))
        print_line(f"The model is in {folder}.")
        return

    module = load(model, model.model)
    taken = take_out_zero_units(module.model, None)
    if folder is not None and not taken.layers:
        raise UserError(f"{taken} Give --units 0.5, for example.")
    print_line(str(taken))
    if not taken.layers:
        print_line("Nothing was saved. Give --units 0.5, for example.")
    elif folder is None:
        print_line("Nothing was saved. To save the smaller model, add --save_model DIR.")
    else:
        module.save_pretrained(folder, results.overwrite)
        print_line(f"The model is in {folder}.")
