"""What a trainer, an evaluator and an exporter know of a network: init, loss, score, generate."""
