"""Changes to code and to objects of other packages: checked first, applied whole, taken back whole."""
