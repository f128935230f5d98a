"""Operations over the vocabulary that never hold all of its logits."""
