"""Training data: image sets on disk, how they are made, and batches that are a function of images seen."""
