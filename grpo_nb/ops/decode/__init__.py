"""Operations of sampling, one token a row."""
