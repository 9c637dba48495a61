"""The frozen teacher: batch norms folded, operations fused, logits cached."""
