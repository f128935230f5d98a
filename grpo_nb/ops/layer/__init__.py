"""Operations inside a layer, and the switch that puts them into a model."""
