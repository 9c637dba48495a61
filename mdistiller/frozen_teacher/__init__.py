"""The frozen teacher: batch norms folded, operations fused, facts computed, logits stored."""
