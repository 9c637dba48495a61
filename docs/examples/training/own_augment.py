"""An augmentation of your own: the library's crop, with half of the images as negatives."""

import torch

from mdistiller.dataset import AUGMENTS, Crop


@AUGMENTS.register("crop_negative")
class CropNegative(Crop):
    def __init__(self, size):
        super().__init__(size)
        self.num_views *= 2  # of an image: the teacher cache enumerates them

    def draw(self, num, generator):  # the parameters of all images of an epoch
        negative = torch.randint(2, (num, 1), generator=generator)
        return torch.cat([super().draw(num, generator), negative], dim=1)

    def views(self, parameters):  # a number below num_views for each
        return 2 * super().views(parameters) + parameters[:, 2]

    def apply(self, store, parameters, index):  # index: of the batch
        crops, negative = super().apply(store, parameters, index), parameters[index, 2]
        return torch.where(negative[:, None, None, None] == 1, 255 - crops, crops)
