"""One verb of the command line each, about one screen."""
