"""What every room uses: progress, files, names of models and layers, checks and words."""
