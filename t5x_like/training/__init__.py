"""From a model and batches to a trained state: losses, optimisers, the step, the loop and what it reports."""
