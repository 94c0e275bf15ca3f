"""Raw corpora -> seqio tasks -> batches on the mesh; knows nothing of models."""
