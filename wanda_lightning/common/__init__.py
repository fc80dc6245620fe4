"""Code for every part of the package: progress, files, names of models and layers, checks and words."""
