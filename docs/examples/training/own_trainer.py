"""A trainer of your own: the student and the teacher see every image with a little noise."""

import torch

from mdistiller import BaseTrainer, trainer_dict


@trainer_dict.register("noisy")
class NoisyTrainer(BaseTrainer):
    def batch_inputs(self, data, epoch):  # the distiller's keyword arguments for a batch
        inputs = super().batch_inputs(data, epoch)
        inputs["image"] = inputs["image"] + 0.1 * torch.randn_like(inputs["image"])
        return inputs
