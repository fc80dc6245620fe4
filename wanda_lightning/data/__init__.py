"""Text and images for calibration, training and evaluation, as LightningDataModules."""

from wanda_lightning.data.images import ImageDataModule
from wanda_lightning.data.text import TextDataModule

__all__ = ["ImageDataModule", "TextDataModule"]
