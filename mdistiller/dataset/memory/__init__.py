"""Images held on the device, and whole batches of them: loaders and augmentation."""
