"""From text to what a model is asked: seqio preprocessors, one file per kind of objective."""
