"""Text and images for calibration, training and evaluation, as LightningDataModules."""
