"""What a person sees: charts of a run and the pictures that a saved notebook keeps."""
