"""What `prune` makes of its arguments before anything is measured."""

from support.zoo import run

from wanda_lightning.calibration.samples import Samples
from wanda_lightning.config import PruningConfig
from wanda_lightning.engine.plan import make_plan
from wanda_lightning.engine.run import Run, WeightStore
from wanda_lightning.parallel import SINGLE_PROCESS


def run_of(model, batches, processes=SINGLE_PROCESS, **choices):
    plan = make_plan(PruningConfig.from_names(**choices), model)
    samples = Samples(model, batches, lambda batch: run(model, batch), None, processes, "the test")
    return Run(plan, samples, WeightStore())
