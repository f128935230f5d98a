"""Operations: the naive line, the kernel and the autograd function side by side."""
