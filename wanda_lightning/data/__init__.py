"""Text and images for calibration_mode, training and measuring, as LightningDataModules."""

from wanda_lightning.data.images import ImageDataModule
from wanda_lightning.data.text import TextDataModule

__all__ = ["ImageDataModule", "TextDataModule"]
