"""Run calibration batches through a model, and measure what enters its layers."""
