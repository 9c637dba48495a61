"""A method of your own: the student's embedding, mapped linearly, points where the teacher's does.

loss = WEIGHT * mean over the batch of (1 - cos(W e_student, e_teacher))
"""

import torch.nn.functional as F
from torch import nn

from mdistiller.distillers import DISTILLERS, Distiller, probe


@DISTILLERS.register("COSINE", config={"CE_WEIGHT": 1.0, "WEIGHT": 2.0})
class Cosine(Distiller):
    soft_labels = True  # reads neither the class nor the number of an image

    def __init__(self, student, teacher, cfg, image_size=None):
        super().__init__(student, teacher)
        self.ce_loss_weight = cfg.COSINE.CE_WEIGHT
        self.weight = cfg.COSINE.WEIGHT
        widths = [probe(net, image_size)["pooled_feat"][1] for net in (student, teacher)]
        self.embed = nn.Linear(*widths)  # trained, moved and saved with the student

    def distill(self, student, teacher, target, **batch):
        embedded = self.embed(student["pooled_feat"])
        cosine = F.cosine_similarity(embedded, teacher["pooled_feat"])
        self.metrics = {"cosine": cosine.mean().detach()}  # logged, never part of the loss
        return self.weight * (1 - cosine).mean()
