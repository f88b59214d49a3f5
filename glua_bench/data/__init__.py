"""Read volumes, cache them and serve batches."""
