"""The page and the figures of a callback: written by the first process, and refused before anything is pruned."""

import pytest
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from support.callbacks import Net, loader, same, trainer
from support.reports import Page

pytest.importorskip("matplotlib", reason="figures need the extra report")

from wanda_lightning import PruningCallback, WandaPrune
from wanda_lightning.report.figures import plots_of


class ImageLogger(Logger):
    """A logger with the method of `WandbLogger`."""

    name, version = "images", 0

    def __init__(self):
        self.images = {}

    def log_metrics(self, metrics, step=None):
        assert metrics

    def log_hyperparams(self, params, *args, **kwargs):
        pass

    def log_image(self, key, images, step=None, **kwargs):
        self.images[key] = (*images, step)


class Board(ImageLogger, TensorBoardLogger):
    """A logger with the experiment of `TensorBoardLogger`."""

    log_image, log_dir, _log_graph = None, "", False
    experiment = property(lambda self: self)

    def save(self):
        pass

    finalize = Logger.finalize

    def add_figure(self, key, figure, step):
        self.images[key] = (figure, step)


def test_a_page_is_written_when_the_callback_prunes(tmp_path):
    callback = PruningCallback(0.5, report=tmp_path / "out/report.html", num_samples=12, method="sparsegpt")
    trainer(callback, max_steps=1).fit(Net(), loader(), loader())
    page = Page(tmp_path / "out/report.html")
    assert page.open == []
    assert all(layer.name in page.text for layer in callback.report.layers)


@pytest.mark.parametrize("kind", [ImageLogger, Board])
def test_loggers_that_take_images_get_the_figures(tmp_path, kind):
    logger = kind()
    callback = PruningCallback(0.5, report=tmp_path / "report.png", num_samples=12, at_step=2, method="sparsegpt")
    run = trainer(callback, max_steps=3, logger=[logger, CSVLogger(tmp_path)])
    run.fit(Net(), loader(), loader())
    titles = {f"pruning/{plot.name}": plot.title for plot in plots_of(callback.report)}
    shown = {name: figure.subfigs[0].get_suptitle() for name, (figure, _) in logger.images.items()}
    assert shown == titles
    assert {step for _, step in logger.images.values()} == {2}
    assert (tmp_path / "report.png").read_bytes()[:4] == b"\x89PNG"


def test_without_a_report_no_figure_is_drawn(tmp_path):
    logger = ImageLogger()
    trainer(WandaPrune(0.5, num_samples=12), max_steps=1, logger=logger).fit(Net(), loader(), loader())
    assert logger.images == {}


@pytest.mark.parametrize(("option", "place"), [("report", "file/report.html"), ("report_dir", "file")])
def test_what_cannot_be_written_is_refused(tmp_path, option, place):
    (tmp_path / "file").write_text("mine")
    module = Net()
    with pytest.raises(OSError, match="file"):
        trainer(WandaPrune(num_samples=12, at_step=2, **{option: tmp_path / place}), max_steps=3).fit(module, loader())
    assert same(module, Net())
    assert (tmp_path / "file").read_text() == "mine"
