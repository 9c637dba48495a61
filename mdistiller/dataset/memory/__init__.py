"""Loaders and augmentation of images held on the device, in whole batches."""
